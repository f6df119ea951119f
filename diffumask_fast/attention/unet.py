"""One UNet call that also gives its attention maps: the pure function that is run, compiled and exported."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch import Tensor, nn

from diffumask_fast.attention.processor import MapProcessor, XFormersMapProcessor, beside, draws_like
from diffumask_fast.attention.tap import Levels, Place, Tap
from diffumask_fast.borrow import patched
from diffumask_fast.errors import DiffuMaskError


class UNetWithMaps(nn.Module):
    """Call a UNet2DConditionModel and read its cross-attention in the same pass.

    Pure: state between the calls is the caller's. The UNet's own processors are back in place after each call.

    Attributes:
        keys: the levels, "0" the finest that has cross-attention.
    """

    def __init__(self, unet: nn.Module, impl: str = "auto") -> None:
        super().__init__()
        self.unet = unet
        self.places = attention_places(getattr(unet, "_orig_mod", unet))
        self.keys = tuple(sorted({place.level for place in self.places.values()}, key=int))
        self.processor = MapProcessor(impl)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        select: Tensor | None,
        prior: Levels | None = None,
        added: Mapping[str, Any] | None = None,
        *,
        first_conditional: int | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **unet_kwargs: Any,
    ) -> tuple[Tensor, Levels, Levels]:
        """Predict the noise, this call's maps, and the earlier maps seen through this call's self-attention.

        Args:
            latents: [B, C, h, w].
            timestep: of the step.
            encoder_hidden_states: [B, T, E].
            select: [Bc, T, K] fp32, the weight of each token in each phrase; None makes no maps.
            prior: level -> [Bc, M, N] fp32, what to propagate; a level that is absent is not propagated.
            added: the UNet's added_cond_kwargs (SDXL).
            first_conditional: the rows first_conditional : first_conditional + Bc are the conditional ones; None: the
                last ones, or all of them where nothing is selected.
            cross_attention_kwargs: what else the attention layers are to get.
            unet_kwargs: what else the UNet is to get.

        Returns:
            noise_pred [B, C, h, w]; maps, level -> [Bc, K, N] fp32, mean over heads and layers; propagated, level ->
            [Bc, M, N] fp32 with the keys of prior, mean over heads and layers of self-attention @ prior.
        """
        first = first_row(latents, select, first_conditional)
        tap = Tap(self.places, select, prior or {}, first)
        return self.run(tap, latents, timestep, encoder_hidden_states, added, cross_attention_kwargs, **unet_kwargs)

    def run(
        self,
        tap: Tap,
        latents: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added: Mapping[str, Any] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **unet_kwargs: Any,
    ) -> tuple[Tensor, Levels, Levels]:
        """Call the UNet with a tap that nothing has been put into; the rest as for `forward`."""
        with patched("processor", {attn: self._processor(attn) for attn in self.places}):
            noise_pred = self._unet()(
                latents,
                timestep,
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs={**(cross_attention_kwargs or {}), "tap": tap},
                added_cond_kwargs=_in_fp32(added),
                return_dict=False,
                **unet_kwargs,
            )[0]
        propagated = {key: tap.propagated[key] for key in self.keys if key in tap.propagated}
        return noise_pred, {key: tap.maps[key] for key in self.keys if tap.select is not None}, propagated

    def _unet(self) -> Any:
        """Return the UNet, under a compiler its forward: what stands at its __call__ then is not to be traced."""
        return self.unet.forward if torch.compiler.is_compiling() else self.unet

    def _processor(self, attn: nn.Module) -> Any:
        """Return what works for the tap in a layer."""
        by_xformers = draws_like(attn, XFormersAttnProcessor)
        if draws_like(attn) or (by_xformers and torch.compiler.is_compiling()):  # which cannot look into xformers
            return self.processor
        return (XFormersMapProcessor if by_xformers else beside)(attn.processor, self.processor.impl)


def first_row(latents: Tensor, select: Tensor | None, first_conditional: int | None) -> int:
    """Return the first conditional row: as given, else that of the last rows, which `select` counts."""
    if first_conditional is not None:
        return first_conditional
    return 0 if select is None else latents.shape[0] - select.shape[0]


def attention_places(unet: nn.Module) -> dict[nn.Module, Place]:
    """Find the attention layers of a UNet and their levels from where they stand: down, middle or up.

    Args:
        unet: a UNet2DConditionModel.

    Returns:
        attention layer -> Place, in the order of the call; levels without cross-attention are left out.

    Raises:
        DiffuMaskError: the UNet has no cross-attention layer of the kind that Stable Diffusion has.
    """
    found, depth = [], 0
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for block in blocks:
        for module in block.modules() if block is not None else ():
            if isinstance(module, BasicTransformerBlock):
                layers = [attn for attn in (module.attn1, module.attn2) if attn is not None]
                found += [(attn, depth, attn.is_cross_attention) for attn in layers]
        depth += bool(getattr(block, "downsamplers", None)) - bool(getattr(block, "upsamplers", None))
    depths = sorted({depth for _, depth, cross in found if cross})
    if not depths:
        raise DiffuMaskError(f"{type(unet).__name__} has no cross-attention layers of the kind that gives maps")
    level = {depth: str(i) for i, depth in enumerate(depths)}
    kinds = [(depth, cross) for _, depth, cross in found]
    return {a: Place(level[d], c, kinds.count((d, c))) for a, d, c in found if d in level}


def _in_fp32(added: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Cast SDXL's two added tensors, which the UNet joins in fp32 anyway, so that an exported graph has one type."""
    if added is None:
        return None
    return {key: value.float() if key in ("text_embeds", "time_ids") else value for key, value in added.items()}
