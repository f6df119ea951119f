"""Where the phrases are among the tokens that a pipeline's text encoders were given."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.attention.phrases import phrase_positions, spelling
from diffumask_fast.errors import DiffuMaskError


def encoded_positions(
    pipe: Any,
    ids: dict[str, list[Tensor]],
    prompts: list[str],
    phrases: Sequence[Sequence[str]],
    length: int,
    prompts_2: list[str] | None = None,
) -> list[list[list[int]]]:
    """Find the positions of each phrase in what was encoded.

    Args:
        pipe: whose tokenizers made the ids.
        ids: name of a tokenizer -> the ids that its text encoder was given, call by call.
        prompts: B prompts.
        phrases: of each prompt.
        length: T, the number of token positions that the UNet sees.
        prompts_2: what the second text encoder was given; None is the same.

    Raises:
        PhraseNotFound: a phrase is not among the tokens.
        DiffuMaskError: it is not known at which positions the UNet sees the tokens, or two text encoders have a phrase
            at different ones.
    """
    found = []
    for name, calls in ids.items():
        tokenizer = getattr(pipe, name)
        convert = getattr(pipe, "maybe_convert_prompt", lambda text, _: text)  # a textual inversion of several tokens
        own = prompts_2 if prompts_2 and name == "tokenizer_2" else prompts
        texts, rows = convert(own, tokenizer), [convert(list(row), tokenizer) for row in phrases]
        found.append(phrase_positions(tokenizer, _of_prompts(tokenizer, calls, texts, length), own, rows))
    if not found:
        raise DiffuMaskError(
            f"{type(pipe).__name__} has no text encoder that could be watched, so the positions of words are unknown: "
            "give token_indices="
        )
    if any(one != found[0] for one in found):
        raise DiffuMaskError(
            "the two text encoders have the phrases at different positions: give both the same prompt, or give "
            "token_indices="
        )
    return found[0]


def _of_prompts(tokenizer: Any, calls: list[Tensor], prompts: list[str], length: int) -> list[list[int]]:
    """Return the ids [B, T] of the prompts: those of one call, or of consecutive ones for prompts in several chunks."""
    candidates = []
    for start in range(len(calls)):
        chunks, width = [], 0
        for call in calls[start:]:
            if width == length or call.shape[0] != len(prompts):
                break
            chunks.append(call)
            width += call.shape[1]
        if width == length:
            rows = torch.cat([chunk.cpu() for chunk in chunks], 1).tolist()
            texts = [spelling(tokenizer, row) for row in rows]
            if all(_is_within(text, _letters(prompt)) for text, prompt in zip(texts, prompts, strict=True)):
                candidates.append((sum(map(len, texts)), rows))
    if not candidates:
        shapes = ", ".join(str(tuple(call.shape)) for call in calls) or "nothing"
        raise DiffuMaskError(
            f"the text encoder was given {shapes} for prompts that the UNet sees as {length} tokens, so the positions "
            "of words are unknown: give token_indices="
        )
    return max(candidates, key=lambda one: one[0])[1]


def _letters(text: str) -> str:
    """Return what every tokenizer keeps of a text: plain letters and digits, without case and accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if c.isascii() and c.isalnum())


def _is_within(part: str, text: str) -> bool:
    """Tell whether all characters of a part occur in a text in this order; the pipeline may have taken some away."""
    rest = iter(text)
    return all(character in rest for character in part)
