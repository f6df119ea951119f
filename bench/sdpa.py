"""The time of each backend of torch's SDPA for heads padded to some width, and which one torch chooses."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffumask_fast.bench.geometries import cross_layers
from diffumask_fast.bench.harness import GRAPH_CALLS, Workload, race
from diffumask_fast.bench.rows import row
from diffumask_fast.kernels.shapes import KEYS

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# widths of q and k, and of v: the head's own; with two columns, padded to a multiple of 8; as wide as flash's tiles
WIDTHS = {
    40: ((40, 40), (48, 48), (40, 48), (64, 64)),
    64: ((64, 64), (72, 72), (64, 72), (96, 96)),
    80: ((80, 80), (88, 88), (80, 88), (96, 96)),
    160: ((160, 160), (168, 168), (160, 168)),
}


def rows(
    suite: str, geometry: str, device: torch.device, batch: int, pairs: int | None, shared: dict[str, Any]
) -> Iterator[dict]:
    """Time one cross-attention layer of each head size, as torch chooses and with each backend that accepts it.

    Returns:
        A row `sdpa` for each pair of widths: microseconds of what torch chose; config has the choice, and the
        microseconds of each backend, None where it refuses.
    """
    seen = set()
    for pixels, heads, head_dim in cross_layers(geometry):
        if head_dim in seen:
            continue
        seen.add(head_dim)
        for qk, v in WIDTHS.get(head_dim, ((head_dim, head_dim), (head_dim + 8, head_dim + 8))):
            yield _row(suite, device, (batch, heads, pixels, qk, v), pairs, {**shared, "batch": batch})


def _row(suite: str, device: torch.device, shape: tuple[int, ...], pairs: int | None, config: dict[str, Any]) -> dict:
    batch, heads, pixels, width, v_width = shape
    rng = torch.Generator(device).manual_seed(0)
    sizes = ((pixels, width), (KEYS, width), (KEYS, v_width))
    q, k, v = (torch.randn(batch, heads, *size, generator=rng, device=device).half() for size in sizes)

    def call() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    timed = race({"auto": call}, **_settings(device, pairs))
    times = sorted(1e6 * seconds for seconds in timed.times["auto"])
    config |= {"case": f"{pixels}x{heads} q {width} v {v_width}", "clock": timed.clock, "dtype": "float16"}
    config |= {"chosen": SDPBackend(torch._fused_sdp_choice(q, k, v)).name.lower()}
    config |= {"us": {name: _microseconds(backend, call, device, pairs) for name, backend in BACKENDS.items()}}
    value = 1e6 * timed.seconds("auto")
    return row(suite, "sdpa", value, unit="us", low=times[0], high=times[-1], n=len(times), config=config)


def _microseconds(backend: SDPBackend, call: Workload, device: torch.device, pairs: int | None) -> float | None:
    try:
        with sdpa_kernel(backend):
            timed = race({"call": call}, **_settings(device, pairs))
    except RuntimeError:  # torch says "No available kernel"
        return None
    return round(1e6 * timed.seconds("call"), 2)


def _settings(device: torch.device, pairs: int | None) -> dict[str, Any]:
    return {"pairs": pairs, "device": device, "warmup": 3, "graph_calls": GRAPH_CALLS}
