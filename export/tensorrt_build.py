"""Build engines of TensorRT or TensorRT-RTX from the ONNX graphs; the latter on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export import plan_cache
from diffumask_fast.export.limits import Limits
from diffumask_fast.export.manifest import Manifest, hash_files, versions, write_manifest
from diffumask_fast.export.onnx_export import check_out, export_onnx, staged
from diffumask_fast.export.options import ShapeOptions
from diffumask_fast.export.tensorrt_library import compute_capability as local_capability
from diffumask_fast.export.tensorrt_library import is_rtx, keeping_logger, library, words_of
from diffumask_fast.models.cache import cache_folder


def export_tensorrt(
    model: str | Path,
    out: str | Path,
    dtype: str = "fp16",
    shapes: ShapeOptions | None = None,
    *,
    to: str = "tensorrt-rtx",
    compute_capability: str | None = None,
    refittable: bool = False,
    revision: str | None = None,
    progress: Callable[[str], Any] = lambda _: None,
) -> Manifest:
    """Export a model as ONNX, check it, and build each graph for one kind of GPU.

    A graph that was built before with the same weights and options is taken from the user's cache.

    Args:
        model: as export_onnx.
        out: folder of the engine; must not be there yet.
        dtype: "fp16", "bf16" or "fp32"; in fp32 attention is decomposed, because there is no fused kernel.
        shapes: as export_onnx.
        to: "tensorrt-rtx", or "tensorrt", which builds only on the GPU that it builds for.
        compute_capability: of the GPU, such as "8.9"; None is the GPU here.
        refittable: let `refit_engine` replace the weights later, at the cost of some speed; needs a GPU, also for
            TensorRT-RTX, whose builder fails without one.
        revision: of a hub id.
        progress: is called with a sentence before each step.

    Returns:
        what was written; none of it has been run.

    Raises:
        DiffuMaskError: as export_onnx; the library is missing, does not know the GPU, or cannot build a graph.
    """
    trt = library(to)
    target = find_target(trt, to, compute_capability)
    if refittable and local_capability() is None:
        raise DiffuMaskError(
            "TensorRT-RTX builds a refittable engine only where there is a GPU, and torch sees none here: leave "
            "`refittable` out, or run this on the GPU's machine."
        )
    out = Path(out).expanduser()
    check_out(out)
    with staged(out) as folder:
        manifest = export_onnx(model, folder, dtype, shapes, revision=revision, progress=progress)
        for name, part in manifest.parts.items():
            progress(f"building {name} for compute capability {target}")
            plan = build_plan(trt, folder / part.graph, manifest.limits, target, part.dtype == "fp32", refittable)
            replace_graph(folder, name, plan)
        manifest = replace(manifest, engine=to, target=target, refittable=refittable)
        manifest = write_engine(manifest, folder, trt, f"built for compute capability {target}, never run")
    return manifest


def find_target(trt: Any, to: str, compute_capability: str | None) -> str:
    """Return the compute capability to build for.

    Raises:
        DiffuMaskError: the library cannot build for it here.
    """
    here = local_capability()
    if to == "tensorrt":
        if here is None or compute_capability not in (None, here):
            raise DiffuMaskError(
                f"TensorRT builds only on the GPU that it builds for, and here is "
                f"{f'one of compute capability {here}' if here else 'none'}: run this on that GPU's machine, or use "
                "`to=tensorrt-rtx`, which needs no GPU."
            )
        return here
    known = list(known_targets(trt))
    wanted = compute_capability or here
    if wanted is None:
        raise DiffuMaskError(
            f"There is no GPU here to build for: name one, such as `compute_capability=8.9`, of {', '.join(known)}."
        )
    if wanted not in known:
        raise DiffuMaskError(
            f"TensorRT-RTX does not build for compute capability {wanted}: it knows {', '.join(known)}; use `to=onnx` "
            "or `to=tensorrt` for other GPUs."
        )
    return wanted


def known_targets(trt: Any) -> dict[str, Any]:
    """Return compute capability -> the builder's own name of it, of TensorRT-RTX."""
    names = {name.removeprefix("SM"): value for name, value in trt.ComputeCapability.__members__.items()}
    return {f"{name[:-1]}.{name[-1]}": value for name, value in names.items() if name.isdecimal()}


def build_plan(
    trt: Any, graph: Path, limits: Limits, target: str, decompose: bool = False, refittable: bool = False
) -> bytes:
    """Build one graph, or take it from the cache where it was built before.

    Args:
        trt: the module.
        graph: the ONNX file.
        limits: the profile's least and most shapes; the most is what it is tuned for.
        target: compute capability, such as "8.9".
        decompose: do without fused attention, which does not exist in fp32.
        refittable: let the weights be replaced later.

    Raises:
        DiffuMaskError: the graph cannot be parsed or built; the message quotes the builder.
    """
    options = {"limits": limits.as_json(), "target": target, "decompose": decompose, "refittable": refittable}
    options |= {"library": trt.__name__, "version": trt.__version__}
    key = plan_cache.plan_key(graph, options)
    plan = plan_cache.kept(key)
    if plan is None:
        plan = _build(trt, graph, limits, target, decompose, refittable)
        plan_cache.keep(key, plan)
    return plan


def profile_shapes(name: str, shape: tuple[int, ...], limits: Limits) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the least and the most shape of an input.

    Args:
        name: of the input.
        shape: of the network, -1 where it is dynamic.
        limits: of the engine.
    """

    def filled(end: int) -> tuple[int, ...]:
        h, w = limits.height[end] // limits.vae_factor, limits.width[end] // limits.vae_factor
        # The UNet's rows are not dynamic in a static engine; those of VAE and text encoder are, and are not padded.
        sizes = {0: (1, limits.rows[1])[end], 2: h, 3: w}
        if name.startswith("prior."):
            sizes[2] = limits.level_pixels((h, w))[name.removeprefix("prior.")]
        return tuple(sizes[axis] if size == -1 else size for axis, size in enumerate(shape))

    return filled(0), filled(1)


def replace_graph(folder: Path, name: str, plan: bytes) -> None:
    """Replace the ONNX graph of a part by its engine."""
    for path in folder.glob(f"{name}.onnx*"):
        path.unlink()
    (folder / f"{name}.engine").write_bytes(plan)


def write_engine(manifest: Manifest, folder: Path, trt: Any, checked: str) -> Manifest:
    """Write the manifest of a folder whose graphs became engines; `checked` is a sentence, for no figures exist."""
    parts = {name: replace(part, graph=f"{name}.engine") for name, part in manifest.parts.items()}
    written = replace(
        manifest, parts=parts, files=hash_files(folder), checked=dict.fromkeys(parts, checked),
        versions={**versions(), manifest.engine: trt.__version__},
    )  # fmt: skip
    write_manifest(folder, written)
    return written


def _build(trt: Any, graph: Path, limits: Limits, target: str, decompose: bool, refittable: bool) -> bytes:
    logger = keeping_logger(trt)
    builder = trt.Builder(logger)
    # A flag of TensorRT 10; from 11 on every network is strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise DiffuMaskError(f"TensorRT cannot read {graph.name}: {parser.get_error(0).desc()[:300]}")
    config = builder.create_builder_config()
    if refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    config.add_optimization_profile(_profile(builder, network, limits))
    if decompose:
        _decompose_attention(trt, network)
    timings = None
    if is_rtx(trt):
        config.num_compute_capabilities = 1
        config.set_compute_capability(known_targets(trt)[target], 0)
    else:
        timings = cache_folder() / "timings" / f"{trt.__version__}-{target}"
        _use_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DiffuMaskError(
            f"TensorRT cannot build {graph.name} ({words_of(logger)}): use another `dtype`, or `to=onnx`."
        )
    if timings is not None:
        plan_cache.write_whole(timings, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _use_timings(config: Any, timings: Path) -> None:
    """Give a build the kernel timings of earlier builds, or none where another model of GPU took them."""
    kept = config.create_timing_cache(plan_cache.read_whole(timings) or b"")
    if not config.set_timing_cache(kept, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _profile(builder: Any, network: Any, limits: Limits) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        entry = network.get_input(index)
        if -1 in tuple(entry.shape):
            least, most = profile_shapes(entry.name, tuple(entry.shape), limits)
            profile.set_shape(entry.name, least, most, most)
    return profile


def _decompose_attention(trt: Any, network: Any) -> None:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            # The bindings return an object of the base class.
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
