"""The one exception that users of diffumask-fast need to catch, and what tells one of others' errors."""

import re


def as_flags(sentence: str, dash: str = "-") -> str:
    """Return a sentence with its parameters written as flags: --steps, --size 64x64.

    Args:
        sentence: with its parameters as `size` or `size=64x64`.
        dash: what joins the words of a flag.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        return f"--{name.replace('_', dash)}" + (f" {value}" if value else "")

    return re.sub(r"`([a-z][a-z_]*)(?:=([^`]*))?`", flag, sentence)


class DiffuMaskError(Exception):
    """Say in one sentence what is wrong and what to do about it; it names parameters so: `size`, `size=64x64`."""

    def as_flags(self, dash: str = "-") -> str:
        """Return the sentence with its parameters written as flags."""
        return as_flags(str(self), dash)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with the next where it ends in a colon; its name where there is none.

    What another library has in backticks is no parameter of ours, and gets quotes.
    """
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    if first.endswith(":") and rest:
        first = f"{first} {rest[0].strip()}"
    return first.replace("`", "'")


def in_one_line(error: BaseException, most: int = 200) -> str:
    """Return so many characters of an error's text in one line, its name where it has none; backticks as above."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:most].replace("`", "'")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is short: Python's, or torch's on a CPU or on CUDA."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
    text = str(error).lower()
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in text for word in words)
