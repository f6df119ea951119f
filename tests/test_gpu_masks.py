"""Masks are the same run after run: on a GPU bit for bit, and everywhere by what they are made with."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffumask_fast import kernels
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.attention.store import MapStore
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import rejections

aten = torch.ops.aten
# what CUDA does in an order that it does not fix, of all that torch.use_deterministic_algorithms names
UNORDERED = {
    aten.scatter_add, aten.scatter_add_, aten.scatter_reduce, aten.scatter_reduce_, aten.scatter, aten.scatter_,
    aten.index_add, aten.index_add_, aten.index_reduce, aten.index_reduce_, aten.index_copy, aten.index_copy_,
    aten.index_put, aten.index_put_, aten._index_put_impl_, aten.put, aten.put_, aten.histc, aten.bincount,
    aten.cumsum, aten.cumsum_, aten.median, aten.nanmedian, aten.kthvalue,
}  # fmt: skip
CASES = {
    "default": MaskOptions(),
    "steps": MaskOptions(colour_steps=3, radius=4),
    "fixed": MaskOptions(threshold=0.45, refine="none", ignore_band=2),
    "cleaned": MaskOptions(min_component=0.01, fill_holes=True),
    "crf": MaskOptions(refine="crf"),
    "adaptive": MaskOptions(threshold="adaptive"),
}


class Ordered(TorchDispatchMode):
    """Refuse what would not add the same floats twice alike on CUDA; whole numbers have one sum in any order."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        floats = [x for x in given if isinstance(x, torch.Tensor) and x.is_floating_point()]
        extremes = "amax" in given or "amin" in given
        # of several lines each is added up in order; only a single one is left to CUB, whose blocks race
        lines = func.overloadpacket in (aten.cumsum, aten.cumsum_) and args[0].numel() != args[0].shape[args[1]]
        if func.overloadpacket in UNORDERED and floats and not (extremes or lines):
            raise AssertionError(f"{func} of {floats[0].dtype} has another order, and another sum, each time")
        return func(*args, **(kwargs or {}))


def made(options, side, device="cpu"):
    """Go from maps of three calls to masks and reasons, as a run does."""
    rng = torch.Generator().manual_seed(5)
    store = MapStore([["dog", "cat"]] * 2, (side // 8, side // 8), propagate=2)
    for _ in range(3):
        sizes = {"0": side**2 // 64, "1": side**2 // 256}
        levels = {key: torch.rand(2, 2, pixels, generator=rng).to(device) for key, pixels in sizes.items()}
        store.add(levels, {key: maps.repeat(1, 2, 1) for key, maps in levels.items()} if store.calls else None)
    flat = torch.randint(0, 256, (2, side // 16, side // 16, 3), generator=rng, dtype=torch.uint8)
    images = flat.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    ids = torch.tensor([[1, 2], [3, 0]])
    found = [store.class_maps(MapOptions(name, propagate=2)) for name in ("paper", "reference", "finest")]
    found += make_masks(found[0], images, options, ids)
    reasons = rejections(images, found[-2], ids, [["dog", "cat"], ["dog"]], options, found[-1])
    return [x.cpu() for x in found], reasons


@pytest.mark.parametrize("name", CASES)
def test_nothing_on_the_way_to_a_mask_depends_on_the_order_of_additions(name):
    with Ordered():
        tensors, reasons = made(CASES[name], 64)
    assert tensors[3].unique().numel() > 1 and len(reasons) == 2


def test_what_depends_on_the_order_would_be_found():
    index = torch.tensor([0, 0, 1])
    for call in (
        lambda: torch.zeros(2).scatter_add_(0, index, torch.rand(3)),
        lambda: torch.rand(3).cumsum(0),
        lambda: torch.zeros(2).index_put_((index,), torch.rand(3), accumulate=True),
    ):
        with Ordered(), pytest.raises(AssertionError, match="another order"):
            call()
    with Ordered():
        torch.zeros(2, dtype=torch.long).scatter_add_(0, index, index)


def test_no_kernel_adds_atomically():
    sources = sorted(Path(kernels.__file__).parent.glob("*_triton.py"))
    assert len(sources) >= 3 and not [path.name for path in sources if "tl.atomic" in path.read_text("utf-8")]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_two_runs_give_the_same_bits(name):
    first, reasons = made(CASES[name], 512, "cuda")
    for _ in range(4):
        again, others = made(CASES[name], 512, "cuda")
        assert reasons == others and all(map(torch.equal, first, again))
