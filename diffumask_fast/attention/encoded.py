"""Where the phrases are among the tokens that a pipeline's text encoders were given."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffumask_fast.attention.phrases import PhraseNotFound, found_positions
from diffumask_fast.attention.spelling import Speller
from diffumask_fast.errors import DiffuMaskError


class TextCall(NamedTuple):
    """A call of a text encoder.

    Args:
        ids: [n, T].
        states: [n, T, E] each, all that it gave of this shape.
    """

    ids: Tensor
    states: list[Tensor]

    def parts(self, rows: int) -> Iterator["TextCall"]:
        """Cut a call to parts of so many rows: some pipelines encode prompts and negative prompts in one."""
        if self.ids.shape[0] % rows:
            return
        for start in range(0, self.ids.shape[0], rows):
            of = slice(start, start + rows)
            yield TextCall(self.ids[of], [states[of] for states in self.states])


class Segment(NamedTuple):
    """A part of the sequence that the denoiser sees.

    Args:
        start: its first position.
        length: the number of its positions.
        tokenizers: whose tokens stand there side by side, by name.
    """

    start: int
    length: int
    tokenizers: tuple[str, ...]


class Encoded(NamedTuple):
    """What a pipeline encoded.

    Args:
        arguments: of encode_prompt.
        result: what it returned.
        calls: name of a tokenizer -> the calls of its text encoder.
        encode: encodes again, with some of the arguments changed.
    """

    arguments: dict[str, Any]
    result: Any
    calls: dict[str, list[TextCall]]
    encode: Callable[[dict[str, Any]], Any]

    @property
    def given(self) -> Tensor | None:
        """The embeddings [B, T, E] that were given in the prompts' place."""
        return self.arguments.get("prompt_embeds")

    @property
    def num(self) -> int:
        """B, the number of prompts."""
        return len(self.texts("tokenizer") if self.given is None else self.given)

    @property
    def copies(self) -> int:
        """The number of images of each prompt."""
        return self.arguments.get("num_images_per_prompt") or 1

    def texts(self, tokenizer: str) -> list[str]:
        """Return the prompts that a tokenizer was given."""
        own = as_list(self.arguments.get(tokenizer.replace("tokenizer", "prompt")))
        return own or as_list(self.arguments["prompt"])


def encoded_positions(
    pipe: Any, encoded: Encoded, phrases: Sequence[Sequence[str]], segments: Sequence[Segment]
) -> list[list[list[int]]]:
    """Find the positions of each phrase in what was encoded, in all segments that have it.

    Args:
        pipe: whose tokenizers made the ids.
        encoded: by the pipeline.
        phrases: of each prompt.
        segments: of the sequence that the denoiser sees.

    Raises:
        PhraseNotFound: a phrase is in no segment.
        DiffuMaskError: it is not known at which positions the denoiser sees the tokens, or two text encoders of a
            segment have a phrase at different ones.
    """
    found = [_positions_in(pipe, encoded, phrases, segment) for segment in segments if segment.tokenizers]
    if not found:
        raise DiffuMaskError(
            f"{type(pipe).__name__} has no text encoder that could be watched, so the positions of words are unknown: "
            "give token_indices="
        )
    return [[_joined(parts) for parts in zip(*rows, strict=True)] for rows in zip(*found, strict=True)]


def _positions_in(
    pipe: Any, encoded: Encoded, phrases: Sequence[Sequence[str]], segment: Segment
) -> list[list[list[int] | PhraseNotFound]]:
    """Find the positions of each phrase that one segment has; an error in the place of the others."""
    found = []
    for name in segment.tokenizers:
        tokenizer = getattr(pipe, name)
        calls = calls_of_prompts(pipe, name, encoded, segment.length)
        if not calls:
            shapes = ", ".join(str(tuple(call.ids.shape)) for call in encoded.calls[name]) or "nothing"
            raise DiffuMaskError(
                f"the text encoder was given {shapes} for prompts that the model sees as {segment.length} tokens, so "
                "the positions of words are unknown: give token_indices="
            )
        ids = torch.cat([call.ids.cpu() for call in calls], 1).tolist()
        rows = [_converted(pipe, list(row), tokenizer) for row in phrases]
        found.append(found_positions(tokenizer, ids, encoded.texts(name), rows, segment.start))
    return [[_same(parts) for parts in zip(*rows, strict=True)] for rows in zip(*found, strict=True)]


def _same(parts: Sequence[list[int] | PhraseNotFound]) -> list[int] | PhraseNotFound:
    """Return what all encoders of a segment have; an error where one of them does not have the phrase."""
    missing = next((part for part in parts if isinstance(part, PhraseNotFound)), None)
    if missing is None and any(part != parts[0] for part in parts):
        raise DiffuMaskError(
            "the two text encoders have the phrases at different positions: give both the same prompt, or give "
            "token_indices="
        )
    return missing or parts[0]


def _joined(parts: Sequence[list[int] | PhraseNotFound]) -> list[int]:
    """Join the positions of a phrase in all segments; raise an error where none has it."""
    positions = [part for part in parts if not isinstance(part, PhraseNotFound)]
    if positions:
        return [one for part in positions for one in part]
    raise max((part for part in parts if isinstance(part, PhraseNotFound)), key=lambda error: error.truncated)


def calls_of_prompts(pipe: Any, name: str, encoded: Encoded, length: int) -> list[TextCall]:
    """Return the call of a text encoder for the prompts: one, or consecutive ones for prompts in several chunks.

    Of texts that could be the prompts' by their letters, they are those with the most, for a pipeline may take brackets
    away and has others encoded beside them; of the same letters, those whose ids are the tokenizer's own. None where
    two are left.

    Args:
        pipe: whose tokenizer it is.
        name: of the tokenizer.
        encoded: by the pipeline.
        length: T of all calls together.
    """
    tokenizer = getattr(pipe, name)
    prompts = _converted(pipe, encoded.texts(name), tokenizer)
    calls = [part for call in encoded.calls[name] for part in call.parts(len(prompts))]
    speller = Speller(tokenizer)
    around = speller.special - speller.unknown
    full = [_without(around, speller.ids(prompt)) for prompt in prompts]
    best: list[tuple[list[list[int]], list[TextCall]]] = []
    most = (0, False)
    for chunks in _runs(calls, length):
        ids = torch.cat([chunk.ids.cpu() for chunk in chunks], 1).tolist()
        texts = [_letters(speller.spelt(row).text) for row in ids]
        if not all(_is_within(text, _letters(prompt)) for text, prompt in zip(texts, prompts, strict=True)):
            continue
        kept = [_without(around, row) for row in ids]
        score = (sum(map(len, texts)), all(row == own[: len(row)] for row, own in zip(kept, full, strict=True)))
        if score > most or not best:
            best, most = [], score
        if score == most:
            best.append((ids, chunks))
    return best[0][1] if best and all(ids == best[0][0] for ids, _ in best) else []


def _runs(calls: list[TextCall], length: int) -> Iterator[list[TextCall]]:
    """Give all consecutive calls that make up a length together."""
    for start in range(len(calls)):
        width = 0
        for end in range(start, len(calls)):
            width += calls[end].ids.shape[1]
            if width == length:
                yield calls[start : end + 1]
            if width >= length:
                break


def _without(around: set[int], ids: list[int]) -> list[int]:
    return [one for one in ids if one not in around]


def _converted(pipe: Any, texts: list[str], tokenizer: Any) -> list[str]:
    """Write the several tokens of a textual inversion in the place of its name."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return texts if convert is None else convert(texts, tokenizer)


def as_list(prompt: Any) -> list[str]:
    """Return prompts as a list, none as an empty one."""
    return [prompt] if isinstance(prompt, str) else list(prompt or [])


def _letters(text: str) -> str:
    """Return what every tokenizer keeps of a text: letters and digits, without case and accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if c.isalnum())


def _is_within(part: str, text: str) -> bool:
    """Tell whether all characters of a part occur in a text in this order; the pipeline may have taken some away."""
    rest = iter(text)
    return all(character in rest for character in part)
