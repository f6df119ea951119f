"""Files are written over only where we wrote them: each kind of ours bears a sign; links are not followed."""

import re
from pathlib import Path

from diffumask_fast.errors import DiffuMaskError

SIGN = "diffumask-fast"  # in the first bytes of every picture that we write
HEAD = 4096


def is_address(path: Path) -> bool:
    """Tell whether a path was made of an address such as s3://bucket, of which it keeps one slash."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", str(path)) is not None


def check_own(path: Path, sign: str = SIGN) -> None:
    """Raise unless there is nothing at a path, or a file that we wrote.

    Args:
        path: where a file is to be written.
        sign: what such a file of ours has in its first bytes.

    Raises:
        DiffuMaskError: somebody else's file, a folder or a link is there, or it cannot be read.
    """
    try:
        if not path.is_symlink() and not path.exists():
            return
        ours = False
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                ours = sign.encode() in file.read(HEAD)
    except (OSError, ValueError) as error:
        raise DiffuMaskError(f"{path} cannot be written: {getattr(error, 'strerror', error)}") from error
    if not ours:
        raise DiffuMaskError(f"{path} is there and was not written by this program: move it away, or name another")


def check_place(path: Path, sign: str = SIGN) -> None:
    """Raise unless a file can be written at a path, over one of ours at most; to be asked before long work.

    Raises:
        DiffuMaskError: as `check_own`, or there is no such folder.
    """
    check_own(path, sign)
    if not path.parent.is_dir():
        raise DiffuMaskError(f"{path.parent} is no folder: make it, or name another place for {path.name}")


def check_no_link(path: Path) -> None:
    """Raise where a path is a link to a file, a folder or nothing: what is written would land elsewhere.

    Raises:
        DiffuMaskError: it is such a link.
    """
    if path.is_symlink() and (path.is_file() or path.is_dir() or not path.exists()):
        raise DiffuMaskError(f"{path} is a link, and writing does not follow links: move it away")


def unlinked(root: Path, *parts: str) -> Path:
    """Return a path below a folder.

    Raises:
        DiffuMaskError: one of its parts is a link.
    """
    path = root
    for part in parts:
        path /= part
        if path.is_symlink():
            raise DiffuMaskError(
                f"{path} is a link, and links in data are not followed: put the files there themselves"
            )
    return path
