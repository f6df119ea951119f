"""Load an exported engine as the pipeline that was exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.components import engine_decoder, engine_text_encoder, engine_unet
from diffumask_fast.export.denoiser import ExportedDenoiser
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.manifest import Manifest, check_build, check_runtime, check_sources, read_manifest
from diffumask_fast.export.session import GraphSession, OnnxSession, runtime
from diffumask_fast.export.tensorrt_library import compute_capability, library
from diffumask_fast.export.tensorrt_session import TensorRTSession
from diffumask_fast.models.device import DTYPES, resolve_device, resolve_dtype
from diffumask_fast.models.diffusers_pipeline import DiffusersPipeline
from diffumask_fast.models.find import ModelInfo, find_model
from diffumask_fast.models.loading import load_pipe, quietly

# engine -> the engines that its folder's manifest may name
ENGINES = {"onnx": ("onnx",), "tensorrt": ("tensorrt", "tensorrt-rtx")}
OpenGraph = Callable[[Path], GraphSession]


@dataclass(frozen=True)
class Engine:
    """An exported engine that runs a pipeline in place of torch.

    Args:
        name: "onnx", "tensorrt" or "tensorrt-rtx".
        sha256: of everything that decides the images.
        limits: the shapes that it takes.
        weights: hash of the model's files, including those that only the engine holds.
        libraries: name -> version, of the libraries that run it.
    """

    name: str
    sha256: str
    limits: Limits
    weights: str
    libraries: dict[str, str]


def load_engine(
    model: str | Path,
    engine: str,
    engine_path: str | Path | None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    lora: Sequence[str] = (),
) -> tuple[DiffusersPipeline, ModelInfo, Engine]:
    """Load a pipeline whose components are those of an engine; the model's folder need not have their weights.

    Args:
        model: what was exported.
        engine: "onnx" or "tensorrt".
        engine_path: folder that `diffumask-fast export` wrote.
        dtype: None is that of the engine; another one is refused.
        device: None is CUDA where there is one that the engine can use.
        revision: of a hub id.
        lora: none, for an engine's weights are fixed.

    Raises:
        DiffuMaskError: no such engine, library, folder or device; a damaged engine, or one of other weights; a LoRA.
    """
    if engine not in ENGINES:
        raise DiffuMaskError(f"There is no engine {engine}: use torch, compile, {' or '.join(ENGINES)}.")
    if lora:
        raise DiffuMaskError(
            f"the weights of `engine={engine}` are fixed: use `engine=torch` or compile with `lora`, or save the model "
            "with it as a folder and export that"
        )
    if engine_path is None:
        raise DiffuMaskError(f"`engine={engine}` needs `engine_path`, a folder that `diffumask-fast export` wrote.")
    folder = Path(engine_path).expanduser()
    manifest = read_manifest(folder)
    if manifest.engine not in ENGINES[engine]:
        fitting = next((name for name, kinds in ENGINES.items() if manifest.engine in kinds), "torch")
        raise DiffuMaskError(f"{folder} is an engine for {manifest.engine}: use `engine={fitting}`, or another folder.")
    open_engine = _open_onnx if engine == "onnx" else _open_tensorrt
    device, open_graph, libraries = open_engine(manifest, folder, device)
    if dtype not in (None, "auto") and resolve_dtype(dtype, device) != DTYPES[manifest.dtype]:
        raise DiffuMaskError(f"{folder} works in {manifest.dtype}: leave `dtype` out, or export with `dtype={dtype}`.")
    info = find_model(model, revision, held=manifest.parts)
    weights = check_sources(manifest, info.local_folder, folder)
    with quietly():
        components = load_components(manifest, folder, open_graph)
    pipe = load_pipe(info, DTYPES[manifest.dtype], device, **components)
    return pipe, info, Engine(manifest.engine, manifest.sha256, manifest.limits, weights, libraries)


def load_components(manifest: Manifest, folder: Path, open_graph: OpenGraph) -> dict[str, Any]:
    """Return the pipeline's components that the engine replaces, by name."""
    components: dict[str, Any] = {}
    for name, part in manifest.parts.items():
        session, config = open_graph(folder / part.graph), folder / part.config
        if name == "unet":
            components[name] = engine_unet(config, ExportedDenoiser(session, manifest.limits))
        elif name == "vae":
            components[name] = engine_decoder(part.kind, config, session, manifest.limits.vae_factor)
        else:
            components[name] = engine_text_encoder(part.kind, config, session)
    return components


def _open_onnx(
    manifest: Manifest, folder: Path, device: str | torch.device | None
) -> tuple[torch.device, OpenGraph, dict[str, str]]:
    ort = runtime()
    check_runtime(manifest, ort.__version__, folder)
    chosen = _onnx_device(device, ort)
    return chosen, lambda path: OnnxSession(path, chosen), {"onnxruntime": ort.__version__}


def _open_tensorrt(
    manifest: Manifest, folder: Path, device: str | torch.device | None
) -> tuple[torch.device, OpenGraph, dict[str, str]]:
    trt, chosen = library(manifest.engine), resolve_device(device)
    capability = compute_capability(chosen) if chosen.type == "cuda" else None
    check_build(manifest, folder, trt.__version__, capability)
    return chosen, lambda path: TensorRTSession(trt, path, chosen), {manifest.engine: trt.__version__}


def _onnx_device(device: str | torch.device | None, ort: Any) -> torch.device:
    if device in (None, "auto") and "CUDAExecutionProvider" not in ort.get_available_providers():
        return torch.device("cpu")
    return resolve_device(device)
