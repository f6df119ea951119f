"""One call of a transformer with joint attention, SD3's or FLUX's, that also gives its maps."""

import math
from typing import Any, Literal

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from diffumask_fast.attention.call import Results, UNetCall
from diffumask_fast.attention.joint import JointTap, joint_with_maps
from diffumask_fast.borrow import patched
from diffumask_fast.errors import DiffuMaskError

Over = Literal["all", "text"]


class TransformerWithMaps(nn.Module):
    """Call an SD3Transformer2DModel or a FluxTransformer2DModel and read its joint attention in the same pass.

    Pure: state between the calls is the caller's. The model's own processors are back in place after each call.

    Args:
        transformer: the model.
        over: the keys among which a pixel's map of a phrase is a share. "all": text and image, the probability that
            draws, so that heads and pixels that look at the image alone count little. "text": the text's keys, head by
            head, as in a UNet's cross-attention, so that all heads count alike.
    """

    def __init__(self, transformer: nn.Module, over: Over = "all") -> None:
        super().__init__()
        if over not in ("all", "text"):
            raise DiffuMaskError(f"over is {over!r}: use all or text")
        self.transformer = transformer
        self.over = over
        self.layers = joint_layers(getattr(transformer, "_orig_mod", transformer))

    def forward(self, call: UNetCall) -> Results:
        """Predict the noise with maps, as a Denoiser does.

        Raises:
            DiffuMaskError: a layer's attention cannot be read.
        """
        self._check()
        assert call.select is not None and call.map_size is not None
        num_pixels = math.prod(call.map_size)
        num_image = call.latents.shape[1] if call.latents.ndim == 3 else num_pixels
        tap = JointTap(call.select, call.prior, call.first, num_image, num_pixels, self.over == "text")
        kwargs = dict(call.unet_kwargs)
        kwargs["joint_attention_kwargs"] = {**(kwargs.get("joint_attention_kwargs") or {}), "tap": tap}
        wrapped = {attn: joint_with_maps(attn.processor, is_joint) for attn, is_joint in self.layers.items()}
        try:
            with patched("processor", wrapped):
                noise_pred = self.transformer(
                    hidden_states=call.latents,
                    timestep=call.timestep,
                    encoder_hidden_states=call.encoder_hidden_states,
                    return_dict=False,
                    **kwargs,
                )[0]
        except Unsupported as error:
            raise DiffuMaskError(
                "the transformer is compiled with fullgraph=True, and attention with maps is not compiled: compile it "
                "without fullgraph"
            ) from error
        return noise_pred, tap.means("maps"), tap.means("propagated")

    def _check(self) -> None:
        if getattr(self.transformer, "_parallel_config", None) is not None:
            raise DiffuMaskError(
                "the transformer's attention is divided between devices (enable_parallelism), and maps of a part are "
                "no maps of the image: draw on one device"
            )


def joint_layers(transformer: nn.Module) -> dict[Any, bool]:
    """Find the attention layers of a transformer.

    Returns:
        layer -> whether its keys are text and image; those of SD3.5's second attention are the image alone.

    Raises:
        DiffuMaskError: there are none of the kind that is known.
    """
    layers: dict[Any, bool] = {}
    for block in transformer.modules():
        if isinstance(block, JointTransformerBlock | FluxTransformerBlock | FluxSingleTransformerBlock):
            layers[block.attn] = True
            if getattr(block, "attn2", None) is not None:
                layers[block.attn2] = False
    if not layers:
        raise DiffuMaskError(
            f"{type(transformer).__name__} has no layers of joint attention as diffusers has them (Nunchaku's and "
            "other quantised forms have their own), so nothing can be read: use the model as diffusers loads it"
        )
    return layers


def packed_size(img_ids: Tensor) -> tuple[int, int]:
    """Return height and width in tokens of the image whose packed tokens come first.

    Args:
        img_ids: [N, 3], the image, row and column of each token; other images follow, where one is drawn after them.

    Raises:
        DiffuMaskError: these are not the tokens of a rectangle, row by row.
    """
    ids = (img_ids[0] if img_ids.ndim == 3 else img_ids).cpu().long()
    num = int((ids[:, 0] == ids[0, 0]).sum())
    places = ids[:num] - ids[0]
    h, w = (max(1, size) for size in (places[-1, 1:] + 1).tolist())
    order = torch.arange(num)
    if h * w != num or not torch.equal(places, torch.stack([torch.zeros_like(order), order // w, order % w], 1)):
        raise DiffuMaskError(
            f"img_ids do not say that {num} tokens are a rectangle, row by row, so what a map would look like is "
            "not known: draw one image"
        )
    return h, w
