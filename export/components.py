"""Components of a diffusers pipeline whose calls an engine answers: class and configuration, without weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.tap import Tap
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.denoiser import ExportedDenoiser
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.session import GraphSession

# Methods that would change the component, which an engine cannot do.
REFUSED = (
    "load_lora_adapter", "load_attn_procs", "add_adapter", "set_attn_processor", "fuse_lora", "enable_freeu",
    "resize_token_embeddings", "save_pretrained", "requires_grad_", "train",
)  # fmt: skip


class EngineComponent:
    """What the components of an engine share: a fixed device and dtype, and no way to change them."""

    engine_device: torch.device
    engine_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """The device of the engine."""
        return self.engine_device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the engine."""
        return self.engine_dtype

    def to(self, *args: Any, **kwargs: Any) -> EngineComponent:
        """Return the component as it is.

        Raises:
            DiffuMaskError: another kind of device, or another dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != self.engine_device.type:
            raise DiffuMaskError(
                f"The engine is on {self.engine_device}: load the pipeline again with `device={device}`."
            )
        if dtype is not None and dtype != self.engine_dtype:
            raise DiffuMaskError(f"The engine works in {self.engine_dtype}: export the model again for {dtype}.")
        return self


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: EngineComponent, *_: Any, **__: Any) -> Any:
        raise DiffuMaskError(f"An exported {_kind(self)} has no {name}: use `engine=torch`, or export again.")

    return refuse


def _kind(component: EngineComponent) -> str:
    """Return the name of the class of diffusers or transformers that a component stands for."""
    return next(kind.__name__ for kind in type(component).__mro__ if not issubclass(kind, EngineComponent))


class EngineUNet(EngineComponent, UNet2DConditionModel):
    """A UNet whose calls an exported graph answers, with maps or without."""

    denoiser: ExportedDenoiser

    @property
    def limits(self) -> Limits:
        """The shapes that the graph takes."""
        return self.denoiser.limits

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **rest: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise, as UNet2DConditionModel.forward; a tap among cross_attention_kwargs gets the maps."""
        given = {name: value for name, value in rest.items() if value is not None}
        attention = dict(given.pop("cross_attention_kwargs", {}))
        tap = attention.pop("tap", None)
        if attention:
            given["cross_attention_kwargs"] = attention
        if tap is None or tap.select is None:
            tap = Tap(torch.zeros(len(sample), encoder_hidden_states.shape[1], 1, device=sample.device), {}, 0)
        noise_pred, maps, propagated = self.denoiser(
            UNetCall(
                sample, timestep, encoder_hidden_states, tap.select, tap.prior, added_cond_kwargs, tap.first, given
            )
        )
        tap.maps.update(maps)
        tap.propagated.update(propagated)
        return UNet2DConditionOutput(sample=noise_pred) if return_dict else (noise_pred,)


class EngineDecoder(EngineComponent):
    """The decoding side of a VAE."""

    session: GraphSession
    vae_factor: int
    encode = _refuse("encode")

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple[Tensor]:
        """Decode latents [B, C, h, w] to [B, 3, H, W]."""
        shape = (z.shape[0], 3, *(size * self.vae_factor for size in z.shape[-2:]))
        image = self.session.run({"latents": z}, {"image": shape})["image"]
        return DecoderOutput(sample=image) if return_dict else (image,)


class EngineTextEncoder(EngineComponent):
    """A CLIP text encoder."""

    config: Any
    session: GraphSession

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> BaseModelOutputWithPooling | CLIPTextModelOutput:
        """Encode ids [B, T]; of the hidden states only hidden_states[-2] is there, which SDXL reads."""
        if attention_mask is not None:
            raise DiffuMaskError("The exported text encoder takes no attention mask: use `engine=torch`.")
        rows, tokens = input_ids.shape
        wide, pooled = (rows, tokens, self.config.hidden_size), (rows, self.config.hidden_size)
        shapes = {"last_hidden_state": wide, "pooler_output": pooled, "penultimate": wide}
        shapes["text_embeds"] = (rows, self.config.projection_dim)
        out: dict[str, Any] = dict(
            self.session.run({"input_ids": input_ids}, {name: shapes[name] for name in self.session.outputs})
        )
        penultimate = _PenultimateState(out.pop("penultimate", None))
        out["hidden_states"] = penultimate if output_hidden_states else None
        return CLIPTextModelOutput(**out) if "text_embeds" in out else BaseModelOutputWithPooling(**out)


class _PenultimateState:
    """Stands for `hidden_states`; only index -2 is there."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor

    def __getitem__(self, index: int) -> Tensor:
        if index != -2 or self.tensor is None:
            raise DiffuMaskError("The exported text encoder knows no clip_skip: leave it out, or use `engine=torch`.")
        return self.tensor


for _name in REFUSED:
    setattr(EngineComponent, _name, _refuse(_name))


def engine_unet(config: Path, denoiser: ExportedDenoiser) -> EngineUNet:
    """Make the UNet of an engine.

    Args:
        config: its config.json.
        denoiser: answers its calls.
    """
    unet = _without_weights(EngineUNet, config, denoiser.session.device, denoiser.dtype)
    unet.denoiser = denoiser
    return unet


def engine_decoder(kind: str, config: Path, session: GraphSession, vae_factor: int) -> Any:
    """Make the VAE of an engine; `kind` is its class in diffusers."""
    decoder = _subclass(EngineDecoder, "diffusers", kind)
    vae = _without_weights(decoder, config, session.device, session.inputs["latents"])
    vae.session, vae.vae_factor = session, vae_factor
    return vae


def engine_text_encoder(kind: str, config: Path, session: GraphSession) -> Any:
    """Make a text encoder of an engine; `kind` is its class in transformers."""
    dtype = session.outputs["last_hidden_state"]
    encoder = _without_weights(_subclass(EngineTextEncoder, "transformers", kind), config, session.device, dtype)
    encoder.session = session
    return encoder


def _subclass(mixin: type, library: str, kind: str) -> type:
    """Return a class that diffusers or transformers takes for `kind`, with the methods of the mixin."""
    base = getattr(importlib.import_module(library), kind, None)
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise DiffuMaskError(f"{library} has no {kind}, which the engine was exported from: export the model again.")
    return type(f"Exported{kind}", (mixin, base), {})


def _without_weights(kind: Any, config: Path, device: torch.device, dtype: torch.dtype) -> Any:
    settings = json.loads(config.read_text("utf-8"))
    with torch.device("meta"):
        if hasattr(kind, "config_class") and kind.config_class is not None:
            module = kind(kind.config_class.from_dict(settings))
        else:
            module = kind.from_config(settings)
    module = nn.Module.to(module, dtype=dtype)
    nn.Module.train(module, False)
    module.engine_device, module.engine_dtype = device, dtype
    return module
