"""kernels/guided_filter.py against brute force in float64 and against the shipped fp32 reference."""

import sys

import numpy as np
import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import reference
from diffumask_fast.kernels.guided_filter import GuidedFilter, guided_filter

SHAPES = [  # B, K, H, W, radius
    (1, 1, 7, 5, 2),
    (2, 3, 9, 14, 1),
    (1, 2, 6, 6, 20),
    (3, 1, 13, 4, 5),
    (1, 1, 1, 9, 3),
]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]


def draw(size_b, size_k, height, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    guide = torch.rand(size_b, 3, height, width, generator=rng)
    return guide, torch.rand(size_b, size_k, height, width, generator=rng)


def brute_force(guide, maps, radius, eps):
    """Solve the ridge regression of every window on its own, then average the windows that cover a pixel."""
    guide, maps = guide.double().numpy(), maps.double().numpy()
    size_b, size_k, height, width = maps.shape
    out = np.zeros(maps.shape)
    for b, k in np.ndindex(size_b, size_k):
        line = np.zeros((4, height, width))
        for y, x in np.ndindex(height, width):
            window = np.s_[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            pixels = guide[(b, slice(None), *window)].reshape(3, -1)
            values = maps[(b, k, *window)].reshape(-1)
            centred = pixels - pixels.mean(1, keepdims=True)
            sigma = centred @ centred.T / values.size + eps * np.eye(3)
            line[:3, y, x] = np.linalg.solve(sigma, centred @ (values - values.mean()) / values.size)
            line[3, y, x] = values.mean() - line[:3, y, x] @ pixels.mean(1)
        for y, x in np.ndindex(height, width):
            window = np.s_[:, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            mean = line[window].reshape(4, -1).mean(1)
            out[b, k, y, x] = mean[:3] @ guide[b, :, y, x] + mean[3]
    return torch.from_numpy(out)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("function", [guided_filter, reference.guided_filter], ids=["fast", "reference"])
def test_matches_brute_force(function, shape):
    *size, radius = shape
    guide, maps = draw(*size)
    truth = brute_force(guide, maps, radius, 1e-3)
    assert (function(guide, maps, radius, 1e-3) - truth).abs().max() < 2e-5
    assert (maps - truth).abs().max() > 1e-2  # the input itself would not pass


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_stays_accurate_where_the_guide_is_grey(eps):
    # three equal channels leave a covariance of rank one: eps alone carries the other two directions
    guide, maps = draw(1, 2, 24, 17)
    guide = guide[:, :1].expand(-1, 3, -1, -1)
    truth = brute_force(guide, maps, 4, eps)
    assert (guided_filter(guide, maps, 4, eps) - truth).abs().max() < 1e-4


def test_flat_guide_is_a_box_filter_twice():
    maps = draw(1, 1, 12, 12)[1]
    out = guided_filter(torch.full((1, 3, 12, 12), 0.3), maps, 2, 1e-3)
    weight = torch.nn.functional.avg_pool2d(maps, 5, 1, 2, count_include_pad=False)
    weight = torch.nn.functional.avg_pool2d(weight, 5, 1, 2, count_include_pad=False)
    assert torch.allclose(out, weight, atol=1e-5)


def test_keeps_constant_maps_and_edges_of_the_guide():
    guide = torch.zeros(1, 3, 32, 32)
    guide[..., 13:] = 1
    blurred = torch.nn.functional.avg_pool2d(guide[:, :1], (1, 9), 1, (0, 4), count_include_pad=False)
    out = guided_filter(guide, torch.cat([blurred, torch.full_like(blurred, 0.7)], 1), 4, 1e-4)
    assert (out[0, 0, :, 13] - out[0, 0, :, 12]).min() > 2 * (blurred[0, 0, :, 13] - blurred[0, 0, :, 12]).max()
    assert torch.allclose(out[0, 1], torch.full((32, 32), 0.7), atol=1e-5)


def test_batch_does_not_change_an_image():
    guide, maps = draw(5, 2, 20, 15)
    alone = torch.cat([guided_filter(guide[i : i + 1], maps[i : i + 1], 3, 1e-3) for i in range(5)])
    assert torch.equal(guided_filter(guide, maps, 3, 1e-3), alone)


def test_takes_strided_and_half_precision_input():
    guide, maps = draw(2, 2, 11, 8)
    strided = guided_filter(guide.to(memory_format=torch.channels_last), maps.mT.contiguous().mT, 2, 1e-3)
    assert torch.allclose(strided, guided_filter(guide, maps, 2, 1e-3), atol=1e-6)
    half = guided_filter(guide.half(), maps.half(), 2, 1e-3)
    assert half.dtype == torch.float32
    assert torch.equal(half, guided_filter(guide.half().float(), maps.half().float(), 2, 1e-3))


@pytest.mark.parametrize(
    "guide, maps, radius, eps, word",
    [
        (torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), 1, 1e-3, "guide"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 5), 1, 1e-3, "fit"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4), 0, 1e-3, "radius"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4), 2.5, 1e-3, "whole radius"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4), float("inf"), 1e-3, "whole radius"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4), 1, 0.0, "eps"),
        (torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4), 1, float("nan"), "eps"),
    ],
)
def test_refuses_what_does_not_fit(guide, maps, radius, eps, word):
    with pytest.raises(DiffuMaskError, match=word):
        guided_filter(guide, maps, radius, eps)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("shape", [(0, 2, 9, 7), (1, 0, 9, 7), (1, 2, 0, 7)], ids=str)
def test_nothing_gives_nothing(shape, impl):
    found = guided_filter(torch.rand(shape[0], 3, *shape[2:]), torch.rand(shape).half(), 2, 1e-3, impl=impl)
    assert found.shape == shape and found.dtype == torch.float32


def test_maps_that_share_a_guide_are_filtered_as_each_alone(monkeypatch):
    module = sys.modules["diffumask_fast.kernels.guided_filter"]
    guide, maps = torch.rand(2, 3, 20, 17), torch.rand(3, 2, 2, 20, 17)
    alone = [guided_filter(guide, one, 4, 1e-3) for one in maps]
    taken, statistics = [], module._statistics
    monkeypatch.setattr(module, "_statistics", lambda *given: taken.append(1) or statistics(*given))
    shared = GuidedFilter(guide, 4, 1e-3)
    assert all(torch.equal(shared(one), other) for one, other in zip(maps, alone, strict=True))
    assert len(taken) == 1
    with pytest.raises(DiffuMaskError, match="do not fit the guide"):
        shared(maps[0, :1])
