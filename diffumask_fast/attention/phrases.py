"""From a phrase to its token columns: whole words among the token ids that were encoded."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from diffumask_fast.attention.spelling import APART, UNKNOWN, Speller
from diffumask_fast.errors import DiffuMaskError


class PhraseNotFound(DiffuMaskError):
    """Name the phrase that is not among the tokens that the text encoder sees.

    Attributes are `phrase`, `prompt`, `truncated`: the phrase is in the prompt, but past its last token, and `unknown`:
    the tokenizer has no tokens for it.
    """

    def __init__(self, phrase: str, prompt: str, length: int, truncated: bool, unknown: bool = False) -> None:
        why = f"only past token {length}, where the prompt is cut off" if truncated else "not there as whole words"
        why = "not known to the tokenizer" if unknown else why
        super().__init__(f"the phrase {phrase!r} is {why}, in the prompt {prompt!r}: reword or shorten the prompt")
        self.phrase, self.prompt, self.truncated, self.unknown = phrase, prompt, truncated, unknown


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
    if not isinstance(phrases, Iterable) or isinstance(phrases, bytes):
        raise DiffuMaskError(f"phrases are {phrases!r}: give a list of words of the prompt, such as ['dog']")
    phrases = [phrases] if isinstance(phrases, str) else list(phrases)
    words = [p for p in phrases if isinstance(p, str)]
    for row in [words, *(p for p in phrases if not isinstance(p, str))]:
        if not isinstance(row, list | tuple) or not all(isinstance(one, str) for one in row):
            raise DiffuMaskError(f"{row!r} is no phrase, nor a list of phrases: give words of the prompt")
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
    found = found_positions(tokenizer, encoded, prompts, phrases)
    missing = next((one for row in found for one in row if isinstance(one, PhraseNotFound)), None)
    if missing is not None:
        raise missing
    return cast(list[list[list[int]]], found)


def found_positions(
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    prompts: Sequence[str],
    phrases: Sequence[Sequence[str]],
    start: int = 0,
) -> list[list[list[int] | PhraseNotFound]]:
    """Find positions as phrase_positions does, with an error in the place of what is not among the ids.

    Args:
        tokenizer: as there.
        encoded: as there.
        prompts: as there.
        phrases: as there.
        start: the position of the first id.
    """
    speller = Speller(tokenizer)
    wanted = {phrase: speller.words(phrase) for row in phrases for phrase in row}
    indices: list[list[list[int] | PhraseNotFound]] = []
    for prompt, ids, row in zip(prompts, encoded, phrases, strict=True):
        spelt = speller.spelt(ids)
        indices.append([])
        for phrase in row:
            found = spelt.occurrences(wanted[phrase])
            if found:
                indices[-1].append([start + position for position in found])
                continue
            whole = speller.spelt(speller.ids(prompt))
            unknown = not wanted[phrase] or not {UNKNOWN, APART}.isdisjoint(wanted[phrase])
            truncated = bool(whole.occurrences(wanted[phrase]))
            indices[-1].append(PhraseNotFound(phrase, prompt, len(ids), truncated, unknown))
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
