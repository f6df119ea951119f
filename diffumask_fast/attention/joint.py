"""Joint attention of text and image: what its layers read and write, and the processors that do so for one call."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor

from diffumask_fast.attention.own_product import OwnProduct, Products, taking_a_tap
from diffumask_fast.attention.tap import Levels
from diffumask_fast.errors import DiffuMaskError

# whose one product is over the image's tokens first, and over the text's first
IMAGE_FIRST = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0)
TEXT_FIRST = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)
LEVEL = "0"  # the only one
SCALE = 2.0**12  # of phrases: fp16 has few digits of a probability among thousands of keys


class JointTap:
    """Carry columns to the joint layers of one call and their maps back; born and dies inside that call.

    One product gives both: the columns of the text's keys are the phrases, those of the image's keys the earlier maps.

    Args:
        select: [Bc, T, K], the weight of each token in each phrase.
        prior: level -> [Bc, M, N], what to propagate.
        first: the first conditional row.
        num_image: how many tokens the layers have of the image: N, and those of other images after it.
        num_pixels: N.
        share_of_text: whether each pixel's maps are shares of what it gives to all of the text.

    Attributes:
        image: [Bc, N, M], the columns of layers on the image alone.
        image_first: [Bc, N + T, M + K], those of layers that have the image's tokens first.
        text_first: [Bc, T + N, M + K], those of layers that have the text's tokens first.
    """

    def __init__(
        self, select: Tensor, prior: Levels, first: int, num_image: int, num_pixels: int, share_of_text: bool = False
    ) -> None:
        self.first = first
        self.num_phrases = select.shape[2]
        self.num_text = select.shape[1]
        self.num_pixels = num_pixels
        self.share_of_text = share_of_text
        select = select * SCALE
        if share_of_text:
            select = torch.cat([select, torch.full_like(select[..., :1], SCALE)], 2)
        self._maps_scale = 1.0 if share_of_text else SCALE
        prior, self._prior_scale = _to_one(prior)
        self.image = _over_all_tokens(prior, select, num_image)
        blocks = F.pad(self.image, (0, select.shape[2])), F.pad(select, (self.image.shape[2], 0))
        self.image_first, self.text_first = torch.cat(blocks, 1), torch.cat(blocks[::-1], 1)
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def put(self, maps: Tensor, text_first: bool) -> None:
        """Keep what a joint layer's columns gave, [Bc, M + K, all tokens]."""
        start = self.num_text if text_first else 0
        maps, earlier = maps[..., start : start + self.num_pixels], self.image.shape[2]
        self._add("maps", maps[:, earlier : earlier + self.num_phrases] / self._maps_scale)
        self.put_image(maps[:, :earlier])

    def put_image(self, propagated: Tensor) -> None:
        """Keep what the columns [Bc, M, N] of a layer on the image alone gave."""
        if propagated.shape[1]:
            self._add("propagated", propagated[..., : self.num_pixels] * self._prior_scale)

    def means(self, name: str) -> Levels:
        """Return the mean of the layers that ran: of "maps" or of "propagated"."""
        total, count = self._sums.get(name, (None, 0))
        return {} if total is None else {LEVEL: total / count}

    def _add(self, name: str, maps: Tensor) -> None:
        total, count = self._sums.get(name, (None, 0))
        self._sums[name] = (maps if total is None else total + maps, count + 1)


def _to_one(prior: Levels) -> tuple[Levels, Tensor | float]:
    """Return earlier maps, each divided by the power of two above its maximum, and these powers, [Bc, M, 1]."""
    if LEVEL not in prior:
        return {}, 1.0
    maps = prior[LEVEL]
    powers = torch.ldexp(torch.ones_like(maps[..., :1]), maps.amax(2, keepdim=True).frexp().exponent)
    return {LEVEL: maps / powers}, powers


def _over_all_tokens(prior: Levels, select: Tensor, num_image: int) -> Tensor:
    """Return the columns [Bc, N, M] of the image's keys, zeros for tokens of other images."""
    if LEVEL not in prior:
        return select.new_zeros(select.shape[0], num_image, 0)
    columns = prior[LEVEL].transpose(1, 2)
    return F.pad(columns, (0, 0, 0, num_image - columns.shape[1]))


class _JointProducts(Products):
    """Products whose last column is the text's share of each head, where that is asked for."""

    tap: JointTap
    is_joint: bool

    def over_heads(self, read: Tensor) -> Tensor:
        """Return the mean over the heads, of shares of the text where that is asked for."""
        if not (self.is_joint and self.tap.share_of_text):
            return super().over_heads(read)
        read, at = read.float(), self.tap.image.shape[2]
        shares = read[..., at:-1] / read[..., -1:].clamp_min(torch.finfo(torch.float32).tiny)
        return torch.cat([read[..., :at], shares], -1).mean(1)


class _JointWithMaps:
    """Stands for a joint layer's own processor: that draws, and its own product gives the maps too."""

    def __init__(self, processor: Any, is_joint: bool) -> None:
        self.processor = processor
        self.is_joint = is_joint
        self.text_first = isinstance(processor, TEXT_FIRST)
        self.product = OwnProduct(_JointProducts())

    @torch.compiler.disable  # it looks into the processor's product, which a compiler cannot trace
    def draw(
        self, attn: Any, hidden_states: Tensor, context: Tensor | None, tap: JointTap, args: Any, kwargs: Any
    ) -> Any:
        """Let the layer's own processor draw, and give the tap what its product's columns gave."""

        def own() -> Any:
            return self.processor(attn, hidden_states, context, *args, **kwargs)

        columns = self._columns(tap)
        if not columns.shape[2]:
            return own()
        found = self.product.found
        assert isinstance(found, _JointProducts)
        found.tap, found.is_joint = tap, self.is_joint
        found.begin(attn.heads, (hidden_states.shape[0], columns.shape[1]), columns, tap.first)
        with self.product:
            out = own()
        maps = found.only()
        if maps is None:
            raise DiffuMaskError(
                f"{type(self.processor).__name__} does not make one product over all {columns.shape[1]} tokens by "
                "torch's scaled_dot_product_attention, so what it attends to cannot be read: use the model's own "
                'processors and set_attention_backend("native")'
            )
        if self.is_joint:
            tap.put(maps, self.text_first)
        else:
            tap.put_image(maps)
        return out

    def _columns(self, tap: JointTap) -> Tensor:
        if not self.is_joint:
            return tap.image
        return tap.text_first if self.text_first else tap.image_first


def joint_with_maps(processor: Any, is_joint: bool) -> Any:
    """Wrap the processor of a layer: it draws, and its own product gives the maps too.

    Args:
        processor: what the layer has.
        is_joint: whether its keys are text and image; else they are the image alone.

    Raises:
        DiffuMaskError: the order of its keys is not known.
    """
    kind: Any = type(processor)
    if not any(kind.__call__ is known.__call__ for known in (*IMAGE_FIRST, *TEXT_FIRST)):
        raise DiffuMaskError(
            f"the order of text and image in {kind.__name__} is not known, so what it attends to cannot be read: use "
            "the model's own processors, not those of PAG, xformers and the like"
        )
    return _class_with_maps(kind)(processor, is_joint)


@functools.cache
def _class_with_maps(kind: Any) -> type:
    def call(
        self: _JointWithMaps,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        tap: JointTap,
        **kwargs: Any,
    ) -> Any:
        return self.draw(attn, hidden_states, encoder_hidden_states, tap, args, kwargs)

    return taking_a_tap(kind, _JointWithMaps, call)
