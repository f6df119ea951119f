"""Class files: TOML, or one class a line. Mistakes are named by file and line."""

from __future__ import annotations

import csv
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.class_entry import Colour

LINE_FORMS = "as name (dog) or as id,name,phrase (30,dgs,guide dog)"
FORMS = f"a text file in UTF-8 with one class a line, {LINE_FORMS}, or in TOML (.toml)"
MOST_BYTES = 2**22
MOST_DIGITS = 10  # of an id
_SHARED = ("templates", "scenes", "views")  # what a file may say for all its classes
_OF_CLASS = ("name", "id", "phrases", "sub_classes", *_SHARED, "colour")


@dataclass(frozen=True)
class ClassLine:
    """What a file says of a class.

    Args:
        where: file and line, for messages.
        name: of the class.
        id: None where the file gives none.
        phrases: none where the file gives none.
        extras: further fields of `ClassEntry` that the file gives.
    """

    where: str
    name: str
    id: int | None = None
    phrases: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)


def read_class_file(path: str | Path) -> list[ClassLine]:
    """Read a class file: TOML where its name ends in .toml, else one class a line.

    Raises:
        DiffuMaskError: it cannot be read, or a line is something else.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DiffuMaskError(f"{path} is no file: give {FORMS}")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = unicodedata.normalize("NFC", data.decode("utf-8-sig")).replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        raise DiffuMaskError(
            f"cannot read {path}, which is neither a class nor a file: give names such as dog,cat, or voc, or {FORMS}"
        ) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DiffuMaskError(f"{path}, line {line}: the text is not in UTF-8: give {FORMS}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DiffuMaskError(f"cannot read the class list {path} ({why}): give {FORMS}") from error
    if len(data) > MOST_BYTES:
        raise DiffuMaskError(f"the class list {path} has more than {MOST_BYTES} bytes: give {FORMS}")
    lines = list(read_toml(text, str(path)) if path.suffix.lower() == ".toml" else _lines(text, path))
    if not lines:
        raise DiffuMaskError(f"{path} names no class: give {FORMS}")
    return lines


def _lines(text: str, path: Path) -> Iterator[ClassLine]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path}, line {number}"
        try:
            fields = [one.strip() for one in next(csv.reader([line], skipinitialspace=True, strict=True))]
        except csv.Error as error:
            raise DiffuMaskError(f"{where}: the line is no class ({error}): write {LINE_FORMS}") from error
        if len(fields) == 1:
            yield ClassLine(where, fields[0])
        elif len(fields) == 3 and fields[0].isdecimal() and len(fields[0]) < MOST_DIGITS:
            yield ClassLine(where, fields[1], int(fields[0]), (" ".join(fields[2].split()),))
        else:
            raise DiffuMaskError(f"{where}: {line!r} is no class: write {LINE_FORMS}")


def read_toml(text: str, path: str) -> Iterator[ClassLine]:
    """Yield the classes of a file in TOML; what it says for all classes goes to each that does not say it itself."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        what = str(error).splitlines()[0]
        line = found[1] if (found := re.search(r"at line (\d+)", what)) else str(text.count("\n") + 1)
        what = re.sub(r" \(at .*\)$", "", what)
        raise DiffuMaskError(f"{path}, line {line}: no TOML ({what}): docs/prompts.md shows the form") from error
    file = _Toml(path, text.split("\n"))
    file.check_keys(document, (*_SHARED, "class"), 0)
    tables = document.get("class", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise file.error("class", 0, "begin each class with a line [[class]]")
    lines = [*file.headers(), *[0] * len(tables)]
    names = [file.text(table, "name", line) for table, line in zip(tables, lines, strict=False)]
    shared = {key: dict.fromkeys(names, file.texts(document, key, 0)) for key in ("templates", "views")}
    shared["scenes"] = file.scenes(document, names)
    for table, line, name in zip(tables, lines, names, strict=False):
        yield _class_line(file, table, line, name, {key: texts[name] for key, texts in shared.items() if texts[name]})


def _class_line(
    file: _Toml, table: Mapping[str, Any], line: int, name: str, shared: Mapping[str, Sequence[str]]
) -> ClassLine:
    file.check_keys(table, _OF_CLASS, line)
    number = table.get("id")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
        raise file.error("id", line, f"the id of {name} is {number!r}: give a whole number from 1 to 254")
    own: dict[str, Any] = {key: file.texts(table, key, line) for key in ("sub_classes", *_SHARED) if key in table}
    if "colour" in table:
        own["colour"] = _colour(file, table["colour"], line)
    phrases = tuple(" ".join(phrase.split()) for phrase in file.texts(table, "phrases", line))
    return ClassLine(file.where(line), name, number, phrases, {**shared, **own})


def _colour(file: _Toml, value: Any, line: int) -> Colour:
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        red, green, blue = bytes.fromhex(value[1:])
        return red, green, blue
    if isinstance(value, list) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value):
        return value[0], value[1], value[2]
    raise file.error("colour", line, f'{value!r} is no colour: write "#40a0ff" or [64, 160, 255]')


@dataclass(frozen=True)
class _Toml:
    """A file in TOML, for messages: what is wrong, and in which line."""

    path: str
    lines: list[str]

    def headers(self) -> list[int]:
        """Return the line of each [[class]], from 1 on."""
        return [number for number, line in enumerate(self.lines, 1) if re.match(r"\s*\[\[\s*\"?class\"?\s*\]\]", line)]

    def where(self, line: int) -> str:
        return f"{self.path}, line {line or 1}"

    def error(self, key: str, line: int, what: str) -> DiffuMaskError:
        """Return the error of a key in the table that begins at a line, 0 for the file's own keys."""
        for number in range(line, len(self.lines)):
            text = self.lines[number]
            if re.match(rf"\s*(\[\s*)?\"?{re.escape(key)}\"?\s*[=\].]", text):
                return DiffuMaskError(f"{self.where(number + 1)}: {what}")
            if line and text.lstrip().startswith("[["):
                break
        return DiffuMaskError(f"{self.where(line)}: {what}")

    def check_keys(self, table: Mapping[str, Any], known: Sequence[str], line: int) -> None:
        for key in table:
            if key not in known:
                raise self.error(key, line, f"{key!r} is no key here: there are {', '.join(known)}")

    def text(self, table: Mapping[str, Any], key: str, line: int) -> str:
        value = table.get(key, "")
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, line, f'each class has a {key}: write {key} = "..."')
        return value.strip()

    def texts(self, table: Mapping[str, Any], key: str, line: int) -> tuple[str, ...]:
        """Return a list of texts; one text alone is a list of one."""
        value = table.get(key, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise self.error(key, line, f'{key} is a list of texts: write {key} = ["...", "..."]')
        return tuple(dict.fromkeys(" ".join(text.split()) for text in value))

    def scenes(self, document: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the scenes of each class, as the file says them for all: a list, or a table scene = [classes]."""
        value = document.get("scenes", {})
        if not isinstance(value, dict):
            return dict.fromkeys(names, self.texts(document, "scenes", 0))
        suited = {scene: self.texts(value, scene, 0) for scene in value}
        for scene, some in suited.items():
            if strange := [name for name in some if name not in names]:
                raise self.error(scene, 0, f"{scene!r} suits {strange[0]!r}, which is no class of this file")
        named = {name for some in suited.values() for name in some}
        return {
            name: tuple(scene for scene, some in suited.items() if name in some or not some or name not in named)
            for name in names
        }
