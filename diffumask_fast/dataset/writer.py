"""Files that are there whole or not at all: temporary name, fsync, rename, fsync of the folder; or one put."""

import contextlib
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from diffumask_fast.dataset.schema import AUGMENTED_SCHEMA, SCHEMA
from diffumask_fast.dataset.storage import Address, Place, place
from diffumask_fast.errors import DiffuMaskError

MARK = b"run"  # in a shard's metadata: for which run, and which place in it, it was written
ROW_GROUP = 64  # rows that are written at once, at most
GROUP_BYTES = 32 * 2**20  # of pictures and maps, after which a row group ends
INDEXED_BYTES = 8 * 2**20  # of the first row group, above which an index of its pages helps who reads single rows
MOST_BYTES = 2**30  # of a shard; Arrow's columns hold at most twice as much

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def shard_path(folder: str | Place, index: int) -> Place:
    """Return the place of a shard in a dataset."""
    return place(folder) / "data" / shard_name(index)


def shard_name(index: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{index:05d}.parquet"


def write_shard(
    folder: str | Place, index: int, rows: Iterable[dict[str, Any]], mark: str | None = None, tag: str = ""
) -> Place:
    """Write rows as a shard, some at a time; equal rows give equal bytes.

    Args:
        folder: of the dataset.
        index: of the shard.
        rows: as `make_row` makes them; with the columns of augmented rows, all have them.
        mark: what `shard_check.mark_of` gives, by which the shard is known again.
        tag: as for `temporary_path`.

    Returns:
        The shard's path, at which it is there whole or not at all.

    Raises:
        DiffuMaskError: the folder cannot be written, or the shard becomes too large; nothing is left of the attempt.
    """
    path, groups = shard_path(folder, index), _groups(rows)
    first = next(groups, [])
    schema = AUGMENTED_SCHEMA if first and "augmentation" in first[0] else SCHEMA
    if mark is not None:
        schema = schema.with_metadata({**schema.metadata, MARK: mark})
    with new_file(path, tag) as file, pq.ParquetWriter(
        file, schema, compression="zstd", compression_level=3, use_dictionary=False, version="2.6",
        write_page_checksum=True, write_page_index=sum(map(_bytes_of, first)) > INDEXED_BYTES,
    ) as writer:  # fmt: skip
        for group in chain([first] if first else [], groups):
            writer.write_table(pa.Table.from_pylist(group, schema))
            if file.tell() > MOST_BYTES:
                raise DiffuMaskError(f"{path} becomes larger than {MOST_BYTES} bytes: give a smaller `shard_size`")
    return path


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Put rows together that are written, and can be read, at once."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += _bytes_of(row)
        if len(group) == ROW_GROUP or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bytes_of(row: dict[str, Any]) -> int:
    return len(row["image"]["bytes"]) + len(row["mask"]["bytes"]) + len(row["maps"])


def dump_manifest(manifest: dict[str, Any]) -> bytes:
    """Return the bytes of a `dataset.json`."""
    return (json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_file(path: Place, data: bytes | memoryview, tag: str = "", *, temporary: Path | None = None) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file.
        data: its bytes.
        tag: as for `temporary_path`.
        temporary: the name until it is whole, on the same file system; None is one beside it.

    Raises:
        DiffuMaskError: it cannot be written; nothing is left of the attempt.
    """
    with new_file(path, tag, temporary=temporary) as file:
        file.write(data)


@contextmanager
def new_file(path: Place, tag: str = "", *, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Give a file to write, which is at its place when the `with` statement ends, and nowhere if that fails.

    What goes to an address is in memory until then.

    Raises:
        DiffuMaskError: it cannot be written; nothing is left of the attempt.
    """
    if isinstance(path, Address):
        buffer = io.BytesIO()
        yield buffer
        path.put(buffer.getvalue())
        return
    temporary = temporary or temporary_path(path, tag)
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # a link that somebody has put there is not followed
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise explain(error, path.parent) from error
    except BaseException:
        _remove(temporary)
        raise


def make_folder(path: Place) -> None:
    """Make a folder and those above it; object stores have none.

    Raises:
        DiffuMaskError: it cannot be made.
    """
    if isinstance(path, Address):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, path) from error


def temporary_path(path: Path, tag: str = "") -> Path:
    """Return the name under which a file is written; no reader of datasets picks it up.

    Args:
        path: of the file.
        tag: of the part of a run that writes it; other processes write under other names.
    """
    return path.with_name(f".{path.name}.{tag}.tmp" if tag else f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def explain(error: OSError, folder: Path) -> DiffuMaskError:
    """Say in one sentence why a folder cannot be written and what to do."""
    if error.errno in _FULL:
        return DiffuMaskError(f"no space left for {folder}: free some and run the same command again to finish it")
    if error.errno in _CLOSED:
        return DiffuMaskError(f"cannot write in {folder} ({error.strerror}): choose a folder that you may write")
    if error.errno in _NO_FOLDER:
        return DiffuMaskError(f"{folder} is no folder: choose another name")
    return DiffuMaskError(f"cannot write in {folder}: {error.strerror or error}")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
