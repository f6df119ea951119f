"""A cache of the engines that TensorRT built, under a hash of everything that decides them."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffumask_fast.models.cache import cache_folder

MOST_BYTES = 16 * 2**30
_DIGEST = hashlib.sha256().digest_size


def plan_key(graph: Path, options: dict[str, Any]) -> str:
    """Return the hash of a graph, with the weights beside it, and of the options that it is built with."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for path in sorted(graph.parent.glob(f"{graph.name}*")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def kept(key: str) -> bytes | None:
    """Return the plan of a key, None where it was not built yet or its file is damaged."""
    path = cache_folder() / "plans" / key
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    digest, plan = data[:_DIGEST], data[_DIGEST:]
    return plan if hashlib.sha256(plan).digest() == digest else None


def keep(key: str, plan: bytes) -> None:
    """Keep a plan, and delete those that were unused for longest when all together are too large."""
    path = cache_folder() / "plans" / key
    write_whole(path, hashlib.sha256(plan).digest() + plan)
    total = 0
    try:
        found = [(old.stat(), old) for old in path.parent.iterdir()]
        for about, old in sorted(found, key=lambda entry: entry[0].st_mtime, reverse=True):
            total += about.st_size
            if total > MOST_BYTES and old != path:
                old.unlink()
    except OSError:  # the folder cannot be read, or another process deleted the same plans
        return


def read_whole(path: Path) -> bytes | None:
    """Return a file of the cache, None where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file of the cache whole; where it cannot be written, go on without the cache."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
