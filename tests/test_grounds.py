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
