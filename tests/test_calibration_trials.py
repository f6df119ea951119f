"""learning/calibration_trials.py: masks by options, compared with the right ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_calibration_search import BAD, GOOD, samples

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.learning.calibration_trials import CALIBRATED, Choice, Trials
from diffumask_fast.learning.metrics import binary_iou, boundary
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions

EVERY = tuple(range(10))
CHOICE = Choice(GOOD, MaskOptions())


def trials(change=lambda labels: labels) -> Trials:
    made, labels = samples(10)
    return Trials(made, [change(mask) for mask in labels], torch.device("cpu"))


def test_figures_are_counted_by_hand():
    made, labels = samples(10)
    maps = torch.from_numpy(np.stack([one.maps[GOOD] for one in made]))
    images = torch.from_numpy(np.stack([one.image for one in made]))
    masks = make_masks(maps, images, MaskOptions(), torch.tensor([one.class_ids for one in made]))[0].numpy()
    figures = trials().figures(CHOICE, EVERY)
    assert figures.shape == (10, 3)
    for row, mask, right in zip(figures, masks, labels, strict=True):
        iou, edge = binary_iou(mask > 0, right > 0), binary_iou(boundary(mask > 0), boundary(right > 0))
        assert row == pytest.approx([iou, iou, edge])
    assert trials().scores(CHOICE, (3,)) == pytest.approx(figures[3].mean())


def test_what_nobody_knows_does_not_count():
    def unknown(mask):
        return np.where(np.arange(32)[:, None] < 16, 255, mask).astype(np.uint8)

    assert not np.allclose(trials(unknown).figures(CHOICE, EVERY), trials().figures(CHOICE, EVERY))
    nothing = trials(lambda mask: np.full_like(mask, 255))
    assert nothing.figures(CHOICE, EVERY) == pytest.approx(1)


def test_a_class_that_is_another_one_is_wrong_for_its_own_figure_alone():
    figures = trials(lambda mask: mask // 12 * 7).figures(CHOICE, EVERY)
    assert figures[:, 0] == pytest.approx(0) and figures[:, 1].mean() > 0.6


def test_a_band_that_is_left_out_is_judged():
    wide = Choice(GOOD, replace(CHOICE.mask, ignore_band=3))
    assert np.array_equal(trials().figures(wide, EVERY), trials().figures(CHOICE, EVERY))


def test_a_trial_is_made_once():
    tried = trials()
    assert tried.figures(CHOICE, EVERY) is tried.figures(CHOICE, EVERY) and tried.count == 1


def test_images_of_several_sizes_and_numbers_of_classes_go_together():
    made, labels = samples(3)
    small = replace(made[1], image=made[1].image[:16], maps={GOOD: made[1].maps[GOOD], BAD: made[1].maps[BAD]})
    two = replace(made[2], class_ids=(12, 7), maps={key: np.concatenate([v, v * 0]) for key, v in made[2].maps.items()})
    tried = Trials([made[0], small, two], [labels[0], labels[1][:16], labels[2]], torch.device("cpu"))
    assert tried.figures(CHOICE, (0, 1, 2)).shape == (3, 3)
    assert tried.figures(CHOICE, (2,))[0, 0] > tried.figures(CHOICE, (2,))[0, 1] / 2  # what is nowhere is right so


def test_equal_maps_are_tried_once():
    made, labels = samples(3)
    same = MapOptions("paper", 1)
    made = [replace(one, maps={**one.maps, same: one.maps[GOOD]}) for one in made]
    assert Trials(made, labels, torch.device("cpu")).maps == [BAD, GOOD]


def test_a_choice_names_what_is_calibrated():
    assert tuple(CHOICE.options) == CALIBRATED
    changed = CHOICE.having(propagate=2, threshold="adaptive")
    assert changed.maps == MapOptions("finest", 2) and changed.mask == MaskOptions(threshold="adaptive")
    assert changed.is_slow and not CHOICE.is_slow and CHOICE.having(refine="crf").is_slow
