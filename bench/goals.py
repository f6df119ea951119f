"""The rows that the GPU goals are judged by: kernels and torch's own, maps on and off, whole runs and diffusers'."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from diffumask_fast.bench import end_to_end
from diffumask_fast.bench.geometries import check_geometry, cross_layers, open_geometry, unet_config
from diffumask_fast.bench.harness import Race, compare, environment, race, row
from diffumask_fast.bench.sides import Sides
from diffumask_fast.compiled import compile_pipe
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import attend, bilateral_norm, guided_filter, mean_field
from diffumask_fast.loading import resolve_device
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu

SUITE = "goals"
PARTS = ("attention", "refinement", "denoising", "stock")
BATCHES = (8, 32)  # of the denoising
TOKENS, PHRASES = 77, 2
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
        Rows as they are finished. `attend_over_sdpa_without_maps` and `attend_over_sdpa_with_columns` for each layer,
        the first also summed over all layers; `attend_copy_share`; `guided_filter_and_otsu` and `mean_field` in
        milliseconds for an image; the `end_to_end` rows `maps_overhead` and `propagation_overhead` (maps on, as by
        default) at each batch; `speedup_over_stock`, diffusers' images without maps over ours with masks.

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
    if "attention" in parts:
        yield from _attention(geometry, where, batch, pairs, shared)
    if "refinement" in parts:
        yield from _refinement(geometry, where, batch, pairs, shared)
    for size in batches if "denoising" in parts else ():
        names = ("maps_overhead", "propagation_overhead")
        yield from end_to_end.run(geometry, str(where), names=names, batch=size, steps=steps, pairs=pairs)
    if "stock" in parts:
        yield _stock(geometry, where, max(1, batch // 2), steps or 20, pairs, engine, shared)


def forms(where: torch.device) -> tuple[str, ...]:
    """Return the forms of the filters that can be launched on a device."""
    return ("torch", "triton") if where.type == "cuda" else ("torch",)


def _attention(geometry, where, batch, pairs, shared) -> Iterator[dict]:
    dtype = torch.float16 if where.type == "cuda" else torch.float32
    bandwidth = _copy_bandwidth(where, pairs)
    kernel = plain = 0.0
    config = {**shared, "batch": batch, "impl": "triton" if where.type == "cuda" else "sdpa", "phrases": PHRASES}
    for (pixels, heads, head_dim), count in cross_layers(geometry).items():
        calls, moved = _layer(where, dtype, batch, pixels, heads, head_dim)
        done = race(calls, control="sdpa_without_maps", pairs=pairs, device=str(where), warmup=3)
        config |= {"case": f"{pixels}x{heads}x{head_dim}", "layers": count, "dtype": str(dtype).removeprefix("torch.")}
        for name in ("sdpa_without_maps", "sdpa_with_columns"):
            if name in calls:
                yield row(SUITE, f"attend_over_{name}", done.ratio("attend", name), config=config)
        share = moved / done.seconds("attend") / bandwidth
        yield row(SUITE, "attend_copy_share", share, config={**config, "bytes": moved, "gb_per_s": bandwidth / 1e9})
        kernel += count * done.seconds("attend")
        plain += count * done.seconds("sdpa_without_maps")
    config |= {"case": "all layers", "layers": sum(cross_layers(geometry).values())}
    yield row(SUITE, "attend_over_sdpa_without_maps", kernel / plain, config={**config, "baseline_s": plain})


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

    calls = {"sdpa_without_maps": lambda: F.scaled_dot_product_attention(*split)}
    if where.type == "cuda":
        calls |= {"attend": mapped("triton"), "sdpa_with_columns": mapped("sdpa")}
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
        done = race({form: make(form) for form in forms(where)}, pairs=pairs, device=str(where), warmup=2)
        for form in forms(where):
            yield _per_image(name, done, form, images, {**config, "batch": images, "case": form})


def _per_image(name: str, done: Race, form: str, images: int, config: dict) -> dict:
    times = sorted(1e3 * seconds / images for seconds in done.times[form])
    config = {**config, "clock": done.clock}
    value = 1e3 * done.seconds(form) / images
    return row(SUITE, name, value, unit="ms/image", low=times[0], high=times[-1], n=len(times), config=config)


def _stock(geometry, where, batch, steps, pairs, engine, shared) -> dict:
    """Compare diffusers' images without maps with our images and masks, both in the device's usual precision."""
    stock, ours = open_geometry(geometry, str(where)), open_geometry(geometry, str(where))
    if engine == "compile":
        compile_pipe(ours.pipe)
    sides = Sides(stock, batch, steps)
    drawn = sides.ours(ours, batch, ours.mask_options(None))
    ratio = compare(sides.plain("pil"), drawn, pairs=pairs, device=str(where))
    config = {**shared, "batch": batch, **sides.settings, "engine": engine, "case": "images and masks"}
    config |= {"dtype": str(stock.pipe.unet.dtype).removeprefix("torch."), "mask": dict(vars(ours.mask_options(None)))}
    return row(SUITE, "speedup_over_stock", ratio, config=config)
