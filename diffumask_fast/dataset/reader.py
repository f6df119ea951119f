"""Rows out of a dataset's shards."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffumask_fast.dataset.schema import MANIFEST, SCHEMA_VERSION, decode_maps, decode_png
from diffumask_fast.errors import DiffuMaskError

BATCH = 64  # rows that are read at once


class Row:
    """One row: every column that was read is an attribute; pictures and maps are decoded when asked for.

    Args:
        values: column names and values, as they are stored; `maps` is an array.
    """

    key: str
    classes: list[str]
    class_ids: list[int]
    prompt: str
    negative_prompt: str
    seed: int
    quality: list[float]
    map_sizes: list[list[int]]
    accepted: bool
    reason: str

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"the row has no column {name}, or it was not read") from None

    @cached_property
    def image(self) -> np.ndarray:
        """The image, [H, W, 3] uint8."""
        return decode_png(self.values["image"])

    @cached_property
    def mask(self) -> np.ndarray:
        """The mask, [H, W] uint8: class ids, 0 background, 255 ignored."""
        return decode_png(self.values["mask"])

    @cached_property
    def maps(self) -> np.ndarray | None:
        """The class maps that the mask was made of, [K, h, w] uint8; None where no maps are stored."""
        return decode_maps(self.values)


def read_rows(folder: str | Path, *, accepted_only: bool = True, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a dataset in the order of its shards; a few rows are in memory at a time.

    Args:
        folder: the dataset.
        accepted_only: leave out rejected rows.
        columns: those to read; None reads all.

    Raises:
        DiffuMaskError: there are no shards, or one cannot be read.

    Example:
        for row in read_rows("demo", columns=["key", "mask"]):
            print(row.key, row.mask.shape)
    """
    paths = shard_paths(folder)
    if not paths:
        raise DiffuMaskError(f"{folder} holds no data/shard-*.parquet: name the folder that generate wrote")
    wanted = None
    if columns is not None:
        wanted = list(dict.fromkeys([*columns, "accepted", *(["map_sizes"] if "maps" in columns else [])]))
    for path in paths:
        for row in read_shard(path, wanted):
            if row.accepted or not accepted_only:
                yield row


def read_shard(path: Path, columns: Iterable[str] | None = None) -> Iterator[Row]:
    """Yield the rows of one shard.

    Raises:
        DiffuMaskError: it is damaged or written by a newer version.
    """
    try:
        with pq.ParquetFile(path) as file:
            version = int((file.schema_arrow.metadata or {}).get(b"schema_version", b"0"))
            if version > SCHEMA_VERSION:
                raise DiffuMaskError(
                    f"{path} has schema version {version}, newer than this program's {SCHEMA_VERSION}: update it"
                )
            for batch in file.iter_batches(BATCH, columns=None if columns is None else list(columns)):
                yield from _rows_of(batch)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DiffuMaskError(f"{path} cannot be read: delete it and run generate again to draw it anew") from error


def _rows_of(batch: pa.RecordBatch) -> Iterator[Row]:
    """Yield the rows of a batch; maps stay arrays, for a list of Python numbers takes eight times the memory."""
    if "maps" not in batch.schema.names:
        yield from map(Row, batch.to_pylist())
        return
    maps = batch.column("maps")
    numbers, ends = maps.values.to_numpy(), maps.offsets.to_numpy()
    for row, values in enumerate(batch.drop_columns(["maps"]).to_pylist()):
        yield Row({**values, "maps": numbers[ends[row] : ends[row + 1]].copy()})


def shard_paths(folder: str | Path) -> list[Path]:
    """List the shards of a dataset in order."""
    return sorted(Path(folder).glob("data/shard-*.parquet"), key=lambda path: (len(path.name), path.name))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read a dataset's `dataset.json`.

    Raises:
        DiffuMaskError: it is missing or damaged, or a newer version wrote it.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version, _, _ = (manifest[name] for name in ("schema_version", "options", "plan"))
    except FileNotFoundError as error:
        raise DiffuMaskError(f"{path} is missing: name the folder that generate wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffuMaskError(f"{path} is no manifest of a dataset: use another folder") from error
    if version != SCHEMA_VERSION:
        raise DiffuMaskError(f"{path} has schema version {version}, not {SCHEMA_VERSION}: use another folder")
    return manifest
