"""Write `docs/kernels.md`: what each kernel must move and compute, what that takes at the GPU's limits, what it needs.

    PYTHONSAFEPATH=1 python -m diffumask_fast.kernels.account docs/kernels.md

The account is arithmetic and takes no time; the table of registers compiles every kernel for five GPUs that need not be
here, which takes about five minutes.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffumask_fast.kernels import tuned
from diffumask_fast.kernels.attend_triton import constants, two_powers
from diffumask_fast.kernels.transients import FORMS, transient
from diffumask_fast.kernels.variants import CAPABILITIES, variants

KEYS = 77
PHRASES = (1, 5, 16)  # of the page's columns
BOUND = 0.002  # what maps may add
PROPAGATED = 1024  # pixels of a level up to which self-attention carries the maps


@dataclass(frozen=True)
class Gpu:
    """Nominal limits of a GPU: bytes/s, dense fp16 and fp32 FLOP/s, 4-byte loads/s from its first-level caches."""

    name: str
    bandwidth: float
    fp16: float = 989e12
    fp32: float = 67e12
    loads: float = 132 * 32 * 1.755e9  # 128 bytes each cycle of each of 132 multiprocessors


GPUS = (Gpu("H100", 3.35e12), Gpu("H200", 4.8e12))


@dataclass(frozen=True)
class Layer:
    """Cross-attention layers of one shape in a UNet."""

    count: int
    pixels: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Model:
    """A UNet: FLOPs of one forward of one sample (1 MAC = 2, by torch's FlopCounterMode), its cross-attention."""

    name: str
    flops: float
    layers: tuple[Layer, ...]


MODELS = (
    Model(
        "SD1.5, 512 x 512",
        0.803e12,
        (Layer(5, 4096, 8, 40), Layer(5, 1024, 8, 80), Layer(5, 256, 8, 160), Layer(1, 64, 8, 160)),
    ),
    Model(
        "SD2.1, 768 x 768",
        2.149e12,
        (Layer(5, 9216, 5, 64), Layer(5, 2304, 10, 64), Layer(5, 576, 20, 64), Layer(1, 144, 20, 64)),
    ),
    Model("SDXL, 1024 x 1024", 6.761e12, (Layer(10, 4096, 10, 64), Layer(60, 1024, 20, 64))),
)


@dataclass(frozen=True)
class Cost:
    """Bytes through device memory, FLOPs on tensor cores (fp16) and outside (fp32), first-level cache loads."""

    bytes: float
    fp16: float = 0.0
    fp32: float = 0.0
    loads: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        sums = (getattr(self, name) + getattr(other, name) for name in ("bytes", "fp16", "fp32", "loads"))
        return Cost(*sums)

    def times(self, number: float) -> "Cost":
        return Cost(self.bytes * number, self.fp16 * number, self.fp32 * number, self.loads * number)

    def seconds(self, gpu: Gpu) -> float:
        """Return the time at the limit that binds, each resource perfectly used."""
        parts = self.bytes / gpu.bandwidth, self.fp16 / gpu.fp16, self.fp32 / gpu.fp32, self.loads / gpu.loads
        return max(parts)

    def serial_seconds(self, gpu: Gpu) -> float:
        """Return the time if nothing overlapped."""
        return self.bytes / gpu.bandwidth + self.fp16 / gpu.fp16 + self.fp32 / gpu.fp32 + self.loads / gpu.loads


def covered(size: int) -> int:
    """Return what the kernel computes for a number of keys or channels: 80 for 77, 64 for 64."""
    first, second = two_powers(size)
    return first if size <= first else first + second


def attention(layer: Layer) -> Cost:
    """Count plain cross-attention of one sample: q, k, v, out once in fp16, products over padded keys and channels."""
    width = layer.heads * layer.head_dim
    keys, channels = covered(KEYS), covered(layer.head_dim)
    exponentials = 6 * layer.heads * layer.pixels * keys  # scale, maximum, exp, sum, division, cast
    return Cost(
        2 * width * (2 * layer.pixels + 2 * KEYS), 4 * layer.heads * layer.pixels * keys * channels, exponentials
    )


def maps(layer: Layer, num: int) -> Cost:
    """Count what the maps add to a guided pair, one of whose two samples is conditional.

    Both samples sum their probabilities over the heads; the conditional one multiplies them by the columns, in fp32 and
    in blocks of 16, and reads and writes its maps, by way of one part for each group of heads where there are several.
    """
    shape = {"heads": layer.heads, "head_dim": layer.head_dim, "pixels": layer.pixels, "keys": KEYS}
    block = tuned.launch("attend", torch.device("cpu"), dtype="fp16", **shape)["block"]
    groups = layer.heads // constants(layer.pixels, KEYS, layer.heads, layer.head_dim, num, block)["GROUP"]
    passes = 2 if groups == 1 else 2 + 2 * groups
    keys = covered(KEYS)
    columns = -(-num // 16) * 16
    sums = 2 * layer.heads * layer.pixels * keys
    return Cost(4 * num * (passes * layer.pixels + KEYS), 0, sums + 2 * layer.pixels * keys * columns)


def overhead(model: Model, num: int, gpu: Gpu) -> float:
    """Return the time that maps add to a guided pair over the time of its UNet, both at the limits that bind."""
    added = 0.0
    for layer in model.layers:
        plain = attention(layer).times(2)
        added += layer.count * ((plain + maps(layer, num)).seconds(gpu) - plain.seconds(gpu))
    return added / (2 * model.flops / gpu.fp16)


def overhead_at_most(model: Model, num: int, gpu: Gpu) -> float:
    """Return the same as if nothing of what maps add overlapped with anything."""
    added = sum(layer.count * maps(layer, num).serial_seconds(gpu) for layer in model.layers)
    return added / (2 * model.flops / gpu.fp16)


def guided_filter(height: int, width: int, num: int, radius: int) -> dict[str, Cost]:
    """Count the guided filter's four launches for one image: fp32 planes and, for each pixel, 2 radius + 1 taps."""
    size, taps = height * width, 2 * radius + 1

    def cost(planes: int, operations: float, loads: int) -> Cost:
        return Cost(4 * planes * size, 0, operations * taps * size, loads * taps * size)

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
        4 * size * (4 + 4 * planes), 0, offsets * size * (programs * (weight + 1) + 2 * planes),
        offsets * size * (4 * programs + planes),
    )  # fmt: skip
    smooth = Cost(4 * size * 4 * planes, 0, 2 * size * planes * (height + width))
    return {"norm": Cost(16 * size, 0, offsets * size * weight, 3 * offsets * size), "smooth": smooth, "step": step}


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
        f"| layers | pixels | heads x size | MB | GFLOP | FLOP/byte | {_names(' µs')} |",
        "|" + " --- |" * (6 + len(GPUS)),
    ]  # fmt: skip
    total = Cost(0)
    for layer in model.layers:
        cost = attention(layer).times(2)  # a guided pair
        total += cost.times(layer.count)
        times = " | ".join(f"{cost.seconds(gpu) * 1e6:.2f}" for gpu in GPUS)
        shape = f"{layer.count} | {layer.pixels} | {layer.heads} x {layer.head_dim}"
        figures = f"{cost.bytes / 1e6:.2f} | {cost.fp16 / 1e9:.2f} | {cost.fp16 / cost.bytes:.0f}"
        lines.append(f"| {shape} | {figures} | {times} |")
    times = " | ".join(f"{total.seconds(gpu) * 1e6:.0f}" for gpu in GPUS)
    figures = f"{total.bytes / 1e6:.0f} | {total.fp16 / 1e9:.1f} | {total.fp16 / total.bytes:.0f}"
    lines.append(f"| all | | | {figures} | {times} |")
    return "\n".join(lines)


def _overhead_table() -> str:
    lines = [_MAPS, "", "| | " + " | ".join(f"K = {num}, {g.name}" for num in PHRASES for g in GPUS) + " | most K |"]
    lines.append("|" + " --- |" * (2 + len(PHRASES) * len(GPUS)))
    for model in MODELS:
        cases = [(model, num, gpu) for num in PHRASES for gpu in GPUS]
        for name, share in ((model.name, overhead), ("without any overlap", overhead_at_most)):
            shares = " | ".join(f"{100 * share(*case):.3f} %" for case in cases)
            most = " and ".join(str(most_phrases(share, model, gpu)) for gpu in GPUS)
            lines.append(f"| {name} | {shares} | {most} |")
    return "\n".join(lines)


def most_phrases(share: Callable[[Model, int, Gpu], float], model: Model, gpu: Gpu) -> int:
    """Return how many phrases keep a share of `overhead` or `overhead_at_most` within BOUND, up to all 77 tokens."""
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


def compiled() -> str:
    """Return the table of what each kernel needs on each architecture, by compiling them all."""
    names = " | ".join(f"sm_{capability}" for capability in CAPABILITIES)
    lines = [_COMPILED, "", f"| kernel | dtype | D | keys | {names} | matrix |"]
    lines.append("|" + " --- |" * (5 + len(CAPABILITIES)))
    for variant in variants():
        needs = [variant.needs(capability) for capability in CAPABILITIES]
        cells = " | ".join(f"{n.registers} / {n.shared / 1024:.1f} / {n.spills}" for n in needs)
        matrix = ", ".join(dict.fromkeys(name for need in needs for name in need.matrix))
        sizes = f"{variant.head_dim or ''} | {variant.keys or ''}"
        lines.append(f"| {variant.kernel} | {variant.dtype} | {sizes} | {cells} | {matrix} |")
    return "\n".join(lines) + "\n"


_HEAD = """\
# The kernels: an account

`PYTHONSAFEPATH=1 python -m diffumask_fast.kernels.account docs/kernels.md` writes this page. **Nothing on it was
measured on a GPU**: times are what bytes and operations take at the nominal limits of H100 SXM and H200 SXM, 3.35 and
4.8 TB/s of device memory, on both 989 TFLOP/s dense fp16, 67 TFLOP/s fp32 and 7.4 T loads/s of 4 bytes from the
first-level caches (132 multiprocessors, 128 bytes a cycle, 1.755 GHz). Real kernels take longer. Measured rows are in
`bench/results/`.

## Cross-attention

One pass: q, k and v are read, the output is written, in fp16; the 77 x N probabilities of a head stay in registers.
Keys are padded to 64 + 16, channels to two powers of two (40 to 32 + 16, 160 to 128 + 32); FLOPs are those of the
padded products. A row is one layer for one guided pair (batch 2); the time is that of the limit that binds, memory's,
the tensor cores' or, for the softmax, fp32's."""

_MAPS = """\
### What maps add

For K phrases, beside the UNet of the guided pair at 989 TFLOP/s: probabilities summed over heads, 16 columns at a time
in fp32, maps read and written in fp32 (and once for each group of heads where a small layer splits them). The first
line is the roofline's: memory binds, and the additions run beside it. The second adds up all of it. The last column is
the number of phrases up to which a line stays within 0.2 %, on H100 and H200: 17 on SD1.5's roofline, more on the
others'; 8 if nothing overlapped, 16 in SD2.1 and SDXL."""

_TRANSIENTS = """\
### What a layer holds for a moment

The most MB that live at once in one layer beside its q, k, v and the maps, its output among them: fp32, a guided pair
of SD1.5, one phrase, propagated in self-attention of at most 1024 pixels. `eager` (`impl="reference"`) writes scores
and probabilities; `sdpa` pads q, k, v and the output to head sizes that are multiples of 8; `triton` writes its output
and, where heads are split, a part of the maps for each group, and leaves more than 128 keys to `sdpa`. The figures are
arithmetic; `tests/test_transients.py` and, while denoising, `tests/test_memory.py` measure the same to the byte on a
CPU, of `triton` what its launcher allocates. What a kernel of torch allocates within itself is in neither."""

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

_COMPILED = """\
## What each kernel needs

Registers of a thread / shared memory in KiB / spilled bytes, compiled ahead of time with the configuration that
`tuned.json` holds for unknown devices. The last column names the tensor-core instructions in the machine code, on
Ampere and Ada, Hopper and Blackwell where they differ. Limits: 255 registers; 163, 99, 99, 227 and 227 KiB. fp32 has no
exact tensor-core product and unrolls, so heads of 160 spill: `auto` leaves fp32 to torch unless a device's measurement
says otherwise. In fp16, tiles of 16 pixels would hold heads of 160 without the few bytes that spill, and read k and v
twice as often; with 128 keys, where more spilled, they are taken."""


def main() -> None:
    """Write the page to the file named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m diffumask_fast.kernels.account docs/kernels.md")
    Path(sys.argv[1]).write_text(account() + "\n" + compiled(), encoding="utf-8")


if __name__ == "__main__":
    main()
