"""One UNet call that also gives its attention maps: the pure function that is run, compiled and exported."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch import nn

from diffumask_fast.attention.call import Results, UNetCall
from diffumask_fast.attention.own_product import with_own_product
from diffumask_fast.attention.processor import MapProcessor, XFormersMapProcessor, draws_like
from diffumask_fast.attention.tap import Levels, Place, Tap
from diffumask_fast.borrow import MODULE_CALL, many_shapes, patched
from diffumask_fast.errors import DiffuMaskError


class UNetWithMaps(nn.Module):
    """Call a UNet2DConditionModel and read its cross-attention in the same pass.

    Pure: state between the calls is the caller's. The UNet's own processors are back in place after each call.

    Attributes:
        keys: the levels, "0" the finest that has cross-attention.
        unpropagated: the levels whose self-attention ran on other tokens than all pixels in the last call.
    """

    def __init__(self, unet: nn.Module, impl: str = "auto") -> None:
        super().__init__()
        self.unet = unet
        self.impl = impl
        self.places = attention_places(getattr(unet, "_orig_mod", unet))
        self.keys = tuple(sorted({place.level for place in self.places.values()}, key=int))
        self.unpropagated: frozenset[str] = frozenset()
        # layers of a kind share a processor, so that one compiled code can serve them all
        self.processors = {place: self.processor(place) for place in set(self.places.values())}
        self._parts = _parts_around(getattr(unet, "_orig_mod", unet), self.places)

    def processor(self, place: Place) -> MapProcessor:
        """Make the processor of the layers of a kind."""
        return MapProcessor(place, self.impl)

    def forward(self, call: UNetCall) -> Results:
        """Predict the noise with maps, as a Denoiser does."""
        return self.run(call, Tap(call.select, call.prior, call.first, latent_shape(call)))

    def run(self, call: UNetCall, tap: Tap) -> Results:
        """Call the UNet with a tap that nothing has been put into.

        Raises:
            DiffuMaskError: all cross-attention of a level ran on other tokens than one for each pixel.
        """
        kwargs = dict(call.unet_kwargs)
        kwargs["cross_attention_kwargs"] = {**(kwargs.get("cross_attention_kwargs") or {}), "tap": tap}
        compiled = self._compiled_parts(tap)
        with (
            patched("processor", {attn: self._processor(attn, place) for attn, place in self.places.items()}),
            patched(MODULE_CALL, compiled),
            many_shapes() if compiled else nullcontext(),
        ):
            noise_pred = self._unet()(
                call.latents,
                call.timestep,
                encoder_hidden_states=call.encoder_hidden_states,
                added_cond_kwargs=_in_fp32(call.added),
                return_dict=False,
                **kwargs,
            )[0]
        self._check(tap)
        return noise_pred, self._means(tap, tap.maps, cross=True), self._means(tap, tap.propagated, cross=False)

    def _unet(self) -> Any:
        """Return the UNet, under a compiler its forward: what stands at its __call__ then is not to be traced."""
        return self.unet.forward if torch.compiler.is_compiling() else self.unet

    def _processor(self, attn: Any, place: Place) -> Any:
        """Return what works for the tap in a layer."""
        by_xformers = draws_like(attn, XFormersAttnProcessor)
        if draws_like(attn) or (by_xformers and torch.compiler.is_compiling()):  # which cannot look into xformers
            return self.processors[place]
        return (XFormersMapProcessor if by_xformers else with_own_product)(attn.processor, place, self.impl)

    def _compiled_parts(self, tap: Tap) -> dict[nn.Module, Any]:
        """Give parts of the UNet that are compiled by themselves a tap each.

        What is in a tap of the whole call differs from block to block, and would be compiled anew for each.
        """
        if torch.compiler.is_compiling():
            return {}
        found = ((part, vars(part).get(MODULE_CALL)) for part in self._parts)
        return {part: _with_tap_of_its_own(compiled, tap) for part, compiled in found if compiled is not None}

    def _check(self, tap: Tap) -> None:
        if tap.shape is None:
            return
        for level, cross in tap.partial:
            if cross and not tap.layers[level, cross]:
                raise DiffuMaskError(
                    f"no cross-attention of level {level} ran on all of its pixels: leave its tokens as they are "
                    "(merge_crossattn=False for token merging)"
                )
        self.unpropagated = frozenset(level for level, cross in tap.partial if not cross)

    def _means(self, tap: Tap, maps: Levels, cross: bool) -> Levels:
        """Return the mean over the layers of each level that ran; each of them has added its part of all layers."""
        counts = {place.level: place.num_layers for place in self.places.values() if place.cross is cross}
        means = {}
        for key in self.keys:
            if key in maps:
                ran = tap.layers[key, cross] or counts[key]
                means[key] = maps[key] if ran == counts[key] else maps[key] * (counts[key] / ran)
        return means


def latent_shape(call: UNetCall) -> tuple[int, int, int] | None:
    """Return B, h and w of a call's latents; None while a graph of all of it is made, which must not ask for them."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return None
    return call.latents.shape[0], call.latents.shape[-2], call.latents.shape[-1]


def _parts_around(unet: nn.Module, layers: Collection[nn.Module]) -> list[nn.Module]:
    """Return the parts of a UNet that have a layer in them, and the layers."""
    named = dict(unet.named_modules())
    names = {".".join(path[:end]) for path in (n.split(".") for n, m in named.items() if m in layers)
             for end in range(1, len(path) + 1)}  # fmt: skip
    return [module for name, module in named.items() if name in names]


def _with_tap_of_its_own(compiled: Any, whole: Tap) -> Any:
    def call(*args: Any, cross_attention_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if not cross_attention_kwargs or "tap" not in cross_attention_kwargs:
            return compiled(*args, cross_attention_kwargs=cross_attention_kwargs, **kwargs)
        part = whole.empty()
        out = compiled(*args, cross_attention_kwargs={**cross_attention_kwargs, "tap": part}, **kwargs)
        whole.take(part)
        return out

    return call


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
    model: Any = unet
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
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
    return {a: Place(level[d], c, kinds.count((d, c)), d) for a, d, c in found if d in level}


def _in_fp32(added: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Cast SDXL's two added tensors, which the UNet joins in fp32 anyway, so that an exported graph has one type."""
    if added is None:
        return None
    return {key: value.float() if key in ("text_embeds", "time_ids") else value for key, value in added.items()}
