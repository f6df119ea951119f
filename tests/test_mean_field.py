"""kernels/mean_field.py against brute force in float64 and against the shipped fp32 reference."""

import math

import numpy as np
import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import reference
from diffumask_fast.kernels.mean_field import bilateral_norm, mean_field

SHAPES = [  # B, M, L, H, W, window, dilation
    (1, 1, 2, 7, 5, 3, 1),
    (2, 3, 2, 6, 9, 5, 2),
    (1, 2, 4, 8, 8, 3, 3),
    (2, 1, 3, 5, 4, 15, 1),
    (1, 1, 2, 1, 9, 3, 4),
    (1, 1, 2, 6, 6, 1, 1),
]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
WEIGHTS = {"bilateral": (2.0, 4.0, 60.0), "gaussian": (1.5, 1.2)}


def draw(size_b, size_m, labels, height, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, p = torch.randn(2, size_b, size_m, labels, height, width, generator=rng).softmax(3)
    return q, -p.log(), torch.randint(0, 256, (size_b, 3, height, width), generator=rng).float()


def brute_force(q, unary, guide, window, dilation, bilateral, gaussian):
    """Sum over all pairs of pixels, one by one."""
    q, unary, guide = q.double().numpy(), unary.double().numpy(), guide.double().numpy()
    height, width = q.shape[-2:]
    places = list(np.ndindex(height, width))
    energy = -unary
    for b in range(q.shape[0]):
        for (compat, sxy, *srgb), windowed in ((bilateral, True), (gaussian, False)):
            weight = np.zeros((len(places), len(places)))
            for (i, (y, x)), (j, (v, u)) in ((a, c) for a in enumerate(places) for c in enumerate(places)):
                dy, dx = v - y, u - x
                reach = window // 2 * dilation
                if windowed and (dy % dilation or dx % dilation or max(abs(dy), abs(dx)) > reach):
                    continue
                power = (dy * dy + dx * dx) / (2 * sxy**2)
                if srgb:
                    power += ((guide[b, :, y, x] - guide[b, :, v, u]) ** 2).sum() / (2 * srgb[0] ** 2)
                weight[i, j] = math.exp(-power)
            norm = weight.sum(1) ** -0.5
            weight = norm[:, None] * weight * norm
            energy[b] += compat * np.einsum("mln,pn->mlp", q[b].reshape(*q.shape[1:3], -1), weight).reshape(q[b].shape)
    return torch.from_numpy(energy).softmax(2)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("function", [mean_field, reference.mean_field], ids=["fast", "reference"])
def test_matches_brute_force(function, shape):
    *size, window, dilation = shape
    q, unary, guide = draw(*size)
    truth = brute_force(q, unary, guide, window, dilation, **WEIGHTS)
    out = function(q, unary, guide, window=window, dilation=dilation, **WEIGHTS)
    assert (out - truth).abs().max() < 1e-5
    assert ((-unary).softmax(2) - truth).abs().max() > 1e-2  # the unary alone would not pass


def test_a_given_norm_changes_nothing():
    q, unary, guide = draw(2, 2, 2, 12, 9)
    settings = {"window": 5, "dilation": 2, "bilateral": WEIGHTS["bilateral"]}
    norm = bilateral_norm(guide, **settings)
    assert norm.shape == (2, 1, 12, 9) and (norm <= 1).all()
    assert torch.equal(mean_field(q, unary, guide, **settings, norm=norm), mean_field(q, unary, guide, **settings))


def test_steps_pull_a_soft_boundary_to_the_edge_of_the_image():
    guide = torch.zeros(1, 3, 24, 24)
    guide[..., 13:] = 200
    soft = torch.linspace(0.05, 0.95, 24).expand(24, 24)
    p = torch.stack([1 - soft, soft])[None, None]
    q = p
    for _ in range(5):
        q = mean_field(q, -p.log(), guide, window=9, bilateral=(10.0, 8.0, 13.0))
    assert torch.equal(q[0, 0, 1] > 0.5, guide[0, 0] > 0)
    assert not torch.equal(soft > 0.5, guide[0, 0] > 0)


def test_candidates_and_batch_change_nothing():
    q, unary, guide = draw(3, 4, 2, 10, 11)
    together = mean_field(q, unary, guide, window=5, **WEIGHTS)
    for b, m in np.ndindex(3, 4):
        one = np.s_[b : b + 1, m : m + 1]
        alone = mean_field(q[one], unary[one], guide[b : b + 1], window=5, **WEIGHTS)
        assert torch.allclose(together[one], alone, atol=1e-6)


def test_input_is_left_as_it_was_and_may_be_half():
    q, unary, guide = draw(1, 2, 2, 8, 8)
    kept = q.clone(), unary.clone(), guide.clone()
    out = mean_field(q, unary, guide, window=3)
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, unary, guide), strict=True))
    half = mean_field(q.half(), unary.half(), guide.half(), window=3)
    assert half.dtype == torch.float32 and (half - out).abs().max() < 1e-2
    strided = mean_field(q.mT.contiguous().mT, unary, guide.to(memory_format=torch.channels_last), window=3)
    assert torch.allclose(strided, out, atol=1e-6)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"q": torch.rand(1, 2, 4, 4)}, "q and unary"),
        ({"guide": torch.rand(1, 3, 4, 5)}, "guide"),
        ({"window": 4}, "odd"),
        ({"dilation": 0}, "dilation"),
        ({"bilateral": (1.0, 0.0, 1.0)}, "widths"),
        ({"bilateral": (1.0, 2.0)}, "two widths"),
        ({"gaussian": (1.0, 0.0)}, "a width above 0"),
        ({"norm": torch.ones(1, 4, 4)}, "norm"),
        ({"norm": torch.ones(1, 1, 1, 1)}, "norm"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_refuses_what_does_not_fit(change, word):
    given = {"q": torch.rand(1, 1, 2, 4, 4), "unary": torch.rand(1, 1, 2, 4, 4), "guide": torch.rand(1, 3, 4, 4)}
    given |= {"window": 3, **change}
    with pytest.raises(DiffuMaskError, match=word):
        mean_field(given.pop("q"), given.pop("unary"), given.pop("guide"), **given)


def test_the_norm_refuses_what_the_step_does():
    guide = torch.rand(1, 3, 4, 4)
    for change, word in (({"window": 4}, "odd"), ({"bilateral": (1.0, 0.0, 1.0)}, "widths")):
        with pytest.raises(DiffuMaskError, match=word):
            bilateral_norm(guide, **{"window": 3, **change})
    with pytest.raises(DiffuMaskError, match="guide"):
        bilateral_norm(guide[:, :1], window=3)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 1, 2, 4, 4), (1, 0, 2, 4, 4), (1, 2, 0, 4, 4), (1, 1, 2, 0, 4)], ids=str)
def test_nothing_gives_nothing(shape, impl):
    q = torch.rand(shape).half()
    found = mean_field(q, q, torch.rand(shape[0], 3, *shape[3:]), window=3, impl=impl)
    assert found.shape == shape and found.dtype == torch.float32
