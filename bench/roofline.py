"""Write `docs/kernels.md`: what each kernel must move and compute, what that takes at the GPU's limits, what it needs.

    PYTHONSAFEPATH=1 python -m diffumask_fast.bench.roofline docs/kernels.md

The account is arithmetic and takes no time; the table of registers compiles every kernel for five GPUs that need not be
here, which takes about five minutes.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from diffumask_fast.bench.launch_specs import compiled
from diffumask_fast.bench.workspace_memory import FORMS, transient
from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.attend_triton import constants, two_powers
from diffumask_fast.kernels.shapes import KEYS, MODELS, Layer, Model

PHRASES = (1, 5, 16)  # of the page's columns
BOUND = 0.002  # what maps may add
WARP_PIXELS = 16  # of query pixels in fp16
# Machine instructions that a warp issues for one head of a layer, sm_90, without what the maps add
ISSUED = {
    "attend": {40: 494, 64: 460, 80: 792, 160: 1072},
    "attend_maps": {40: 299, 64: 286, 80: 472, 160: 592},
}
COLUMN = 96  # and for one column, its loads and the store of a map
PROPAGATED = 1024  # pixels of a level up to which self-attention carries the maps


@dataclass(frozen=True)
class Gpu:
    """Nominal limits of a GPU, each a second; what the second-level cache gives is about what others have measured."""

    name: str
    bandwidth: float
    cache: float = 5.5e12  # bytes from the second-level cache
    fp16: float = 989e12  # dense FLOP
    fp32: float = 67e12
    loads: float = 132 * 32 * 1.755e9  # of 4 bytes from the first-level caches, 128 bytes a multiprocessor and cycle
    issue: float = 132 * 4 * 1.755e9  # instructions of a warp, four schedulers a multiprocessor


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
        """Return the time if nothing were computed while memory is read or written."""
        parts = self.parts(gpu)
        memory = max(parts.pop("bytes"), parts.pop("cache"))
        return memory + max(parts.values())


def covered(size: int) -> int:
    """Return what the kernel computes for a number of keys or channels: 80 for 77, 64 for 64."""
    first, second = two_powers(size)
    return first if size <= first else first + second


def grid(layer: Layer, num: int, kernel: str = "attend") -> tuple[int, int, dict[str, int | bool]]:
    """Return the blocks of pixels and groups of heads of one sample in fp16, and the compile-time arguments."""
    shape = {"pixels": layer.pixels, "keys": KEYS, "heads": layer.heads, "head_dim": layer.head_dim}
    block = tuned.launch(kernel, torch.device("cpu"), dtype="fp16", **shape)["block"]
    fixed = constants(kernel, **shape, num=num, block=block)
    return -(-layer.pixels // block), layer.heads // fixed["GROUP"], fixed


def attention(layer: Layer) -> Cost:
    """Count plain cross-attention of one sample in fp16, products over padded keys and channels.

    Device memory gives q, k and v and takes the output once; each block of pixels has k and v from the cache again.
    """
    queries, keys = 2 * layer.heads * layer.head_dim * layer.pixels, 2 * layer.heads * layer.head_dim * KEYS
    blocks = grid(layer, 1)[0]
    return Cost(
        2 * queries + 2 * keys,
        cache=2 * queries + 2 * blocks * keys,
        fp16=4 * layer.heads * layer.pixels * covered(KEYS) * covered(layer.head_dim),
        issue=layer.heads * layer.pixels / WARP_PIXELS * ISSUED["attend"][layer.head_dim],
    )


def maps(layer: Layer, num: int) -> Cost:
    """Count what the maps add to a guided pair, one of whose two samples is conditional.

    That one sums its probabilities over the heads in fp32, multiplies the sums of each group of heads by the columns,
    and reads and writes its maps, by way of one part for each group where there are several.
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
        fp16=2 * layer.heads * layer.pixels * covered(KEYS) * covered(layer.head_dim),
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
    """Return the same as if nothing of what maps add overlapped with anything, nor memory with computing."""
    added = sum(layer.count * maps(layer, num).serial_seconds(gpu) for layer in model.layers)
    return added / (2 * model.flops / gpu.fp16)


def overhead_alone(model: Model, num: int, gpu: Gpu) -> float:
    """Return the same for "sdpa+maps", whose second kernel waits for the first."""
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
    filter_costs, step_costs = guided_filter(512, 512, 1, 32), mean_field(512, 512, 8, 2, 11)
    parts = [_HEAD, *map(_attention_table, MODELS), _overhead_table(), _transient_table(MODELS[0])]
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
        told = " | ".join(f"{1e6 * one:.2f}, {_binds(cost, gpu)}" for one, gpu in zip(times, GPUS, strict=True))
        lines.append(f"| {shape} | {_figures(cost, 2)} | {told} |")
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
    for model in MODELS:
        cases = [(model, num, gpu) for num in PHRASES for gpu in GPUS]
        forms = {model.name: overhead, "without any overlap": overhead_at_most, "sdpa+maps": overhead_alone}
        for name, share in forms.items():
            shares = " | ".join(f"{100 * share(*case):.3f} %" for case in cases)
            most = " and ".join(str(most_phrases(share, model, gpu)) for gpu in GPUS)
            lines.append(f"| {name} | {shares} | {most} |")
    return "\n".join(lines)


def most_phrases(share: Callable[[Model, int, Gpu], float], model: Model, gpu: Gpu) -> int:
    """Return how many phrases keep a share such as `overhead` within BOUND, up to all 77 tokens."""
    return sum(1 for _ in itertools.takewhile(lambda num: share(model, num, gpu) <= BOUND, range(1, KEYS + 1)))


def _transient_table(model: Model) -> str:
    lines = [_TRANSIENTS, "", "| attention | pixels | heads x size | " + " | ".join(FORMS) + " |"]
    lines.append("|" + " --- |" * (3 + len(FORMS)))
    largest = dict.fromkeys(FORMS, 0)
    for kind in ("cross", "self"):
        for layer in model.layers:
            keys, num = (KEYS, 1) if kind == "cross" else (layer.pixels, int(layer.pixels <= PROPAGATED))
            shape = {"pixels": layer.pixels, "keys": keys, "heads": layer.heads, "head_dim": layer.head_dim}
            found = {form: transient(form, rows=2, num=num, **shape) for form in FORMS}
            largest = {form: max(largest[form], found[form]) for form in FORMS}
            sizes = " | ".join(f"{value / 1e6:.2f}" for value in found.values())
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

`PYTHONSAFEPATH=1 python -m diffumask_fast.bench.roofline docs/kernels.md` writes this page. **Nothing on it was
measured on a GPU**: times are what bytes and operations take at the limits of an H100 SXM and an H200 SXM. They have
3.35 and 4.8 TB/s of device memory; both give 5.5 TB/s from the second-level cache (about what others measured), 989
TFLOP/s dense fp16, 67 TFLOP/s fp32, 7.4 T loads/s of 4 bytes from the first-level caches (132 multiprocessors, 128
bytes a cycle, 1.755 GHz) and issue 927 G instructions/s, each for 32 threads. Real kernels take longer. Measured rows
are in `bench/results/`.

## Cross-attention

One pass: q, k and v are read, the output is written, in fp16; the 77 x N probabilities of a head stay in registers.
Keys are padded to 64 + 16, channels to two powers of two (40 to 32 + 16, 160 to 128 + 32); FLOPs are those of the
padded products. Instructions are counted in the machine code for Hopper: about 12 for a score of a head of 40 (19
before powers of two replaced exponentials and one reciprocal a row the divisions). Each block of 64 pixels reads k and
v again, from the cache, which is more than q and the output: there larger blocks would gain, `tune` tries them. A row
is one layer for one guided pair (batch 2); the time is that of the limit that binds, which is named."""

_MAPS = """\
### What maps add

For K phrases, beside the UNet of the guided pair at 989 TFLOP/s. The conditional sample sums its probabilities over the
heads and multiplies the sums by the columns, once for each group of heads: a small layer has several groups, to fill
the GPU. The first line is the limit's: the memory or the cache binds, and what is computed runs beside it. The second
adds up everything. The third is `sdpa+maps`: torch's attention, then a kernel that reads the conditional half of q and
k again and makes the maps alone. It leaves the output exactly torch's, and costs more unless torch's attention is the
faster one by that much. The last column is the number of phrases up to which a line stays within 0.2 %, on H100 and
H200.

Partial maps rather than partial sums are written for the groups: K floats a pixel instead of 77. A column meets the
sums by multiplying and adding over the keys, 96 instructions; as a product of matrices two columns took 1064
instructions where 1024 do (1024 x 8 x 80), five 1352 instead of 1312; from about a dozen the product was shorter."""

_TRANSIENTS = """\
### What a layer holds for a moment

The most MB that live at once in one layer beside its q, k, v and the maps, its output among them: fp32, a guided pair
of SD1.5, one phrase, propagated in self-attention of at most 1024 pixels. `eager` (`impl="reference"`) writes scores
and probabilities; `sdpa` pads q, k, v and the output to head sizes that are multiples of 8; `triton` writes its output
and, where heads are split, a part of the maps for each group; `sdpa+maps` holds the larger of those parts and what
torch's attention keeps; both leave more than 128 keys to `sdpa`. The figures are arithmetic; `tests/test_transients.py`
and, while denoising, `tests/test_memory.py` measure the same to the byte on a CPU, of the kernels what their launchers
allocate. What a kernel of torch allocates within itself is in neither."""

_FILTER = """\
## The guided filter

Four launches for all images and maps: box means of products along rows, along columns with the 3x3 systems solved in
registers, and the same two ways for the lines. Below: one image of 512 x 512, one map, radius 32 (65 taps). What binds
is loading the taps from the first-level caches, not device memory."""

_STEP = """\
## One step of the CRF

The Gaussian term is two products along the sides in fp32 (`smooth`, torch's own), the windowed term and the softmax one
launch (`step`); `norm` comes once for all steps of a guide. Below: one image of 512 x 512, 8 candidates of 2 labels,
window 11. A pair's weight is made once for 4 candidates."""


def main() -> None:
    """Write the page to the file named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m diffumask_fast.bench.roofline docs/kernels.md")
    Path(sys.argv[1]).write_text(account() + "\n" + compiled(), encoding="utf-8")


if __name__ == "__main__":
    main()
