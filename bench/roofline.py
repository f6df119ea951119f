"""Write `docs/notes/kernels.md`: what each kernel moves and computes, the time at a GPU's limits, its resources.

    PYTHONSAFEPATH=1 python -m diffumask_fast.bench.roofline docs/notes/kernels.md

The account is arithmetic and takes no time. The last table compiles every kernel for five GPUs, none of which need be
here; that takes a few minutes.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from diffumask_fast.bench.launch_specs import compiled
from diffumask_fast.bench.workspace_memory import IMPLS, workspace
from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.attend_triton import NARROWEST, WGMMA, constants, two_powers
from diffumask_fast.kernels.inputs import CANDIDATES, CRF, LABELS
from diffumask_fast.kernels.shapes import KEYS, MODELS, STABLE_DIFFUSION, Layer, Model
from diffumask_fast.own_files import check_own

PHRASES = (1, 5, 16)  # of the table's columns
BOUND = 0.002  # share of the UNet's time that maps may add
WARP_PIXELS = 16  # query pixels of a warp in fp16
# Machine instructions that a warp issues for one head of a layer, sm_90, without those for the maps
ISSUED = {
    "attend": {40: 463, 64: 462, 80: 848, 160: 1200},
    "attend_maps": {40: 330, 64: 325, 80: 488, 160: 600},
}
COLUMN = 96  # machine instructions for one column, its loads and the store of a map among them
PROPAGATED = 1024  # pixels of a level up to which self-attention carries the maps


@dataclass(frozen=True)
class Gpu:
    """Nominal limits of a GPU, per second; the second-level cache's is about what others have measured."""

    name: str
    bandwidth: float
    cache: float = 5.5e12  # bytes from the second-level cache
    fp16: float = 989e12  # dense FLOP
    fp32: float = 67e12
    loads: float = 132 * 32 * 1.755e9  # of 4 bytes from the first-level caches: 128 bytes per multiprocessor and cycle
    issue: float = 132 * 4 * 1.755e9  # instructions of a warp: four schedulers per multiprocessor


GPUS = (Gpu("H100", 3.35e12), Gpu("H200", 4.8e12))


@dataclass(frozen=True)
class Cost:
    """Bytes through device memory and the second-level cache, FLOPs, first-level cache loads, instructions of warps."""

    bytes: float
    cache: float = 0.0
    fp16: float = 0.0
    fp32: float = 0.0
    loads: float = 0.0
    issue: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def times(self, number: float) -> "Cost":
        return Cost(*(number * value for value in astuple(self)))

    def parts(self, gpu: Gpu) -> dict[str, float]:
        """Return the time of each resource, perfectly used."""
        limits = {"bytes": gpu.bandwidth} | {name: getattr(gpu, name) for name in list(vars(self))[1:]}
        return {name: value / limits[name] for name, value in vars(self).items()}

    def seconds(self, gpu: Gpu) -> float:
        """Return the time at the limit that binds, each resource perfectly used."""
        return max(self.parts(gpu).values())

    def serial_seconds(self, gpu: Gpu) -> float:
        """Return the time if no computing overlapped with memory."""
        parts = self.parts(gpu)
        memory = max(parts.pop("bytes"), parts.pop("cache"))
        return memory + max(parts.values())


def covered(size: int, narrowest: int = NARROWEST) -> int:
    """Return the padded number of keys or channels that the kernel computes: 80 for 77, 64 for 64."""
    first, second = two_powers(size, narrowest=narrowest)
    return first if size <= first else first + second


def grid(layer: Layer, num: int, kernel: str = "attend") -> tuple[int, int, dict[str, int | bool]]:
    """Return the blocks of pixels and groups of heads of one sample in fp16, and the compile-time arguments."""
    shape = {"pixels": layer.pixels, "keys": KEYS, "heads": layer.heads, "head_dim": layer.head_dim}
    block = tuned.launch(kernel, torch.device("cpu"), dtype="fp16", **shape)["block"]
    fixed = constants(kernel, **shape, num=num, block=block)
    return -(-layer.pixels // block), layer.heads // fixed["GROUP"], fixed


def attention(layer: Layer) -> Cost:
    """Count plain cross-attention of one sample in fp16, products over padded keys and channels.

    q, k and v are read from device memory once and the output is written once; each block of pixels reads k and v from
    the cache again.
    """
    queries, keys = 2 * layer.heads * layer.head_dim * layer.pixels, 2 * layer.heads * layer.head_dim * KEYS
    blocks = grid(layer, 1)[0]
    return Cost(
        2 * queries + 2 * keys,
        cache=2 * queries + 2 * blocks * keys,
        fp16=4 * layer.heads * layer.pixels * covered(KEYS) * covered(layer.head_dim, WGMMA),
        issue=layer.heads * layer.pixels / WARP_PIXELS * ISSUED["attend"][layer.head_dim],
    )


def maps(layer: Layer, num: int) -> Cost:
    """Count what maps add to a guided pair, one of whose two samples is conditional.

    Its probabilities are summed over the heads in fp32, and each group of heads multiplies its sums by the columns. The
    maps are read and written; several groups write a part each, which are then added.
    """
    blocks, groups, fixed = grid(layer, num)
    passes = 2 if groups == 1 else 2 + 2 * groups
    columns = -(-num // fixed["BLOCK_K"]) * fixed["BLOCK_K"]
    warps = layer.pixels / WARP_PIXELS
    return Cost(
        4 * num * (passes * layer.pixels + KEYS),
        cache=4 * num * (passes * layer.pixels + blocks * groups * KEYS),
        fp32=2 * layer.pixels * covered(KEYS) * (layer.heads + groups * columns),
        issue=warps * (layer.heads * WARP_PIXELS * covered(KEYS) / 32 + groups * columns * COLUMN),
    )


def maps_alone(layer: Layer, num: int) -> Cost:
    """Count the kernel that makes the maps of a guided pair beside torch's attention ("sdpa+maps")."""
    blocks = grid(layer, num, "attend_maps")[0]
    queries, keys = 2 * layer.heads * layer.head_dim * layer.pixels, 2 * layer.heads * layer.head_dim * KEYS
    return maps(layer, num) + Cost(
        queries + keys,
        cache=queries + blocks * keys,
        fp16=2 * layer.heads * layer.pixels * covered(KEYS) * covered(layer.head_dim, WGMMA),
        issue=layer.heads * layer.pixels / WARP_PIXELS * ISSUED["attend_maps"][layer.head_dim],
    )


def overhead(model: Model, num: int, gpu: Gpu) -> float:
    """Return the time that maps add to a guided pair over the time of its UNet, both at the limits that bind."""
    added = 0.0
    for layer in model.layers:
        plain = attention(layer).times(2)
        added += layer.count * ((plain + maps(layer, num)).seconds(gpu) - plain.seconds(gpu))
    return added / (2 * model.flops / gpu.fp16)


def overhead_at_most(model: Model, num: int, gpu: Gpu) -> float:
    """Return the same if nothing overlapped: neither maps with attention, nor memory with computing."""
    added = sum(layer.count * maps(layer, num).serial_seconds(gpu) for layer in model.layers)
    return added / (2 * model.flops / gpu.fp16)


def overhead_alone(model: Model, num: int, gpu: Gpu) -> float:
    """Return the same for "sdpa+maps", whose second kernel begins after the first."""
    added = sum(layer.count * maps_alone(layer, num).seconds(gpu) for layer in model.layers)
    return added / (2 * model.flops / gpu.fp16)


def guided_filter(height: int, width: int, num: int, radius: int) -> dict[str, Cost]:
    """Count the guided filter's four launches for one image: fp32 planes and, for each pixel, 2 radius + 1 taps."""
    size, taps = height * width, 2 * radius + 1

    def cost(planes: int, operations: float, loads: int) -> Cost:
        return Cost(4 * planes * size, fp32=operations * taps * size, loads=loads * taps * size)

    return {
        "products": cost(3 + 4 * num + 9 + 4 * num, 18 + 10 * num, 3 + 4 * num),
        "lines": cost(9 + 8 * num, 9 + 4 * num, 9 + 4 * num),
        "rows": cost(8 * num, 4 * num, 4 * num),
        "values": cost(3 + 5 * num, 4 * num, 4 * num),
    }


def mean_field(height: int, width: int, candidates: int, labels: int, window: int) -> dict[str, Cost]:
    """Count one step of the windowed CRF for one image, and the norm, once for all steps."""
    size, offsets, planes = height * width, window**2, candidates * labels
    programs = -(-candidates // tuned.launch("mean_field", torch.device("cpu"), window=window)["candidates"])
    weight = 14  # three differences, their squares, the distance, the exponential
    step = Cost(
        4 * size * (4 + 4 * planes),
        fp32=offsets * size * (programs * (weight + 1) + 2 * planes),
        loads=offsets * size * (4 * programs + planes),
    )
    smooth = Cost(4 * size * 4 * planes, fp32=2 * size * planes * (height + width))
    norm = Cost(16 * size, fp32=offsets * size * weight, loads=3 * offsets * size)
    return {"norm": norm, "smooth": smooth, "step": step}


def account() -> str:
    """Return the arithmetic part of the page."""
    filter_costs = guided_filter(512, 512, 1, 32)
    step_costs = mean_field(512, 512, CANDIDATES, LABELS, CRF["window"])
    parts = [_HEAD, *map(_attention_table, STABLE_DIFFUSION), _overhead_table(), _workspace_table(MODELS["sd15"])]
    parts += [_launch_table(_FILTER, filter_costs), _launch_table(_STEP, step_costs)]
    return "\n\n".join(parts) + "\n"


def _names(unit: str) -> str:
    return " | ".join(gpu.name + unit for gpu in GPUS)


def _attention_table(model: Model) -> str:
    lines = [
        f"### {model.name}: {model.flops / 1e12:.3f} TFLOP each sample and forward", "",
        f"| layers | pixels | heads x size | MB | cache MB | GFLOP | million instructions | {_names(' µs')} |",
        "|" + " --- |" * (7 + len(GPUS)),
    ]  # fmt: skip
    total, seconds = Cost(0), [0.0] * len(GPUS)
    for layer in model.layers:
        cost = attention(layer).times(2)  # a guided pair
        total += cost.times(layer.count)
        times = [cost.seconds(gpu) for gpu in GPUS]
        seconds = [whole + layer.count * one for whole, one in zip(seconds, times, strict=True)]
        shape = f"{layer.count} | {layer.pixels} | {layer.heads} x {layer.head_dim}"
        limits = " | ".join(f"{1e6 * one:.2f}, {_binds(cost, gpu)}" for one, gpu in zip(times, GPUS, strict=True))
        lines.append(f"| {shape} | {_figures(cost, 2)} | {limits} |")
    lines.append(f"| all | | | {_figures(total, 0)} | {' | '.join(f'{1e6 * one:.0f}' for one in seconds)} |")
    return "\n".join(lines)


def _figures(cost: Cost, digits: int) -> str:
    values = (cost.bytes / 1e6, cost.cache / 1e6, cost.fp16 / 1e9, cost.issue / 1e6)
    return " | ".join(f"{value:.{digits}f}" for value in values)


def _binds(cost: Cost, gpu: Gpu) -> str:
    parts = cost.parts(gpu)
    names = {"bytes": "memory", "cache": "cache", "issue": "issue", "fp16": "tensor cores"}
    return names[max(parts, key=parts.__getitem__)]


def _overhead_table() -> str:
    lines = [_MAPS, "", "| | " + " | ".join(f"K = {num}, {g.name}" for num in PHRASES for g in GPUS) + " | most K |"]
    lines.append("|" + " --- |" * (2 + len(PHRASES) * len(GPUS)))
    for model in STABLE_DIFFUSION:
        cases = [(model, num, gpu) for num in PHRASES for gpu in GPUS]
        shares_of = {model.name: overhead, "without any overlap": overhead_at_most, "sdpa+maps": overhead_alone}
        for name, share in shares_of.items():
            shares = " | ".join(f"{100 * share(*case):.3f} %" for case in cases)
            most = " and ".join(str(most_phrases(share, model, gpu)) for gpu in GPUS)
            lines.append(f"| {name} | {shares} | {most} |")
    return "\n".join(lines)


def most_phrases(share: Callable[[Model, int, Gpu], float], model: Model, gpu: Gpu) -> int:
    """Return how many phrases keep a share such as `overhead` within BOUND, up to all 77 tokens."""
    return sum(1 for _ in itertools.takewhile(lambda num: share(model, num, gpu) <= BOUND, range(1, KEYS + 1)))


def _workspace_table(model: Model) -> str:
    lines = [_WORKSPACE, "", "| attention | pixels | heads x size | " + " | ".join(IMPLS) + " |"]
    lines.append("|" + " --- |" * (3 + len(IMPLS)))
    largest = dict.fromkeys(IMPLS, 0)
    for kind in ("cross", "self"):
        for layer in model.layers:
            keys, num = (KEYS, 1) if kind == "cross" else (layer.pixels, int(layer.pixels <= PROPAGATED))
            shape: dict[str, Any] = {
                "pixels": layer.pixels,
                "keys": keys,
                "heads": layer.heads,
                "head_dim": layer.head_dim,
            }
            peaks = {impl: workspace(impl, rows=2, num=num, **shape) for impl in IMPLS}
            largest = {impl: max(largest[impl], peaks[impl]) for impl in IMPLS}
            sizes = " | ".join(f"{value / 1e6:.2f}" for value in peaks.values())
            lines.append(f"| {kind} | {layer.pixels} | {layer.heads} x {layer.head_dim} | {sizes} |")
    lines.append("| largest | | | " + " | ".join(f"{value / 1e6:.2f}" for value in largest.values()) + " |")
    return "\n".join(lines)


def _launch_table(text: str, costs: dict[str, Cost]) -> str:
    lines = [text, "", f"| launch | MB | MFLOP | million loads | {_names(' µs')} |", "|" + " --- |" * (4 + len(GPUS))]
    for name, cost in costs.items():
        times = " | ".join(f"{cost.seconds(gpu) * 1e6:.1f}" for gpu in GPUS)
        lines.append(f"| {name} | {cost.bytes / 1e6:.1f} | {cost.fp32 / 1e6:.0f} | {cost.loads / 1e6:.0f} | {times} |")
    times = " | ".join(f"{sum(cost.seconds(gpu) for cost in costs.values()) * 1e6:.1f}" for gpu in GPUS)
    lines.append(f"| all | | | | {times} |")
    return "\n".join(lines)


_HEAD = """\
# The kernels: an account

`PYTHONSAFEPATH=1 python -m diffumask_fast.bench.roofline docs/notes/kernels.md` writes this page. **Nothing on it was
measured on a GPU.** A time here is the time that the bytes and operations of a kernel take at the limits of an H100 SXM
and an H200 SXM: 3.35 and 4.8 TB/s of device memory; for both, 5.5 TB/s from the second-level cache (about what others
measured), 989 TFLOP/s dense fp16, 67 TFLOP/s fp32, 7.4 T loads/s of 4 bytes from the first-level caches (132
multiprocessors, 128 bytes per cycle, 1.755 GHz) and 927 G instructions/s of 32 threads each. Real kernels take longer.
Measured rows are in `bench/results/`; [kernels.md](../kernels.md) says what the kernels do.

## Cross-attention

One pass reads q, k and v and writes the output, in fp16. The 77 x N probabilities of a head stay in registers. Keys are
padded to 64 + 16, channels to two powers of two (40 to 32 + 16, 160 to 128 + 32); the FLOPs are those of the padded
products. Instructions are counted in the machine code for Hopper: about 12 for each score of a head of 40 (19 before
exponentials became powers of two, and divisions one reciprocal per row). Each block of 64 pixels reads k and v from the
cache again, which is more than q and the output together. Larger blocks would read less; `tune` tries them. A row of
the table is one layer for one guided pair (batch 2). Its time is that of the slowest resource, which is named."""

_MAPS = """\
### What maps add

The time that maps of K phrases add, as a share of the time of the guided pair's UNet at 989 TFLOP/s. The conditional
sample sums its probabilities over the heads and multiplies the sums by the columns, once for each group of heads; a
small layer has several groups, to fill the GPU. The first line of a model assumes that computing overlaps with memory
access, which is the slower of the two; the second assumes no overlap at all. The third is `sdpa+maps`: torch's
attention, then a kernel that reads the conditional half of q and k again and makes the maps alone. Its output is
exactly torch's. It costs more, unless torch's attention is faster than ours by that much. The last column is the
largest number of phrases at which a line stays within 0.2 %, on H100 and H200.

Groups write partial maps, K numbers for each pixel, rather than partial sums, which are 77. A column is multiplied by
the sums and added over the keys in 96 instructions. As a matrix product, two columns took 1064 instructions instead of
1024 (1024 x 8 x 80), five took 1352 instead of 1312; from about a dozen columns on the product was shorter."""

_WORKSPACE = """\
### Workspace memory of a layer

The most MB that live at once in one layer beside its q, k, v and the maps; the output counts. In fp32, for a guided
pair of SD1.5 and one phrase, which is propagated in self-attention of at most 1024 pixels. `reference` writes scores
and probabilities. `sdpa` pads q, k, v and the output to head sizes that are multiples of 8. `triton` writes its output
and, where heads are split into groups, a part of the maps for each group. `sdpa+maps` holds the larger of those parts
and what torch's attention keeps. With more than 128 keys the last two are `sdpa`. The figures are arithmetic;
`tests/test_workspace_memory.py` and, while denoising, `tests/test_memory.py` measure the same to the byte on a CPU (of
the kernels, what their launchers allocate). What a kernel of torch allocates within itself is not counted."""

_FILTER = """\
## The guided filter

Four launches serve all images and maps: box means of products along rows; along columns, with the 3x3 systems solved in
registers; and the same two for the lines. The table is for one image of 512 x 512, one map, radius 32 (65 taps). The
limit is loading the taps from the first-level caches, not device memory."""

_STEP = """\
## One step of the CRF

The Gaussian term is two products along the sides in fp32 (`smooth`, torch's own). The windowed term and the softmax are
one launch (`step`). `norm` runs once for all steps of a guide. The table is for one image of 512 x 512, 8 candidates of
2 labels, window 11. The weight of a pair of pixels is computed once for 4 candidates."""


def main() -> None:
    """Write the page to the file named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m diffumask_fast.bench.roofline docs/notes/kernels.md")
    check_own(Path(sys.argv[1]), _HEAD.splitlines()[0])
    Path(sys.argv[1]).write_text(account() + "\n" + compiled(), encoding="utf-8")


if __name__ == "__main__":
    main()
