"""Advisory locks on files and folders, which end with the process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import Self


class Taken(Exception):
    """Another process holds the lock."""


class Lock:
    """A lock on a file or folder until it is closed, or the process ends.

    Args:
        path: of what is locked.
        shared: several processes may hold it at once, but none that does not share.
        wait: until nobody else holds it.
        make: the file, where it is missing.

    Raises:
        Taken: another process holds it.
        OSError: the path cannot be opened.
    """

    def __init__(self, path: Path, *, shared: bool = False, wait: bool = False, make: bool = False) -> None:
        self.path, self._made = path, make
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW if make else os.O_RDONLY
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            self.descriptor = os.open(path, flags, 0o666)
            self.works = self._locked(kind)  # False on a file system without locks
            if not make or self._is_there():
                return
            self.close()  # its holder has just removed it

    def _locked(self, kind: int) -> bool:
        try:
            fcntl.flock(self.descriptor, kind)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise Taken(self.path) from error
            return False
        except BaseException:
            self.close()
            raise
        return True

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def release(self) -> None:
        """Let go of it, and remove the file if it was made for the lock."""
        if self._made:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        self.close()


def is_taken(path: Path, *, shared: bool = False) -> bool:
    """Tell whether another process holds a lock that keeps this one from getting its own.

    Raises:
        OSError: the path cannot be opened.
    """
    try:
        Lock(path, shared=shared).close()
    except Taken:
        return True
    return False
