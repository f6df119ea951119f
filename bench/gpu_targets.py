"""What a GPU is to show: our kernels beside torch's, maps on and off, whole runs beside diffusers'."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.store import MAX_PROPAGATED_PIXELS
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.bench import end_to_end, sdpa
from diffumask_fast.bench.contenders import Contenders
from diffumask_fast.bench.geometries import check_geometry, cross_layers, open_geometry, unet_config
from diffumask_fast.bench.harness import GRAPH_CALLS, Race, Workload, compare, race
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.engines.compiled import compile_pipe
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend, bilateral_norm, guided_filter, mean_field
from diffumask_fast.kernels.inputs import CRF, attention_input, filter_input, step_input
from diffumask_fast.kernels.shapes import KEYS
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu
from diffumask_fast.models.device import resolve_device
from diffumask_fast.pipeline import DiffuMaskPipeline

SUITE = "gpu_targets"
PARTS = ("sdpa", "attention", "refinement", "denoising", "stock", "graphs")
BATCHES = (8, 32)  # of the denoising
PHRASES = 1

UNET_CALLS = 5  # between two events
REFINEMENT_CALLS = 4  # in a graph: their temporaries are large
PLAIN = "sdpa_without_maps"


class Opened:
    """A geometry on a device, and beside it the same weights drawn by an engine; each is made when it is asked for.

    Args:
        geometry: one of `bench.GEOMETRIES`.
        device: the device.
        engine: "compile" or "torch".
    """

    def __init__(self, geometry: str, device: torch.device, engine: str) -> None:
        self.geometry, self.device, self.engine = geometry, device, engine

    @cached_property
    def stock(self) -> DiffuMaskPipeline:
        """The geometry as it is."""
        return open_geometry(self.geometry, self.device)

    @cached_property
    def ours(self) -> DiffuMaskPipeline:
        """The same weights once more, drawn by the engine."""
        stock = self.stock
        pipe: Any = stock.pipe
        copies = {name: copy.deepcopy(getattr(pipe, name)) for name in ("unet", "vae")}
        made_with = inspect.signature(type(pipe).__init__).parameters.keys() - pipe.components.keys()
        settings = {name: pipe.config[name] for name in made_with if name in pipe.config}
        again = type(pipe)(**{**pipe.components, **copies, **settings})
        again.set_progress_bar_config(disable=True)
        return DiffuMaskPipeline(again, stock.info, compiled=compile_pipe(again) if self.engine == "compile" else None)

    def warm(self, batch: int) -> None:
        """Let the engine compile all that `stock` and `graphs` run."""
        Contenders(self.stock, batch, 3).ours(self.ours, batch, like_reference=False)()
        for call in _unet_calls(self, batch).values():
            call()


def run(
    geometry: str = "sd15",
    device: str | torch.device = "auto",
    *,
    names: Sequence[str] | None = None,
    batch: int = 16,
    batches: Sequence[int] = BATCHES,
    steps: int | None = None,
    pairs: int | None = None,
    engines: Sequence[str] = ("compile",),
    opened: Opened | None = None,
) -> Iterator[dict]:
    """Measure what a GPU is to show; on a CPU the same rows without Triton.

    Args:
        geometry: one of `bench.GEOMETRIES`.
        device: "auto", "cpu" or "cuda".
        names: which of PARTS; None is all.
        batch: samples of the layers, images of the refinement; whole runs draw half as many.
        batches: images of the denoising with and without maps.
        steps: denoising steps of whole runs, 20 when None; of the denoising, 3 when None.
        pairs: rounds of a comparison; None is the harness' number for the device.
        engines: one, "compile" or "torch": what draws our side of the whole runs.
        opened: the geometry, where it is open already.

    Returns:
        Rows as they are finished. On CUDA, `sdpa`, microseconds of each backend at each width (`bench.sdpa`). For each
        layer and for all of them, over SDPA without maps: `attend_over_...` (the fused kernel), `sdpa_maps_over_...`
        (SDPA and the maps-only kernel), `columns_over_...` (SDPA with the columns in the values); `attend_copy_share`.
        `guided_filter_and_otsu`, `mean_field` and `make_masks` in milliseconds for an image; the `end_to_end` rows
        `maps_overhead` and `propagation_overhead` (maps on, as by default) at each batch; `speedup_over_stock`,
        diffusers' images without maps over ours with masks; `unet_maps_overhead` and `unet_propagation_overhead`, a
        UNet call of the engine with maps over one without.

    Raises:
        DiffuMaskError: an unknown geometry, part or engine.
    """
    check_geometry(geometry)
    for name in names or ():
        if name not in PARTS:
            raise DiffuMaskError(f"There is no part {name} in {SUITE}: use {', '.join(PARTS)}.")
    if tuple(engines) not in (("compile",), ("torch",)):
        raise DiffuMaskError(f"{SUITE} takes one engine, compile or torch, not {', '.join(engines)}.")
    device = resolve_device(device)
    opened = opened or Opened(geometry, device, engines[0])
    return _rows(opened, names or PARTS, batch, batches, steps, pairs)


def _rows(
    opened: Opened, parts: Sequence[str], batch: int, batches: Sequence[int], steps: int | None, pairs: int | None
) -> Iterator[dict]:
    geometry, device = opened.geometry, opened.device
    shared = {"geometry": geometry, **environment(device)}
    if "sdpa" in parts and device.type == "cuda":
        yield from sdpa.rows(SUITE, geometry, device, batch, pairs, shared)
    if "attention" in parts:
        yield from _attention(geometry, device, batch, pairs, shared)
    if "refinement" in parts:
        yield from _refinement(geometry, device, batch, pairs, shared)
    for size in batches if "denoising" in parts else ():
        names = ("maps_overhead", "propagation_overhead")
        yield from end_to_end.run(
            geometry, device, names=names, batch=size, steps=steps, pairs=pairs, pipe=opened.stock
        )
    if "stock" in parts:
        yield _stock(opened, max(1, batch // 2), steps or 20, pairs, shared)
    if "graphs" in parts:
        yield from _graphs(opened, max(1, batch // 2), pairs, shared)


def filter_impls(device: torch.device) -> tuple[str, ...]:
    """Return the implementations of the filters that can be launched on a device."""
    return ("torch", "triton") if device.type == "cuda" else ("torch",)


def _attention(
    geometry: str, device: torch.device, batch: int, pairs: int | None, shared: dict[str, Any]
) -> Iterator[dict]:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    bandwidth = _copy_bandwidth(device, pairs)
    plain = 0.0
    totals: dict[str, float] = defaultdict(float)
    config = {**shared, "batch": batch, "phrases": PHRASES, "dtype": str(dtype).removeprefix("torch.")}
    layers = cross_layers(geometry)
    for shape, count in layers.items():
        calls, num_bytes = _layer(device, dtype, batch, shape)
        timed = race(calls, control=PLAIN, pairs=pairs, device=device, warmup=3, graph_calls=GRAPH_CALLS)
        config |= {"case": "x".join(map(str, shape)), "layers": count}
        for name in calls.keys() - {PLAIN}:
            yield row(SUITE, f"{name}_over_{PLAIN}", timed.ratio(name, PLAIN), config=config)
            totals[name] += count * timed.seconds(name)
        plain += count * timed.seconds(PLAIN)
        share = num_bytes / timed.seconds("attend") / bandwidth
        copied = {"bytes": num_bytes, "gb_per_s": bandwidth / 1e9}
        yield row(SUITE, "attend_copy_share", share, config={**config, **copied})
    config |= {"case": "all layers", "layers": sum(layers.values()), "baseline_s": plain}
    for name, total in totals.items():
        yield row(SUITE, f"{name}_over_{PLAIN}", total / plain, config=config)


def _layer(
    device: torch.device, dtype: torch.dtype, batch: int, shape: tuple[int, int, int]
) -> tuple[dict[str, Workload], int]:
    """Return what is compared at one layer, and the bytes that it must move at least."""
    rng, half = torch.Generator().manual_seed(0), max(1, batch // 2)
    given = attention_input(shape, dtype, device, rng, rows=batch, conditional=half, num=PHRASES)
    split = [x.unflatten(-1, (given.heads, -1)).transpose(1, 2) for x in (given.q, given.k, given.v)]

    def mapped(impl: str) -> Workload:
        return lambda: attend(given.q, given.k, given.v, given.select, **given.settings, maps=given.maps, impl=impl)

    calls: dict[str, Workload] = {PLAIN: lambda: F.scaled_dot_product_attention(*split)}
    if device.type == "cuda":
        calls |= {"attend": mapped("triton"), "sdpa_maps": mapped("sdpa+maps"), "columns": mapped("sdpa")}
    else:
        calls |= {"attend": mapped("sdpa")}
    return calls, given.num_bytes


def _copy_bandwidth(device: torch.device, pairs: int | None) -> float:
    """Return bytes/s of a copy that no cache holds, read and written."""
    source = torch.rand((1024 if device.type == "cuda" else 64) * 2**18, device=device)
    target = torch.empty_like(source)
    timed = race({"copy": lambda: target.copy_(source)}, pairs=pairs, device=device, warmup=3)
    return 2 * source.nbytes / timed.seconds("copy")


def _refinement(
    geometry: str, device: torch.device, batch: int, pairs: int | None, shared: dict[str, Any]
) -> Iterator[dict]:
    latent, rng = unet_config(geometry)["sample_size"], torch.Generator().manual_seed(0)
    size, options = 8 * latent, MaskOptions()
    guide, maps = filter_input(batch, 1, size, device, rng)
    radius = size // latent  # one cell of the map, as the default
    few = max(1, batch // 4)
    q, unary, colours = step_input(few, size, device, rng)
    norm = bilateral_norm(colours, **{name: CRF[name] for name in ("window", "dilation", "bilateral")})

    def filtering(impl: str) -> Workload:
        return lambda: otsu(guided_filter(guide, maps, radius, options.eps, impl=impl))

    def stepping(impl: str) -> Workload:
        return lambda: mean_field(q, unary, colours, **CRF, norm=norm, impl=impl)

    config = {**shared, "pixels": size, "dtype": "float32"}
    for name, make, images in (("guided_filter_and_otsu", filtering, batch), ("mean_field", stepping, few)):
        calls = {impl: make(impl) for impl in filter_impls(device)}
        timed = race(calls, pairs=pairs, device=device, warmup=2, graph_calls=REFINEMENT_CALLS)
        for impl in calls:
            yield _per_image(name, timed, impl, images, {**config, "batch": images, "case": impl})
    cells = torch.rand(batch, 1, latent, latent, generator=rng).to(device)
    pictures = (255 * guide).byte().movedim(1, 3)
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    timed = race({"auto": lambda: make_masks(cells, pictures, options, ids)}, pairs=pairs, device=device, warmup=2)
    config |= {"batch": batch, "case": "auto", "mask": dict(vars(options))}
    yield _per_image("make_masks", timed, "auto", batch, config)


def _per_image(name: str, timed: Race, impl: str, images: int, config: dict[str, Any]) -> dict:
    times = sorted(1e3 * seconds / images for seconds in timed.times[impl])
    config = {**config, "clock": timed.clock}
    value = 1e3 * timed.seconds(impl) / images
    return row(SUITE, name, value, unit="ms/image", low=times[0], high=times[-1], n=len(times), config=config)


def _stock(opened: Opened, batch: int, steps: int, pairs: int | None, shared: dict[str, Any]) -> dict:
    """Compare diffusers' images without maps with our images and masks, both in the device's usual precision."""
    pipe, ours = opened.stock, opened.ours
    contenders, mask = Contenders(pipe, batch, steps), {**vars(ours.map_options()), **vars(MaskOptions())}
    drawn = contenders.ours(ours, batch, like_reference=False)
    ratio = compare(contenders.plain("pil"), drawn, pairs=pairs, device=opened.device)
    config = {**shared, "batch": batch, **contenders.settings, "engine": opened.engine, "case": "images and masks"}
    config |= {"dtype": str(pipe.pipe.unet.dtype).removeprefix("torch."), "mask": mask}
    return row(SUITE, "speedup_over_stock", ratio, config=config)


def _graphs(opened: Opened, batch: int, pairs: int | None, shared: dict[str, Any]) -> Iterator[dict]:
    """Compare one UNet call of a guided batch with maps, and with propagation, to the same engine's without maps."""
    calls = {name: _times(call, UNET_CALLS) for name, call in _unet_calls(opened, batch).items()}
    timed = race(calls, control="plain", pairs=pairs, device=opened.device, warmup=2)
    config = {**shared, "batch": batch, "engine": opened.engine, "case": opened.engine}
    config |= {"dtype": str(opened.ours.pipe.unet.dtype).removeprefix("torch.")}
    for name in ("maps", "propagation"):
        yield row(SUITE, f"unet_{name}_overhead", timed.ratio(name, "plain"), config=config)


def _unet_calls(opened: Opened, batch: int) -> dict[str, Workload]:
    """Return UNet calls of a guided batch: without maps, with maps, with maps and propagation."""
    unet, rng = opened.ours.pipe.unet, torch.Generator().manual_seed(0)
    denoiser = opened.ours.denoiser or UNetWithMaps(unet)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(batch, unet.config.in_channels, side, side, generator=rng).repeat(2, 1, 1, 1)
    states = torch.randn(2 * batch, KEYS, width, generator=rng)
    latents, states = (x.to(opened.device, unet.dtype) for x in (latents, states))
    select = torch.rand(batch, KEYS, PHRASES, generator=rng).to(opened.device)

    @torch.no_grad()
    def call(columns: Tensor | None, prior: dict[str, Tensor] | None = None) -> tuple:
        return denoiser(UNetCall(latents, 500, states, columns, prior or {}, first_conditional=batch))

    maps = call(select)[1]
    prior = {level: kept for level, kept in maps.items() if kept.shape[-1] <= MAX_PROPAGATED_PIXELS}
    return {"plain": lambda: call(None), "maps": lambda: call(select), "propagation": lambda: call(select, prior)}


def _times(call: Workload, count: int) -> Workload:
    """Repeat a call: while the device works on one, the host already launches the next."""

    def repeated() -> None:
        for _ in range(count):
            call()

    return repeated
