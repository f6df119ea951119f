"""The time of other engines beside eager torch's for the same drawing, and of xformers' self-attention."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor

from diffumask_fast.attention.choice import check_attention
from diffumask_fast.bench.contenders import Contenders
from diffumask_fast.bench.geometries import check_geometry, cross_layers
from diffumask_fast.bench.harness import Workload, compare, race
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.borrow import patched
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.device import resolve_device
from diffumask_fast.pipeline import DiffuMaskPipeline

logger = logging.getLogger("diffumask_fast")

SUITE = "engines"
MODELS = {"mini": "mini"}
ENGINES = ("compile", "compile_bf16", "onnx", "tensorrt", "tensorrt-rtx", "xformers")


def run(
    geometry: str = "mini",
    device: str | torch.device = "auto",
    *,
    model: str | Path | None = None,
    engine_path: str | Path | None = None,
    engines: Sequence[str] | None = None,
    batch: int = 8,
    steps: int | None = None,
    pairs: int | None = None,
    threads: Sequence[int] | None = None,
) -> Iterator[dict]:
    """Measure the engines against eager torch: the plain denoising, that with maps and propagation, finished masks.

    Args:
        geometry: which model; "mini" is the embedded one. Of the others, xformers' layers alone are measured.
        device: "auto", "cpu" or "cuda".
        model: another model folder of the same geometry.
        engine_path: an exported engine, for the one that is exported; None exports one and throws it away.
        engines: of ENGINES; None is all that work here. Eager torch is fp32 on the CPU and fp16 on CUDA; bf16 is
            beside it.
        batch: images per call.
        steps: denoising steps; None is 3.
        pairs: rounds of a comparison; None is the harness' number for the device.
        threads: one set of rows for each number; None is 1 and 2 on the CPU, 1 elsewhere.

    Returns:
        Rows `<engine>_plain`, `<engine>_maps` and `<engine>_masks` for each number of threads, as each is finished;
        below 1 the engine is the quicker one. The plain rows of compile are of diffusers' UNet under torch.compile. For
        xformers, `xformers_self_attention` of each self-attention layer and of all, over torch's SDPA.

    Raises:
        DiffuMaskError: an unknown geometry or engine, a library that is missing, one engine_path for two engines.
    """
    check_geometry(geometry)
    if unknown := [name for name in engines or () if name not in ENGINES]:
        raise DiffuMaskError(f"There is no engine {unknown[0]} to compare: use {', '.join(ENGINES)}.")
    device = resolve_device(device)
    checks = _checks(device, engine_path is None)
    threads = threads or ((1, 2) if device.type == "cpu" else (1,))
    if engines is None:
        possible = checks if geometry in MODELS else ("xformers",)
        engines = [name for name in possible if _works(name, checks[name])]
    exported = [name for name in engines if not name.startswith("compile") and name != "xformers"]
    if engine_path is not None and len(exported) > 1:
        raise DiffuMaskError("An engine path is one engine's: name that engine alone.")
    for name in engines:
        if geometry not in MODELS and name != "xformers":
            raise DiffuMaskError(f"There is no geometry {geometry} of {name}: use {', '.join(MODELS)}.")
        checks[name]()
    config = {"geometry": geometry, "batch": batch, "num_inference_steps": steps or 3}
    return _rows(model or MODELS.get(geometry, geometry), device, engine_path, engines, pairs, threads, config)


def _checks(device: torch.device, exports: bool) -> dict[str, Callable[[], Any]]:
    """Return for each engine a call that raises if it cannot run."""
    from diffumask_fast.export.onnx_export import need_exporter
    from diffumask_fast.export.session import runtime
    from diffumask_fast.export.tensorrt_library import library
    from diffumask_fast.kernels import native

    def tensorrt(flavour: str) -> None:
        if exports:
            need_exporter()
        library(flavour)
        if device.type != "cuda":
            raise DiffuMaskError(f"An engine of {flavour} runs on CUDA: use `device=cuda`.")

    def onnx() -> None:
        if exports:
            need_exporter()
        runtime()

    def compiler() -> None:
        if device.type == "cpu":
            native.library()

    return {
        "compile": compiler,
        "compile_bf16": compiler,
        "onnx": onnx,
        "tensorrt": partial(tensorrt, "tensorrt"),
        "tensorrt-rtx": partial(tensorrt, "tensorrt-rtx"),
        "xformers": partial(check_attention, "xformers", "torch", device),
    }


def _works(name: str, check: Callable[[], Any]) -> bool:
    try:
        check()
    except DiffuMaskError as error:
        logger.warning("%s is left out: %s", name, error)
        return False
    return True


def _rows(
    model: str | Path,
    device: torch.device,
    engine_path: str | Path | None,
    engines: Sequence[str],
    pairs: int | None,
    threads: Sequence[int],
    config: dict[str, Any],
) -> Iterator[dict]:
    dtype = "fp32" if device.type == "cpu" else "fp16"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for engine in engines:
            if engine == "xformers":
                yield from _self_attention(config["geometry"], device, config["batch"], pairs)
                continue
            path = engine_path
            if path is None and not engine.startswith("compile"):
                path = folder / engine
                _export(model, path, engine, dtype, config["batch"])
            for count in threads:
                eager = _open(model, "torch", None, device, dtype, count)
                its_dtype = "bf16" if engine.endswith("bf16") else dtype
                other = _open(model, engine.removesuffix("_bf16"), path, device, its_dtype, count)
                libraries = other.engine.libraries if other.engine else {}
                facts = config | {"dtype": its_dtype, **environment(device), **libraries, "threads": count}
                both = [Contenders(pipe, config["batch"], config["num_inference_steps"]) for pipe in (other, eager)]
                calls: dict[str, list[Workload]] = {
                    "plain": [_plain(one) for one in both],
                    "maps": [one.mapped(1) for one in both],
                    "masks": [one.ours(like_reference=False) for one in both],
                }
                for name, (candidate, baseline) in calls.items():
                    ratio = compare(candidate, baseline, pairs=pairs, device=device, threads=count)
                    yield row(SUITE, f"{engine}_{name}", ratio, config=facts)


@torch.no_grad()
def _self_attention(geometry: str, device: torch.device, batch: int, pairs: int | None) -> Iterator[dict]:
    """Time a guided batch's self-attention layers; each stands before a cross-attention of the same heads."""
    dtype, total = torch.float32 if device.type == "cpu" else torch.float16, {"xformers": 0.0, "sdpa": 0.0}
    config = {"geometry": geometry, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    config |= environment(device) | {"xformers": metadata.version("xformers")}
    for (pixels, heads, head_dim), count in cross_layers(geometry).items():
        layer = Attention(heads * head_dim, heads=heads, dim_head=head_dim).to(device, dtype)
        hidden = torch.randn(2 * batch, pixels, heads * head_dim, device=device, dtype=dtype)
        processors: dict[str, Any] = {"xformers": XFormersAttnProcessor(), "sdpa": AttnProcessor2_0()}
        calls: dict[str, Workload] = {name: partial(call, layer, hidden) for name, call in processors.items()}
        timed = race(calls, control="sdpa", pairs=pairs, device=device, warmup=3)
        total = {name: seconds + count * timed.seconds(name) for name, seconds in total.items()}
        case = {"case": f"{pixels}x{heads}x{head_dim}", "layers": count}
        yield row(SUITE, "xformers_self_attention", timed.ratio("xformers", "sdpa"), config=config | case)
    case = {"case": "all layers", "layers": sum(cross_layers(geometry).values()), "baseline_s": total["sdpa"]}
    yield row(SUITE, "xformers_self_attention", total["xformers"] / total["sdpa"], config=config | case)


def _export(model: str | Path, path: Path, engine: str, dtype: str, batch: int) -> None:
    from diffumask_fast.export.export_model import export_model
    from diffumask_fast.export.options import ExportOptions, ShapeOptions

    export_model(ExportOptions(str(model), path, engine, dtype=dtype, shapes=ShapeOptions(max_batch=batch)))


def _open(
    model: str | Path, engine: str, engine_path: str | Path | None, device: torch.device, dtype: str, threads: int
) -> DiffuMaskPipeline:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if engine in ("torch", "compile"):
            pipe = DiffuMaskPipeline.from_pretrained(model, engine=engine, device=device, dtype=dtype)
        else:
            engine = engine.partition("-")[0]
            pipe = DiffuMaskPipeline.from_pretrained(model, engine=engine, engine_path=engine_path, device=device)
    finally:
        torch.set_num_threads(before)
    pipe.pipe.set_progress_bar_config(disable=True)
    return pipe


def _plain(contenders: Contenders) -> Workload:
    """Draw latents by the diffusers pipeline alone, its UNet under torch.compile where that is the engine."""
    call, unet = contenders.plain(), contenders.pipe.pipe.unet
    if contenders.pipe.engine_name != "compile":
        return call
    compiled = torch.compile(unet.forward, dynamic=False)

    def compiled_call() -> None:
        with patched("forward", {unet: compiled}):
            call()

    return compiled_call
