"""Every kernel as it is launched, compiled for GPUs that are not here: what `docs/kernels.md` and the tests list."""

from dataclasses import dataclass
from typing import Any

import torch

from diffumask_fast.bench.aot import Needs, compile_for
from diffumask_fast.kernels import attend_triton, guided_filter_triton, mean_field_triton, tuned
from diffumask_fast.kernels.attend import MAX_KEYS

CAPABILITIES = (80, 86, 89, 90, 100)
# pixels, heads, head size: layers of Stable Diffusion 1.5, 2.1 and XL that are compiled differently
LAYERS = ((4096, 8, 40), (9216, 5, 64), (1024, 20, 64), (1024, 8, 80), (256, 8, 160))
PHRASES = 2
_CPU = torch.device("cpu")  # a device without entries of its own: the defaults


@dataclass(frozen=True)
class Variant:
    """One kernel in one dtype, at one layer and number of keys where it has them."""

    kernel: str
    dtype: str
    layer: tuple[int, int, int] = (0, 0, 0)
    keys: int = 0

    def needs(self, capability: int) -> Needs:
        """Compile it for two phrases, or 512 x 512 pixels, in its default launch configuration."""
        if self.kernel in attend_triton.KERNELS:
            shape = dict(zip(("pixels", "heads", "head_dim"), self.layer, strict=True), keys=self.keys)
            config = tuned.launch(self.kernel, _CPU, dtype=self.dtype, **shape)
            tile = {"block": config.pop("block"), "widest": config.pop("widest", MAX_KEYS)}
            fixed = attend_triton.constants(self.kernel, **shape, num=PHRASES, **tile)
            kernel, types = attend_triton.KERNELS[self.kernel], attend_triton.types(self.kernel, self.dtype)
            return compile_for(capability, kernel, types, {**fixed, "UPCAST": False}, **config)
        if self.kernel in _named(mean_field_triton.KERNELS):
            kernel = _named(mean_field_triton.KERNELS)[self.kernel]
            config = tuned.launch("mean_field", _CPU, window=11)
            fixed = mean_field_triton.constants(kernel, 8, 2, 11, config)
            launch = {name: config[name] for name in ("num_warps", "num_stages")}
            return compile_for(capability, kernel, mean_field_triton.types(kernel), fixed, **launch)
        kernel = _named(guided_filter_triton.KERNELS)[self.kernel]
        config = tuned.launch("guided_filter", _CPU, height=512, width=512, radius=8)
        fixed = {"NUM_MAPS": 4, "BLOCK_Y": config.pop("rows"), "BLOCK_X": config.pop("columns")}
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        return compile_for(capability, kernel, guided_filter_triton.types(kernel), fixed, **config)


def _named(kernels: tuple) -> dict[str, Any]:
    return {kernel.__name__.removesuffix("_kernel"): kernel for kernel in kernels}


def variants() -> list[Variant]:
    """Return every variant of the page, the worst of each kernel among them."""
    sizes = [(layer, 77) for layer in LAYERS] + [((1024, 20, 64), 128), ((256, 8, 160), 128)]
    attention = [("attend", "fp16"), ("attend", "bf16"), ("attend", "fp32"), ("attend_maps", "fp16")]
    listed = [Variant(*kernel, *size) for kernel in [*attention, ("attend_maps", "fp32")] for size in sizes]
    others = _named(guided_filter_triton.KERNELS + mean_field_triton.KERNELS)
    return listed + [Variant(name, "fp32") for name in others]


def compiled() -> str:
    """Return the table of what each kernel needs on each architecture, by compiling them all."""
    names = " | ".join(f"sm_{capability}" for capability in CAPABILITIES)
    lines = [_COMPILED, "", f"| kernel | dtype | layer | keys | {names} | matrix |"]
    lines.append("|" + " --- |" * (5 + len(CAPABILITIES)))
    for variant in (one for one in variants() if one.dtype != "bf16"):
        needs = [variant.needs(capability) for capability in CAPABILITIES]
        cells = [f"{need.registers} / {need.shared / 1024:.1f} / {need.spills}" for need in needs]
        if variant.keys:
            cells = [f"{cell} / {need.instructions}" for cell, need in zip(cells, needs, strict=True)]
        matrix = ", ".join(dict.fromkeys(name for need in needs for name in need.matrix))
        layer = "{} x {} x {}".format(*variant.layer) if variant.keys else ""
        lines.append(
            f"| {variant.kernel} | {variant.dtype} | {layer} | {variant.keys or ''} | {' | '.join(cells)} | {matrix} |"
        )
    return "\n".join(lines) + "\n"


_COMPILED = """\
## What each kernel needs

Registers of a thread / shared memory in KiB / spilled bytes / instructions, of attention: those for one head, or the
whole kernel's with two phrases where a program has one head. Compiled ahead of time with the configuration
that `tuned.json` holds for unknown devices, at layers as they are launched; bf16 needs what fp16 needs. The last column
names the tensor-core instructions in the machine code, on Ampere and Ada, Hopper and Blackwell where they differ.
Limits: 255 registers; 163, 99, 99, 227 and 227 KiB.

Heads of up to 64 channels are walked over in two stages, the next head's q and k on their way while one is computed:
two programs fit a multiprocessor with one stage and with two. Wider heads use their registers up, heads beyond 96
channels have a program each. Those of 160 spill a few bytes on Ampere and Ada; in half the block they would not, with
one program on a multiprocessor instead of two. The maps alone need few registers; four programs hide each other's
loads, so they take one stage. fp32 has no exact tensor-core product and unrolls, so heads of 160 spill: `auto` leaves
fp32 to torch unless a device's measurement says otherwise."""
