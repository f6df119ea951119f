"""A sheet of samples: image, overlay and mask side by side."""

import io
from collections.abc import Sequence
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from diffumask_fast.dataset.reader import Row, read_manifest, read_rows
from diffumask_fast.dataset.schema import MANIFEST, PNG_LEVEL, PREVIEW
from diffumask_fast.dataset.storage import Place, check_own_place, place
from diffumask_fast.dataset.writer import write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import MAX_PIXELS, checked, whole
from diffumask_fast.own_files import SIGN
from diffumask_fast.prompts.vocabulary import palette_of
from diffumask_fast.show import colour, overlay

RED = "#b00020"
_GAP, _SEAM, _LINE = 10, 2, 17


def write_preview(
    folder: str | Place,
    limit: int = 24,
    side: int = 160,
    columns: int = 3,
    *,
    max_pixels: int = MAX_PIXELS,
    tag: str = "",
) -> Place:
    """Write `preview.png` into a dataset: its first rows, rejected ones with their reason in red.

    A picture that does not decode is shown as a red field.

    Args:
        folder: the dataset.
        limit: number of samples at most.
        side: longest side of each picture; pictures are made smaller, never larger.
        columns: samples beside each other.
        max_pixels: of a picture that is decoded.
        tag: as for `writer.temporary_path`.

    Returns:
        The sheet's path.

    Raises:
        DiffuMaskError: there are no rows, or the sheet cannot be written.
    """
    for name, value in (("limit", limit), ("side", side), ("columns", columns)):
        checked(name, value, whole(1))
    there = (place(folder) / MANIFEST).exists()
    palette = palette_of(read_manifest(folder)["classes"] if there else ())
    wanted = ["key", "image", "mask", "reason"]
    rows = read_rows(folder, accepted_only=False, columns=wanted, max_pixels=max_pixels)
    tiles = [_tile(row, side, palette) for row in islice(rows, limit)]
    if not tiles:
        raise DiffuMaskError(f"{folder} holds no sample to show: draw some first")
    path = place(folder) / PREVIEW
    write_png(path, sheet(tiles, columns), tag)
    return path


def sheet(tiles: list[Image.Image], columns: int) -> Image.Image:
    """Lay tiles out in rows of `columns`."""
    width, height = (max(tile.size[axis] for tile in tiles) + _GAP for axis in (0, 1))
    columns = min(columns, len(tiles))
    page = Image.new("RGB", (width * columns + _GAP, height * -(-len(tiles) // columns) + _GAP), "white")
    for number, piece in enumerate(tiles):
        page.paste(piece, (number % columns * width + _GAP, number // columns * height + _GAP))
    return page


def write_png(path: Place, picture: Image.Image, tag: str = "") -> None:
    """Write a picture, whole or not at all.

    Raises:
        DiffuMaskError: it cannot be written, or there is a file that we did not write.
    """
    check_own_place(path)
    stream, note = io.BytesIO(), PngInfo()
    note.add_text("Software", SIGN)
    picture.save(stream, "PNG", compress_level=PNG_LEVEL, pnginfo=note)
    write_file(path, stream.getvalue(), tag)


def tile(arrays: Sequence[np.ndarray], text: str, ink: str = "black", side: int = 160) -> Image.Image:
    """Lay pictures [H, W, 3] uint8 of one size beside each other, under a line of text.

    The first two, image and overlay, are made smaller smoothly; the others, coloured masks, by nearest pixels.
    """
    pictures = [Image.fromarray(pixels) for pixels in arrays]
    for slot, picture in enumerate(pictures):
        picture.thumbnail((side, side), Image.Resampling.BICUBIC if slot < 2 else Image.Resampling.NEAREST)
    width, height = pictures[0].size
    page = Image.new("RGB", (len(pictures) * (width + _SEAM) - _SEAM, height + _LINE), "white")
    for slot, picture in enumerate(pictures):
        page.paste(picture, (slot * (width + _SEAM), _LINE))
    ImageDraw.Draw(page).text((0, 0), text, ink, ImageFont.load_default(13))
    return page


def _tile(row: Row, side: int, palette: Sequence[int]) -> Image.Image:
    text, ink = (row.key, "black") if row.accepted else (f"{row.key}: {row.reason}", RED)
    try:
        shapes = row.image.shape[:2], row.mask.shape
    except DiffuMaskError as error:
        return tile([np.full((side, side, 3), (176, 0, 32), np.uint8)], f"{row.key}: {error}", RED, side)
    if shapes[0] != shapes[1]:
        return tile((row.image,), f"{row.key}: its mask has {shapes[1]} pixels, its image {shapes[0]}", RED, side)
    return tile((row.image, overlay(row.image, row.mask, palette=palette), colour(row.mask, palette)), text, ink, side)
