"""Compare a written graph with the torch module that it came from."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.denoiser import ExportedDenoiser
from diffumask_fast.export.graphs import pooled_width, states_width
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.session import OnnxSession

logger = logging.getLogger("diffumask_fast")
# the largest error over the largest value, against torch in fp32
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 2e-1}


def check_part(name: str, graph: Path, module: nn.Module, limits: Limits, dtype: str) -> dict[str, float] | str:
    """Run a graph on the CPU beside its module, on random inputs of several shapes.

    Args:
        name: "unet", "vae" or a text encoder.
        graph: file of the graph.
        module: the torch module in fp32; for the UNet the UNet2DConditionModel.
        limits: of the engine.
        dtype: of the graph.

    Returns:
        output -> largest error over the largest value; for bf16, which ONNX Runtime cannot run on the CPU, the reason.

    Raises:
        DiffuMaskError: an error over the tolerance of the type.
    """
    try:
        session = OnnxSession(graph, torch.device("cpu"))
    except DiffuMaskError as refused:
        if dtype != "bf16":
            raise
        logger.info("%s", refused)
        return "written, never run: ONNX Runtime has no bf16 on the CPU"
    with torch.no_grad():
        if name == "unet":
            errors = _check_unet(ExportedDenoiser(session, limits), UNetWithMaps(module, impl="sdpa"), limits)
        else:
            errors = _check_decoder(session, module, limits) if name == "vae" else _check_text(session, module, limits)
    for output, error in errors.items():
        if not error <= TOLERANCE[dtype]:
            raise DiffuMaskError(
                f"The graph of {name} does not give what torch gives ({output}: relative error {error:.2g}, allowed "
                f"{TOLERANCE[dtype]}): nothing was written; use `dtype=fp32`, or `engine=torch`."
            )
    return errors


def random_inputs(unet: Any, limits: Limits, rows: int, conditional: int, size: tuple[int, int]) -> dict:
    """Return random arguments of a UNetCall.

    Args:
        unet: says their widths.
        limits: of the engine.
        rows: B.
        conditional: Bc.
        size: height and width of the images, pixels.
    """
    config, phrases = unet.config, max(1, limits.max_phrases // 2)
    h, w = (side // limits.vae_factor for side in size)
    pixels = limits.level_pixels((h, w))
    added = None
    if config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.randn(rows, pooled_width(config)), "time_ids": torch.full((rows, 6), 512.0)}
    return {
        "latents": torch.randn(rows, config.in_channels, h, w),
        "timestep": torch.tensor(321),
        "encoder_hidden_states": torch.randn(rows, limits.tokens, states_width(config)),
        "select": torch.rand(conditional, limits.tokens, phrases),
        "prior": {key: torch.rand(conditional, phrases, pixels[key]) for key in limits.propagated},
        "added": added,
    }


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return the largest error over the largest true value."""
    return ((value.float() - truth.float()).abs().max() / truth.float().abs().max()).item()


def _check_unet(denoiser: ExportedDenoiser, model: UNetWithMaps, limits: Limits) -> dict[str, float]:
    errors: dict[str, float] = {}
    for images, guided, size in _shapes(limits):
        call = UNetCall(**random_inputs(model.unet, limits, images * (1 + guided), images, size))
        truth, found = model(call), denoiser(call)
        pairs = [("noise_pred", found[0], truth[0])]
        pairs += [("maps", found[1][key], truth[1][key]) for key in truth[1]]
        pairs += [("propagated", found[2][key], truth[2][key]) for key in truth[2]]
        _keep_largest(errors, pairs)
    return errors


def _check_decoder(session: OnnxSession, vae: Any, limits: Limits) -> dict[str, float]:
    errors: dict[str, float] = {}
    for images, _, size in _shapes(limits):
        latents = torch.randn(images, limits.channels, *(side // limits.vae_factor for side in size))
        found = session.run({"latents": latents}, {"image": (images, 3, *size)})["image"]
        _keep_largest(errors, [("image", found, vae.decode(latents, return_dict=False)[0])])
    return errors


def _check_text(session: OnnxSession, encoder: Any, limits: Limits) -> dict[str, float]:
    errors: dict[str, float] = {}
    for rows in (1, 3):
        ids = torch.randint(0, encoder.config.vocab_size, (rows, limits.tokens))
        ids[:, limits.tokens // 2] = encoder.config.eos_token_id
        truth: Any = encoder(ids, output_hidden_states=True)
        wanted = {n: truth.hidden_states[-2] if n == "penultimate" else truth[n] for n in session.outputs}
        found = session.run({"input_ids": ids}, {n: tuple(value.shape) for n, value in wanted.items()})
        _keep_largest(errors, [(n, found[n], wanted[n]) for n in wanted])
    return errors


def _shapes(limits: Limits) -> list[tuple[int, bool, tuple[int, int]]]:
    """Return (images, with guidance, size): the least size, and another that is not square where there is room."""
    least, wide = (limits.height[0], limits.width[0]), (limits.height[0], limits.width[0] + limits.multiple)
    other = wide if wide[1] <= limits.width[1] else least
    return [(1, True, least), (min(3, limits.batch), False, other)]


def _keep_largest(errors: dict[str, float], pairs: list[tuple[str, Tensor, Tensor]]) -> None:
    for name, value, truth in pairs:
        error, kept = relative_error(value, truth), errors.get(name, 0.0)
        # max() would drop a NaN
        errors[name] = kept if math.isnan(kept) or error <= kept else error
