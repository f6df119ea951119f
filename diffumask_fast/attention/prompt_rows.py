"""Which rows of what a pipeline encoded are of its prompts: told by their content, for their order is its own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from diffumask_fast.attention.encoded import Encoded, Segment, calls_of_prompts
from diffumask_fast.errors import DiffuMaskError

NEGATIVE = "negative_"


class PromptRows(NamedTuple):
    """The rows of the prompts.

    Args:
        embeds: [Bc, T, E], what the prompts were encoded to.
        is_doubled: other rows were encoded to the same, as where a negative prompt is the prompt.
    """

    embeds: Tensor
    is_doubled: bool


Segments = Callable[[int], Sequence[Segment]]


def prompt_rows(pipe: Any, encoded: Encoded, segments: Segments) -> PromptRows:
    """Find the rows of the prompts among those that encode_prompt returned.

    They are those that the text encoders gave for the prompts' ids. Where the pipeline changes what these give, by
    weights as an example, it encodes once more with the prompts in the negative prompts' place: the rows of the prompts
    stay the same, and the others become the same as they are.

    Args:
        pipe: that encoded.
        encoded: what it encoded, and to what.
        segments: gives those of a sequence of so many tokens.

    Raises:
        DiffuMaskError: it is not known which rows are of the prompts, or of which prompt a row is.
    """
    num, copies = encoded.num, encoded.copies
    blocks = _blocks(encoded.result, num * copies)
    if not blocks:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(encoded.result) if isinstance(leaf, Tensor)]
        raise DiffuMaskError(
            f"{type(pipe).__name__} encoded {num} prompts, {copies} images of each, to {shapes}, and which rows of "
            "them are of the prompts is not known: use another pipeline"
        )
    if any(block.isnan().any() for block in blocks):
        raise DiffuMaskError(
            f"{type(pipe).__name__} encodes texts to values that are no numbers (weights that are damaged, or too "
            "large for fp16), so no image could be drawn: use `dtype=fp32`, or fetch the model again"
        )
    at = 0 if len(blocks) == 1 else _at_prompts(pipe, encoded, blocks, segments(blocks[0].shape[1]))
    if at is None:
        raise DiffuMaskError(
            f"which of the rows that {type(pipe).__name__} encodes are of the prompts, and which of the negative "
            "prompts, is not known: let its encode_prompt take both texts by the names prompt and negative_prompt, and "
            "encode both in the same way"
        )
    embeds = blocks[at].detach().clone()  # a callback may write over what was encoded
    images = embeds.unflatten(0, (num, copies))
    if not torch.equal(images, images[:, :1].expand_as(images)):
        raise DiffuMaskError(
            f"{type(pipe).__name__} does not put the {copies} images of a prompt side by side, and which row is of "
            "which prompt is not known: draw one image of each prompt"
        )
    others = blocks[:at] + blocks[at + 1 :]
    return PromptRows(embeds, any(torch.equal(other, embeds) for other in others))


def _blocks(result: Any, rows: int) -> list[Tensor]:
    """Cut all embeddings [n, T, E] that a pipeline returned to blocks of as many rows as the prompts have."""
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [block for x in leaves if x.ndim == 3 and x.shape[0] % rows == 0 for block in x.split(rows)]


def _at_prompts(pipe: Any, encoded: Encoded, blocks: list[Tensor], segments: Sequence[Segment]) -> int | None:
    """Return which block is of the prompts; None where that is not known."""
    for at, block in enumerate(blocks):
        if _is_encoded(pipe, encoded, block, segments):
            return at
    return _unchanged_by_negative(encoded, blocks)


def _is_encoded(pipe: Any, encoded: Encoded, block: Tensor, segments: Sequence[Segment]) -> bool:
    """Tell whether a block is made of what each of the text encoders gave for the prompts."""
    if (given := encoded.given) is not None:
        return _is_in(given, block, encoded.copies, used=0)
    found = []
    for start, length, tokenizers in segments:
        part, used = block[:, start : start + length], 0
        for name in tokenizers:
            own = calls_of_prompts(pipe, name, encoded, length)
            layers = [torch.cat(layer, 1) for layer in zip(*(call.states for call in own), strict=False)]
            found.append(any(_is_in(layer, part, encoded.copies, used) for layer in layers))
            used += layers[0].shape[-1] if layers else 0
    return bool(found) and all(found)


def _is_in(states: Tensor, block: Tensor, copies: int, used: int) -> bool:
    """Tell whether features of a block are these states, each row as often as it has images: the first ones, the last
    ones, or those after the ones that other encoders have used."""
    rows, width = states.to(block).repeat_interleave(copies, 0), states.shape[-1]
    return any(torch.equal(block[..., at : at + width], rows) for at in {0, used, block.shape[-1] - width})


def _unchanged_by_negative(encoded: Encoded, blocks: list[Tensor]) -> int | None:
    """Return the one block that another one becomes when the negative prompts are the prompts."""
    arguments = encoded.arguments
    negatives = [name for name in arguments if name.startswith(NEGATIVE) and name.removeprefix(NEGATIVE) in arguments]
    if not negatives:
        return None
    own = {name: arguments[name.removeprefix(NEGATIVE)] for name in negatives}
    again = _blocks(encoded.encode(own), blocks[0].shape[0])
    found = [
        at
        for at, block in enumerate(blocks)
        if any(torch.equal(block, other) for i, other in enumerate(again) if i != at)
    ]
    is_one = bool(found) and all(torch.equal(blocks[at], blocks[found[0]]) for at in found)
    return found[0] if is_one and len(again) == len(blocks) else None
