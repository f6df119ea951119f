"""Under which licence a model or a dataset is, as the front matter of its card has it."""

from __future__ import annotations

import re
from typing import NamedTuple

from diffumask_fast.dataset.storage import Place

CARD = "README.md"
HEAD = 2**16  # bytes of a card that are read
_ENTRY = re.compile(r"""^(license(?:_name|_link)?):[ \t]*["']?([\w.+:/#?=&%~-]{1,200})["']?[ \t]*\r?$""", re.MULTILINE)


class Licence(NamedTuple):
    """The hub's three entries: id, and, where that is `other`, name and address; "" where there is none."""

    license: str = "unknown"
    license_name: str = ""
    license_link: str = ""

    def __str__(self) -> str:
        return self.license_name or self.license


def licence_of(folder: Place | None) -> Licence:
    """Read the licence in a folder's card; `unknown` where there is no card, or none that names one.

    Args:
        folder: of a model or a dataset; None for neither.
    """
    if folder is None:
        return Licence()
    try:
        with (folder / CARD).open("rb") as file:
            text = file.read(HEAD).decode(errors="replace")
    except (OSError, ValueError):
        return Licence()
    front = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    found = dict(_ENTRY.findall(front[1])) if front else {}
    return Licence(**found) if "license" in found else Licence()
