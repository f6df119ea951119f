"""kernels/guided_filter_triton.py: the real kernels, in Triton's interpreter where there is no GPU."""

import pytest
import test_guided_filter
import torch
from test_guided_filter import brute_force, draw

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import guided_filter, ran

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [*test_guided_filter.SHAPES, (1, 2, 9, 70, 3)]  # B, K, H, W, radius


def both(guide, maps, radius, eps):
    """Return what Triton and what torch give, on the CPU."""
    guide, maps = guide.to(DEVICE), maps.to(DEVICE)
    return [guided_filter(guide, maps, radius, eps, impl=impl).cpu() for impl in ("triton", "torch")]


def worst(value, truth):
    return (value - truth).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_at_most_twice_that_of_torch(shape):
    *size, radius = shape
    guide, maps = draw(*size)
    truth = brute_force(guide, maps, radius, 1e-3)
    found, plain = both(guide, maps, radius, 1e-3)
    bound = 2 * worst(plain, truth) + 2e-6
    assert worst(found, truth) <= bound
    assert worst(torch.zeros_like(found), truth) > bound and worst(maps, truth) > bound


@pytest.mark.parametrize("offset", [0.0, 0.9])
def test_it_stays_accurate_where_the_guide_is_grey_and_bright(offset):
    guide, maps = draw(1, 1, 16, 18)
    guide = offset + (1 - offset) * guide[:, :1].expand(-1, 3, -1, -1)
    truth = brute_force(guide, maps, 4, 1e-5)
    found, plain = both(guide, maps, 4, 1e-5)
    assert worst(found, truth) <= 2 * worst(plain, truth) + 1e-5


def test_the_same_input_gives_the_same_bits_in_every_batch():
    guide, maps = draw(2, 2, 8, 11)
    first, again = (guided_filter(guide.to(DEVICE), maps.to(DEVICE), 2, 1e-3, impl="triton") for _ in range(2))
    alone = guided_filter(guide[1:2].to(DEVICE), maps[1:2].to(DEVICE), 2, 1e-3, impl="triton")
    assert torch.equal(first, again) and torch.equal(first[1:2], alone)


def test_what_is_not_written_is_not_read(monkeypatch):
    guide, maps = draw(1, 2, 9, 13)
    clean = guided_filter(guide.to(DEVICE), maps.to(DEVICE), 2, 1e-3, impl="triton")
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **k: plain(*a, **k).fill_(float("nan")))
    assert torch.equal(guided_filter(guide.to(DEVICE), maps.to(DEVICE), 2, 1e-3, impl="triton"), clean)


def test_it_takes_strided_and_half_precision_input():
    guide, maps = draw(1, 2, 7, 8)
    guide, maps = guide.half(), maps.half()
    truth, _ = both(guide.float(), maps.float(), 2, 1e-3)
    found, _ = both(guide.to(memory_format=torch.channels_last), maps.mT.contiguous().mT, 2, 1e-3)
    assert torch.equal(found, truth) and found.dtype == torch.float32


def test_auto_is_torch_on_the_cpu_and_what_ran_can_be_asked():
    guide, maps = draw(1, 1, 6, 6)
    with ran() as impls:
        for impl in ("auto", "torch", "triton", "reference"):
            guided_filter(guide, maps, 1, 1e-3, impl=impl)
    assert impls == [("guided_filter", impl) for impl in ("torch", "torch", "triton", "reference")]


def test_what_it_cannot_do_is_one_sentence(monkeypatch):
    guide, maps = draw(1, 1, 4, 4)
    with pytest.raises(DiffuMaskError, match="impl is 'cudnn'"):
        guided_filter(guide, maps, 1, 1e-3, impl="cudnn")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(DiffuMaskError, match="runs on CUDA"):
        guided_filter(guide, maps, 1, 1e-3, impl="triton")
