"""The SHA-256 of a model folder, by which datasets and engines identify a model."""

from __future__ import annotations

import hashlib
from pathlib import Path


def weight_hash(folder: Path) -> str:
    """Return the SHA-256 of all weight and configuration files of a model folder, names included."""
    return combined_hash(file_hashes(folder))


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight and configuration file of a model folder, under its path in the folder."""
    hashes = {}
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def combined_hash(hashes: dict[str, str]) -> str:
    """Return one SHA-256 of what file_hashes gives."""
    digest = hashlib.sha256()
    for name in sorted(hashes, key=Path):
        digest.update(name.encode() + b"\0" + bytes.fromhex(hashes[name]))
    return digest.hexdigest()
