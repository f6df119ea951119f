"""masks/adaptive.py: of several thresholds, the one whose mask agrees best with the estimate."""

import pytest
import torch
from test_make import ONE, RIGHT, picture

from diffumask_fast.masks.adaptive import CANDIDATES, adaptive
from diffumask_fast.masks.crf import PRESETS, crf
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions


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
