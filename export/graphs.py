"""The calls of a diffusion model as ONNX graphs: UNet with maps, text encoder, VAE decoder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.export import Dim

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.borrow import patched
from diffumask_fast.export.limits import Limits

OPSET = 23  # the first with Attention


@dataclass(frozen=True)
class Exportable:
    """A module with what its export needs.

    Args:
        module: takes the inputs by name and returns a flat tuple.
        inputs: name -> example, `prior` a dict of levels.
        dynamic: as torch.export's dynamic_shapes.
        outputs: names in order.
    """

    module: nn.Module
    inputs: dict[str, Any]
    dynamic: dict[str, Any]
    outputs: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of the graph's inputs in order; those of the levels are `prior.0`, `prior.1`."""
        return [
            f"{name}.{key}" if key else name
            for name, value in self.inputs.items()
            for key in (value if isinstance(value, dict) else [""])
        ]


class FlatUNet(nn.Module):
    """UNetWithMaps with one row of select and prior for each row of the latents, zeros for the unconditional ones."""

    def __init__(self, model: UNetWithMaps) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        select: Tensor,
        prior: dict[str, Tensor] | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        inputs = (latents, timestep, encoder_hidden_states, select, prior or {}, added)
        noise_pred, maps, propagated = self.model(UNetCall(*inputs, first_conditional=0))
        return noise_pred, *maps.values(), *propagated.values()


class FlatTextEncoder(nn.Module):
    """A text encoder that returns the named outputs as a tuple."""

    def __init__(self, encoder: nn.Module, outputs: list[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.outputs = outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.encoder(input_ids, output_hidden_states="penultimate" in self.outputs)
        return tuple(out.hidden_states[-2] if name == "penultimate" else out[name] for name in self.outputs)


class FlatDecoder(nn.Module):
    """The decoder of a VAE as a module, its image in a tuple."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(latents, return_dict=False)[0],)


def exportable_unet(model: UNetWithMaps, limits: Limits) -> Exportable:
    """Prepare the UNet; rows, height and width are dynamic where the limits leave room."""
    unet: Any = model.unet
    config, dtype = unet.config, unet.dtype
    rows, h, w = _example_rows(limits), *(size[0] // limits.vae_factor for size in (limits.height, limits.width))
    pixels = limits.level_pixels((h, w))
    inputs: dict[str, Any] = {
        "latents": torch.randn(rows, config.in_channels, h, w, dtype=dtype),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(rows, limits.tokens, states_width(config), dtype=dtype),
        "select": torch.rand(rows, limits.tokens, limits.max_phrases),
    }
    dims = _Dims(limits)
    dynamic: dict[str, Any] = {
        "latents": dims.latents(), "timestep": None, "encoder_hidden_states": dims.rows(), "select": dims.rows()
    }  # fmt: skip
    if limits.propagated:
        inputs["prior"] = {key: torch.rand(rows, limits.max_phrases, pixels[key]) for key in limits.propagated}
        dynamic["prior"] = {key: dims.rows() | dims.level() for key in limits.propagated}
    if config.addition_embed_type == "text_time":
        inputs |= {"text_embeds": torch.randn(rows, pooled_width(config)), "time_ids": torch.full((rows, 6), 512.0)}
        dynamic |= {"text_embeds": dims.rows(), "time_ids": dims.rows()}
    outputs = ["noise_pred", *(f"maps.{key}" for key in model.keys)]
    outputs += [f"propagated.{key}" for key in limits.propagated]
    return Exportable(FlatUNet(model), inputs, dynamic, outputs)


def exportable_text_encoder(encoder: Any, limits: Limits, penultimate: bool) -> Exportable:
    """Prepare a CLIP text encoder; with `penultimate` it also returns hidden_states[-2], which SDXL reads."""
    pooled = hasattr(encoder, "text_projection")
    outputs = ["text_embeds", "last_hidden_state"] if pooled else ["last_hidden_state", "pooler_output"]
    outputs += ["penultimate"] if penultimate else []
    inputs = {"input_ids": torch.full((2, limits.tokens), encoder.config.eos_token_id or 2)}
    return Exportable(FlatTextEncoder(encoder, outputs), inputs, {"input_ids": {0: _prompts(limits)}}, outputs)


def exportable_decoder(vae: nn.Module, limits: Limits, latent_channels: int) -> Exportable:
    """Prepare the VAE's decoder."""
    h, w = (size[0] // limits.vae_factor for size in (limits.height, limits.width))
    inputs = {"latents": torch.randn(2, latent_channels, h, w, dtype=next(vae.parameters()).dtype)}
    sizes = _Dims(limits).latents()
    return Exportable(FlatDecoder(vae), inputs, {"latents": {**sizes, 0: _prompts(limits)}}, ["image"])


def write_graph(part: Exportable, path: Path, external_bytes: int) -> None:
    """Export a module and write its graph; weights of more than `external_bytes` go into a file beside it."""
    size = sum(p.nbytes for p in part.module.parameters())
    with torch.no_grad(), _any_batch(part.module), _silence():
        program = torch.export.export(part.module, (), part.inputs, dynamic_shapes=part.dynamic, strict=False)
        graph = torch.onnx.export(
            program, (), opset_version=OPSET, dynamo=True, verbose=False,
            input_names=part.names, output_names=part.outputs,
        )  # fmt: skip
    if graph is None:  # what torch.onnx.export returns without dynamo
        raise RuntimeError("the exporter returned no graph")
    _forget_sources(graph.model)
    graph.save(str(path), external_data=size > external_bytes)


def _forget_sources(model: Any) -> None:
    """Remove the exporter's notes of source lines, which hold paths of this machine."""
    model.metadata_props.clear()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in (*node.inputs, *node.outputs):
                if value is not None:
                    value.metadata_props.clear()


def states_width(config: Any) -> int:
    """Return E, the width of encoder_hidden_states."""
    width = config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def pooled_width(config: Any) -> int:
    """Return the width of SDXL's pooled text embedding."""
    return config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim


def unet_factor(unet: Any) -> int:
    """Return the number that height and width of the latents must be multiples of."""
    return 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in unet.down_blocks)


class _Dims:
    """The dynamic dimensions that the limits leave."""

    def __init__(self, limits: Limits) -> None:
        least, most = limits.rows
        self._rows = {0: Dim("rows", min=1, max=most)} if least != most else {}
        cells = limits.multiple // limits.vae_factor
        sizes = {2: ("h", limits.height), 3: ("w", limits.width)}
        self._sizes = {
            axis: cells * Dim(name, min=1, max=most // limits.multiple) if cells > 1 else Dim(name, min=1, max=most)
            for axis, (name, (least, most)) in sizes.items()
            if least != most
        }

    def rows(self) -> dict[int, Any]:
        return dict(self._rows)

    def latents(self) -> dict[int, Any]:
        return {**self._rows, **self._sizes}

    def level(self) -> dict[int, Any]:
        # A Dim cannot be the product of two others.
        return {2: Dim.AUTO} if self._sizes else {}


def _example_rows(limits: Limits) -> int:
    # The exporter takes a dimension of 1 for a constant.
    return limits.rows[1] if limits.rows[0] == limits.rows[1] else 2


def _prompts(limits: Limits) -> Any:
    return Dim("batch", min=1, max=max(2, limits.rows[1]))


@contextmanager
def _silence() -> Iterator[None]:
    """Hide the exporter's advice; its errors are raised all the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _any_batch(model: nn.Module) -> AbstractContextManager[None]:
    """Upsample without diffusers' detours for many rows, which would fix the number of rows in the graph."""
    return patched("forward", {m: partial(_upsample, m) for m in model.modules() if _is_plain_upsampling(m)})


def _is_plain_upsampling(module: nn.Module) -> TypeGuard[Upsample2D]:
    return type(module) is Upsample2D and module.interpolate and module.norm is None and not module.use_conv_transpose


def _upsample(module: Upsample2D, hidden_states: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
    size: Mapping[str, Any] = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
    hidden_states = F.interpolate(hidden_states, **size, mode="nearest")
    if not module.use_conv:
        return hidden_states
    convolution: Any = module.conv if module.name == "conv" else module.Conv2d_0
    return convolution(hidden_states)
