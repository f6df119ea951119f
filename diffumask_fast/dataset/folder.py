"""The folder of a dataset: who may write in it, and that it never holds shards of two datasets."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

from diffumask_fast.dataset.licence import CARD
from diffumask_fast.dataset.locks import Lock, Taken, is_taken
from diffumask_fast.dataset.parts import Part
from diffumask_fast.dataset.reader import read_manifest, shard_paths
from diffumask_fast.dataset.schema import CAPTIONS, MANIFEST, PREVIEW
from diffumask_fast.dataset.storage import Place, check_own_place, place
from diffumask_fast.dataset.writer import dump_manifest, explain, make_folder, temporary_path, write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import check_no_link

WRITTEN = (MANIFEST, CAPTIONS, CARD, "*.png", "data/shard-*.parquet")


class DatasetPlace:
    """What is written of a dataset at a place; made by `open_folder`, to be used in a `with` statement.

    Here it is an address: an object store has no locks and keeps nothing half-written.

    Args:
        path: of the dataset.
        part: of a run that is written; None is a whole one.
    """

    close: Callable[[], object] = staticmethod(lambda: None)  # lets others write in the folder

    def __init__(self, path: Place, part: Part | None = None) -> None:
        self.path, self.part = path, part
        check_own_place(path / PREVIEW)

    @property
    def tag(self) -> str:
        """What the names of temporary files bear."""
        return self.part.tag if self.part else ""

    @contextmanager
    def beginning(self) -> Iterator[bool]:
        """Keep other parts from beginning or ending while the manifest is compared or written.

        Returns:
            Whether the folder may become another dataset, if there are no shards: not while other parts draw, or may
            do so where there are no locks.

        Raises:
            DiffuMaskError: another process draws this part, or parts of another number.
        """
        yield self.part is None

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Keep other parts from beginning or ending while what concerns the whole run is written."""
        yield

    def begun(self, free: bool = True) -> dict[str, Any] | None:
        """Return the manifest; None where there is none yet.

        Args:
            free: None too where no shard was written yet, for then the folder may become another dataset.

        Raises:
            DiffuMaskError: there are shards without a manifest, or a manifest that is not a dataset's.
        """
        begun, drawn = (self.path / MANIFEST).exists(), bool(shard_paths(self.path))
        if drawn and not begun:
            raise DiffuMaskError(f"{self.path} holds shards but no {MANIFEST}: use another folder")
        there = read_manifest(self.path) if begun else None
        return there if drawn or not free else None

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write `dataset.json`."""
        write_file(self.path / MANIFEST, dump_manifest(manifest), self.tag)

    def keep_captions(self, data: bytes) -> None:
        """Write the captions that a run is drawn from, unless they are there."""
        path = self.path / CAPTIONS
        if not path.exists() or path.read_bytes() != data:
            write_file(path, data, self.tag)

    def write_first(self, manifest: dict[str, Any]) -> dict[str, Any] | None:
        """Write `dataset.json` where `begun` found none; return it if another part has just been faster."""
        path = self.path / MANIFEST
        if isinstance(path, Path) or self.part is None:
            self.write_manifest(manifest)
            return None
        try:
            path.put(dump_manifest(manifest), new=True)
        except FileExistsError:
            return read_manifest(self.path)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class DatasetFolder(DatasetPlace):
    """A dataset's local folder, locked until it is closed or the process ends.

    It is one writer's, or that of the parts of one run: each part locks a file of its own, which goes when it ends.
    What a killed writer left half-written is removed.

    Args:
        path: made if needed.
        part: of a run that is written; None is a whole one.

    Raises:
        DiffuMaskError: it cannot be written, another process is writing in it, or a name of ours in it is a link.
    """

    path: Path

    def __init__(self, path: Path, part: Part | None = None) -> None:
        for name in ("data", MANIFEST, CAPTIONS):
            check_no_link(path / name)
        super().__init__(path, part)
        make_folder(path / "data")
        self._locks: list[Lock] = []
        self.close = weakref.finalize(self, _release, self._locks)  # lets others write in the folder
        try:
            self._locks.append(self._lock())
            if part is None:
                self._remove_leftovers()
        except OSError as error:
            raise explain(error, self.path) from error

    def _lock(self) -> Lock:
        try:
            return Lock(self.path, shared=self.part is not None)
        except Taken as taken:
            if self.part is None and not is_taken(self.path, shared=True):
                raise DiffuMaskError(
                    f"parts of a run are being drawn in {self.path}: wait for them to end, or draw one with `part`"
                ) from taken
            raise _in_use(self.path) from taken

    def _remove_leftovers(self) -> None:
        """Remove what killed writers left, those of all parts; nobody else may be at work."""
        left = [temporary_path(Path(name), tag) for name in WRITTEN for tag in ("", "*-of-*")]
        for pattern in left:
            for path in self.path.glob(str(pattern)):
                path.unlink(missing_ok=True)
        for tag in self._tags():
            (self.path / _part_lock(tag)).unlink(missing_ok=True)

    def _tags(self) -> list[str]:
        """Return the tags of parts that have a lock, held or not."""
        names = sorted(path.name for path in self.path.glob(".*.lock"))
        return [name[1:].removesuffix(".lock") for name in names if re.fullmatch(r"\.\d+-of-\d+\.lock", name)]

    @contextmanager
    def beginning(self) -> Iterator[bool]:
        """Also lock the part; see `DatasetPlace.beginning`."""
        with self._undisturbed():
            yield self.part is None or self._join(self.part)

    def _join(self, part: Part) -> bool:
        """Lock a part, and remove what it left when it was killed; return whether it is known to be alone."""
        try:
            lock = Lock(self.path / _part_lock(part.tag), make=True)
        except Taken as taken:
            raise DiffuMaskError(f"another process draws part {part} in {self.path}: wait for it to end") from taken
        if not lock.works:
            lock.release()
        else:
            self._locks.append(lock)
        self._remove_temporary(part.tag)
        if not lock.works:
            return False
        self._remove_temporary("")
        others = self._other_parts()
        for tag in others:
            if tag.rpartition("-")[2] != str(part.count):
                raise DiffuMaskError(
                    f"part {tag.replace('-of-', '/')} is being drawn in {self.path}: draw parts of the same number, "
                    "or wait for it to end"
                )
        return not others

    def _other_parts(self) -> list[str]:
        """Return the tags of other parts that are being drawn; remove what those left that were killed."""
        others = [tag for tag in self._tags() if tag != self.tag]
        working = [tag for tag in others if is_taken(self.path / _part_lock(tag))]
        for tag in set(others) - set(working):
            self._remove_temporary(tag)
            (self.path / _part_lock(tag)).unlink(missing_ok=True)
        return working

    def _remove_temporary(self, tag: str) -> None:
        for name in WRITTEN:
            for left in self.path.glob(str(temporary_path(Path(name), tag))):
                left.unlink(missing_ok=True)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Also remove what killed parts left; see `DatasetPlace.ending`."""
        with self._undisturbed():
            if len(self._locks) > 1:
                self._other_parts()
            yield

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        try:
            lock = Lock(self.path / "data", wait=True) if self.part else None
            with lock or nullcontext():
                yield
        except OSError as error:
            raise explain(error, self.path) from error


def open_folder(where: str | Place, part: Part | None = None) -> DatasetPlace:
    """Begin to write at a place.

    Args:
        where: of the dataset.
        part: of a run that is written; None is a whole one.

    Raises:
        DiffuMaskError: it cannot be written, another process is writing in it, or a name of ours in it is a link.
    """
    path = place(where)
    return DatasetFolder(path, part) if isinstance(path, Path) else DatasetPlace(path, part)


def _part_lock(tag: str) -> str:
    return f".{tag}.lock"


def _release(locks: list[Lock]) -> None:
    while locks:
        locks.pop().release()


def lock(path: Path) -> int:
    """Lock a folder against other processes; return its descriptor, which holds the lock until it is closed.

    Raises:
        DiffuMaskError: another process has locked it.
    """
    try:
        return Lock(path).descriptor
    except Taken as taken:
        raise _in_use(path) from taken


def _in_use(path: Path) -> DiffuMaskError:
    return DiffuMaskError(f"another run is writing in {path}: wait for it to end")


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
