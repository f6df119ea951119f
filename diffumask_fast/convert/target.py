"""The folder that is filled: bound to one conversion by its record, locked, and finished shard by shard."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from diffumask_fast.dataset.folder import differences, lock
from diffumask_fast.dataset.writer import dump_manifest, make_folder, new_file, temporary_path, write_file
from diffumask_fast.errors import DiffuMaskError

RECORD = "convert.json"
PARTS = ".convert"  # what the shards that are done leave for the lists of all images; removed at the end
DONE = "images"  # in the record of a finished conversion: the number of images of each split


class Target:
    """A folder for one conversion; to be used in a `with` statement.

    Args:
        path: made if needed.
        record: what the files depend on; another conversion in the same folder is refused.

    Raises:
        DiffuMaskError: the folder cannot be written, is in use, or holds something else.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, json.loads(dump_manifest(record))
        make_folder(path)
        self._descriptor = lock(path)
        try:
            self._there = self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _read(self) -> dict[str, Any] | None:
        """Return the record that is there, None in an empty folder."""
        place = self.path / RECORD
        others = {entry.name for entry in self.path.iterdir()} - {temporary_path(place).name}
        if RECORD not in others:
            if others:
                raise DiffuMaskError(f"{self.path} holds {min(others)} and no {RECORD}: name an empty folder")
            return None
        try:
            there = json.loads(place.read_text("utf-8"))
            done = there.pop(DONE, None)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DiffuMaskError(f"{place} is none of this program's records: name an empty folder") from error
        if changes := [f"{_title(name)} {change}" for name, change in differences(there, self.record)]:
            raise DiffuMaskError(
                f"{self.path} holds another conversion: {', '.join(changes)}; name an empty folder, or convert as then"
            )
        return there | ({DONE: done} if done else {})

    @property
    def finished(self) -> dict[str, int] | None:
        """The number of images of each split, None until all is written."""
        return (self._there or {}).get(DONE)

    def begin(self) -> None:
        """Write the record, or remove what a killed conversion left half-written."""
        if self._there is None:
            write_file(self.path / RECORD, dump_manifest(self.record))
        else:
            for left in self.path.rglob(".*.tmp"):
                left.unlink(missing_ok=True)
        folder(self.path, PARTS)

    def share(self) -> None:
        """Let the processes of this conversion `join`; until the last of them has ended, nobody else writes here."""
        _share(self._descriptor)

    def done(self, index: int) -> bool:
        """Tell whether all files of a shard are written."""
        return part_path(self.path, index).exists()

    def records(self, shards: int, split: str) -> Iterator[dict[str, Any]]:
        """Yield what was noted of each item of a split, in their order; nothing of it stays in memory."""
        for index in range(shards):
            with part_path(self.path, index).open(encoding="utf-8") as lines:
                for line in lines:
                    record = json.loads(line)
                    if record["split"] == split:
                        yield record

    def finish(self, counts: dict[str, int]) -> None:
        """Note that all is written."""
        write_file(self.path / RECORD, dump_manifest(self.record | {DONE: counts}))
        shutil.rmtree(self.path / PARTS, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


def join(path: Path) -> None:
    """Lock a target's folder until this process ends, beside the conversion that it works for.

    Raises:
        BlockingIOError: that conversion has ended, and another one writes there.
    """
    _share(os.open(path, os.O_RDONLY))


def _share(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise  # elsewhere: a file system without locks


def digest(manifest: dict[str, Any]) -> str:
    """Return the hash by which a dataset is known again."""
    return hashlib.sha256(dump_manifest(manifest)).hexdigest()


def part_path(path: Path, index: int) -> Path:
    """Return where a shard that is done leaves its notes."""
    return path / PARTS / f"{index:06d}.jsonl"


def write_part(path: Path, index: int, records: Iterable[dict[str, Any]]) -> None:
    """Write the notes of a shard, after all its files, which are flushed together: from then on it is done."""
    notes = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    os.sync()
    write_file(part_path(path, index), notes)


def put_file(path: Path, data: bytes) -> None:
    """Write one of the files of a shard, whole or not at all."""
    write_file(path, data, flushed=False)


def folder(path: Path, *names: str) -> Path:
    """Return a folder below the target's, made if needed.

    Raises:
        DiffuMaskError: it cannot be made, or is a link.
    """
    for name in names:
        path /= name
        if path.is_symlink():
            raise DiffuMaskError(f"{path} is a link, and writing does not follow links: move it away")
    make_folder(path)
    return path


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file a line at a time, whole or not at all."""
    with new_file(path) as file:
        for line in lines:
            file.write(f"{line}\n".encode())


def write_list(path: Path, lists: dict[str, Iterable[Any]], also: dict[str, Any]) -> None:
    """Write a JSON object of long lists, an entry at a time, whole or not at all.

    Args:
        path: of the file.
        lists: name -> entries.
        also: what else the object holds.
    """
    with new_file(path) as file:
        file.write(b"{")
        for name, entries in lists.items():
            file.write(f"{json.dumps(name)}: [".encode())
            for number, entry in enumerate(entries):
                file.write((b",\n" if number else b"\n") + json.dumps(entry).encode())
            file.write(b"\n],\n")
        file.write(json.dumps(also)[1:].encode() + b"\n")


def _title(name: str) -> str:
    return "the dataset" if name.startswith("source") else f"`{name}`"
