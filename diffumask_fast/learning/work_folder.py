"""The folder inside a new dataset that holds what is trained to make it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from diffumask_fast.dataset.folder import differences
from diffumask_fast.dataset.schema import MANIFEST, PREVIEW
from diffumask_fast.dataset.storage import Place
from diffumask_fast.dataset.writer import dump_manifest, make_folder, write_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import Options
from diffumask_fast.own_files import check_no_link, check_own

BEGUN = "options.json"  # in the folder: what the work was begun with; the dataset records it at the end


def work_folder(out: Place, name: str, trained: str, otherwise: str) -> Path:
    """Return where that is.

    Args:
        out: of the dataset.
        name: of the folder in it.
        trained: what is trained there, in words.
        otherwise: what to do where `out` is an address.

    Raises:
        DiffuMaskError: `out` is an address, or holds another dataset or what is not written over.
    """
    if not isinstance(out, Path):
        raise DiffuMaskError(f"{out} is an address, and {trained} are trained in a folder: {otherwise}")
    folder = out / name
    check_no_link(folder)
    check_own(out / PREVIEW)
    if (out / MANIFEST).exists() and not folder.exists():
        raise DiffuMaskError(f"{out} holds another dataset: name a folder of its own")
    left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if left and not ((out / MANIFEST).exists() or (folder / BEGUN).exists()):
        raise DiffuMaskError(f"{folder} holds {left[0]}, which was not made here: name another folder for `out`")
    return folder


def begin(folder: Path, options: Options) -> None:
    """Write into a work folder what the work is begun with, or compare it where something is trained already.

    Args:
        folder: as `work_folder` gave it.
        options: that the dataset will record.

    Raises:
        DiffuMaskError: it was begun with other options.
    """
    path, now = folder / BEGUN, dump_manifest(asdict(options))
    if path.exists() and any(folder.rglob("*.safetensors")):
        _check_same(path, now)
    elif not (folder.parent / MANIFEST).exists():
        make_folder(folder)
        write_file(path, now)


def _check_same(path: Path, now: bytes) -> None:
    try:
        changes = list(differences(json.loads(path.read_bytes()), json.loads(now)))
    except (OSError, ValueError, AttributeError) as error:
        raise DiffuMaskError(f"{path} is damaged: remove {path.parent}, and the work begins anew") from error
    if changes:
        told = ", ".join(f"`{name.rpartition('.')[2]}` {change}" for name, change in changes)
        raise DiffuMaskError(f"{path.parent} was begun with other options: {told}; use another folder for `out`")
