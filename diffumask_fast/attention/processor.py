"""The attention processors that stand in the UNet for the length of one call."""

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from diffumask_fast.attention.tap import Place, Tap
from diffumask_fast.kernels import attend


class MapProcessor:
    """Draw as AttnProcessor2_0 does, and fill the tap in the same product; stateless, one for all layers of a kind.

    Args:
        place: of its layers.
        impl: of `attend`.
    """

    def __init__(self, place: Place, impl: str = "auto") -> None:
        self.place = place
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
        return q, k, v, bias(attn, attention_mask, context)

    def product(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tap: Tap | None) -> Tensor:
        """Return the output [B, N, H*D], and let the tap have the maps."""
        columns, impl = None if tap is None else tap.columns(self.place, q), self.impl_for(q, mask)
        if tap is None or columns is None:
            return attend(q, k, v, heads=attn.heads, mask=mask, impl=impl)[0]
        maps, weight = tap.target(self.place)
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
        tap.put(self.place, maps)
        return out

    def impl_for(self, q: Tensor, mask: Tensor | None) -> str:
        """Return the form of `attend` for a layer's queries."""
        return self.impl


class XFormersMapProcessor(MapProcessor):
    """MapProcessor for a layer that a user gave to xformers, which goes on drawing where no maps are wanted.

    Where they are, one product gives output and maps, as in any other layer.

    Args:
        processor: the layer's own, with the operator that the user chose.
        place: of the layer.
        impl: of our product.
    """

    def __init__(self, processor: Any, place: Place, impl: str = "auto") -> None:
        super().__init__(place, impl)
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
        if tap is None or tap.columns(self.place, hidden_states) is None:
            return self.processor(*given)
        return super().__call__(*given, tap)


def draws_like(attn: Attention, kind: type = AttnProcessor2_0) -> bool:
    """Tell whether a processor of this kind is the layer's, and MapProcessor gives what it gives.

    For AttnProcessor2_0 that is bit for bit on CPU, for XFormersAttnProcessor up to rounding.
    """
    return type(attn.processor) is kind and is_plain(attn)


def is_plain(attn: Attention) -> bool:
    """Tell whether a layer only projects, attends and projects again."""
    return (
        attn.spatial_norm is attn.group_norm is attn.norm_q is attn.norm_k is None
        and not attn.norm_cross
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )


def bias(attn: Attention, attention_mask: Tensor | None, context: Tensor) -> Tensor | None:
    """Bring the mask [B, 1, T] to [B, H, 1, T], the shape that the scores take."""
    if attention_mask is None:
        return None
    mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
    return mask.view(context.shape[0], attn.heads, -1, mask.shape[-1])
