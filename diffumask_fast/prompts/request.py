"""What is to be drawn for one sample."""

import unicodedata
from dataclasses import dataclass

from diffumask_fast.errors import DiffuMaskError


def is_file_stem(text: str, also: str = "_-", limit: int = 200) -> bool:
    """Tell whether text is safe in a file name everywhere: letters and digits of any script and what `also` lists."""
    letters = text
    for letter in also:
        letters = letters.replace(letter, "")
    plain = letters.isascii() and letters.isalnum()
    return (
        (plain or all(unicodedata.category(letter)[0] in "LMN" for letter in letters))
        and unicodedata.category(text[:1] or "-")[0] in "LN"
        and len(text.encode()) <= limit
    )


def check_text(text: str, what: str) -> None:
    """Raise a DiffuMaskError if text holds what no UTF-8 file can hold, or a zero byte."""
    if "\0" in text or not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DiffuMaskError(f"{what} {text!r} is no readable text: write it in UTF-8")


def check_class(name: str) -> None:
    """Raise a DiffuMaskError if a class is named as what no class covers."""
    if name.strip().casefold() == "background":
        raise DiffuMaskError(f"{name!r} cannot be a class, for it is what no class covers: masks have it as 0")
    if name == "ignored":
        raise DiffuMaskError(f"{name!r} cannot be a class, for formats call pixels so that are 255: use another name")


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw.

    Args:
        key: unique in a run and safe as a file name: letters, digits, `_`, `-`, `+` and `.`, at most 200 bytes.
        prompt: the text to draw.
        negative_prompt: the text to keep away from.
        phrases: the words in the prompt whose objects are wanted, one per class.
        class_ids: the value in the mask for each phrase, 1 to 254.
        seed: of the image, 0 to 2^63 - 1.
        classes: names of the classes; the phrases where left out.

    Raises:
        DiffuMaskError: a field is out of range, or the fields do not fit together.

    Example:
        >>> Request("dog-000000", "a photo of a dog", "", ("dog",), (12,), seed=7).classes
        ('dog',)
    """

    key: str
    prompt: str
    negative_prompt: str
    phrases: tuple[str, ...]
    class_ids: tuple[int, ...]
    seed: int
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("phrases", "class_ids", "classes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "classes", self.classes or self.phrases)
        for text in (self.key, self.prompt, self.negative_prompt, *self.phrases, *self.classes):
            check_text(text, "the request's")
        for name in (*self.phrases, *self.classes):
            check_class(name)
        if not is_file_stem(self.key, "_-+."):
            raise DiffuMaskError(f"key {self.key!r} is no safe file name: use letters, digits, _, -, + and .")
        if not len(self.phrases) == len(self.class_ids) == len(self.classes) > 0:
            raise DiffuMaskError(f"{self.key}: give one class id and one name for each phrase, and at least one phrase")
        if not all(1 <= class_id <= 254 for class_id in self.class_ids):
            raise DiffuMaskError(f"{self.key}: class ids {self.class_ids} must be from 1 to 254")
        if not 0 <= self.seed < 2**63:
            raise DiffuMaskError(f"{self.key}: seed {self.seed} must be from 0 to 2^63 - 1")
