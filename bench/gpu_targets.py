"""The rows that the GPU goals are judged by: kernels and torch's own, maps on and off, whole runs and diffusers'."""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.store import MAX_PROPAGATED_PIXELS
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.bench import end_to_end, sdpa
from diffumask_fast.bench.contenders import Contenders
from diffumask_fast.bench.geometries import check_geometry, cross_layers, open_geometry, unet_config
from diffumask_fast.bench.harness import GRAPH_CALLS, Race, compare, race
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.engines.compiled import compile_pipe
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend, bilateral_norm, guided_filter, mean_field
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu
from diffumask_fast.models.device import resolve_device
from diffumask_fast.pipeline import DiffuMaskPipeline

SUITE = "goals"
PARTS = ("sdpa", "attention", "refinement", "denoising", "stock", "graphs")
BATCHES = (8, 32)  # of the denoising
TOKENS, PHRASES = 77, 1

UNET_CALLS = 5  # between two events
REFINEMENT_CALLS = 4  # in a graph: their temporaries are large
PLAIN = "sdpa_without_maps"
CRF = {"window": 11, "bilateral": (10.0, 80.0, 13.0), "gaussian": (3.0, 3.0)}


class Opened:
    """A geometry on a device, and beside it the same weights drawn by an engine; each is made when it is asked for.

    Args:
        geometry: one of `geometries.GEOMETRIES`.
        where: the device.
        engine: "compile" or "torch".
    """

    def __init__(self, geometry: str, where: torch.device, engine: str) -> None:
        self.geometry, self.where, self.engine = geometry, where, engine

    @cached_property
    def stock(self) -> DiffuMaskPipeline:
        """The geometry as it is."""
        return open_geometry(self.geometry, str(self.where))

    @cached_property
    def ours(self) -> DiffuMaskPipeline:
        """The same weights once more, drawn by the engine."""
        pipe, stock = self.stock.pipe, self.stock
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
    device: str = "auto",
    *,
    names: Sequence[str] | None = None,
    batch: int = 16,
    batches: Sequence[int] = BATCHES,
    steps: int | None = None,
    pairs: int | None = None,
    engines: Sequence[str] = ("compile",),
    opened: Opened | None = None,
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
    where = resolve_device(device)
    opened = opened or Opened(geometry, where, engines[0])
    return _rows(opened, names or PARTS, batch, batches, steps, pairs)


def _rows(opened: Opened, parts, batch, batches, steps, pairs) -> Iterator[dict]:
    geometry, where = opened.geometry, opened.where
    shared = {"geometry": geometry, **environment(str(where))}
    if "sdpa" in parts and where.type == "cuda":
        yield from sdpa.rows(SUITE, geometry, where, batch, pairs, shared)
    if "attention" in parts:
        yield from _attention(geometry, where, batch, pairs, shared)
    if "refinement" in parts:
        yield from _refinement(geometry, where, batch, pairs, shared)
    for size in batches if "denoising" in parts else ():
        names = ("maps_overhead", "propagation_overhead")
        shapes = {"batch": size, "steps": steps, "pairs": pairs}
        yield from end_to_end.run(geometry, str(where), names=names, **shapes, pipe=opened.stock)
    if "stock" in parts:
        yield _stock(opened, max(1, batch // 2), steps or 20, pairs, shared)
    if "graphs" in parts:
        yield from _graphs(opened, max(1, batch // 2), pairs, shared)


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


def _stock(opened: Opened, batch, steps, pairs, shared) -> dict:
    """Compare diffusers' images without maps with our images and masks, both in the device's usual precision."""
    pipe, ours = opened.stock, opened.ours
    sides, mask = Contenders(pipe, batch, steps), {**vars(ours.map_options()), **vars(MaskOptions())}
    drawn = sides.ours(ours, batch, like_reference=False)
    ratio = compare(sides.plain("pil"), drawn, pairs=pairs, device=str(opened.where))
    config = {**shared, "batch": batch, **sides.settings, "engine": opened.engine, "case": "images and masks"}
    config |= {"dtype": str(pipe.pipe.unet.dtype).removeprefix("torch."), "mask": mask}
    return row(SUITE, "speedup_over_stock", ratio, config=config)


def _graphs(opened: Opened, batch, pairs, shared) -> Iterator[dict]:
    """Compare one UNet call of a guided batch with maps, and with propagation, to the same engine's without maps."""
    calls = {name: _times(call, UNET_CALLS) for name, call in _unet_calls(opened, batch).items()}
    done = race(calls, control="plain", pairs=pairs, device=str(opened.where), warmup=2)
    config = {**shared, "batch": batch, "engine": opened.engine, "case": opened.engine}
    config |= {"dtype": str(opened.ours.pipe.unet.dtype).removeprefix("torch.")}
    for name in ("maps", "propagation"):
        yield row(SUITE, f"unet_{name}_overhead", done.ratio(name, "plain"), config=config)


def _unet_calls(opened: Opened, batch) -> dict[str, Callable[[], object]]:
    """Return UNet calls of a guided batch: without maps, with maps, with maps and propagation."""
    unet, rng = opened.ours.pipe.unet, torch.Generator().manual_seed(0)
    denoiser = opened.ours.denoiser or UNetWithMaps(unet)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(batch, unet.config.in_channels, side, side, generator=rng).repeat(2, 1, 1, 1)
    states = torch.randn(2 * batch, TOKENS, width, generator=rng)
    latents, states = (x.to(opened.where, unet.dtype) for x in (latents, states))
    select = torch.rand(batch, TOKENS, PHRASES, generator=rng).to(opened.where)

    @torch.no_grad()
    def call(columns, prior=None):
        return denoiser(UNetCall(latents, 500, states, columns, prior or {}, first_conditional=batch))

    maps = call(select)[1]
    prior = {level: kept for level, kept in maps.items() if kept.shape[-1] <= MAX_PROPAGATED_PIXELS}
    return {"plain": lambda: call(None), "maps": lambda: call(select), "propagation": lambda: call(select, prior)}


def _times(call: Callable[[], object], count: int) -> Callable[[], None]:
    """Repeat a call, so that the host's share of the first one hides behind the device's work on it."""

    def repeated() -> None:
        for _ in range(count):
            call()

    return repeated
