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
from diffumask_fast.export.tensorrt_library import compute_capability as local_capability
from diffumask_fast.export.tensorrt_library import is_rtx, keeping_logger, library, words_of
from diffumask_fast.models.cache import cache_folder


def export_tensorrt(
    model: str | Path,
    out: str | Path,
    dtype: str = "fp16",
    *,
    flavour: str = "tensorrt-rtx",
    compute_capability: str | None = None,
    refittable: bool = False,
    progress: Callable[[str], Any] = lambda _: None,
    **settings: Any,
) -> Manifest:
    """Export a model as ONNX, check it, and build each graph for one kind of GPU.

    What was built once, with the same weights and options, comes from the user's cache.

    Args:
        model: as export_onnx.
        out: folder of the engine; must not be there yet.
        dtype: "fp16", "bf16" or "fp32"; in fp32 attention is decomposed, for there is no fused kernel.
        flavour: "tensorrt-rtx", or "tensorrt", which builds only on the GPU that it builds for.
        compute_capability: of the GPU, such as "8.9"; None is the GPU here.
        refittable: keep the engine open for the weights of other fine-tunes (`refit_engine`), at some speed; needs
            a GPU, also for TensorRT-RTX, whose builder fails without one.
        progress: is told what comes next.
        settings: of export_onnx.

    Returns:
        what was written; nothing of it has been run.

    Raises:
        DiffuMaskError: as export_onnx; the library is missing, does not know the GPU, or cannot build a graph.
    """
    trt = library(flavour)
    target = find_target(trt, flavour, compute_capability)
    if refittable and local_capability() is None:
        raise DiffuMaskError(
            "TensorRT-RTX builds a refittable engine only where there is a GPU, and torch sees none here: leave "
            "--refittable out, or run this on the GPU's machine."
        )
    out = Path(out).expanduser()
    check_out(out)
    with staged(out) as folder:
        manifest = export_onnx(model, folder, dtype, progress=progress, **settings)
        for name, part in manifest.parts.items():
            progress(f"building {name} for compute capability {target}")
            plan = build_plan(trt, folder / part.graph, manifest.limits, target, part.dtype == "fp32", refittable)
            replace_graph(folder, name, plan)
        manifest = replace(manifest, engine=flavour, target=target, refittable=refittable)
        manifest = write_engine(manifest, folder, trt, f"built for compute capability {target}, never run")
    return manifest


def find_target(trt: Any, flavour: str, compute_capability: str | None) -> str:
    """Return the compute capability to build for.

    Raises:
        DiffuMaskError: the flavour cannot build for it here.
    """
    here = local_capability()
    if flavour == "tensorrt":
        if here is None or compute_capability not in (None, here):
            raise DiffuMaskError(
                f"TensorRT builds only on the GPU that it builds for, and here is "
                f"{f'one of compute capability {here}' if here else 'none'}: run this on that GPU's machine, or use "
                "--to tensorrt-rtx, which needs no GPU."
            )
        return here
    known = list(known_targets(trt))
    wanted = compute_capability or here
    if wanted is None:
        raise DiffuMaskError(
            f"There is no GPU here to build for: name one, such as --compute-capability 8.9, of {', '.join(known)}."
        )
    if wanted not in known:
        raise DiffuMaskError(
            f"TensorRT-RTX does not build for compute capability {wanted}: it knows {', '.join(known)}; use --to onnx "
            "or --to tensorrt for other GPUs."
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
        decompose: do without fused attention, which fp32 does not have.
        refittable: let other weights be put in later.

    Raises:
        DiffuMaskError: the graph cannot be parsed or built; the builder's own words are in it.
    """
    options = {"limits": limits.as_json(), "target": target, "decompose": decompose, "refittable": refittable}
    options |= {"library": trt.__name__, "version": trt.__version__}
    key = plan_cache.plan_key(graph, options)
    plan = plan_cache.kept(key)
    if plan is None:
        plan = _built(trt, graph, limits, target, decompose, refittable)
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
        # where rows are dynamic in a static engine they are those of VAE and text encoder, whose calls nobody pads
        sizes = {0: (1, limits.rows[1])[end], 2: h, 3: w}
        if name.startswith("prior."):
            sizes[2] = limits.level_pixels((h, w))[name.removeprefix("prior.")]
        return tuple(sizes[axis] if size == -1 else size for axis, size in enumerate(shape))

    return filled(0), filled(1)


def replace_graph(folder: Path, name: str, plan: bytes) -> None:
    """Put the engine of a part in the place of its ONNX graph."""
    for path in folder.glob(f"{name}.onnx*"):
        path.unlink()
    (folder / f"{name}.engine").write_bytes(plan)


def write_engine(manifest: Manifest, folder: Path, trt: Any, said: str) -> Manifest:
    """Write the manifest of a folder whose graphs became engines; `said` stands where figures of a check would."""
    parts = {name: replace(part, graph=f"{name}.engine") for name, part in manifest.parts.items()}
    found = replace(
        manifest, parts=parts, files=hash_files(folder), checked=dict.fromkeys(parts, said),
        versions={**versions(), manifest.engine: trt.__version__},
    )  # fmt: skip
    write_manifest(folder, found)
    return found


def _built(trt: Any, graph: Path, limits: Limits, target: str, decompose: bool, refittable: bool) -> bytes:
    logger = keeping_logger(trt)
    builder = trt.Builder(logger)
    # strongly typed is a flag of TensorRT 10, and all there is from 11 on
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
            f"TensorRT cannot build {graph.name} ({words_of(logger)}): use another --dtype, or --to onnx."
        )
    if timings is not None:
        plan_cache.write_whole(timings, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _use_timings(config: Any, timings: Path) -> None:
    """Let a build know the timings of earlier ones, or of none where another model of GPU took them."""
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
            # the bindings give the base class
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
