"""bench/workspace_memory.py: its arithmetic equals what is measured, for every implementation."""

import pytest
import torch

from diffumask_fast.bench.memory import peak_bytes
from diffumask_fast.bench.workspace_memory import IMPLS, workspace
from diffumask_fast.kernels import attend, attend_triton

# B, N, T, H, D, K: cross-attention, small and split over heads, fewer pixels than keys, self-attention without and with
SHAPES = [
    (2, 256, 77, 8, 40, 2),
    (2, 1024, 77, 2, 64, 9),
    (4, 16, 77, 4, 160, 1),
    (2, 300, 300, 2, 40, 0),
    (2, 300, 300, 2, 40, 3),
]


class NotLaunched:
    """Stands for a kernel: its launcher's allocations count, the interpreter's copies do not."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    for kernel in ("attend_kernel", "attend_maps_kernel", "add_parts_kernel"):
        monkeypatch.setattr(attend_triton, kernel, NotLaunched())


def measured(impl, shape, dtype):
    rows, pixels, keys, heads, head_dim, num = shape
    q, k, v = (torch.randn(rows, count, heads * head_dim).to(dtype) for count in (pixels, keys, keys))
    columns = torch.rand(rows // 2, keys, num) / keys if num else None
    maps = torch.zeros(rows // 2, num, pixels) if num else None
    if impl in ("triton", "sdpa+maps") and not (num and keys <= 128):
        impl = "auto"
    settings = {"heads": heads, "first_conditional": rows - rows // 2, "maps": maps, "impl": impl}
    return peak_bytes(lambda: attend(q, k, v, columns, **settings))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_account_is_what_is_measured(shape, impl):
    layer = dict(zip(("rows", "pixels", "keys", "heads", "head_dim", "num"), shape, strict=True))
    assert measured(impl, shape, torch.float32) == workspace(impl, **layer)


def test_half_precision_halves_the_fused_ones():
    layer = dict(rows=2, pixels=256, keys=77, heads=8, head_dim=40, num=2)
    fused = measured("triton", tuple(layer.values()), torch.float16)
    assert fused == workspace("triton", **layer, dtype="fp16") == 2 * 256 * 320 * 2 + 4 * 8 * 2 * 256
    assert workspace("reference", **layer) > workspace("sdpa", **layer) > 3 * fused
