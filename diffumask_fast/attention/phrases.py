"""From a phrase to its token columns: whole words among the token ids that were encoded."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError

END_OF_WORD = "</w>"  # CLIP's
BYTES = "Ġ"  # before a word of byte-level BPE
STARTS_OF_WORD = ("▁", BYTES)  # the first is SentencePiece's
WITHIN_WORD = "##"  # WordPiece's
IDEOGRAPHS = "\u2e80"  # from here on scripts whose words are not parted by spaces


class PhraseNotFound(DiffuMaskError):
    """Name the phrase that is not among the tokens that the text encoder sees.

    Attributes are `phrase`, `prompt`, and `truncated`: the phrase is in the prompt, but past its last token.
    """

    def __init__(self, phrase: str, prompt: str, length: int, truncated: bool) -> None:
        why = f"only past token {length}, where the prompt is cut off" if truncated else "not there as whole words"
        super().__init__(f"the phrase {phrase!r} is {why}, in the prompt {prompt!r}: reword or shorten the prompt")
        self.phrase, self.prompt, self.truncated = phrase, prompt, truncated


class Word(NamedTuple):
    """A word among tokens; its text is None where a token of it is unknown, or where it only parts other words."""

    text: str | None
    positions: list[int]


def per_prompt(phrases: str | Sequence[str] | Sequence[Sequence[str]], num: int) -> list[list[str]]:
    """Give each of the prompts its own list of phrases: one list counts for all of them.

    Args:
        phrases: a phrase, a list of phrases, or a list of lists, one for each prompt.
        num: number of prompts.

    Returns:
        num lists of phrases.

    Raises:
        DiffuMaskError: the number of lists is not the number of prompts.
    """
    phrases = [phrases] if isinstance(phrases, str) else list(phrases)
    words = [p for p in phrases if isinstance(p, str)]
    if len(words) == len(phrases):
        return [list(words) for _ in range(num)]
    if words:
        raise DiffuMaskError(f"phrases must be one list for all prompts or a list for each, not a mixture: {phrases}")
    if len(phrases) != num:
        raise DiffuMaskError(f"there are {len(phrases)} lists of phrases for {num} prompts: give one for each prompt")
    return [list(p) for p in phrases]


def phrase_columns(
    tokenizer: Any,
    prompts: Sequence[str],
    phrases: str | Sequence[str] | Sequence[Sequence[str]],
    *,
    length: int,
    pad_to: int | None = None,
) -> Tensor:
    """Find the tokens of each phrase in each prompt, whole words only, in all places where it occurs.

    Args:
        tokenizer: of a pipeline that encodes a prompt as it is, padded and cut off to the tokenizer's own length.
        prompts: B prompts.
        phrases: one list of phrases for all prompts, or one list for each of them.
        length: T, the number of token positions that the UNet sees.
        pad_to: K of the result; None is the longest list of phrases.

    Returns:
        select [B, T, K] fp32: 1/n at each of the n tokens of a phrase, columns of zeros after a prompt's last phrase.

    Raises:
        PhraseNotFound: a phrase is not among the first `length` tokens of its prompt.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = per_prompt(phrases, len(prompts))
    limit = min(length, tokenizer.model_max_length)
    padding = "max_length" if tokenizer.pad_token is not None else False
    encoded = tokenizer(prompts, padding=padding, max_length=limit, truncation=True)["input_ids"]
    indices = phrase_positions(tokenizer, encoded, prompts, rows)
    return token_columns(indices, length=length, pad_to=pad_to)


def phrase_positions(
    tokenizer: Any, encoded: Sequence[Sequence[int]], prompts: Sequence[str], phrases: Sequence[Sequence[str]]
) -> list[list[list[int]]]:
    """Find the positions of each phrase among the ids that were encoded.

    Args:
        tokenizer: that made the ids.
        encoded: the ids of each prompt, with all special ones.
        prompts: what they were made of.
        phrases: of each prompt.

    Raises:
        PhraseNotFound: a phrase is not among the ids.
    """
    wanted = {phrase: [w.text for w in _words(tokenizer, own_ids(tokenizer, phrase))] for p in phrases for phrase in p}
    indices: list[list[list[int]]] = []
    for prompt, ids, row in zip(prompts, encoded, phrases, strict=True):
        words = list(_words(tokenizer, ids))
        indices.append([])
        for phrase in row:
            found = _occurrences(words, wanted[phrase])
            if not found:
                whole = list(_words(tokenizer, own_ids(tokenizer, prompt)))
                raise PhraseNotFound(phrase, prompt, len(ids), truncated=bool(_occurrences(whole, wanted[phrase])))
            indices[-1].append(found)
    return indices


def token_columns(indices: Sequence[Sequence[Sequence[int]]], *, length: int, pad_to: int | None = None) -> Tensor:
    """Weigh given token positions: what phrase_columns does once it knows where the phrases are.

    Args:
        indices: for each of B prompts and each of its phrases, positions among the tokens (the start token is 0).
        length: T, the number of token positions.
        pad_to: K of the result; None is the longest list of phrases.

    Returns:
        select [B, T, K] fp32.

    Raises:
        DiffuMaskError: a position is outside the tokens, a phrase has none, or there are more phrases than pad_to.
    """
    most = max((len(row) for row in indices), default=0)
    width = most if pad_to is None else pad_to
    if not most:
        raise DiffuMaskError("there are no phrases: name at least one word of a prompt")
    if most > width:
        raise DiffuMaskError(f"a prompt has {most} phrases, room was asked for {width}: raise pad_to")
    select = torch.zeros(len(indices), length, width)
    for b, row in enumerate(indices):
        for column, positions in enumerate(row):
            if not positions or min(positions) < 0 or max(positions) >= length:
                raise DiffuMaskError(f"token positions {list(positions)} are not among 0 to {length - 1}")
            select[b, list(positions), column] = 1 / len(positions)
    return select


def spelling(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the plain letters and digits of tokens, in small letters; those that stand for bytes have none."""
    special, mark = set(tokenizer.all_special_ids), _word_mark(tokenizer)
    pieces = [
        _piece(token, mark)[1] for one, token in zip(ids, _tokens(tokenizer, ids), strict=True) if one not in special
    ]
    plain = "".join(piece for piece in pieces if not re.fullmatch("<0x[0-9A-F]{2}>", piece))
    return "".join(c for c in plain.lower() if c.isascii() and c.isalnum())


def own_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text by itself, without special ones around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _words(tokenizer: Any, ids: Sequence[int]) -> Iterator[Word]:
    """Join tokens to words, by the marks of the tokenizer's kind, and where letters and other characters meet."""
    added, special = set(tokenizer.get_added_vocab().values()), set(tokenizer.all_special_ids)
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    mark = _word_mark(tokenizer)
    word = Word("", [])
    ended = True
    for position, (one, token) in enumerate(zip(ids, _tokens(tokenizer, ids), strict=True)):
        if one in unknown:
            starts, piece, ends = mark == WITHIN_WORD, None, mark == WITHIN_WORD
        elif one in special or one in added:
            starts, piece, ends = True, None if one in special else token, True
        else:
            starts, piece, ends = _piece(token, mark)
        if word.positions and (ended or starts or not _joined(word.text, piece, mark)):
            yield word
            word = Word("", [])
        text = None if word.text is None or piece is None else word.text + piece.casefold()
        word, ended = Word(text, [*word.positions, position]), ends
    if word.positions:
        yield word


def _tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    return [token.decode("utf-8", "replace") if isinstance(token, bytes) else token for token in tokens]


def _piece(token: str, mark: str) -> tuple[bool, str, bool]:
    """Return whether a word starts with a token, the token's own characters, and whether a word ends with it."""
    if mark == END_OF_WORD:
        return False, token.removesuffix(mark), token.endswith(mark)
    if mark == WITHIN_WORD:
        return not token.startswith(mark), token.removeprefix(mark), False
    return token.startswith(mark), token.removeprefix(mark), False


def _word_mark(tokenizer: Any) -> str:
    """Return what marks words in a tokenizer's tokens, found on its tokens for two short words."""
    last = (_tokens(tokenizer, own_ids(tokenizer, "a a")) or [""])[-1]
    if last.endswith(END_OF_WORD):
        return END_OF_WORD
    return next((mark for mark in STARTS_OF_WORD if last.startswith(mark)), WITHIN_WORD)


def _joined(text: str | None, piece: str | None, mark: str) -> bool:
    """Tell whether two neighbours are of one word as far as their characters say."""
    if not text or not piece or mark not in STARTS_OF_WORD:  # other tokenizers part such words themselves
        return True
    pair = text[-1], piece[0]
    if mark == BYTES:  # whose other characters stand for bytes
        return all(c.isalnum() or not c.isascii() for c in pair)
    return all(unicodedata.category(c)[0] in "LMN" and c < IDEOGRAPHS for c in pair)


def _occurrences(words: Sequence[Word], wanted: Sequence[str | None]) -> list[int]:
    """Return the positions of all tokens of the wanted words in a row, without overlaps; an unknown word is none."""
    positions: list[int] = []
    at = 0
    while wanted and None not in wanted and at + len(wanted) <= len(words):
        here = words[at : at + len(wanted)]
        if [word.text for word in here] == list(wanted):
            positions += [position for word in here for position in word.positions]
            at += len(wanted)
        else:
            at += 1
    return positions
