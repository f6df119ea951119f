"""A sheet of samples: image, overlay and mask side by side."""

import io
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffumask_fast.dataset.reader import Row, read_rows
from diffumask_fast.dataset.schema import PNG_LEVEL
from diffumask_fast.dataset.writer import write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.vocabulary import voc_palette

_GAP, _SEAM, _LINE = 10, 2, 17


def write_preview(folder: str | Path, limit: int = 24, side: int = 160, columns: int = 3) -> Path:
    """Write `preview.png` into a dataset: its first rows, rejected ones with their reason in red.

    Args:
        folder: the dataset.
        limit: number of samples at most.
        side: longest side of each picture; pictures are made smaller, never larger.
        columns: samples beside each other.

    Returns:
        The sheet's path.

    Raises:
        DiffuMaskError: there are no rows, or the sheet cannot be written.
    """
    rows = read_rows(folder, accepted_only=False, columns=["key", "image", "mask", "reason"])
    tiles = [_tile(row, side) for row in islice(rows, limit)]
    if not tiles:
        raise DiffuMaskError(f"{folder} holds no sample to show: draw some first")
    width, height = (max(tile.size[axis] for tile in tiles) + _GAP for axis in (0, 1))
    columns = min(columns, len(tiles))
    sheet = Image.new("RGB", (width * columns + _GAP, height * -(-len(tiles) // columns) + _GAP), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width + _GAP, number // columns * height + _GAP))
    stream = io.BytesIO()
    sheet.save(stream, "PNG", compress_level=PNG_LEVEL)
    path = Path(folder) / "preview.png"
    write_file(path, stream.getvalue())
    return path


def overlay(image: np.ndarray, mask: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Lay a mask's colours over an image [H, W, 3] uint8; background stays as it is."""
    mixed = image + opacity * (colour(mask).astype(np.float32) - image)
    return np.where((mask > 0)[..., None], mixed.round(), image).astype(np.uint8)


def colour(mask: np.ndarray) -> np.ndarray:
    """Give a mask [H, W] its colours in VOC's palette: [H, W, 3] uint8."""
    return np.array(voc_palette(), np.uint8).reshape(256, 3)[mask]


def _tile(row: Row, side: int) -> Image.Image:
    arrays = (row.image, overlay(row.image, row.mask), colour(row.mask))
    pictures = [Image.fromarray(pixels) for pixels in arrays]
    for picture, method in zip(pictures, (Image.BICUBIC, Image.BICUBIC, Image.NEAREST), strict=True):
        picture.thumbnail((side, side), method)
    width, height = pictures[0].size
    tile = Image.new("RGB", (3 * width + 2 * _SEAM, height + _LINE), "white")
    for slot, picture in enumerate(pictures):
        tile.paste(picture, (slot * (width + _SEAM), _LINE))
    text, ink = (row.key, "black") if row.accepted else (f"{row.key}: {row.reason}", "#b00020")
    ImageDraw.Draw(tile).text((0, 0), text, ink, ImageFont.load_default(13))
    return tile
