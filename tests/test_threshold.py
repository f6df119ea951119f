"""masks/threshold.py against Otsu's criterion written as a search."""

import pytest
import torch

from diffumask_fast.masks.threshold import otsu


def between_class_variance(values, threshold):
    low, high = values[values < threshold], values[values >= threshold]
    if not len(low) or not len(high):
        return 0.0
    share = len(low) / len(values)
    return float(share * (1 - share) * (low.mean() - high.mean()) ** 2)


def bimodal(rng, shape, share):
    high = torch.rand(shape, generator=rng) < share
    return torch.where(high, 0.8, 0.2) + 0.1 * torch.randn(shape, generator=rng)


@pytest.mark.parametrize("shape", [(1, 1, 9, 7), (3, 2, 16, 16), (1, 4, 1, 40)], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_no_edge_of_the_histogram_splits_better(shape, share):
    rng = torch.Generator().manual_seed(5)
    maps = bimodal(rng, shape, share).clamp(0, 1)
    found = otsu(maps)
    for b in range(shape[0]):
        for k in range(shape[1]):
            bins = (maps[b, k].flatten() * 256).long().clamp(max=255).double()
            best = max(between_class_variance(bins, edge) for edge in range(1, 256))
            here = between_class_variance(bins, found[b, k].item() * 256)
            assert here == pytest.approx(best, rel=1e-9) and best > 0
            assert between_class_variance(bins, 64) < best  # a fixed guess, to see that the bound bites


def test_takes_the_middle_of_equal_thresholds():
    maps = torch.tensor([0.1, 0.1, 0.9, 0.9]).view(1, 1, 2, 2)
    assert otsu(maps).item() == 0.5


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_a_flat_map_has_nothing_above(value):
    assert otsu(torch.full((2, 3, 5, 5), value)).tolist() == [[1.0] * 3] * 2


def test_survives_values_out_of_range():
    maps = torch.tensor([float("nan"), -3, 0.1, 0.9, 7, float("inf")]).view(1, 1, 2, 3)
    assert 0.1 < otsu(maps).item() < 0.9


def test_batch_does_not_change_a_map():
    maps = bimodal(torch.Generator().manual_seed(1), (6, 2, 12, 12), 0.3).clamp(0, 1)
    assert torch.equal(otsu(maps), torch.cat([otsu(maps[i : i + 1]) for i in range(6)]))
