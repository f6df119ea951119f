"""The commands that the documentation shows."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "diffumask_fast/mini/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?:(?: {4}.*)?\n)+)")
INLINE = re.compile(r"`(diffumask-fast\s[^`]+)`")


def blocks(text: str) -> list[str]:
    """Return the code of a page, block by block: indented by four, or fenced."""
    plain = FENCED.sub(lambda fence: re.sub("^", "    ", "\n" + fence[2], flags=re.MULTILINE), text)
    found = ["".join(line[4:] + "\n" for line in block.splitlines()).strip("\n") for block in INDENTED.findall(plain)]
    return [block for block in found if block]


def lines(block: str) -> list[str]:
    """Return a block's lines; those that end with a backslash are one with the next."""
    return re.sub(r"\\\n\s*", "", block).splitlines()


def words(line: str) -> list[str] | None:
    """Return the words of a line that begins with diffumask-fast, without it; None where it begins otherwise."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="&;<>")
    reader.whitespace_split = True
    found = list(reader) if line.startswith("diffumask-fast ") else []
    ends = [index for index, word in enumerate(found) if word[0] in "|&;<>"]
    return [word.strip("[]") for word in found[1 : min(ends, default=None)]] or None


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a page, without diffumask-fast."""
    shown = [line for block in blocks(text) for line in lines(block)]
    inline = [" ".join(command.split()) for command in INLINE.findall(text)]
    return [found for line in (*shown, *inline) if (found := words(line.strip()))]
