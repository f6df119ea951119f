"""The SHA-256 of a model folder, by which datasets and engines identify a model."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

OWN_OPTIONS = "diffumask.json"  # in a model's folder: its classes, its best steps and options


def weight_hash(folder: Path) -> str:
    """Return the SHA-256 of all weight and configuration files of a model folder, names included."""
    return combined_hash(file_hashes(folder))


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight and configuration file of a model folder, under its path in the folder.

    A model that was calibrated is the same model: its own options count as they were before.
    """
    hashes = {}
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    if OWN_OPTIONS in hashes:
        hashes |= {OWN_OPTIONS: before_calibration(folder / OWN_OPTIONS)}
    return {name: value for name, value in hashes.items() if value}


def before_calibration(path: Path) -> str:
    """Return the SHA-256 of a file of a model's own options as it was before calibrations; "" where there was none."""
    data = path.read_bytes() if path.is_file() else b""
    try:
        before = str(json.loads(data)["calibration"]["before_sha256"])
    except (ValueError, KeyError, TypeError, RecursionError):
        before = "unknown"
    if re.fullmatch(r"([0-9a-f]{64})?", before):
        return before
    return hashlib.sha256(data).hexdigest() if data else ""


def combined_hash(hashes: dict[str, str]) -> str:
    """Return one SHA-256 of what file_hashes gives."""
    digest = hashlib.sha256()
    for name in sorted(hashes, key=Path):
        digest.update(name.encode() + b"\0" + bytes.fromhex(hashes[name]))
    return digest.hexdigest()
