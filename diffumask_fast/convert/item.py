"""One image on its way out: encoded as it is wanted, with a mask in the numbers of the format."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from diffumask_fast.convert.names import file_stem
from diffumask_fast.dataset.reader import Row
from diffumask_fast.dataset.schema import encode_png
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.pictures import decode_picture

IGNORE = 255
PILLOW = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
SETTINGS: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 95, "subsampling": 0},
    "png": {"compress_level": 6},
    "webp": {"lossless": True},
}


@dataclass(frozen=True)
class Item:
    """An image to write.

    Args:
        name: of its files, without ending.
        split: train or val.
        number: of the item, from 1 on, over both splits.
        stored: the picture, encoded as it is in the dataset.
        picture: the same, decoded, RGB.
        image_format: that it is written in: jpg, png or webp.
        mask: [H, W] uint8 in the numbers of the format: 0 background, 255 ignored.
        classes: number -> name of the classes that it was made with.
        facts: prompt, seed and the like, as JSON holds them.
        maps: [K, h, w] uint8 of the classes, for formats that hold them, else None.
    """

    name: str
    split: str
    number: int
    stored: bytes
    picture: Image.Image
    image_format: str
    mask: np.ndarray
    classes: Mapping[int, str]
    facts: Mapping[str, Any]
    maps: np.ndarray | None

    @property
    def image(self) -> bytes:
        """The encoded picture."""
        return encode_image(self.stored, self.picture, self.image_format, self.name)

    @property
    def file_name(self) -> str:
        """Name of the image's file."""
        return f"{self.name}.{self.image_format}"

    def present(self) -> list[int]:
        """Return the numbers of the classes in the mask, without background and ignored pixels."""
        return [number for number in np.unique(self.mask).tolist() if number not in (0, IGNORE)]


def make_item(
    row: Row, split: str, number: int, image_format: str, numbers: Mapping[int, int], names: Mapping[int, str]
) -> Item:
    """Make an item of a row.

    Args:
        row: with all columns; the maps may be left out.
        split: train or val.
        number: of the item.
        image_format: jpg, png or webp.
        numbers: class id of the dataset -> number in the format.
        names: number in the format -> name.

    Raises:
        DiffuMaskError: a picture is damaged or too large, image and mask differ in size, an id is no class, or maps
            are read and none are stored.
    """
    stored = row.values["image"]["bytes"] or b""
    picture = decode_picture(stored, f"the image of {row.key}", max_pixels=row.max_pixels)
    if picture.mode != "RGB":
        raise DiffuMaskError(f"the image of {row.key} has mode {picture.mode}: images have RGB")
    if row.mask.shape != (picture.height, picture.width):
        image, mask = f"{picture.height}x{picture.width}", "x".join(map(str, row.mask.shape))
        raise DiffuMaskError(f"the image of {row.key} has {image} pixels and its mask {mask}: bring both to one size")
    maps = row.maps if "maps" in row.values else None
    if "maps" in row.values and maps is None:
        raise DiffuMaskError(f"{row.key} has no maps, and this format holds maps: take another one")
    facts = {"key": row.key, "prompt": row.prompt, "negative_prompt": row.negative_prompt, "seed": row.seed}
    classes = {numbers[class_id]: names[numbers[class_id]] for class_id in row.class_ids}
    facts |= {"classes": list(classes.values()), "quality": [_json_number(value) for value in row.quality]}
    return Item(
        name=file_stem(row.key),
        split=split,
        number=number,
        stored=stored,
        picture=picture,
        image_format=image_format,
        mask=_renumbered(row, numbers),
        classes=classes,
        facts=facts,
        maps=maps,
    )


def encode_image(stored: bytes, picture: Image.Image, image_format: str, name: str) -> bytes:
    """Return a picture in the wanted format; stored so already, its bytes; its XMP is kept.

    Args:
        stored: its bytes.
        picture: the same, decoded, RGB.
        image_format: jpg, png or webp.
        name: of the image, for an error.

    Raises:
        DiffuMaskError: the format does not hold it: it is too wide or too high, or its XMP too long.
    """
    if picture.format == PILLOW[image_format]:
        return stored
    settings = dict(SETTINGS[image_format])
    if xmp := picture.info.get("xmp", picture.info.get("XML:com.adobe.xmp")):
        settings["xmp"] = xmp.encode() if isinstance(xmp, str) else xmp
    stream = io.BytesIO()
    try:
        picture.save(stream, PILLOW[image_format], **settings)
    except (OSError, ValueError) as error:
        kind, size = PILLOW[image_format], f"{picture.height}x{picture.width} pixels"
        raise DiffuMaskError(
            f"the image {name} of {size} cannot be written as {kind} ({error}): give another `image_format`"
        ) from error
    return stream.getvalue()


def mask_png(mask: np.ndarray, palette: list[int] | None = None) -> bytes:
    """Encode a mask as PNG: grey, its values the numbers of the classes; with a palette, in colours.

    Args:
        mask: [H, W] uint8.
        palette: 768 numbers.
    """
    if palette is None:
        return encode_png(mask)
    picture = Image.fromarray(mask)
    picture.putpalette(palette)  # the mode becomes P
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=6)
    return stream.getvalue()


def _json_number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None  # JSON has no NaN


def _renumbered(row: Row, numbers: Mapping[int, int]) -> np.ndarray:
    table = np.full(256, -1, np.int16)
    table[0], table[IGNORE] = 0, IGNORE
    table[list(numbers)] = list(numbers.values())
    if unknown := [value for value in np.unique(row.mask).tolist() if table[value] < 0]:
        raise DiffuMaskError(f"the mask of {row.key} holds {unknown[0]}, which is no class of the dataset")
    return table[row.mask].astype(np.uint8)
