"""A run in a folder: what it was asked for, which shards are there, which are missing."""

import errno
import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

from diffumask_fast.dataset.reader import Row, read_manifest, read_rows, shard_paths
from diffumask_fast.dataset.schema import MANIFEST, SCHEMA_VERSION, Sample, make_row
from diffumask_fast.dataset.writer import (
    dump_manifest,
    explain,
    make_folder,
    shard_path,
    temporary_path,
    write_file,
    write_shard,
)
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import Vocabulary

# options that older runs have not recorded, and what they were drawn with
UNRECORDED = {"attention": "sdpa"}


def open_run(
    folder: str | Path,
    requests: Sequence[Request],
    options: dict,
    environment: dict,
    shard_size: int = 64,
    allow_drift: bool = False,
    *,
    model: dict | None = None,
    vocabulary: Vocabulary | None = None,
) -> "Run":
    """Begin a run in a folder, or go on with the one that is there.

    `dataset.json` is written before the first shard; it never changes afterwards, except that a tolerated drift is
    added. What a killed run left half-written is removed. The run is locked against other processes until it is
    finished or the process ends; the lock is no file.

    Args:
        folder: made if needed.
        requests: all samples in order; their keys are unique.
        options: every option that makes a difference to the data, `auto` resolved, named as on the command line with
            underscores; values that JSON can hold.
        environment: device, threads, versions: what may change rounding.
        shard_size: rows of a shard; becomes an option.
        allow_drift: go on in another environment and record it under `drift`, with the shards that were missing.
        model: `{"id": ..., "weights": hash}`.
        vocabulary: recorded under `classes`.

    Returns:
        The run, to be used in a `with` statement.

    Raises:
        DiffuMaskError: the folder cannot be written or is in use, or holds a run with another model, option, plan or
            environment; the message names each difference.
    """
    if shard_size < 1:
        raise DiffuMaskError(f"shard_size is {shard_size}: give at least 1")
    if not requests or len({request.key for request in requests}) < len(requests):
        raise DiffuMaskError("a run needs at least one request, and each key once")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "model": model or {},
        "options": {**options, "shard_size": shard_size},
        "classes": [
            {"id": entry.id, "name": entry.name, "phrase": entry.phrase}
            for entry in (vocabulary.entries if vocabulary else ())
        ],
        "plan": {"rows": len(requests), "shards": -(-len(requests) // shard_size), "sha256": _digest(requests)},
        "environment": environment,
    }
    # what comes back from JSON is compared with what comes back from JSON
    run = Run(Path(folder), tuple(requests), shard_size, json.loads(dump_manifest(manifest)))
    try:
        run._begin(allow_drift)
    except OSError as error:
        run.finish()
        raise explain(error, run.folder) from error
    except BaseException:
        run.finish()
        raise
    return run


class Run:
    """The shards of one run; made by `open_run`."""

    def __init__(self, folder: Path, requests: tuple[Request, ...], shard_size: int, manifest: dict):
        self.folder, self.requests, self.shard_size, self.manifest = folder, requests, shard_size, manifest
        self._unlock = lambda: None

    def missing_shards(self) -> list[tuple[int, tuple[Request, ...]]]:
        """List the shards that are still to be drawn, each with its requests."""
        return [
            (index, self._requests_of(index))
            for index in range(self.manifest["plan"]["shards"])
            if not shard_path(self.folder, index).exists()
        ]

    def write(self, index: int, samples: Sequence[Sample]) -> Path:
        """Write a whole shard.

        Args:
            index: of the shard.
            samples: one for each of its requests, in their order.

        Raises:
            DiffuMaskError: the samples are not those of the shard, or it cannot be written.
        """
        if [sample.request for sample in samples] != list(self._requests_of(index)):
            raise DiffuMaskError(f"shard {index} takes the samples of its requests, all of them and in their order")
        return self.write_rows(index, [make_row(sample) for sample in samples])

    def write_rows(self, index: int, rows: Sequence[dict]) -> Path:
        """Write a whole shard of rows that are already encoded, as `write`."""
        if [row["key"] for row in rows] != [request.key for request in self._requests_of(index)]:
            raise DiffuMaskError(f"shard {index} takes the rows of its requests, all of them and in their order")
        return write_shard(self.folder, index, rows)

    def rows(self, *, accepted_only: bool = True, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the rows that are there."""
        return read_rows(self.folder, accepted_only=accepted_only, columns=columns)

    def accepted_flags(self) -> list[bool]:
        """Tell of each row that is there whether it is accepted."""
        return [row.accepted for row in self.rows(accepted_only=False, columns=["accepted"])]

    def finish(self) -> None:
        """Let others open the folder."""
        self._unlock()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def _requests_of(self, index: int) -> tuple[Request, ...]:
        return self.requests[index * self.shard_size : (index + 1) * self.shard_size]

    def _begin(self, allow_drift: bool) -> None:
        make_folder(self.folder / "data")
        self._lock()
        for name in (MANIFEST, "*.png", "data/shard-*.parquet"):
            for path in self.folder.glob(str(temporary_path(Path(name)))):
                path.unlink(missing_ok=True)
        begun, drawn = (self.folder / MANIFEST).exists(), bool(shard_paths(self.folder))
        if drawn and not begun:
            raise DiffuMaskError(f"{self.folder} holds shards but no {MANIFEST}: use another folder")
        there = read_manifest(self.folder) if begun else {}
        if not drawn:
            # a run that has drawn nothing yet binds nobody
            write_file(self.folder / MANIFEST, dump_manifest(self.manifest))
            return
        _compare(there, self.manifest, self.folder)
        changes = _differences(there["environment"], self.manifest["environment"])
        if changes and not allow_drift:
            raise DiffuMaskError(
                f"{self.folder} was begun in another environment: {_list(changes)}; with --allow-drift the run goes "
                "on, equal up to rounding, and records it"
            )
        drift = {"environment": self.manifest["environment"], "shards": [index for index, _ in self.missing_shards()]}
        last = (there.get("drift") or [there])[-1]["environment"]
        if drift["shards"] and last != drift["environment"]:
            there["drift"] = [*there.get("drift", []), drift]
            write_file(self.folder / MANIFEST, dump_manifest(there))
        self.manifest = there

    def _lock(self) -> None:
        descriptor = os.open(self.folder / "data", os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DiffuMaskError(f"another run is writing in {self.folder}: wait for it to end") from error
            # a file system without locks: shards are written whole all the same


def _compare(there: dict, now: dict, folder: Path) -> None:
    """Raise unless the folder was begun with the same model, options and plan."""
    if not now.keys() <= there.keys():
        raise DiffuMaskError(f"{folder} holds a dataset that generate did not begin: use another folder")
    changes = [
        ("--model" if name == "id" else f"the model's {name}", old, new)
        for name, old, new in _differences(there["model"], now["model"])
    ]
    options = {name: value for name, value in UNRECORDED.items() if name in now["options"]} | there["options"]
    changes += [(f"--{name.replace('_', '-')}", old, new) for name, old, new in _differences(options, now["options"])]
    if changes:
        raise DiffuMaskError(
            f"{folder} was begun with other options: {_list(changes)}; give the old ones to finish it, or use another "
            "folder"
        )
    if there["plan"] != now["plan"] or there["classes"] != now["classes"]:
        raise DiffuMaskError(
            f"{folder} was begun with other prompts: the class list, the scenes or the tokenizer changed; bring the "
            "old ones back to finish it, or use another folder"
        )


def _differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """List (name, old value, new value) of what differs; names of nested values are joined by dots."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name, "not set"), new.get(name, "not set")
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append((prefix + name, before, after))
    return found


def _list(changes: list[tuple[str, object, object]]) -> str:
    return ", ".join(f"{name} was {_short(old)} and is {_short(new)} now" for name, old, new in changes)


def _short(value: object) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _digest(requests: Sequence[Request]) -> str:
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps(astuple(request)).encode())
    return digest.hexdigest()
