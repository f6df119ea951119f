"""Which shards of a dataset are done: those that hold the rows planned for them, in this dataset, and decode."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from diffumask_fast.dataset.reader import BATCH, DamagedShard, open_shard, read_shard, shard_paths
from diffumask_fast.dataset.schema import MANIFEST
from diffumask_fast.dataset.storage import Address, Place, place, size_of
from diffumask_fast.dataset.writer import MARK, MOST_BYTES, shard_name, shard_path
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import check_no_link
from diffumask_fast.prompts.class_entry import phrases_by_name
from diffumask_fast.prompts.matching import phrase_in
from diffumask_fast.prompts.request import Request

logger = logging.getLogger("diffumask_fast")

READ_WHOLE = 2**30  # bytes of shards of which every page is read; of the others, footer, keys and seeds
AT_ONCE = 16  # shards of an object store that are looked at
BOUND = ("model", "classes", "plan")  # of a manifest: what, with its options, the bytes of its shards depend on
PARQUET = b"PAR1"
# Options that older runs did not record, with the values that they used.
UNRECORDED = {"attention": "sdpa"}
_VALUES = attrgetter(*(part.name for part in fields(Request)))

Read = TypeVar("Read")
Names = Sequence[tuple[str, int]]  # key and seed of each row


@dataclass(frozen=True)
class Content:
    """What a shard says of itself: keys and seeds of its rows, and the mark of who wrote it, None in older ones."""

    names: Names
    mark: str | None
    bytes: int


@dataclass(frozen=True)
class PlanDigest:
    """Hashes of a plan: of all that it says, of the keys and seeds of each shard, and of all up to each round's end."""

    sha256: str
    shards: list[bytes]
    rounds: list[str]


def mark_of(manifest: dict[str, Any], index: int, names: Iterable[tuple[str, int]]) -> str:
    """Return what a shard of a dataset is marked with: a hash of the dataset, the shard's number and its rows' names.

    Args:
        manifest: of the dataset.
        index: of the shard.
        names: key and seed of each row.
    """
    options = {**UNRECORDED, **manifest["options"]}
    parts = {name: manifest[name] for name in BOUND} | {"plan": _plan_of(manifest["plan"], index)}
    bound = [parts, options, index, [list(name) for name in names]]
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def _plan_of(plan: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the plan as it was when a shard's round was the last: later rounds make no difference to the shard."""
    return next((part for part in plan.get("rounds", []) if index < part["shards"]), plan)


def done_shards(
    folder: Place, manifest: dict[str, Any], planned: Callable[[int], bytes], indices: Iterable[int] | None = None
) -> set[int]:
    """Return which shards need not be made; one that is damaged is not among them, and a warning names it.

    Args:
        folder: of the dataset.
        manifest: of the dataset.
        planned: gives the `names_digest` of a shard.
        indices: of the shards that are looked at; None is all.

    Raises:
        DiffuMaskError: there is a file that is not of this dataset, which is not to be replaced.
    """
    check_names(folder, manifest)
    there = {path.name for path in shard_paths(folder)}
    shards = {}
    for index in range(manifest["plan"]["shards"]) if indices is None else indices:
        path = shard_path(folder, index)
        if isinstance(path, Path):
            check_no_link(path)
        if path.name in there:
            shards[index] = path
    left = READ_WHOLE if isinstance(folder, Path) else 0  # an object store keeps what was put

    def content_of(path: Place) -> Content | None:
        try:
            return read_content(path, whole=left > 0)
        except DamagedShard:
            return None

    done = set()
    for (index, path), content in zip(shards.items(), _each(content_of, list(shards.values())), strict=True):
        if content is None:
            _check_parquet(path)
            logger.warning("%s is damaged: it is made anew", path)
            continue
        left -= content.bytes
        check_content(path, content, manifest, index, planned(index))
        done.add(index)
    return done


def _each(read: Callable[[Place], Read], paths: Sequence[Place]) -> Iterator[Read]:
    """Yield what is read of each shard; from an object store many at once, for each takes its time to answer."""
    if not any(isinstance(path, Address) for path in paths):
        yield from map(read, paths)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(read, paths)


def finished_shards(folder: str | Place, manifest: dict[str, Any]) -> list[Place]:
    """List the shards of a finished dataset, in order.

    Raises:
        DiffuMaskError: one is missing, damaged, or not of this dataset.
    """
    check_names(place(folder), manifest)
    there = {path.name for path in shard_paths(folder)}
    paths = [shard_path(folder, index) for index in range(manifest["plan"]["shards"])]
    missing = [path for path in paths if path.name not in there]
    if missing:
        first, command = missing[0].name, "run the command again that began it"
        raise DiffuMaskError(f"{folder} is not finished: {first} is missing, one of {len(missing)}; {command}")
    marked = True
    for index, (path, content) in enumerate(zip(paths, _each(read_content, paths), strict=True)):
        check_content(path, content, manifest, index)
        marked = marked and content.mark is not None
    if not marked and manifest["classes"]:
        _check_plan(folder, paths, manifest)
    return paths


def _check_plan(folder: str | Place, paths: Sequence[Place], manifest: dict[str, Any]) -> None:
    """Raise unless all rows together are those of the plan: what shards of older versions, without a mark, allow."""
    phrases = phrases_by_name(manifest["classes"])
    columns = [part.name for part in fields(Request) if part.name != "phrases"]
    requests = (
        Request(**row.values, phrases=tuple(phrase_in(row.prompt, phrases.get(name, (name,))) for name in row.classes))
        for path in paths
        for row in read_shard(path, columns)
    )
    if digest_plan(requests, manifest["options"]["shard_size"]).sha256 != manifest["plan"]["sha256"]:
        raise DiffuMaskError(
            f"the rows in {folder}/data are not those of the run in {MANIFEST}: bring back the files as they were "
            "written"
        )


def digest_plan(requests: Iterable[Request], shard_size: int, rounds: Collection[int] = ()) -> PlanDigest:
    """Return the hashes of a plan, whose requests are read once.

    Args:
        requests: all of them, in order.
        shard_size: requests of a shard.
        rounds: how many requests there are up to the end of each round.

    Raises:
        DiffuMaskError: a key comes twice.
    """
    digest, keys = hashlib.sha256(), array("q")
    names: list[tuple[str, int]] = []
    shards: list[bytes] = []
    ends: list[str] = []
    for request in requests:
        digest.update(planned_line(request))
        keys.append(hash(request.key))
        names.append((request.key, request.seed))
        if len(names) == shard_size:
            shards.append(names_digest(names))
            names.clear()
        if len(keys) in rounds:
            ends.append(digest.hexdigest())
    _check_unique(np.asarray(keys))
    return PlanDigest(digest.hexdigest(), [*shards, names_digest(names)] if names else shards, ends)


def planned_line(request: Request) -> bytes:
    """Return what a plan's hash takes of a request."""
    return json.dumps(_VALUES(request)).encode()


def _check_unique(hashes: np.ndarray) -> None:
    """Raise where two keys are the same, by their hashes: eight bytes a key, where the keys of a large run are many."""
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order][1:] == hashes[order][:-1]]
    if len(again):
        raise DiffuMaskError(f"request {again.min()} of the run has the key of an earlier one: give each key once")


def names_digest(names: Names) -> bytes:
    """Return the hash of the keys and seeds of a shard."""
    return hashlib.sha256(json.dumps(names).encode()).digest()


def check_names(folder: Place, manifest: dict[str, Any]) -> None:
    """Raise unless the Parquet files in `data/` are those that are planned, or some of them."""
    planned = {shard_name(index) for index in range(manifest["plan"]["shards"])}
    strange = sorted(path.name for path in folder.glob("data/*.parquet") if path.name not in planned)
    if strange:
        raise DiffuMaskError(
            f"{folder / 'data' / strange[0]} is none of the {len(planned)} shards of this dataset: move it away"
        )


def read_content(path: Place, *, whole: bool = False) -> Content:
    """Read footer, keys and seeds of a shard.

    Args:
        path: of the shard.
        whole: read every page of it as well, which checks them.

    Raises:
        DamagedShard: it does not decode.
        DiffuMaskError: it cannot be opened, or is too large.
    """
    size = size_of(path)
    if size > 2 * MOST_BYTES:
        raise DiffuMaskError(f"{path} has {size} bytes, more than any shard: move it away")
    with open_shard(path) as file:
        names: list[tuple[str, int]] = []
        for batch in file.iter_batches(BATCH, columns=None if whole else ["key", "seed"], use_threads=False):
            names += zip(batch["key"].to_pylist(), batch["seed"].to_pylist(), strict=True)
        marks = file.schema_arrow.metadata or {}
    return Content(names, marks[MARK].decode(errors="replace") if MARK in marks else None, size)


def check_content(
    path: Place, content: Content, manifest: dict[str, Any], index: int, planned: bytes | None = None
) -> None:
    """Raise unless the shard holds what is planned, and is marked so; shards of older versions bear no mark."""
    if content.mark is None:
        size = manifest["options"]["shard_size"]
        fits = len(content.names) == min(size, manifest["plan"]["rows"] - index * size)
    else:
        fits = content.mark == mark_of(manifest, index, content.names)
    if not fits or planned not in (None, names_digest(content.names)):
        rows = f"{content.names[0][0]} to {content.names[-1][0]}" if content.names else "no row"
        raise DiffuMaskError(
            f"{path} ({rows}) was not written for its place by the run in {MANIFEST}: move it away, or bring back the "
            "files as they were written"
        )


def _check_parquet(path: Place) -> None:
    """Raise unless what is left of a file is of a Parquet file: another program's file is not replaced."""
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4))
        tail = file.read(4)
    if head and PARQUET not in (head, tail):
        raise DiffuMaskError(f"{path} is no shard, and not replaced: move it away")
