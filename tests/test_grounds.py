"""mini.grounds.py: a picture for each place of the world."""

import numpy as np

from diffumask_fast.mini.grounds import BACKGROUNDS
from diffumask_fast.mini.world import SCENES


def test_all_backgrounds_are_pictures_of_their_own():
    means = {}
    for name, draw in BACKGROUNDS.items():
        canvas = draw(np.random.default_rng(0), 128)
        assert canvas.shape == (128, 128, 3) and canvas.dtype == np.uint8 and canvas.std() > 5, name
        means[name] = tuple(canvas.reshape(-1, 3).mean(0).round())
    assert set(BACKGROUNDS) == set(SCENES) and len(set(means.values())) == len(SCENES)


def test_a_background_depends_on_its_random_numbers_alone():
    for name, draw in BACKGROUNDS.items():
        first, again, other = (draw(np.random.default_rng(seed), 96) for seed in (1, 1, 2))
        assert np.array_equal(first, again) and not np.array_equal(first, other), name


def test_the_same_ground_is_of_many_kinds():
    """No colour of one place covers the same pixels in all of its pictures."""
    for name, draw in BACKGROUNDS.items():
        drawn = np.stack([draw(np.random.default_rng(seed), 64) for seed in range(24)]).astype(np.float32)
        assert drawn.std(0).mean() > 12, (name, drawn.std(0).mean())
