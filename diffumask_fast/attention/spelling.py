"""What tokens say, character by character, whatever kind of tokenizer made them."""

import codecs
import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

END_OF_WORD = "</w>"  # CLIP's
START_OF_WORD = "\u2581"  # SentencePiece's
WITHIN_WORD = "##"  # WordPiece's
BYTE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's for what is not in its vocabulary
IDEOGRAPHS = "\u2e80"  # from here on scripts whose words are not parted by spaces
UNKNOWN = "\ufffd"
APART = "\0"  # stands for special tokens, which no phrase crosses


class Spelt(NamedTuple):
    """What tokens say, in small letters and with single spaces.

    Args:
        text: as the tokenizer sees it: some part words by spaces of their own.
        positions: of each character, the positions of its tokens; none of a space.
    """

    text: str
    positions: list[tuple[int, ...]]

    def occurrences(self, wanted: str) -> list[int]:
        """Return the positions of all tokens of the wanted words where they stand whole, without overlaps.

        Not so where a token of them has letters of other words as well.
        """
        text, found, at = self.text, set[int](), 0
        if not wanted or UNKNOWN in wanted or APART in wanted:
            return []
        while (at := text.find(wanted, at)) >= 0:
            end = at + len(wanted)
            own = {position for one in self.positions[at:end] for position in one}
            is_whole = not (_are_joined(text[at - 1 : at], text[at]) or _are_joined(text[end - 1], text[end : end + 1]))
            if is_whole and not self._has_letters_around(at, end, own):
                found |= own
                at = end
            else:
                at += 1
        return sorted(found)

    def _has_letters_around(self, start: int, end: int, own: set[int]) -> bool:
        around = (*range(start), *range(end, len(self.text)))
        return any(not own.isdisjoint(self.positions[i]) and _is_of_word(self.text[i]) for i in around)


class Speller:
    """Spells the tokens of a tokenizer: CLIP's, byte-level BPE, SentencePiece's or WordPiece's.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = set(tokenizer.get_added_vocab().values())
        self.special = set(tokenizer.all_special_ids)
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self.unknown = {tokenizer.unk_token_id} - ends
        tokens = tokenizer.convert_ids_to_tokens(self.ids("é a"))
        self.mark, self.alphabet = _mark(tokens), _alphabet(tokens)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text by itself, without special ones around it."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def words(self, text: str) -> str:
        """Return a text as it is spelt by its tokens."""
        return self.spelt(self.ids(text)).text.strip()

    def spelt(self, ids: Sequence[int]) -> Spelt:
        """Put the characters of tokens together, for pieces may end within a word, and within a character."""
        characters: list[str] = []
        positions: list[tuple[int, ...]] = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        begun: tuple[int, ...] = ()  # the tokens of a character that is not complete yet
        further = self._further_vectors(ids)
        for position, piece in enumerate(self._pieces(ids)):
            if position in further:  # it says what the first one says
                positions = [(*one, position) if further[position] in one else one for one in positions]
                continue
            for byte in piece:
                found = decoder.decode(bytes((byte,)))
                begun = (*begun, position) if begun[-1:] != (position,) else begun
                for character in found:
                    if not character.isspace():
                        folded = character.casefold()
                        characters += folded
                        positions += [begun] * len(folded)
                    elif characters[-1:] != [" "]:
                        characters.append(" ")
                        positions.append(())
                if found:
                    begun = (position,) if decoder.getstate()[0] else ()
        return Spelt("".join(characters), positions)

    def _further_vectors(self, ids: Sequence[int]) -> dict[int, int]:
        """Return the positions of a textual inversion's vectors after its first -> the position of that."""
        found, first = {}, 0
        tokens = self.tokenizer.convert_ids_to_tokens(list(ids))
        for position, one in enumerate(ids):
            if one in self.added and position and tokens[position] == f"{tokens[first]}_{position - first}":
                found[position] = first
            else:
                first = position
        return found

    def _pieces(self, ids: Sequence[int]) -> Iterator[bytes]:
        """Give the utf-8 of each token, with spaces between words in the place of the tokenizer's marks."""
        for one, token in zip(ids, self.tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
            if one in self.unknown:
                yield (f" {UNKNOWN} " if self.mark == WITHIN_WORD else UNKNOWN).encode()
            elif one in self.special:
                yield APART.encode()
            elif isinstance(token, bytes):
                yield token
            elif byte := BYTE.fullmatch(token):
                yield bytes((int(byte[1], 16),))
            elif one in self.added:
                yield f" {token} ".encode()
            else:
                text = _with_spaces(token, self.mark)
                yield b"".join(bytes((self.alphabet[c],)) if c in self.alphabet else c.encode() for c in text)


def _mark(tokens: Sequence[str | bytes]) -> str:
    """Return what marks words in tokens, found on those of a text that ends with a word of one letter."""
    last = tokens[-1] if tokens else ""
    if isinstance(last, bytes):
        return " "
    if last.endswith(END_OF_WORD):
        return END_OF_WORD
    marks = (START_OF_WORD, _characters_of_bytes()[ord(" ")])
    return next((mark for mark in marks if last.startswith(mark)), WITHIN_WORD)


def _alphabet(tokens: Sequence[str | bytes]) -> dict[str, int]:
    """Return the byte that each character stands for, found on tokens of an é; nothing where it stands for itself."""
    characters = _characters_of_bytes()
    first = characters["é".encode()[0]]
    is_of_bytes = any(isinstance(token, str) and first in token for token in tokens)
    return {character: byte for byte, character in enumerate(characters)} if is_of_bytes else {}


def _with_spaces(token: str, mark: str) -> str:
    if mark == END_OF_WORD:
        return token.removesuffix(mark) + " " * token.endswith(mark)
    if mark == WITHIN_WORD:
        return token.removeprefix(mark) if token.startswith(mark) else f" {token}"
    return token.replace(mark, " ")


@functools.cache
def _characters_of_bytes() -> list[str]:
    """Return the 256 characters that stand for bytes in byte-level BPE: their own where it can be seen."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def _are_joined(left: str, right: str) -> bool:
    """Tell whether two neighbours are of one word."""
    return all(c == UNKNOWN or (c != "" and c < IDEOGRAPHS and _is_of_word(c)) for c in (left, right))


def _is_of_word(c: str) -> bool:
    return c == UNKNOWN or unicodedata.category(c)[0] in "LMN"
