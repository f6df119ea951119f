"""What ONNX Runtime takes beside eager torch, for the same drawing with the same model."""

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.bench.harness import compare, environment, row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.loading import resolve_device
from diffumask_fast.pipeline import DiffuMaskPipeline

logger = logging.getLogger("diffumask_fast")

SUITE = "engines"
MODELS = {"mini": "mini"}
PROMPT, PHRASE = "a photo of a dog on the grass", "dog"


def run(
    geometry: str = "mini",
    device: str = "auto",
    *,
    model: str | Path | None = None,
    engine_path: str | Path | None = None,
    batch: int = 8,
    steps: int = 3,
    pairs: int | None = None,
    threads: Sequence[int] = (1, 2),
) -> list[dict]:
    """Measure the denoising in ONNX Runtime against that in torch: plain, and with maps and propagation.

    Args:
        geometry: which model; "mini" is the embedded one.
        device: "auto", "cpu" or "cuda".
        model: another model folder of the same geometry.
        engine_path: its engine; None exports one and throws it away.
        batch: images per call.
        steps: denoising steps.
        pairs: rounds of a comparison; None is the harness' number for the device.
        threads: one pair of rows for each number.

    Returns:
        Rows `onnx_plain` and `onnx_maps` for each number of threads; below 1 ONNX Runtime is the quicker one.

    Raises:
        DiffuMaskError: an unknown geometry, or a library that is missing.
    """
    if geometry not in MODELS:
        raise DiffuMaskError(f"There is no geometry {geometry}: use {', '.join(MODELS)}.")
    model, where = model or MODELS[geometry], resolve_device(device)
    rows = []
    with ExitStack() as stack:
        if engine_path is None:
            from diffumask_fast.export.onnx_export import export_onnx

            engine_path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "engine"
            export_onnx(model, engine_path, max_batch=batch)
        for count in threads:
            rows += _rows(geometry, model, engine_path, where, batch, steps, pairs, count)
    return rows


def _rows(geometry, model, engine_path, where, batch, steps, pairs, threads) -> list[dict]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        eager = DiffuMaskPipeline.from_pretrained(model, device=where, dtype="fp32")
        onnx = DiffuMaskPipeline.from_pretrained(model, engine="onnx", engine_path=engine_path, device=where)
    finally:
        torch.set_num_threads(before)
    rows = []
    for name, propagate in (("onnx_plain", None), ("onnx_maps", 1)):
        candidate, baseline = (_drawing(pipe, batch, steps, propagate) for pipe in (onnx, eager))
        ratio = compare(candidate, baseline, pairs=pairs, device=str(where), threads=threads)
        config = {"geometry": geometry, "batch": batch, "num_inference_steps": steps, "propagate": propagate}
        config |= {"dtype": "fp32", **environment(str(where)), **onnx.engine.libraries, "threads": threads}
        rows.append(row(SUITE, name, ratio, config=config))
        logger.info("%s %s", name, ratio)
    return rows


def _drawing(pipe: DiffuMaskPipeline, batch: int, steps: int, propagate: int | None) -> Any:
    """Return a function that draws the latents of a batch, with maps unless propagate is None."""
    unet = pipe.pipe.unet
    shape = (batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(unet.device, unet.dtype)
    settings = {"num_inference_steps": steps, "guidance_scale": pipe.info.guidance_scale, "output_type": "latent"}
    pipe.pipe.set_progress_bar_config(disable=True)

    def plain() -> None:
        pipe.pipe([PROMPT] * batch, latents=latents, **settings)

    def mapped() -> None:
        with collect_maps(pipe.pipe, [PHRASE], propagate=propagate) as maps:
            plain()
        assert maps.levels

    return plain if propagate is None else mapped
