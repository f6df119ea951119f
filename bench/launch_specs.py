"""Every kernel as it is launched: what `docs/notes/kernels.md` lists and the tests compile."""

from dataclasses import dataclass
from typing import Any

from triton import JITFunction

from diffumask_fast.bench.aot import Needs, compile_for
from diffumask_fast.kernels import attend_triton, guided_filter_triton, mean_field_triton, tuned
from diffumask_fast.kernels.attend import MAX_KEYS
from diffumask_fast.kernels.inputs import CANDIDATES, CRF, LABELS
from diffumask_fast.kernels.shapes import KEYS, MODELS

CAPABILITIES = (80, 86, 89, 90, 100)
_SD15, _SD21, _SDXL = (MODELS[geometry].layers for geometry in ("sd15", "sd21", "sdxl"))
# each head size, and of 64 channels the fewest and the most heads: layers that are compiled differently
LAYERS = tuple(layer.shape for layer in (_SD15[0], _SD21[0], _SDXL[1], _SD15[1], _SD15[2]))
PHRASES = 2


@dataclass(frozen=True)
class LaunchSpec:
    """One kernel in one dtype; attention's at one layer and number of keys."""

    kernel: str
    dtype: str
    layer: tuple[int, int, int] = (0, 0, 0)
    keys: int = 0

    def needs(self, capability: int, numbers: str = "fp32") -> Needs:
        """Compile it for two phrases, or 512 x 512 pixels, as it is launched there.

        Args:
            capability: as in `compile_for`.
            numbers: type of a Python number: "fp32", or "fp64" as torch compiles a call.
        """
        if self.kernel in attend_triton.KERNELS:
            shape = dict(zip(("pixels", "heads", "head_dim"), self.layer, strict=True), keys=self.keys)
            config = _launch(self.kernel, capability, dtype=self.dtype, **shape)
            tile = {"block": config.pop("block"), "widest": config.pop("widest", MAX_KEYS)}
            tile["narrowest"] = attend_triton.narrowest(tile["block"], f"sm_{capability}")
            fixed = attend_triton.constants(self.kernel, **shape, num=PHRASES, **tile)
            kernel = attend_triton.KERNELS[self.kernel]
            types = _with(numbers, attend_triton.types(self.kernel, self.dtype))
            return compile_for(capability, kernel, types, {**fixed, "UPCAST": False}, **config)
        if self.kernel in _named(mean_field_triton.KERNELS):
            kernel = _named(mean_field_triton.KERNELS)[self.kernel]
            config = _launch("mean_field", capability, window=CRF["window"])
            fixed = mean_field_triton.constants(kernel, CANDIDATES, LABELS, CRF["window"], config)
            launch = {name: config[name] for name in ("num_warps", "num_stages")}
            return compile_for(capability, kernel, _with(numbers, mean_field_triton.types(kernel)), fixed, **launch)
        kernel = _named(guided_filter_triton.KERNELS)[self.kernel]
        config = _launch("guided_filter", capability, height=512, width=512, radius=8)
        fixed = {"NUM_MAPS": 4, "BLOCK_Y": config.pop("rows"), "BLOCK_X": config.pop("columns")}
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        return compile_for(capability, kernel, _with(numbers, guided_filter_triton.types(kernel)), fixed, **config)


def _launch(kernel: str, capability: int, **facts: Any) -> dict[str, int]:
    return dict(tuned.find(tuned.table(), kernel, [f"sm_{capability}"], facts)["launch"])


def _with(numbers: str, types: dict[str, str]) -> dict[str, str]:
    return {name: numbers if kind == "fp32" else kind for name, kind in types.items()}


def _named(kernels: tuple[JITFunction, ...]) -> dict[str, JITFunction]:
    return {kernel.__name__.removesuffix("_kernel"): kernel for kernel in kernels}


def launch_specs() -> list[LaunchSpec]:
    """Return every launch that the page lists, the most demanding of each kernel among them."""
    sizes = [(layer, KEYS) for layer in LAYERS] + [(layer, MAX_KEYS) for layer in (_SDXL[1].shape, _SD15[2].shape)]
    attention = [("attend", "fp16"), ("attend", "bf16"), ("attend", "fp32"), ("attend_maps", "fp16")]
    listed = [LaunchSpec(*kernel, *size) for kernel in [*attention, ("attend_maps", "fp32")] for size in sizes]
    others = _named(guided_filter_triton.KERNELS + mean_field_triton.KERNELS)
    return listed + [LaunchSpec(name, "fp32") for name in others]


def compiled() -> str:
    """Return the table of what each kernel needs on each architecture, by compiling them all."""
    names = " | ".join(f"sm_{capability}" for capability in CAPABILITIES)
    lines = [_COMPILED, "", f"| kernel | dtype | layer | keys | {names} | matrix |"]
    lines.append("|" + " --- |" * (5 + len(CAPABILITIES)))
    for spec in (one for one in launch_specs() if one.dtype != "bf16"):
        needs = [spec.needs(capability) for capability in CAPABILITIES]
        cells = [f"{need.registers} / {need.shared / 1024:.1f} / {need.spills}" for need in needs]
        if spec.keys:
            cells = [f"{cell} / {need.instructions}" for cell, need in zip(cells, needs, strict=True)]
        matrix = ", ".join(dict.fromkeys(name for need in needs for name in need.matrix))
        layer = "{} x {} x {}".format(*spec.layer) if spec.keys else ""
        lines.append(f"| {spec.kernel} | {spec.dtype} | {layer} | {spec.keys or ''} | {' | '.join(cells)} | {matrix} |")
    return "\n".join(lines) + "\n"


_COMPILED = """\
## What each kernel needs

Registers of a thread / shared memory in KiB / spilled bytes / instructions. Instructions are counted for attention
alone: those for one head, or, where a program has one head, those of the whole kernel with two phrases. Everything is
compiled ahead of time with the configuration that `tuned.json` holds for unknown devices, at layers as they are
launched; bf16 needs what fp16 needs. The last column names the tensor-core instructions in the machine code of Ampere
and Ada, Hopper and Blackwell where they differ. Limits: 255 registers; 163, 99, 99, 227 and 227 KiB.

Heads of up to 64 channels are computed in two stages: the next head's q and k are loaded meanwhile, and two programs
fit a multiprocessor as with one stage. Wider heads use up their registers; heads of more than 96 channels have a
program each. Heads of 160 spill a few bytes on Ampere and Ada. In half the block they would not, but then one program
would fit a multiprocessor instead of two. The maps alone need few registers: four programs hide each other's loads, so
one stage is enough. fp32 has no exact tensor-core product and its products are unrolled, so heads of 160 spill; `auto`
leaves fp32 to torch unless a measurement on the device says otherwise."""
