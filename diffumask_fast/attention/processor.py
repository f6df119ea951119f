"""The attention processors that stand in the UNet for the length of one call."""

import functools
import inspect
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from diffumask_fast.attention.tap import Tap
from diffumask_fast.kernels import attend


class MapProcessor:
    """Draw as AttnProcessor2_0 does, and fill the tap in the same product; stateless, one for all layers."""

    def __init__(self, impl: str = "auto") -> None:
        self.impl = impl

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v, mask = self.project(attn, hidden_states, context, attention_mask, tap)
        out = self.product(attn, q, k, v, mask, tap)
        return attn.to_out[1](attn.to_out[0](out.to(hidden_states.dtype)))

    def project(
        self, attn: Attention, hidden_states: Tensor, context: Tensor, attention_mask: Tensor | None, tap: Tap | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries [B, N, H*D], keys and values [B, T, H*D], and the bias of the scores."""
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        return q, k, v, _bias(attn, attention_mask, context)

    def product(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tap: Tap | None) -> Tensor:
        """Return the output [B, N, H*D], and let the tap have the maps."""
        columns, impl = None if tap is None else tap.columns(attn), self.impl_for(q, mask)
        if columns is None:
            return attend(q, k, v, heads=attn.heads, mask=mask, impl=impl)[0]
        maps, weight = tap.target(attn)
        out, maps = attend(
            q,
            k,
            v,
            columns,
            heads=attn.heads,
            first_conditional=tap.first,
            maps=maps,
            weight=weight,
            mask=mask,
            impl=impl,
        )
        tap.put(attn, maps)
        return out

    def impl_for(self, q: Tensor, mask: Tensor | None) -> str:
        """Return the form of `attend` for a layer's queries."""
        return self.impl


class XFormersMapProcessor(MapProcessor):
    """MapProcessor for a layer that a user gave to xformers, which goes on drawing where no maps are wanted.

    Where they are, one product gives output and maps, as in any other layer.

    Args:
        processor: the layer's own, with the operator that the user chose.
        impl: of our product.
    """

    def __init__(self, processor: Any, impl: str = "auto") -> None:
        super().__init__(impl)
        self.processor = processor

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if tap is None or tap.columns(attn) is None:
            return self.processor(*given)
        return super().__call__(*given, tap)


def draws_like(attn: Attention, kind: type = AttnProcessor2_0) -> bool:
    """Tell whether a processor of this kind is the layer's, and MapProcessor gives what it gives.

    For AttnProcessor2_0 that is bit for bit on CPU, for XFormersAttnProcessor up to rounding.
    """
    return (
        type(attn.processor) is kind
        and attn.spatial_norm is attn.group_norm is attn.norm_q is attn.norm_k is None
        and not attn.norm_cross
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )


def with_second_product(processor: Any, impl: str = "auto") -> Any:
    """Wrap a foreign processor (IP-Adapter, a user's own): it draws, maps come from a second product.

    Args:
        processor: what the layer has; it is called with what it would be called with without maps.
        impl: of the second product.

    Returns:
        a processor with the same named parameters, for diffusers filters by name, and `tap`.
    """
    return _class_with_second_product(type(processor))(processor, impl)


class _SecondProduct:
    def __init__(self, processor: Any, impl: str) -> None:
        self.processor = processor
        self.impl = impl


@functools.cache
def _class_with_second_product(kind: type) -> type:
    """Make the wrapper for one class of processors, with its signature and `tap`."""

    def call(
        self: _SecondProduct,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        tap: Tap | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if tap is not None and tap.columns(attn) is not None:
            _second_product(attn, hidden_states, encoder_hidden_states, attention_mask, tap, self.impl)
        return self.processor(
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
        )

    taken = list(inspect.signature(kind.__call__).parameters.values())
    at = len(taken) - (taken[-1].kind is inspect.Parameter.VAR_KEYWORD)
    taken.insert(at, inspect.Parameter("tap", inspect.Parameter.KEYWORD_ONLY))
    call.__signature__ = inspect.Signature(taken)
    return type(f"{kind.__name__}WithMaps", (_SecondProduct,), {"__call__": call})


def _second_product(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | tuple[Tensor, ...] | None,
    attention_mask: Tensor | None,
    tap: Tap,
    impl: str,
) -> None:
    """Attend again for the conditional rows, for the maps alone."""
    columns = tap.columns(attn)
    rows = slice(tap.first, tap.first + columns.shape[0])
    context = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
    hidden = hidden_states[rows]
    context = hidden if context is None else context[rows]
    q, k = attn.to_q(hidden), attn.to_k(context)
    mask = _bias(attn, None if attention_mask is None else attention_mask[rows], context)
    maps, weight = tap.target(attn)
    _, maps = attend(q, k, k, columns, heads=attn.heads, maps=maps, weight=weight, mask=mask, impl=impl)
    tap.put(attn, maps)


def _bias(attn: Attention, attention_mask: Tensor | None, context: Tensor) -> Tensor | None:
    """Bring the mask [B, 1, T] to [B, H, 1, T], the shape that the scores take."""
    if attention_mask is None:
        return None
    mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
    return mask.view(context.shape[0], attn.heads, -1, mask.shape[-1])
