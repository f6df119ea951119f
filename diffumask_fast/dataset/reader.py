"""Rows out of a dataset's shards."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffumask_fast.dataset.schema import (
    AUGMENTED_SCHEMA,
    MANIFEST,
    SCHEMA,
    SCHEMA_VERSION,
    decode_maps,
    decode_png,
)
from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.errors import DiffuMaskError, in_one_line
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.show import caption_of, sample_html

BATCH = 64  # rows that are read at once


class DamagedShard(DiffuMaskError):
    """A shard does not decode."""


class Row:
    """One row: every column that was read is an attribute; pictures and maps are decoded when asked for.

    Args:
        values: column names and values, as they are stored; `maps` is an array.
        path: of the shard that it is in; an error names it.
        max_pixels: of a picture that is decoded.
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

    def __init__(self, values: dict[str, Any], path: Place | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.values, self.path, self.max_pixels = values, path, max_pixels

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"the row has no column {name}, or it was not read") from None

    @cached_property
    def image(self) -> np.ndarray:
        """The image, [H, W, 3] uint8."""
        return self._decoded("image", 3)

    @cached_property
    def mask(self) -> np.ndarray:
        """The mask, [H, W] uint8: class ids, 0 background, 255 ignored."""
        return self._decoded("mask", 2)

    @cached_property
    def maps(self) -> np.ndarray | None:
        """The class maps that the mask was made of, [K, h, w] uint8; None where no maps are stored."""
        with self._naming():
            return decode_maps(self.values)

    def _repr_html_(self) -> str | None:
        """Show the row in a notebook, where its pictures were read."""
        have = self.values.get
        if not have("image") or not have("mask"):
            return None
        key, prompt, reason = (have(name) or "" for name in ("key", "prompt", "reason"))
        words = caption_of(key, prompt, have("classes") or (), have("quality") or (), reason)
        return sample_html(self.image, self.mask, words)

    def _decoded(self, name: str, axes: int) -> np.ndarray:
        with self._naming():
            pixels = decode_png(self.values[name], self.max_pixels)
            if pixels.ndim != axes:
                raise DiffuMaskError(f"{name} of {self.key} has shape {pixels.shape}, not {axes} axes")
            return pixels

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Say in an error which shard the row is in."""
        try:
            yield
        except DiffuMaskError as error:
            raise error if self.path is None else DiffuMaskError(f"{self.path}: {error}") from error


def read_rows(
    folder: str | Place,
    *,
    accepted_only: bool = True,
    columns: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Row]:
    """Yield the rows of a dataset in the order of its shards; a few rows are in memory at a time.

    Args:
        folder: the dataset.
        accepted_only: leave out rejected rows.
        columns: those to read; None reads all.
        max_pixels: of a picture, when it is decoded.

    Raises:
        DiffuMaskError: there are no shards, or one cannot be read.

    Example:
        for row in read_rows("demo", columns=["key", "mask"]):
            print(row.key, row.mask.shape)
    """
    paths = shard_paths(folder)
    if not paths:
        raise DiffuMaskError(f"{folder} holds no data/shard-*.parquet: name the folder that generate wrote")
    return read_paths(paths, accepted_only=accepted_only, columns=columns, max_pixels=max_pixels)


def read_paths(
    paths: Iterable[Place],
    *,
    accepted_only: bool = True,
    columns: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Row]:
    """Yield the rows of some shards, as `read_rows`."""
    wanted = None
    if columns is not None:
        if unknown := set(columns) - set(AUGMENTED_SCHEMA.names):
            names = ", ".join(AUGMENTED_SCHEMA.names)
            raise DiffuMaskError(f"rows have no column {min(unknown)}: name some of {names}")
        wanted = list(dict.fromkeys([*columns, "accepted", *(["map_sizes"] if "maps" in columns else [])]))
    for path in paths:
        for row in read_shard(path, wanted, max_pixels):
            if row.accepted or not accepted_only:
                yield row


def read_shard(path: Place, columns: Iterable[str] | None = None, max_pixels: int = MAX_PIXELS) -> Iterator[Row]:
    """Yield the rows of one shard.

    Raises:
        DamagedShard: it does not decode.
        DiffuMaskError: it cannot be opened, or is written by a newer version.
    """
    with open_shard(path) as file:
        wanted = None if columns is None else list(columns)
        for group in range(file.num_row_groups):  # one in memory at a time
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=wanted):
                yield from rows_of(batch, path, max_pixels)


@contextmanager
def open_shard(path: Place) -> Iterator[pq.ParquetFile]:
    """Open a shard, whose pages are checked as they are read.

    Raises:
        DamagedShard: it does not decode, now or later in the `with` statement.
        DiffuMaskError: it cannot be opened, or is written by a newer version.
    """
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise DiffuMaskError(f"{path} is no file: move it away")
    try:
        # opened here, for pyarrow takes no path that is not UTF-8
        with path.open("rb") as stream, pq.ParquetFile(stream, page_checksum_verification=True) as file:
            version = int((file.schema_arrow.metadata or {}).get(b"schema_version", b"0"))
            if version > SCHEMA_VERSION:
                raise DiffuMaskError(
                    f"{path} has schema version {version}, newer than this program's {SCHEMA_VERSION}: update it"
                )
            if not any(file.schema_arrow.equals(schema) for schema in (SCHEMA, AUGMENTED_SCHEMA)):
                raise ValueError("other columns than a dataset's")
            yield file
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, FileNotFoundError) or isinstance(error, OSError) and error.errno is not None:
            raise DiffuMaskError(f"{path} cannot be opened: {error.strerror or 'it is gone'}") from error
        raise DamagedShard(
            f"{path} cannot be read ({in_one_line(error, 100)}): run the command again that wrote the dataset, it "
            "makes this shard anew"
        ) from error


def rows_of(batch: pa.RecordBatch, path: Place, max_pixels: int) -> Iterator[Row]:
    """Yield the rows of a shard's batch; maps stay arrays, for a list of numbers takes eight times the memory."""
    if "maps" not in batch.schema.names:
        for values in batch.to_pylist():
            yield Row(values, path, max_pixels)
        return
    maps = batch.column("maps")
    numbers, ends = maps.values.to_numpy(), maps.offsets.to_numpy()
    for row, values in enumerate(batch.drop_columns(["maps"]).to_pylist()):
        yield Row({**values, "maps": numbers[ends[row] : ends[row + 1]].copy()}, path, max_pixels)


def shard_paths(folder: str | Place) -> list[Place]:
    """List the shards of a dataset in order."""
    found: Iterator[Place] = place(folder).glob("data/shard-*.parquet")
    return sorted(
        (path for path in found if re.fullmatch(r"shard-\d{5,}", path.stem)),
        key=lambda path: (len(path.name), path.name),
    )


def read_manifest(folder: str | Place) -> dict[str, Any]:
    """Read a dataset's `dataset.json`.

    Raises:
        DiffuMaskError: it is missing or damaged, or a newer version wrote it.
    """
    path = place(folder) / MANIFEST
    try:
        if isinstance(path, Path) and path.exists() and not path.is_file():
            raise ValueError("no file")
        manifest = json.loads(path.read_text("utf-8"))
        version, _, _ = (manifest[name] for name in ("schema_version", "options", "plan"))
        if version == SCHEMA_VERSION:
            _check_manifest(manifest)
    except FileNotFoundError as error:
        raise DiffuMaskError(f"{path} is missing: name the folder that generate wrote") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DiffuMaskError(f"{path} is no manifest of a dataset: use another folder") from error
    if version != SCHEMA_VERSION:
        raise DiffuMaskError(f"{path} has schema version {version}, not {SCHEMA_VERSION}: use another folder")
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise a ValueError, KeyError, TypeError or AttributeError unless this is what a run or `derive` writes."""
    plan, options = manifest["plan"], manifest["options"].items()
    size = dict(options)["shard_size"]
    if not all(type(number) is int and number > 0 for number in (plan["rows"], plan["shards"], size)):
        raise ValueError("numbers that are none")
    if plan["shards"] != -(-plan["rows"] // size) or not isinstance(plan["sha256"], str):
        raise ValueError("a plan that does not fit")
    _check_rounds(plan, size)
    if not all(isinstance(manifest[name], dict) for name in ("model", "environment")):
        raise TypeError("no objects")
    if not all(isinstance(entry[name], str) for entry in manifest["classes"] for name in ("name", "phrase")):
        raise TypeError("classes without a name")
    if not all(isinstance(word, str) for entry in manifest["classes"] for word in [*entry.get("synonyms", [])]):
        raise TypeError("synonyms that are none")
    for entry in manifest["classes"]:
        if "colour" in entry and not (entry["id"] in range(256) and len(bytes([*entry["colour"]])) == 3):
            raise ValueError("a colour that is none")
    drifts = manifest.get("drift", [])
    if not all(isinstance(one["environment"], dict) and isinstance(one["shards"], list) for one in drifts):
        raise TypeError("a drift without its environment or shards")
    if not all(type(index) is int for one in drifts for index in [one.get("batch_size", 1), *one["shards"]]):
        raise TypeError("numbers of a drift that are none")


def _check_rounds(plan: dict[str, Any], shard_size: int) -> None:
    """Raise as `_check_manifest` unless the rounds of a plan, if it has some, add up to it in whole shards."""
    rows = 0
    for part in plan.get("rounds", []):
        counts = list(part["classes"].values())
        rows += sum(counts)
        if not counts or not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("a round without images")
        if [part["rows"], part["shards"] * shard_size] != [rows, rows] or not isinstance(part["sha256"], str):
            raise ValueError("rounds that do not fit")
    if rows not in (0, plan["rows"]):
        raise ValueError("rounds that are not all")
