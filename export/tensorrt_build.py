"""Build TensorRT-RTX engines from the ONNX graphs, for a named compute capability, on a machine without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.manifest import Manifest, hash_files, versions, write_manifest
from diffumask_fast.export.onnx_export import export_onnx, staged

ENGINE = "tensorrt-rtx"


def export_rtx(
    model: str | Path,
    out: str | Path,
    dtype: str = "fp16",
    *,
    compute_capability: str = "8.9",
    progress: Callable[[str], Any] = lambda _: None,
    **settings: Any,
) -> Manifest:
    """Export a model as ONNX, check it, and build each graph for one kind of GPU.

    Args:
        model: as export_onnx.
        out: folder of the engine; must not be there yet.
        dtype: "fp16", "bf16" or "fp32"; in fp32 attention is decomposed, for there is no fused kernel.
        compute_capability: of the GPU, such as "8.9".
        progress: is told what comes next.
        settings: of export_onnx.

    Returns:
        what was written; nothing of it has been run.

    Raises:
        DiffuMaskError: as export_onnx; TensorRT-RTX is missing, does not know the GPU, or cannot build a graph.
    """
    trt = builder_library()
    target = find_target(trt, compute_capability)
    with staged(Path(out).expanduser()) as folder:
        manifest = export_onnx(model, folder, dtype, progress=progress, **settings)
        for name, part in manifest.parts.items():
            progress(f"building {name} for compute capability {compute_capability}")
            plan = build_plan(trt, folder / part.graph, manifest.limits, target, part.dtype == "fp32")
            for path in folder.glob(f"{name}.onnx*"):
                path.unlink()
            (folder / f"{name}.engine").write_bytes(plan)
        manifest = _rewritten(manifest, folder, compute_capability, trt.__version__)
    return manifest


def builder_library() -> Any:
    """Return TensorRT-RTX's module.

    Raises:
        DiffuMaskError: it is not installed, or broken.
    """
    try:
        return importlib.import_module("tensorrt_rtx_bindings")
    except (ImportError, OSError) as error:
        raise DiffuMaskError(
            f"TensorRT-RTX cannot be imported ({error}): on Linux, pip install 'diffumask-fast[onnx,tensorrt-rtx]'."
        ) from error


def find_target(trt: Any, compute_capability: str) -> Any:
    """Return the builder's name of a compute capability such as "8.9"; raises DiffuMaskError where there is none."""
    known = {name.removeprefix("SM"): value for name, value in trt.ComputeCapability.__members__.items()}
    known = {f"{name[:-1]}.{name[-1]}": value for name, value in known.items() if name.isdecimal()}
    if compute_capability not in known:
        raise DiffuMaskError(
            f"TensorRT-RTX does not build for compute capability {compute_capability}: it knows {', '.join(known)}; "
            "use --to onnx for other GPUs."
        )
    return known[compute_capability]


def build_plan(trt: Any, graph: Path, limits: Limits, target: Any, decompose: bool) -> bytes:
    """Build one graph.

    Args:
        trt: the module.
        graph: the ONNX file.
        limits: the profile's least and most shapes; the most is what it is tuned for.
        target: the builder's compute capability.
        decompose: do without fused attention, which fp32 does not have.

    Raises:
        DiffuMaskError: the graph cannot be parsed or built; the builder's own words are in it.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise DiffuMaskError(f"TensorRT-RTX cannot read {graph.name}: {parser.get_error(0).desc()[:300]}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(target, 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        if -1 in tuple(entry.shape):
            least, most = profile_shapes(entry.name, tuple(entry.shape), limits)
            profile.set_shape(entry.name, least, most, most)
    config.add_optimization_profile(profile)
    if decompose:
        _decompose_attention(trt, network)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        words = "; ".join(logger.errors)[:300] or "without a reason"
        raise DiffuMaskError(f"TensorRT-RTX cannot build {graph.name} ({words}): use another --dtype, or --to onnx.")
    return bytes(plan)


def profile_shapes(name: str, shape: tuple[int, ...], limits: Limits) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the least and the most shape of an input.

    Args:
        name: of the input.
        shape: of the network, -1 where it is dynamic.
        limits: of the engine.
    """

    def filled(end: int) -> tuple[int, ...]:
        h, w = limits.height[end] // limits.vae_factor, limits.width[end] // limits.vae_factor
        sizes = {0: limits.rows[end], 2: h, 3: w}
        if name.startswith("prior."):
            sizes[2] = limits.level_pixels((h, w))[name.removeprefix("prior.")]
        return tuple(sizes[axis] if size == -1 else size for axis, size in enumerate(shape))

    return filled(0), filled(1)


def _logger(trt: Any) -> Any:
    class Kept(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Kept()


def _decompose_attention(trt: Any, network: Any) -> None:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            # the bindings give the base class
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _rewritten(manifest: Manifest, folder: Path, compute_capability: str, version: str) -> Manifest:
    parts = {name: replace(part, graph=f"{name}.engine") for name, part in manifest.parts.items()}
    checked = dict.fromkeys(parts, f"built for compute capability {compute_capability}, never run")
    found = replace(
        manifest, engine=ENGINE, parts=parts, files=hash_files(folder), target=compute_capability,
        versions={**versions(), "tensorrt-rtx": version}, checked=checked,
    )  # fmt: skip
    write_manifest(folder, found)
    return found
