"""From a phrase to its token columns, exact for byte-pair tokens, repeats and several words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.errors import DiffuMaskError

END_OF_WORD = "</w>"


class PhraseNotFound(DiffuMaskError):
    """Name the phrase that is not among the tokens that the text encoder sees.

    Attributes are `phrase`, `prompt`, and `truncated`: the phrase is in the prompt, but past its last token.
    """

    def __init__(self, phrase: str, prompt: str, length: int, truncated: bool) -> None:
        why = f"only past token {length}, where the prompt is cut off" if truncated else "not there as whole words"
        super().__init__(f"the phrase {phrase!r} is {why}, in the prompt {prompt!r}: reword or shorten the prompt")
        self.phrase, self.prompt, self.truncated = phrase, prompt, truncated


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
    if all(isinstance(p, str) for p in phrases):
        return [list(phrases) for _ in range(num)]
    if any(isinstance(p, str) for p in phrases):
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
        tokenizer: of the pipeline that encodes the prompts.
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
    phrases = per_prompt(phrases, len(prompts))
    limit = min(length, tokenizer.model_max_length)
    encoded = tokenizer(prompts, verbose=False)["input_ids"]
    wanted = {p: tokenizer(p, add_special_tokens=False)["input_ids"] for p in {p for row in phrases for p in row}}
    indices = []
    for prompt, ids, row in zip(prompts, encoded, phrases, strict=True):
        starts_word = _word_starts(tokenizer, ids)
        indices.append([])
        for phrase in row:
            found = _occurrences(ids, wanted[phrase], starts_word)
            seen = [span for span in found if span.stop < limit]
            if not seen:
                raise PhraseNotFound(phrase, prompt, limit, truncated=bool(found))
            indices[-1].append([position for span in seen for position in span])
    return token_columns(indices, length=length, pad_to=pad_to)


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


def _word_starts(tokenizer: Any, ids: list[int]) -> list[bool]:
    """Tell for each token whether a word begins there: after a token that ends in </w>, a special or an added one."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if not any(t.endswith(END_OF_WORD) for t in tokens):
        return [True] * len(ids)
    whole = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ends = [i in whole or t.endswith(END_OF_WORD) for i, t in zip(ids, tokens, strict=True)]
    return [True, *ends[:-1]]


def _occurrences(ids: list[int], wanted: list[int], starts_word: list[bool]) -> list[range]:
    """Return the positions of the wanted ids in a row, each time from the beginning of a word, without overlaps."""
    found, at = [], 0
    while wanted and at + len(wanted) <= len(ids):
        if starts_word[at] and ids[at : at + len(wanted)] == wanted:
            found.append(range(at, at + len(wanted)))
            at += len(wanted)
        else:
            at += 1
    return found
