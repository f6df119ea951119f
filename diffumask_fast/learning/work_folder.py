"""The folder inside a new dataset that holds what is trained to make it."""

from pathlib import Path

from diffumask_fast.dataset.schema import MANIFEST
from diffumask_fast.dataset.storage import Place
from diffumask_fast.errors import DiffuMaskError


def work_folder(out: Place, name: str, trained: str, otherwise: str) -> Path:
    """Return where that is.

    Args:
        out: of the dataset.
        name: of the folder in it.
        trained: what is trained there, in words.
        otherwise: what to do where `out` is an address.

    Raises:
        DiffuMaskError: `out` is an address, or holds another dataset.
    """
    if not isinstance(out, Path):
        raise DiffuMaskError(f"{out} is an address, and {trained} are trained in a folder: {otherwise}")
    if (out / MANIFEST).exists() and not (out / name).exists():
        raise DiffuMaskError(f"{out} holds another dataset: name a folder of its own")
    return out / name
