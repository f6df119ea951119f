"""One UNet call that also gives its attention maps: the pure function that is run, compiled and exported."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch import nn

from diffumask_fast.attention.call import Results, UNetCall
from diffumask_fast.attention.processor import MapProcessor, XFormersMapProcessor, draws_like, with_second_product
from diffumask_fast.attention.tap import Place, Tap
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

    def forward(self, call: UNetCall) -> Results:
        """Predict the noise with maps, as a Denoiser does."""
        return self.run(call, Tap(self.places, call.select, call.prior, call.first))

    def run(self, call: UNetCall, tap: Tap) -> Results:
        """Call the UNet with a tap that nothing has been put into."""
        kwargs = dict(call.unet_kwargs)
        kwargs["cross_attention_kwargs"] = {**(kwargs.get("cross_attention_kwargs") or {}), "tap": tap}
        with patched("processor", {attn: self._processor(attn) for attn in self.places}):
            noise_pred = self._unet()(
                call.latents,
                call.timestep,
                encoder_hidden_states=call.encoder_hidden_states,
                added_cond_kwargs=_in_fp32(call.added),
                return_dict=False,
                **kwargs,
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
        return (XFormersMapProcessor if by_xformers else with_second_product)(attn.processor, self.processor.impl)


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
