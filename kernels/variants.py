"""Every kernel as it is launched, compiled for GPUs that are not here: what `docs/kernels.md` and the tests list."""

from dataclasses import dataclass
from typing import Any

import torch

from diffumask_fast.kernels import attend_triton, guided_filter_triton, mean_field_triton, tuned
from diffumask_fast.kernels.aot import Needs, compile_for
from diffumask_fast.kernels.attend import MAX_KEYS

CAPABILITIES = (80, 86, 89, 90, 100)
_CPU = torch.device("cpu")  # a device without entries of its own: the defaults


@dataclass(frozen=True)
class Variant:
    """One kernel at one head size, number of keys and dtype; zeros where it has none."""

    kernel: str
    dtype: str
    head_dim: int = 0
    keys: int = 0

    def needs(self, capability: int) -> Needs:
        """Compile it, 8 heads and 4096 pixels, or 512 x 512 pixels, in its default launch configuration."""
        if self.kernel == "attend":
            shape = {"heads": 8, "head_dim": self.head_dim, "pixels": 4096, "keys": self.keys}
            config = tuned.launch("attend", _CPU, dtype=self.dtype, **shape)
            tile = config.pop("block"), config.pop("widest", MAX_KEYS)
            fixed = attend_triton.constants(4096, self.keys, 8, self.head_dim, 4, *tile)
            kernel, types = attend_triton.attend_kernel, attend_triton.types(self.dtype)
            return compile_for(capability, kernel, types, {**fixed, "UP": False}, **config)
        if self.kernel in _named(mean_field_triton.KERNELS):
            kernel = _named(mean_field_triton.KERNELS)[self.kernel]
            config = tuned.launch("mean_field", _CPU, window=11)
            fixed = mean_field_triton.constants(kernel, 8, 2, 11, config)
            launch = {name: config[name] for name in ("num_warps", "num_stages")}
            return compile_for(capability, kernel, mean_field_triton.types(kernel), fixed, **launch)
        kernel = _named(guided_filter_triton.KERNELS)[self.kernel]
        config = tuned.launch("guided_filter", _CPU, height=512, width=512, radius=8)
        fixed = {"NUM": 4, "BY": config.pop("rows"), "BX": config.pop("columns")}
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        return compile_for(capability, kernel, guided_filter_triton.types(kernel), fixed, **config)


def _named(kernels: tuple) -> dict[str, Any]:
    return {kernel.__name__.removesuffix("_kernel"): kernel for kernel in kernels}


def variants() -> list[Variant]:
    """Return every variant of the page, the worst of each kernel among them."""
    sizes = [(head_dim, 77) for head_dim in (40, 64, 80, 160)] + [(64, 128), (160, 128)]
    listed = [Variant("attend", dtype, *size) for dtype in ("fp16", "bf16", "fp32") for size in sizes]
    others = _named(guided_filter_triton.KERNELS + mean_field_triton.KERNELS)
    return listed + [Variant(name, "fp32") for name in others]
