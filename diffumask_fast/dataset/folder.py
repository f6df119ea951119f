"""The folder of a dataset: one process at a time writes in it, and it never holds shards of two datasets."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from diffumask_fast.dataset.reader import read_manifest, shard_paths
from diffumask_fast.dataset.schema import MANIFEST, PREVIEW
from diffumask_fast.dataset.writer import dump_manifest, explain, make_folder, temporary_path, write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import check_no_link, check_own


class DatasetFolder:
    """A dataset's folder, locked until it is closed or the process ends; the lock is no file.

    What a killed writer left half-written is removed.

    Args:
        path: made if needed.

    Raises:
        DiffuMaskError: it cannot be written, another process is writing in it, or a name of ours in it is a link.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._check_links()
        make_folder(self.path / "data")
        try:
            self.close = weakref.finalize(self, os.close, lock(self.path))  # lets others write in the folder
            for name in (MANIFEST, "*.png", "data/shard-*.parquet"):
                for left in self.path.glob(str(temporary_path(Path(name)))):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise explain(error, self.path) from error

    def _check_links(self) -> None:
        """Raise where one of our names is a link, or our picture's name is another's file."""
        for place in (self.path / "data", self.path / MANIFEST):
            check_no_link(place)
        check_own(self.path / PREVIEW)

    def begun(self) -> dict[str, Any] | None:
        """Return the manifest, None where no shard was written yet: then the folder may become another dataset.

        Raises:
            DiffuMaskError: there are shards without a manifest, or a manifest that is not a dataset's.
        """
        begun, drawn = (self.path / MANIFEST).exists(), bool(shard_paths(self.path))
        if drawn and not begun:
            raise DiffuMaskError(f"{self.path} holds shards but no {MANIFEST}: use another folder")
        there = read_manifest(self.path) if begun else None
        return there if drawn else None

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write `dataset.json`."""
        write_file(self.path / MANIFEST, dump_manifest(manifest))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def lock(path: Path) -> int:
    """Lock a folder against other processes; return its descriptor, which holds the lock until it is closed.

    Raises:
        DiffuMaskError: another process has locked it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise DiffuMaskError(f"another run is writing in {path}: wait for it to end") from error
        # A file system without locks: each file is still written whole.
    return descriptor


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, "was ... and is ... now") of what differs; names of nested values are joined by dots."""
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name, "not set"), new.get(name, "not set")
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield prefix + name, f"was {_short(before)} and is {_short(after)} now"


def _short(value: object) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return text if len(text) <= 60 else text[:57] + "..."
