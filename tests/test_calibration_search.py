"""learning/calibration_search.py: better options are found, and only those that are better beyond noise are taken."""

import numpy as np
import pytest
import torch

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.learning.calibration_samples import CalibrationSample
from diffumask_fast.learning.calibration_search import difference, halves, search
from diffumask_fast.learning.calibration_trials import Choice, Trials
from diffumask_fast.masks.make import quantise_maps
from diffumask_fast.masks.options import MaskOptions

GOOD, BAD = MapOptions("finest", "none"), MapOptions("2", "none")


def picture(seed: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Return a disc on colours that are much like its own, with noise, and where it is."""
    rng = np.random.default_rng(seed)
    x, y, radius = *rng.uniform(10, side - 10, 2), rng.uniform(5, 9)
    rows, columns = np.mgrid[:side, :side]
    inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    colours = np.where(inside[..., None], rng.uniform(60, 160, 3), rng.uniform(100, 200, 3))
    return (colours + rng.normal(0, 30, colours.shape)).clip(0, 255).astype(np.uint8), inside


def samples(num: int = 12) -> tuple[list[CalibrationSample], list[np.ndarray]]:
    """Return pictures whose good maps are the truth at 8x8, and whose bad ones are noise; and the right masks."""
    made, labels = [], []
    for seed in range(num):
        image, inside = picture(seed)
        coarse = torch.from_numpy(inside.reshape(8, 4, 8, 4).mean((1, 3)))[None, None]
        noise = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        maps = {BAD: quantise_maps(noise)[0].numpy(), GOOD: quantise_maps(coarse)[0].numpy()}
        made.append(CalibrationSample(f"dog-{seed:06d}", ("dog",), (12,), image, maps))
        labels.append(np.where(inside, 12, 0).astype(np.uint8))
    return made, labels


@pytest.fixture(scope="module")
def trials():
    return Trials(*samples(), torch.device("cpu"))


def test_spoiled_options_are_mended(trials):
    own = Choice(BAD, MaskOptions(threshold=0.9, ignore_band=2))
    choosing, confirming = halves([sample.classes for sample in trials.samples])
    counted = []
    best = search(trials, own, choosing, lambda: counted.append(1))
    assert best.maps == GOOD and best.mask.threshold != 0.9
    assert best.mask.ignore_band == 2  # what is no matter of agreement stays
    gain = difference(trials.scores(best, confirming), trials.scores(own, confirming))
    assert gain.mean > 0.4 and trials.scores(best, confirming).mean() > 0.7
    assert counted and len(counted) <= trials.count


def test_what_changes_nothing_beyond_noise_keeps_its_own_value(trials):
    choosing, _ = halves([sample.classes for sample in trials.samples])
    own = Choice(BAD, MaskOptions(threshold=0.9, ignore_band=2))
    best = search(trials, own, choosing)  # whose trials are all known
    for name, value in own.options.items():
        if best.options[name] != value:
            less = best.having(**{name: value})
            loss = difference(trials.scores(best, choosing), trials.scores(less, choosing))
            assert loss.mean > 0, name


def test_halves_share_the_classes():
    classes = [("dog",), ("cat",), ("car",)] * 5
    first, second = halves(classes)
    assert sorted((*first, *second)) == list(range(15)) and abs(len(first) - len(second)) == 1
    for name in set(classes):
        counts = [sum(classes[index] == name for index in half) for half in (first, second)]
        assert abs(counts[0] - counts[1]) == 1
    eighteen = [(str(number % 18),) for number in range(36)]  # in turn: each class is in each half
    assert all({eighteen[index] for index in half} == set(eighteen) for half in halves(eighteen))


def test_a_difference_is_of_pairs():
    gain = difference(np.array([0.5, 0.7, 0.9]), np.array([0.4, 0.6, 0.8]))
    assert gain.mean == pytest.approx(0.1) and gain.error == pytest.approx(0, abs=1e-12)
