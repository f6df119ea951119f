"""The rows that the GPU goals are judged by: kernels and torch's own, maps on and off, whole runs and diffusers'."""

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from diffumask_fast.attention.store import MAX_PROPAGATED_PIXELS
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.bench import end_to_end, sdpa
from diffumask_fast.bench.geometries import check_geometry, cross_layers, open_geometry, unet_config
from diffumask_fast.bench.harness import GRAPH_CALLS, Race, compare, race
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.bench.sides import Sides
from diffumask_fast.compiled import CompiledDenoiser, compile_pipe
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend, bilateral_norm, guided_filter, mean_field
from diffumask_fast.loading import resolve_device
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu
from diffumask_fast.pipeline import DiffuMaskPipeline

SUITE = "goals"
PARTS = ("sdpa", "attention", "refinement", "denoising", "graphs", "stock")
BATCHES = (8, 32)  # of the denoising
TOKENS, PHRASES = 77, 2

REFINEMENT_CALLS = 4  # in a graph: their temporaries are large
PLAIN = "sdpa_without_maps"
CRF = {"window": 11, "bilateral": (10.0, 80.0, 13.0), "gaussian": (3.0, 3.0)}


def run(
    geometry: str = "sd15",
    device: str = "auto",
    *,
    names: Sequence[str] | None = None,
    batch: int = 16,
    batches: Sequence[int] = BATCHES,
    steps: int | None = None,
    pairs: int | None = None,
    engines: Sequence[str] = ("compile",),
) -> Iterator[dict]:
    """Measure what the goals name; on a CPU the same rows without the Triton forms.

    Args:
        geometry: one of `geometries.GEOMETRIES`.
        device: "auto", "cpu" or "cuda".
        names: which of PARTS; None is all.
        batch: samples of the layers, images of the refinement; whole runs draw half as many.
        batches: images of the denoising with and without maps.
        steps: denoising steps of whole runs, 20 when None; of the denoising, 3 when None.
        pairs: rounds of a comparison; None is the harness' number for the device.
        engines: one, "compile" or "torch": what draws our side of the whole runs.

    Returns:
        Rows as they are finished. On CUDA, `sdpa`, microseconds of each backend at each width (`bench.sdpa`). For each
        layer and for all of them, over SDPA without maps: `attend_over_...` (the fused kernel), `sdpa_maps_over_...`
        (SDPA and the maps-only kernel), `columns_over_...` (SDPA with the columns in the values); `attend_copy_share`.
        `guided_filter_and_otsu`, `mean_field` and `make_masks` in milliseconds for an image; the `end_to_end` rows
        `maps_overhead` and `propagation_overhead` (maps on, as by default) at each batch; `unet_maps_overhead` and
        `unet_propagation_overhead`, a UNet call of the engine with maps over one without; `speedup_over_stock`,
        diffusers' images without maps over ours with masks.

    Raises:
        DiffuMaskError: an unknown geometry, part or engine.
    """
    check_geometry(geometry)
    for name in names or ():
        if name not in PARTS:
            raise DiffuMaskError(f"There is no part {name} in {SUITE}: use {', '.join(PARTS)}.")
    if tuple(engines) not in (("compile",), ("torch",)):
        raise DiffuMaskError(f"{SUITE} takes one engine, compile or torch, not {', '.join(engines)}.")
    where = resolve_device(device)
    return _rows(geometry, where, names or PARTS, batch, batches, steps, pairs, engines[0])


def _rows(geometry, where, parts, batch, batches, steps, pairs, engine) -> Iterator[dict]:
    shared = {"geometry": geometry, **environment(str(where))}
    opened = functools.cache(functools.partial(open_geometry, geometry, str(where)))
    if "sdpa" in parts and where.type == "cuda":
        yield from sdpa.rows(SUITE, geometry, where, batch, pairs, shared)
    if "attention" in parts:
        yield from _attention(geometry, where, batch, pairs, shared)
    if "refinement" in parts:
        yield from _refinement(geometry, where, batch, pairs, shared)
    for size in batches if "denoising" in parts else ():
        names, pipe = ("maps_overhead", "propagation_overhead"), opened()
        yield from end_to_end.run(geometry, str(where), names=names, batch=size, steps=steps, pairs=pairs, pipe=pipe)
    if "graphs" in parts:
        yield from _unet_calls(opened(), where, max(1, batch // 2), pairs, engine, shared)
    if "stock" in parts:
        yield _stock(opened(), where, max(1, batch // 2), steps or 20, pairs, engine, shared)


def forms(where: torch.device) -> tuple[str, ...]:
    """Return the forms of the filters that can be launched on a device."""
    return ("torch", "triton") if where.type == "cuda" else ("torch",)


def _attention(geometry, where, batch, pairs, shared) -> Iterator[dict]:
    dtype = torch.float16 if where.type == "cuda" else torch.float32
    bandwidth = _copy_bandwidth(where, pairs)
    plain, totals = 0.0, Counter()
    config = {**shared, "batch": batch, "phrases": PHRASES, "dtype": str(dtype).removeprefix("torch.")}
    for (pixels, heads, head_dim), count in cross_layers(geometry).items():
        calls, moved = _layer(where, dtype, batch, pixels, heads, head_dim)
        device, graph_calls = str(where), GRAPH_CALLS
        done = race(calls, control=PLAIN, pairs=pairs, device=device, warmup=3, graph_calls=graph_calls)
        config |= {"case": f"{pixels}x{heads}x{head_dim}", "layers": count}
        for name in calls.keys() - {PLAIN}:
            yield row(SUITE, f"{name}_over_{PLAIN}", done.ratio(name, PLAIN), config=config)
            totals[name] += count * done.seconds(name)
        plain += count * done.seconds(PLAIN)
        share = moved / done.seconds("attend") / bandwidth
        yield row(SUITE, "attend_copy_share", share, config={**config, "bytes": moved, "gb_per_s": bandwidth / 1e9})
    config |= {"case": "all layers", "layers": sum(cross_layers(geometry).values()), "baseline_s": plain}
    for name, total in totals.items():
        yield row(SUITE, f"{name}_over_{PLAIN}", total / plain, config=config)


def _layer(where, dtype, batch, pixels, heads, head_dim) -> tuple[dict[str, Callable[[], object]], int]:
    """Return the sides of one layer, random and never zero, and the bytes that it must move at least."""
    rng, half = torch.Generator().manual_seed(0), max(1, batch // 2)
    q, k, v = (
        torch.randn(batch, num, heads * head_dim, generator=rng).to(where, dtype) for num in (pixels, TOKENS, TOKENS)
    )
    select = torch.rand(half, TOKENS, PHRASES, generator=rng).to(where)
    maps = torch.zeros(half, PHRASES, pixels, device=where)
    split = [x.unflatten(-1, (heads, head_dim)).transpose(1, 2) for x in (q, k, v)]
    settings = {"heads": heads, "first_conditional": batch - half, "maps": maps}

    def mapped(impl: str) -> Callable[[], object]:
        return lambda: attend(q, k, v, select, **settings, impl=impl)

    calls = {PLAIN: lambda: F.scaled_dot_product_attention(*split)}
    if where.type == "cuda":
        calls |= {"attend": mapped("triton"), "sdpa_maps": mapped("sdpa+maps"), "columns": mapped("sdpa")}
    else:
        calls |= {"attend": mapped("sdpa")}
    return calls, 2 * q.nbytes + k.nbytes + v.nbytes + 2 * maps.nbytes + select.nbytes


def _copy_bandwidth(where: torch.device, pairs: int | None) -> float:
    """Return bytes/s of a copy that no cache holds, read and written."""
    source = torch.rand((1024 if where.type == "cuda" else 64) * 2**18, device=where)
    target = torch.empty_like(source)
    done = race({"copy": lambda: target.copy_(source)}, pairs=pairs, device=str(where), warmup=3)
    return 2 * source.nbytes / done.seconds("copy")


def _refinement(geometry, where, batch, pairs, shared) -> Iterator[dict]:
    latent, rng = unet_config(geometry)["sample_size"], torch.Generator().manual_seed(0)
    size, options = 8 * latent, MaskOptions()
    guide, maps = (torch.rand(batch, num, size, size, generator=rng).to(where) for num in (3, 1))
    radius = size // latent  # one cell of the map, as the default
    few = max(1, batch // 4)
    q = torch.rand(few, 8, 2, size, size, generator=rng).softmax(2).to(where)
    unary, colours = -q.log(), 255 * guide[:few]
    norm = bilateral_norm(colours, window=CRF["window"], bilateral=CRF["bilateral"])

    def filtering(form: str) -> Callable[[], object]:
        return lambda: otsu(guided_filter(guide, maps, radius, options.eps, impl=form))

    def stepping(form: str) -> Callable[[], object]:
        return lambda: mean_field(q, unary, colours, **CRF, norm=norm, impl=form)

    config = {**shared, "pixels": size, "dtype": "float32"}
    for name, make, images in (("guided_filter_and_otsu", filtering, batch), ("mean_field", stepping, few)):
        calls = {form: make(form) for form in forms(where)}
        done = race(calls, pairs=pairs, device=str(where), warmup=2, graph_calls=REFINEMENT_CALLS)
        for form in forms(where):
            yield _per_image(name, done, form, images, {**config, "batch": images, "case": form})
    cells, pictures = torch.rand(batch, 1, latent, latent, generator=rng).to(where), (255 * guide).byte().movedim(1, 3)
    ids = torch.ones(batch, 1, dtype=torch.long, device=where)
    done = race({"auto": lambda: make_masks(cells, pictures, options, ids)}, pairs=pairs, device=str(where), warmup=2)
    config |= {"batch": batch, "case": "auto", "mask": dict(vars(options))}
    yield _per_image("make_masks", done, "auto", batch, config)


def _per_image(name: str, done: Race, form: str, images: int, config: dict) -> dict:
    times = sorted(1e3 * seconds / images for seconds in done.times[form])
    config = {**config, "clock": done.clock}
    value = 1e3 * done.seconds(form) / images
    return row(SUITE, name, value, unit="ms/image", low=times[0], high=times[-1], n=len(times), config=config)


def _unet_calls(pipe, where, batch, pairs, engine, shared) -> Iterator[dict]:
    """Compare one UNet call of a guided batch with maps, and with propagation, to the same engine's without maps."""
    unet, rng = copy.deepcopy(pipe.pipe.unet), torch.Generator().manual_seed(0)
    if engine == "compile":
        denoiser = CompiledDenoiser(unet.to(memory_format=torch.channels_last))
    else:
        denoiser = UNetWithMaps(unet)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(batch, unet.config.in_channels, side, side, generator=rng).repeat(2, 1, 1, 1)
    states = torch.randn(2 * batch, TOKENS, width, generator=rng)
    latents, states = (x.to(where, unet.dtype) for x in (latents, states))
    select = torch.rand(batch, TOKENS, PHRASES, generator=rng).to(where)

    @torch.no_grad()
    def call(columns, prior=None):
        return denoiser(latents, 500, states, columns, prior, first_conditional=batch)

    prior = {level: maps for level, maps in call(select)[1].items() if maps.shape[-1] <= MAX_PROPAGATED_PIXELS}
    calls = {"plain": lambda: call(None), "maps": lambda: call(select), "propagation": lambda: call(select, prior)}
    done = race(calls, control="plain", pairs=pairs, device=str(where), warmup=2)
    config = {**shared, "batch": batch, "engine": engine, "dtype": str(unet.dtype).removeprefix("torch.")}
    for name in ("maps", "propagation"):
        yield row(SUITE, f"unet_{name}_overhead", done.ratio(name, "plain"), config={**config, "case": engine})


def _stock(pipe, where, batch, steps, pairs, engine, shared) -> dict:
    """Compare diffusers' images without maps with our images and masks, both in the device's usual precision."""
    parts = {**pipe.pipe.components, "unet": copy.deepcopy(pipe.pipe.unet), "vae": copy.deepcopy(pipe.pipe.vae)}
    ours = DiffuMaskPipeline(type(pipe.pipe)(**parts, **_optional(pipe.pipe)), pipe.info)
    ours.pipe.set_progress_bar_config(disable=True)
    if engine == "compile":
        compile_pipe(ours.pipe)
    sides, mask = Sides(pipe, batch, steps), {**vars(ours.map_options()), **vars(MaskOptions())}
    ratio = compare(sides.plain("pil"), sides.ours(ours, batch, like_reference=False), pairs=pairs, device=str(where))
    config = {**shared, "batch": batch, **sides.settings, "engine": engine, "case": "images and masks"}
    config |= {"dtype": str(pipe.pipe.unet.dtype).removeprefix("torch."), "mask": mask}
    return row(SUITE, "speedup_over_stock", ratio, config=config)


def _optional(pipe: DiffusionPipeline) -> dict[str, object]:
    """Return what a pipeline was made with beside its components."""
    named = inspect.signature(type(pipe).__init__).parameters.keys() - pipe.components.keys()
    return {name: pipe.config[name] for name in named if name in pipe.config}
