"""Vectors of captions, kept in the cache: made once for a file, an encoder and a set of classes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffumask_fast.models.cache import cache_folder

logger = logging.getLogger("diffumask_fast")

VERSION = 1  # of what is in an index
CHUNK = 1024  # captions that are in memory at once
MOST_BYTES = 16 * 2**30  # of all indices

Embed = Callable[[Sequence[str]], np.ndarray]


class Chunk(NamedTuple):
    """Some captions, the classes that each serves, and their vectors [n, D] fp16."""

    captions: list[str]
    classes: list[str]
    vectors: np.ndarray


def index_path(*parts: object) -> Path:
    """Return the place of an index in the cache.

    Args:
        parts: all that decides what is in it, as JSON types.
    """
    key = hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()
    return cache_folder() / "captions" / f"{key}.parquet"


def read_or_make(path: Path | None, captions: Callable[[], Iterable[tuple[str, str]]], embed: Embed) -> Iterator[Chunk]:
    """Yield the chunks of an index; one that is missing, torn or damaged is made on the way, and kept at its end.

    Args:
        path: of the index; None keeps none.
        captions: gives each caption and the classes that it serves.
        embed: gives the vectors of captions.
    """
    if path is not None and _is_whole(path):
        with suppress(OSError):
            os.utime(path)
        yield from _read(path)
        return
    writer = _Writer(path)
    try:
        for part in _parts(captions()):
            texts, classes = [caption for caption, _ in part], [names for _, names in part]
            chunk = Chunk(texts, classes, embed(texts))
            writer.add(chunk)
            yield chunk
        writer.finish()
    finally:
        writer.drop()


def _parts(captions: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    rest = iter(captions)
    while part := list(islice(rest, CHUNK)):
        yield part


def _is_whole(path: Path) -> bool:
    """Tell whether there is an index every page of which can be read."""
    try:
        with closing(_read(path)) as chunks:
            for _ in chunks:
                pass
    except (OSError, pa.ArrowException, ValueError):
        if path.exists():
            logger.warning("%s is damaged: the captions are embedded anew", path)
        return False
    return True


def _read(path: Path) -> Generator[Chunk]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(CHUNK, use_threads=False):
            column = batch["vector"]
            width = column.type.byte_width
            data = memoryview(column.buffers()[1])[column.offset * width :][: len(column) * width]
            vectors = np.frombuffer(data, np.float16).reshape(len(column), -1)
            yield Chunk(batch["caption"].to_pylist(), batch["classes"].to_pylist(), vectors)


class _Writer:
    """Writes an index, which is at its place once it is whole; where the cache cannot be written, nothing is kept.

    Args:
        path: of the index; None keeps none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._part = path and path.with_name(f".{path.name}.{os.getpid()}")
        self._file: BinaryIO | None = None
        self._writer: pq.ParquetWriter | None = None

    def add(self, chunk: Chunk) -> None:
        """Write a chunk."""
        if self._part is None:
            return
        width = chunk.vectors.shape[1] * chunk.vectors.itemsize
        schema = pa.schema([("caption", pa.string()), ("classes", pa.string()), ("vector", pa.binary(width))])
        data = pa.py_buffer(np.ascontiguousarray(chunk.vectors))
        vectors = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(chunk.captions), [None, data])
        try:
            if self._writer is None:
                self._part.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._part.open("wb")
                self._writer = pq.ParquetWriter(
                    self._file, schema, use_dictionary=["classes"], write_statistics=False, write_page_checksum=True,
                    compression={"caption": "zstd", "classes": "zstd", "vector": "none"},
                )  # fmt: skip
            self._writer.write_table(pa.table([chunk.captions, chunk.classes, vectors], schema))
        except OSError as error:
            logger.warning("the captions' index cannot be kept (%s): the next run makes it anew", error)
            self.drop()

    def finish(self) -> None:
        """Put the index at its place."""
        if self._path is None or self._part is None or self._writer is None or self._file is None:
            return
        with suppress(OSError):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._part, self._path)
            _trim(self._path.parent, self._path)

    def drop(self) -> None:
        """Close what is open, and remove what is not at its place."""
        part, self._part = self._part, None
        for one in (self._writer, self._file):
            if one is not None:
                with suppress(OSError, pa.ArrowException):
                    one.close()
        if part is not None:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _trim(folder: Path, new: Path) -> None:
    """Delete the indices that were unused for longest when all together are too large."""
    found = sorted(((path.stat(), path) for path in folder.iterdir()), key=lambda one: one[0].st_mtime, reverse=True)
    total = 0
    for about, path in found:
        total += about.st_size
        if total > MOST_BYTES and path != new:
            path.unlink()
