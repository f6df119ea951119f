"""The rows that a report shows, as the page's script takes them: words, and pictures small enough to stand in it."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffumask_fast.dataset.reader import Row, open_shard, read_shard
from diffumask_fast.dataset.storage import Place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.show import SIDE, webp

MAP_SIDE = 32
MOST_TEXT = 1000  # letters of a prompt
MOST_BYTES = 11 * 2**20  # of all entries


def rows_at(paths: Iterable[Place], numbers: set[int], max_pixels: int) -> Iterator[tuple[int, Row]]:
    """Yield some rows of shards with their numbers; shards without such rows are not read."""
    first = 0
    for path in paths:
        with open_shard(path) as file:
            count = file.metadata.num_rows
        if not numbers.isdisjoint(range(first, first + count)):
            for number, row in enumerate(read_shard(path, max_pixels=max_pixels), first):
                if number in numbers:
                    yield number, row
        first += count


def entry_of(row: Row, palette: Sequence[int]) -> dict[str, Any]:
    """Return what the page shows of a row, as JSON types; what it does not have is left out.

    Args:
        row: of the dataset.
        palette: 768 numbers, the colours of its masks.
    """
    entry = {
        "key": row.key,
        "accepted": row.accepted,
        "classes": list(row.class_ids),
        "quality": [round(value, 3) for value in row.quality or () if value is not None and np.isfinite(value)],
        "prompt": _short(row.prompt),
        "negative": _short(row.negative_prompt),
        "seed": str(row.seed),  # scripts have no whole numbers of 63 bits
        "reason": _short(row.reason),
        "made": _short(row.values.get("augmentation")),
        "sources": [_short(key) for key in row.values.get("sources") or ()],
    } | _pictures(row, palette)
    return {name: value for name, value in entry.items() if value not in ("", [], None)}


def within(entries: dict[int, dict[str, Any]], order: list[int], most: int = MOST_BYTES) -> dict[int, dict[str, Any]]:
    """Return the entries that have room in a page, the first of the order first."""
    kept, left = {}, most
    for number in order:
        if number not in kept and number in entries:
            left -= len(json.dumps(entries[number]))
            if left < 0:
                break
            kept[number] = entries[number]
    return kept


def _pictures(row: Row, palette: Sequence[int]) -> dict[str, Any]:
    try:
        image, mask = row.image, row.mask
        if image.shape[:2] != mask.shape:
            raise DiffuMaskError(f"the mask has {mask.shape[0]}x{mask.shape[1]} pixels")
        maps = row.maps
    except DiffuMaskError as error:
        return {"damaged": _short(" ".join(str(error).split()).removeprefix(f"{row.path}: "))}
    return {
        "size": [image.shape[1], image.shape[0]],
        "image": b64encode(webp(image)).decode(),
        "mask": b64encode(_mask_png(mask, palette)).decode(),
        "maps": [b64encode(_map_png(one)).decode() for one in maps] if maps is not None else [],
    }


def _mask_png(mask: np.ndarray, palette: Sequence[int]) -> bytes:
    """Encode a mask [H, W] in its colours, the background transparent."""
    values, places = np.unique(np.append(0, mask), return_inverse=True)
    picture = Image.fromarray(places[1:].reshape(mask.shape).astype(np.uint8), "P")
    picture.putpalette(np.array(palette, np.uint8).reshape(256, 3)[values].tobytes())
    picture.thumbnail((SIDE, SIDE), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=9, transparency=0)
    return stream.getvalue()


def _map_png(heat: np.ndarray) -> bytes:
    picture, stream = Image.fromarray(heat), io.BytesIO()
    picture.thumbnail((MAP_SIDE, MAP_SIDE), Image.Resampling.BOX)
    picture.save(stream, "PNG", compress_level=9)
    return stream.getvalue()


def _short(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"
