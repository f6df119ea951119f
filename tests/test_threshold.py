"""masks/threshold.py against the same criteria written as a search."""

from fractions import Fraction

import pytest
import torch
from test_make import ONE, RIGHT, picture

from diffumask_fast.masks.crf import PRESETS, crf
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.threshold import CANDIDATES, adaptive, otsu


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


def best_split(levels):
    """Return the largest between-class variance of integers, times their number squared, over all splits."""
    found = Fraction(0)
    for level in set(levels):
        found = max(found, variance([value for value in levels if value < level], levels))
    return found


def variance(low, levels):
    high = len(levels) - len(low)
    if not low or not high:
        return Fraction(0)
    gap = Fraction(sum(low), len(low)) - Fraction(sum(levels) - sum(low), high)
    return gap * gap * len(low) * high


@pytest.mark.parametrize("steps", [255, 256])
@pytest.mark.parametrize("span", [2, 3, 7, 40, 254])
def test_pixels_above_are_the_upper_group_for_values_that_lie_on_edges(steps, span):
    rng = torch.Generator().manual_seed(steps + span)
    for _ in range(20):
        low = int(torch.randint(0, 255 - span, (), generator=rng))
        levels = torch.randint(low, low + span, (5, 6), generator=rng)
        maps = (levels.float() / steps)[None, None]
        below = levels[maps[0, 0] <= otsu(maps).item()].tolist()
        best = best_split(levels.flatten().tolist())
        assert variance(below, levels.flatten().tolist()) == best, (levels, otsu(maps).item() * 256)


def test_of_two_equally_good_thresholds_the_first_is_taken():
    # both tails are split off equally well; half-way between them is the worst place
    levels = torch.tensor([13] * 10 + [127] * 50 + [128] * 50 + [242] * 10)
    found = otsu((levels / 256).view(1, 1, 10, 12)).item()
    assert 13 / 256 < found < 127 / 256


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


def soft(*shapes):
    maps = torch.stack(shapes)[None].float()
    return torch.nn.functional.avg_pool2d(maps, 31, 1, 15, count_include_pad=False)


def slow(maps, estimate, image):
    """One candidate after the other, as the reference program does."""
    best, chosen = -1.0, None
    for level in CANDIDATES:
        q = crf((maps >= level)[None, None], 2, image[None], PRESETS["threshold"], window=11)[0, 0, 1] > 0.5
        score = ((q & estimate).sum() / (q | estimate).sum().clamp(min=1)).item()
        if score > best:
            best, chosen = score, level
    return chosen


def test_one_pass_is_the_search_one_by_one():
    maps = torch.cat([soft(ONE, RIGHT), soft(RIGHT, ONE)])
    images = torch.stack([picture(ONE, RIGHT), torch.full((96, 96, 3), 120, dtype=torch.uint8)])
    estimate = maps > torch.tensor([[0.3, 0.5], [0.45, 0.55]])[..., None, None]
    found = adaptive(maps, estimate, images)
    wanted = [[slow(maps[b, k], estimate[b, k], images[b]) for k in range(2)] for b in range(2)]
    assert torch.allclose(found, torch.tensor(wanted))
    assert len(found.unique()) > 1


def test_the_first_of_equals_is_taken_and_nothing_gives_the_first():
    image = picture(ONE)[None]
    hard = ONE[None, None].float()
    assert adaptive(hard, hard > 0.5, image).item() == pytest.approx(CANDIDATES[0])
    assert adaptive(0 * hard, hard > 2, image).item() == pytest.approx(CANDIDATES[0])


def test_it_is_an_option():
    maps = torch.nn.functional.adaptive_avg_pool2d(ONE[None, None].float(), 12)
    mask = make_masks(maps, picture(ONE)[None], MaskOptions(threshold="adaptive"), torch.tensor([[5]]))[0]
    assert ((mask[0] == 5) & ONE).sum() / ((mask[0] == 5) | ONE).sum() > 0.95
