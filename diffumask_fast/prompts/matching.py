"""Find the phrases of classes in a text: whole words, the longest first, small and capital letters alike."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

from diffumask_fast.prompts.english import plural

IDEOGRAPHS = "\u2e80"  # from here on scripts whose words are not parted by spaces


class Matcher:
    """Finds phrases in texts, each of them also in the plural where it is an English noun.

    Args:
        phrases: at least one.

    Example:
        >>> list(Matcher(["dog", "hot dog", "犬"]).find("Two dogs and a hot dog, 黒い犬"))
        [('dogs', 'dog'), ('hot dog', 'hot dog'), ('犬', '犬')]
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        self._forms = {_folded(phrase): (phrase, phrase) for phrase in phrases}
        for phrase in phrases:
            if (many := plural(phrase)) is not None:
                self._forms.setdefault(_folded(many), (many, phrase))
        self._longest_first = sorted(self._forms, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join(map(re.escape, self._longest_first)))

    @property
    def forms(self) -> list[str]:
        """All words that are found: the phrases and their plurals."""
        return [form for form, _ in self._forms.values()]

    def find(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield (the words found, the phrase that they are a form of) in the text's order, none within another."""
        text, at = _folded(text), 0
        while found := self._pattern.search(text, at):
            start, form = found.start(), found[0]
            if not _is_whole(text, start, form):  # a shorter one may be
                shorter = (one for one in self._longest_first if text.startswith(one, start))
                form = next((one for one in shorter if _is_whole(text, start, one)), "")
            if form:
                yield self._forms[form]
            at = start + max(len(form), 1)


def phrase_in(text: str, phrases: Sequence[str]) -> str:
    """Return the words that stand for a class in a text: the first that are found, or the first phrase if none is.

    Args:
        text: a prompt.
        phrases: of the class.

    Example:
        >>> phrase_in("a photo of two puppies", ("dog", "puppy")), phrase_in("a photo", ("dog", "puppy"))
        ('puppies', 'dog')
    """
    return next(matcher(tuple(phrases)).find(text), (phrases[0], ""))[0]


@lru_cache(512)
def matcher(phrases: tuple[str, ...]) -> Matcher:
    """Return the matcher of some phrases, made once."""
    return Matcher(phrases)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _is_whole(text: str, start: int, form: str) -> bool:
    """Tell whether a form is no part of a longer word where it stands."""
    end = start + len(form)
    return not (_are_joined(text[start - 1 : start], form[0]) or _are_joined(text[end : end + 1], form[-1]))


def _are_joined(neighbour: str, edge: str) -> bool:
    return _is_of_word(edge) and (neighbour == "-" or _is_of_word(neighbour))


def _is_of_word(letter: str) -> bool:
    return letter.isalnum() if letter.isascii() else letter < IDEOGRAPHS and unicodedata.category(letter)[0] in "LMN"
