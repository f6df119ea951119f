"""The columns of a shard, and a row made of a result."""

import io
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from diffumask_fast.dataset.origin import drawn_note
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.pictures import decode_picture
from diffumask_fast.prompts.request import Request

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
PREVIEW = "preview.png"
CAPTIONS = "captions.jsonl"  # that were found for a run in a file
PNG_LEVEL = 6

_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FIELDS = [
    ("key", pa.string()),
    ("image", _PICTURE),
    ("mask", _PICTURE),
    ("classes", pa.list_(pa.string())),
    ("class_ids", pa.list_(pa.int32())),
    ("prompt", pa.string()),
    ("negative_prompt", pa.string()),
    ("seed", pa.int64()),
    ("quality", pa.list_(pa.float32())),
    ("maps", pa.list_(pa.uint8())),
    ("map_sizes", pa.list_(pa.list_(pa.int32()))),
    ("accepted", pa.bool_()),
    ("reason", pa.string()),
]
# How a row was made of others: the kind of augmentation, "" for none, and the keys of those others.
_AUGMENTED_FIELDS = [*_FIELDS, ("augmentation", pa.string()), ("sources", pa.list_(pa.string()))]


def datasets_features(columns: Sequence[tuple[str, pa.DataType]]) -> dict[str, Any]:
    """Return the columns as the `datasets` library notes them, so that it hands out pictures instead of bytes."""
    features: dict[str, object] = {}
    for name, kind in columns:
        if kind == _PICTURE:
            features[name] = {"_type": "Image"}
            continue
        depth = 0
        while pa.types.is_list(kind):
            kind, depth = kind.value_type, depth + 1
        note: object = {"dtype": "float32" if kind == pa.float32() else str(kind), "_type": "Value"}
        for _ in range(depth):
            note = {"feature": note, "_type": "Sequence"}
        features[name] = note
    return features


def _schema(columns: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    note = json.dumps({"info": {"features": datasets_features(columns)}})
    return pa.schema(columns, metadata={"schema_version": str(SCHEMA_VERSION), "huggingface": note})


SCHEMA = _schema(_FIELDS)
AUGMENTED_SCHEMA = _schema(_AUGMENTED_FIELDS)


class Sample(Protocol):
    """What a row is made of: `pipeline.Result` or anything with these attributes."""

    @property
    def request(self) -> Request:
        """What was asked for."""

    @property
    def image(self) -> np.ndarray:
        """[H, W, 3] uint8."""

    @property
    def mask(self) -> np.ndarray:
        """[H, W] uint8."""

    @property
    def quality(self) -> Sequence[float]:
        """One number per class."""

    @property
    def maps(self) -> np.ndarray | None:
        """[K, h, w] uint8, as `quantise_maps` leaves them."""

    @property
    def accepted(self) -> bool:
        """Whether it is kept."""

    @property
    def reason(self) -> str:
        """Why it is not; "" where it is."""


def make_row(sample: Sample) -> dict[str, Any]:
    """Turn a sample into a row of `SCHEMA`.

    Args:
        sample: see `Sample`. `maps` are what its mask was made of, so that it can be made again; None stores none. With
            an attribute `drawn` that is true, a model drew the image, which is then marked so.

    Returns:
        One value per column; `map_sizes` holds [h, w] for each class, whose maps lie one after the other in `maps`.

    Raises:
        DiffuMaskError: an array has the wrong type or size.
    """
    request = sample.request
    image, mask = np.asarray(sample.image), np.asarray(sample.mask)
    maps = np.zeros((0, 0, 0), np.uint8) if sample.maps is None else np.asarray(sample.maps)
    size = len(request.class_ids)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DiffuMaskError(f"{request.key}: the image must be uint8 [H, W, 3], not {image.dtype} {image.shape}")
    if mask.dtype != np.uint8 or mask.shape != image.shape[:2]:
        raise DiffuMaskError(f"{request.key}: the mask must be uint8 {image.shape[:2]}, not {mask.dtype} {mask.shape}")
    if maps.dtype != np.uint8 or maps.ndim != 3 or len(maps) not in (0, size):
        raise DiffuMaskError(f"{request.key}: maps must be uint8 [{size}, h, w], not {maps.dtype} {maps.shape}")
    quality = [float(value) for value in sample.quality]
    if len(quality) != size:
        raise DiffuMaskError(f"{request.key}: quality has {len(quality)} numbers for {size} classes")
    return {
        "key": request.key,
        "image": {"bytes": encode_png(image, drawn=getattr(sample, "drawn", False)), "path": f"{request.key}.png"},
        "mask": {"bytes": encode_png(mask), "path": f"{request.key}_mask.png"},
        "classes": list(request.classes),
        "class_ids": list(request.class_ids),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "quality": quality,
        "maps": maps.reshape(-1),
        "map_sizes": [list(maps.shape[1:])] * len(maps),
        "accepted": bool(sample.accepted),
        "reason": sample.reason or "",
    }


def encode_png(pixels: np.ndarray, *, drawn: bool = False) -> bytes:
    """Encode [H, W, 3] or [H, W] uint8 as PNG, mode RGB or L; `drawn` marks it as drawn by a model."""
    stream, picture = io.BytesIO(), Image.fromarray(np.ascontiguousarray(pixels))
    picture.save(stream, "PNG", compress_level=PNG_LEVEL, pnginfo=drawn_note() if drawn else None)
    return stream.getvalue()


def decode_png(picture: dict[str, Any], max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the `image` or `mask` of a row: [H, W, 3] or [H, W] uint8.

    Raises:
        DiffuMaskError: it is damaged, larger than `max_pixels`, or neither RGB nor one channel of 8 bits.
    """
    decoded = decode_picture(picture["bytes"] or b"", picture.get("path"), max_pixels=max_pixels)
    if decoded.mode not in ("RGB", "L", "P"):
        raise DiffuMaskError(f"{picture.get('path')} has mode {decoded.mode}: images have RGB, masks L")
    return np.array(decoded)


def decode_maps(values: dict[str, Any]) -> np.ndarray | None:
    """Give the `maps` of a row their shape: [K, h, w] uint8; None where none are stored.

    Raises:
        DiffuMaskError: their number does not fit `map_sizes`.
    """
    sizes = values["map_sizes"]
    if not sizes:
        return None
    maps, (height, width) = np.asarray(values["maps"], np.uint8), sizes[0]
    if min(height, width) < 1 or maps.size != len(sizes) * height * width or any(size != sizes[0] for size in sizes):
        raise DiffuMaskError(f"{maps.size} values of maps do not fit the map sizes {sizes}")
    return maps.reshape(len(sizes), height, width)
