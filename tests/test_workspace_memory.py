"""kernels/transients.py: its arithmetic is what the meter reads, for every form."""

import pytest
import torch

from diffumask_fast.bench.memory import peak_bytes
from diffumask_fast.bench.workspace_memory import FORMS, transient
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
    """Stands for a kernel: what its launcher allocates is the transient; the interpreter's copies are not."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    for kernel in ("attend_kernel", "attend_maps_kernel", "add_parts_kernel"):
        monkeypatch.setattr(attend_triton, kernel, NotLaunched())


def measured(form, shape, dtype):
    rows, pixels, keys, heads, head_dim, num = shape
    q, k, v = (torch.randn(rows, count, heads * head_dim).to(dtype) for count in (pixels, keys, keys))
    columns = torch.rand(rows // 2, keys, num) / keys if num else None
    maps = torch.zeros(rows // 2, num, pixels) if num else None
    fits = num and keys <= 128
    impl = {"eager": "reference", "sdpa": "sdpa"}.get(form, form if fits else "auto")
    where = {"heads": heads, "first_conditional": rows - rows // 2, "maps": maps, "impl": impl}
    return peak_bytes(lambda: attend(q, k, v, columns, **where))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_account_is_what_is_measured(shape, form):
    layer = dict(zip(("rows", "pixels", "keys", "heads", "head_dim", "num"), shape, strict=True))
    assert measured(form, shape, torch.float32) == transient(form, **layer)


def test_half_precision_halves_what_the_fused_forms_hold():
    layer = dict(rows=2, pixels=256, keys=77, heads=8, head_dim=40, num=2)
    found = measured("triton", tuple(layer.values()), torch.float16)
    assert found == transient("triton", **layer, dtype="fp16") == 2 * 256 * 320 * 2 + 4 * 8 * 2 * 256
    assert transient("eager", **layer) > transient("sdpa", **layer) > 3 * found
