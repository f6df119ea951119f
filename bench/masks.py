"""What the mask stage takes for an image: refinement and thresholds, each by itself and together."""

from collections.abc import Callable, Iterator, Sequence

import torch

from diffumask_fast.bench.geometries import check_geometry, unet_config
from diffumask_fast.bench.harness import race
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.kernels.guided_filter import guided_filter
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import otsu
from diffumask_fast.models.device import resolve_device

SUITE = "masks"
CASES: dict[str, MaskOptions] = {
    "fixed threshold, no refinement": MaskOptions(refine="none", threshold=0.45),
    "otsu, no refinement": MaskOptions(refine="none"),
    "fixed threshold, guided": MaskOptions(threshold=0.45),
    "otsu, guided": MaskOptions(),
}


def run(
    geometry: str = "mini",
    device: str = "auto",
    *,
    batch: int = 8,
    classes: Sequence[int] = (1, 2),
    pairs: int | None = None,
) -> Iterator[dict]:
    """Measure the mask stage on random maps and images of a geometry's sizes.

    Args:
        geometry: one of `geometries.GEOMETRIES`.
        device: "auto", "cpu" or "cuda".
        batch: images per call.
        classes: numbers of classes in an image.
        pairs: timed calls; None is the harness' number for the device.

    Returns:
        Rows `make_masks`, `guided_filter` and `otsu` in milliseconds for an image; the case is in config.

    Raises:
        DiffuMaskError: an unknown geometry.
    """
    check_geometry(geometry)
    return _rows(geometry, resolve_device(device), batch, classes, pairs)


def _rows(geometry, where, batch, classes, pairs) -> Iterator[dict]:
    latent = unet_config(geometry)["sample_size"]
    for count in classes:
        calls = _calls(where, batch, count, latent)
        done = race(calls, pairs=pairs, device=str(where))
        for name in calls:
            seconds = sorted(done.times[name])
            config = {"geometry": geometry, "batch": batch, "classes": count, "pixels": 8 * latent}
            config |= {"case": f"{name.partition(': ')[2]} K={count}".strip(), "clock": done.clock}
            spread = {"low": 1e3 * seconds[0] / batch, "high": 1e3 * seconds[-1] / batch, "n": len(seconds)}
            value = 1e3 * done.seconds(name) / batch
            config |= environment(str(where))
            yield row(SUITE, name.partition(": ")[0], value, unit="ms/image", config=config, **spread)


def _calls(where: torch.device, batch: int, count: int, latent: int) -> dict[str, Callable[[], object]]:
    rng = torch.Generator().manual_seed(0)
    size = 8 * latent
    maps = torch.rand(batch, count, latent, latent, generator=rng).to(where)
    images = torch.randint(0, 256, (batch, size, size, 3), generator=rng, dtype=torch.uint8).to(where)
    ids = torch.arange(1, count + 1).repeat(batch, 1).to(where)
    guide, large = (
        images.permute(0, 3, 1, 2).float() / 255,
        torch.rand(batch, count, size, size, generator=rng).to(where),
    )
    radius = size // latent  # one cell of the map, as the default
    calls = {f"make_masks: {name}": _making(maps, images, options, ids) for name, options in CASES.items()}
    calls["guided_filter: "] = lambda: guided_filter(guide, large, radius, MaskOptions().eps)
    calls["otsu: "] = lambda: otsu(large)
    return calls


def _making(maps, images, options, ids) -> Callable[[], object]:
    return lambda: make_masks(maps, images, options, ids)
