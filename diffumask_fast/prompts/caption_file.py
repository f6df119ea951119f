"""The captions of a local file, one at a time: text, JSON lines or Parquet, the first two also in gzip."""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from diffumask_fast.errors import DiffuMaskError

COLUMNS = ("text", "caption", "TEXT")
TEXT, LINES, PARQUET = (".txt",), (".jsonl", ".ndjson", ".json"), (".parquet",)
MOST_BYTES = 2**20  # of a line
MOST_LETTERS = 1000  # of a caption
BATCH = 4096  # rows of Parquet that are read at once
_JOINERS = {0x200C: None, 0x200D: None}  # which some scripts need within words
_GIVE = "give .txt with a caption a line, .jsonl or .parquet with a field `text` or `caption`, or .txt.gz, .jsonl.gz"
_TORN = (OSError, EOFError, zlib.error)


class CaptionFile:
    """A file of captions, which is read from its beginning each time; in memory are a few lines.

    Empty lines are passed over. Skipped and counted is what is no caption: a line that is not UTF-8 or is too long, a
    field that is null, text with characters that cannot be printed, such as zero bytes and lone surrogates.

    Args:
        path: of the file; its ending says what it is.

    Raises:
        DiffuMaskError: there is no such file, or its ending is another one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.skipped = path, 0
        name = path.name.lower()
        self._zipped = name.endswith(".gz")
        self._ending = Path(name.removesuffix(".gz")).suffix
        known = TEXT + LINES + (() if self._zipped else PARQUET)
        if self._ending not in known:
            raise DiffuMaskError(f"`captions` cannot be {path}: {_GIVE}")
        if not path.is_file():
            raise DiffuMaskError(f"`captions` names {path}, which is no file: {_GIVE}")
        self._began = self._state()

    def sha256(self) -> str:
        """Return the hash of the file's bytes.

        Raises:
            DiffuMaskError: it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(error) from error

    def check_unchanged(self) -> None:
        """Raise a DiffuMaskError if the file is another one than when this was made: then its hash is of no use."""
        if self._state() != self._began:
            raise DiffuMaskError(f"{self.path} changed while it was read: run the same command again")

    def _state(self) -> tuple[int, ...]:
        try:
            about = self.path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return about.st_ino, about.st_size, about.st_mtime_ns

    def __iter__(self) -> Iterator[str]:
        """Yield the captions in their order, with single spaces.

        Raises:
            DiffuMaskError: the file is damaged or something else; the line or row is named.
        """
        self.skipped = 0
        for text in self._parquet() if self._ending in PARQUET else self._lines():
            if caption := cleaned(text):
                yield caption
            else:
                self.skipped += 1

    def _lines(self) -> Iterator[str]:
        """Yield the text of each line that is not empty; "" for one that has none."""
        number, read = 0, self._field if self._ending in LINES else lambda line, _: line
        try:
            with cast(BinaryIO, gzip.open(self.path) if self._zipped else self.path.open("rb")) as file:
                for number, line in enumerate(_whole_lines(file), 1):
                    if line.strip():
                        yield read(line.removeprefix("\ufeff") if number == 1 else line, number)
        except _TORN as error:
            raise self._unreadable(error, f"after line {number}: ") from error

    def _field(self, line: str, number: int) -> str:
        """Return the caption of a line of JSON."""
        if line == _NO_TEXT:
            return ""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = str(error).partition(":")[0]
            raise DiffuMaskError(f"{self.path}, line {number}: no JSON ({why}); give one object a line") from error
        name = next((name for name in COLUMNS if isinstance(value, dict) and name in value), None)
        text = value[name] if name else 0
        if not isinstance(text, str | None):
            raise DiffuMaskError(
                f"{self.path}, line {number}: no caption; give one object a line with text in its field `text` or "
                "`caption`"
            )
        return text or ""

    def _parquet(self) -> Iterator[str]:
        row = 0
        try:
            with pq.ParquetFile(self.path) as file:
                column = next((name for name in COLUMNS if name in file.schema_arrow.names), None)
                kind = file.schema_arrow.field(column).type if column else None
                kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
                if kind not in (pa.string(), pa.large_string(), pa.string_view()):
                    names = ", ".join(file.schema_arrow.names[:8])
                    raise DiffuMaskError(
                        f"{self.path} has no column of text that is named {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}: "
                        f"it has {names or 'none'}"
                    )
                for batch in file.iter_batches(BATCH, columns=[column], use_threads=False):
                    yield from _texts(batch[0])
                    row += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error, f"after row {row}: ") from error

    def _unreadable(self, error: BaseException, where: str = "") -> DiffuMaskError:
        why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:120]
        return DiffuMaskError(f"{self.path} cannot be read ({where}{why.rstrip('.')}): bring back a whole file")


def cleaned(text: str) -> str:
    """Return a caption with single spaces; "" where it is empty, too long, or not to be printed."""
    if len(text) > 2 * MOST_LETTERS:
        return ""
    text = " ".join(text.split())
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    is_plain = text.isprintable() or text.translate(_JOINERS).isprintable()
    return text if is_plain and len(text) <= MOST_LETTERS else ""


_NO_TEXT = "\0"


def _whole_lines(file: BinaryIO) -> Iterator[str]:
    """Yield lines; a zero byte for one that is too long or not UTF-8."""
    while line := file.readline(MOST_BYTES):
        if len(line) == MOST_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MOST_BYTES)
            yield _NO_TEXT
            continue
        try:
            yield line.decode()
        except UnicodeDecodeError:
            yield _NO_TEXT


def _texts(column: pa.Array) -> Iterator[str]:
    """Yield the texts of a column; "" for null and for what is not UTF-8."""
    try:
        yield from (text or "" for text in column.to_pylist())
    except UnicodeDecodeError:
        for value in column:
            try:
                yield value.as_py() or ""
            except UnicodeDecodeError:
                yield ""
