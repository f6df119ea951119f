"""Where a dataset is: a folder, or an address in an object store that fsspec opens (s3://, gs://, memory://)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.own_files import HEAD, SIGN, check_own, is_address

READ_AHEAD = 2**20  # bytes of a file that are asked for at once, at least
PACKAGES = {"s3": "'diffumask-fast[s3]'", "s3a": "'diffumask-fast[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}
CREDENTIALS = re.compile("Credential|ProfileNotFound|Token|UnauthorizedSSO")


@dataclass(frozen=True)
class Address:
    """A place in an object store, with those methods of `pathlib.Path` that datasets need.

    Args:
        url: `protocol://bucket/folder`, without a slash at its end.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """What comes after the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its last ending."""
        return Path(self.name).stem

    def with_name(self, name: str) -> Address:
        """Return the address of another file beside this one."""
        return Address(f"{self.url.rpartition('/')[0]}/{name}")

    def exists(self) -> bool:
        """Tell whether there is a file here, or files below."""
        return bool(self._info())

    def is_file(self) -> bool:
        """Tell whether there is a file here."""
        return self._info().get("type") == "file"

    def glob(self, pattern: str) -> Iterator[Address]:
        """Yield the files in one folder whose names match: `*.parquet`, `data/*.parquet`."""
        folder, _, names = pattern.rpartition("/")
        place = self / folder if folder else self
        with place._telling() as (files, path):
            try:
                there = files.ls(path, detail=False)
            except FileNotFoundError:
                there = []
        found = sorted(one.rstrip("/").rpartition("/")[2] for one in there)
        yield from (place / name for name in found if fnmatchcase(name, names))

    def open(self, mode: str = "rb") -> io.RawIOBase:
        """Open a file to read it.

        Raises:
            FileNotFoundError: there is none.
            DiffuMaskError: it cannot be read.
        """
        with self._telling() as (files, path):
            return _Stream(files.open(path, mode, block_size=READ_AHEAD), self)

    def read_bytes(self) -> bytes:
        """Return what is in a file; raises as `open`."""
        with self._telling() as (files, path):
            return files.cat_file(path)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the text in a file; raises as `open`."""
        return self.read_bytes().decode(encoding)

    def put(self, data: bytes, *, new: bool = False) -> None:
        """Write a file by one put: it is there whole or not at all.

        Args:
            data: what is in it.
            new: only where there is none yet.

        Raises:
            FileExistsError: there is one.
            DiffuMaskError: it cannot be written.
        """
        with self._telling("written") as (files, path):
            try:
                files.pipe_file(path, data, **({"mode": "create"} if new else {}))
            except FileNotFoundError as error:
                bucket = "/".join(self.url.split("/")[:3])
                raise DiffuMaskError(f"there is no {bucket}: make that bucket, or name another") from error

    def _info(self) -> dict[str, Any]:
        with self._telling() as (files, path):
            try:
                return files.info(path)
            except FileNotFoundError:
                return {}

    @contextmanager
    def _telling(self, done: str = "read") -> Iterator[tuple[Any, str]]:
        """Give fsspec's file system and the path in it; say in one sentence what fails there."""
        with telling(self, done):
            from fsspec.core import url_to_fs

            yield url_to_fs(self.url, use_listings_cache=False)


Place: TypeAlias = Path | Address


def place(value: str | Path | Address) -> Place:
    """Return the place that a text names: an address, or a local folder, also as file:///folder.

    Raises:
        DiffuMaskError: it names none.
    """
    if isinstance(value, Address):
        return value
    protocol, is_url, rest = value.partition("://") if isinstance(value, str) else ("", "", "")
    if not is_url:
        if is_address(path := Path(value)):
            raise DiffuMaskError(f"{path} is a pathlib.Path, which no address can be: give it as text")
        return path
    if not re.fullmatch("[a-z][a-z0-9+.-]*", protocol) or not rest.strip("/"):
        raise DiffuMaskError(f"{value} names no place: give an address such as s3://bucket/folder, or a local folder")
    return Path(rest) if protocol in ("file", "local") else Address(f"{protocol}://{rest.rstrip('/')}")


def size_of(path: Place) -> int:
    """Return the bytes of a file."""
    return int(path._info()["size"]) if isinstance(path, Address) else path.stat().st_size


def check_own_place(path: Place) -> None:
    """Raise unless there is nothing at a place, or a picture that we wrote; see `check_own`."""
    if isinstance(path, Path):
        check_own(path)
    elif path.exists() and SIGN.encode() not in path.open().read(HEAD):
        raise DiffuMaskError(f"{path} is there and was not written by this program: move it away, or name another")


class _Stream(io.RawIOBase):
    """A file of an object store that says in one sentence what fails."""

    def __init__(self, stream: Any, address: Address) -> None:
        self._stream, self._address = stream, address

    def read(self, size: int = -1) -> bytes:
        with telling(self._address):
            return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


@contextmanager
def telling(address: Address, done: str = "read") -> Iterator[None]:
    """Say in one sentence what fails at an address; that a file is missing, or there, is for the caller to say.

    Args:
        address: of the file.
        done: with it: "read" or "written".

    Raises:
        DiffuMaskError: what an object store, its package or the network raises.
    """
    try:
        yield
    except (DiffuMaskError, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        ours = type(error).__module__ == "builtins"
        if ours and not isinstance(error, OSError | ImportError | ValueError | NotImplementedError):
            raise
        raise DiffuMaskError(_sentence(error, address, done)) from error


def _sentence(error: Exception, address: Address, done: str) -> str:
    protocol, kind = address.url.partition(":")[0], type(error).__name__
    detail = " ".join(str(error).split())[:200].rstrip(".") or kind
    if isinstance(error, ImportError):
        package = PACKAGES.get(protocol)
        return f"{protocol}:// needs a package that is missing: " + (f"pip install {package}" if package else detail)
    if isinstance(error, ValueError) and "rotocol" in detail:
        return f"{address}: no object store goes by {protocol}://; s3://, gs:// and memory:// do"
    if CREDENTIALS.search(kind) or isinstance(error, PermissionError):
        where = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" if protocol == "s3" else "its own way"
        return f"{address} cannot be {done} ({detail}): set credentials that allow it, by {where}"
    if isinstance(error, NotImplementedError):
        return f"{address} cannot be {done}: {protocol}:// does not allow it"
    return f"{address} cannot be {done} ({detail}): run the same command again when it can"
