"""Put a fine-tune's weights into an engine that was built for another model of its geometry. Written against the
signatures of TensorRT-RTX 1.7.1; no GPU has run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.manifest import Manifest, check_build, read_manifest
from diffumask_fast.export.onnx_export import check_out, export_onnx, staged
from diffumask_fast.export.options import ShapeOptions
from diffumask_fast.export.tensorrt_build import replace_graph, write_engine
from diffumask_fast.export.tensorrt_library import MODULES, compute_capability, keeping_logger, library, words_of


def refit_engine(
    engine_path: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    progress: Callable[[str], Any] = lambda _: None,
) -> Manifest:
    """Write an engine with the weights of another model, without building it again.

    Args:
        engine_path: folder of an engine that was built refittable; it is not changed.
        model: "mini", a diffusers folder or a hub id, of the geometry of the engine's model.
        out: folder of the new engine; must not be there yet.
        revision: of a hub id.
        progress: is called with a sentence before each step.

    Returns:
        what was written.

    Raises:
        DiffuMaskError: no refittable engine, no GPU of its kind here, another library version, a model of another
            geometry; nothing is left then.
    """
    source = Path(engine_path).expanduser()
    manifest = read_manifest(source)
    if manifest.engine not in MODULES:
        raise DiffuMaskError(
            f"{source} is an engine for {manifest.engine}, whose models are exported anew: leave `refit` out."
        )
    if not manifest.refittable:
        raise DiffuMaskError(f"{source} cannot take other weights: export its model again with `refittable`.")
    trt = library(manifest.engine)
    check_build(manifest, source, trt.__version__, compute_capability())
    out = Path(out).expanduser()
    check_out(out)
    limits = manifest.limits
    shapes = ShapeOptions(
        max_batch=limits.rows[1] // 2, min_size=(limits.height[0], limits.width[0]),
        max_size=(limits.height[1], limits.width[1]), static=limits.rows[0] == limits.rows[1],
        max_phrases=limits.max_phrases, propagate=bool(limits.propagated),
    )  # fmt: skip
    with staged(out) as folder:
        exported = export_onnx(model, folder, manifest.dtype, shapes, revision=revision, progress=progress)
        if exported.limits != limits or _geometry(exported, folder) != _geometry(manifest, source):
            raise DiffuMaskError(f"{model} has another geometry than {source}: export it by itself.")
        for name, part in manifest.parts.items():
            progress(f"refitting {name}")
            plan = refit_plan(trt, source / part.graph, folder / exported.parts[name].graph)
            replace_graph(folder, name, plan)
        refitted = replace(exported, engine=manifest.engine, target=manifest.target, refittable=True)
        return write_engine(refitted, folder, trt, "refitted, never run")


def _geometry(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Return the configuration of each part, without the entries that tell where it came from."""
    configs = {name: json.loads((folder / part.config).read_text("utf-8")) for name, part in manifest.parts.items()}
    origins = ("_", "transformers_version", "torch_dtype", "dtype")
    return {
        name: {key: config[key] for key in config if not key.startswith(origins)} for name, config in configs.items()
    }


def refit_plan(trt: Any, engine_file: Path, graph: Path) -> bytes:
    """Return an engine with the weights of a graph.

    Raises:
        DiffuMaskError: the engine cannot be loaded, or the weights do not fit.
    """
    logger = keeping_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(engine_file.read_bytes())
    if engine is None:
        raise DiffuMaskError(f"TensorRT cannot load {engine_file} ({words_of(logger)}): export the model again.")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
        raise DiffuMaskError(
            f"The weights of {graph.name} do not fit the engine ({words_of(logger)}): export the model by itself."
        )
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # else the new engine would take no further weights
    return bytes(engine.serialize_with_config(config))
