"""kernels/mean_field_triton.py: the real kernels, in Triton's interpreter where there is no GPU."""

import pytest
import test_mean_field
import torch
from test_mean_field import WEIGHTS, brute_force, draw

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import mean_field_triton, ran
from diffumask_fast.kernels.mean_field import bilateral_norm, mean_field

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [*test_mean_field.SHAPES, (1, 6, 3, 8, 8, 3, 3), (1, 1, 2, 11, 13, 1, 1)]  # B, M, L, H, W, window, dilation


def step(q, unary, guide, window, dilation):
    q, unary, guide = (x.to(DEVICE) for x in (q, unary, guide))
    with ran() as impls:
        out = mean_field(q, unary, guide, window=window, dilation=dilation, **WEIGHTS, impl="triton")
    assert impls == [("mean_field", "triton")]
    return out.cpu()


def worst(value, truth):
    return (value - truth).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_at_most_twice_that_of_torch(shape):
    *size, window, dilation = shape
    q, unary, guide = draw(*size)
    truth = brute_force(q, unary, guide, window, dilation, **WEIGHTS)
    bound = 2 * worst(mean_field(q, unary, guide, window=window, dilation=dilation, **WEIGHTS), truth) + 1e-6
    assert worst(step(q, unary, guide, window, dilation), truth) <= bound
    uniform = torch.full_like(truth, 1 / size[2])
    for wrong in (torch.zeros_like(truth), uniform, (-unary).softmax(2)):
        assert worst(wrong, truth) > 1000 * bound


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_the_norm_is_that_of_torch(shape):
    size_b, _, _, height, width, window, dilation = shape
    guide = draw(size_b, 1, 2, height, width)[2]
    settings = {"window": window, "dilation": dilation, "bilateral": WEIGHTS["bilateral"]}
    found = mean_field_triton.bilateral_norm(guide.to(DEVICE), **settings).cpu()
    assert found.shape == (size_b, 1, height, width)
    assert torch.allclose(found, bilateral_norm(guide, **settings), rtol=2e-6)


def test_the_same_input_gives_the_same_bits_and_every_pixel_is_written(monkeypatch):
    q, unary, guide = draw(2, 5, 3, 7, 11)
    clean = step(q, unary, guide, 5, 1)
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **k: plain(*a, **k).fill_(float("nan")))
    assert torch.equal(step(q, unary, guide, 5, 1), clean)


def test_strided_input_is_read_as_it_means():
    q, unary, guide = draw(1, 2, 2, 6, 5)
    turned = q.mT.contiguous().mT, unary.mT.contiguous().mT, guide.to(memory_format=torch.channels_last)
    assert torch.equal(step(*turned, 3, 1), step(q, unary, guide, 3, 1))


def test_without_a_gpu_and_the_interpreter_it_is_one_sentence(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DiffuMaskError, match="impl 'triton' runs on CUDA, not on cpu: use 'torch'"):
        mean_field(*draw(1, 1, 2, 4, 4), window=3, impl="triton")
