"""The time of the mask stage for an image: refinement and thresholds, each by itself and together."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.bench.geometries import check_geometry, unet_config
from diffumask_fast.bench.harness import Workload, race
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
    device: str | torch.device = "auto",
    *,
    batch: int = 8,
    classes: Sequence[int] = (1, 2),
    pairs: int | None = None,
) -> Iterator[dict]:
    """Measure the mask stage on random maps and images of a geometry's sizes.

    Args:
        geometry: one of `bench.GEOMETRIES`.
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


def _rows(geometry: str, device: torch.device, batch: int, classes: Sequence[int], pairs: int | None) -> Iterator[dict]:
    latent = unet_config(geometry)["sample_size"]
    for count in classes:
        calls = _calls(device, batch, count, latent)
        timed = race(calls, pairs=pairs, device=device)
        for name in calls:
            seconds = sorted(timed.times[name])
            config = {"geometry": geometry, "batch": batch, "classes": count, "pixels": 8 * latent}
            config |= {"case": f"{name.partition(': ')[2]} K={count}".strip(), "clock": timed.clock}
            spread: dict[str, Any] = {
                "low": 1e3 * seconds[0] / batch,
                "high": 1e3 * seconds[-1] / batch,
                "n": len(seconds),
            }
            value = 1e3 * timed.seconds(name) / batch
            config |= environment(device)
            yield row(SUITE, name.partition(": ")[0], value, unit="ms/image", config=config, **spread)


def _calls(device: torch.device, batch: int, count: int, latent: int) -> dict[str, Workload]:
    rng = torch.Generator().manual_seed(0)
    size = 8 * latent
    maps = torch.rand(batch, count, latent, latent, generator=rng).to(device)
    images = torch.randint(0, 256, (batch, size, size, 3), generator=rng, dtype=torch.uint8).to(device)
    ids = torch.arange(1, count + 1).repeat(batch, 1).to(device)
    guide = images.permute(0, 3, 1, 2).float() / 255
    large = torch.rand(batch, count, size, size, generator=rng).to(device)
    radius = size // latent  # one cell of the map, as the default
    calls = {f"make_masks: {name}": _making(maps, images, options, ids) for name, options in CASES.items()}
    calls["guided_filter: "] = lambda: guided_filter(guide, large, radius, MaskOptions().eps)
    calls["otsu: "] = lambda: otsu(large)
    return calls


def _making(maps: Tensor, images: Tensor, options: MaskOptions, ids: Tensor) -> Workload:
    return lambda: make_masks(maps, images, options, ids)
