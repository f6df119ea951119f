"""learning/augmenter.py: what is drawn depends on seed, epoch and the example's number, and on nothing else."""

import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augmentations import gaussian_blur, occlude, perspective, splice
from diffumask_fast.learning.augmenter import (
    Augmenter,
    draw_box,
    draw_corners,
    draw_grid,
    draw_length,
    draw_other,
    draw_parts,
    draw_seed,
)
from diffumask_fast.learning.data import Example
from diffumask_fast.learning.options import AugmentationOptions

ALWAYS = AugmentationOptions(splice="2x2=1/2,1x2=1/2", blur=1, occlude=1, perspective=1)
SHAPES = ((16, 24), (16, 24), (40, 9), (24, 16), (16, 24))


class Pictures:
    """Random pictures of some sizes, each a function of its number."""

    classes = {0: "background", 3: "bird", 12: "dog"}

    def __init__(self, shapes=SHAPES):
        self.shapes, self.names = shapes, [f"picture-{number}" for number in range(len(shapes))]

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        shape = self.shapes[index]
        labels = rng.choice(np.array([0, 3, 12, 255], np.uint8), shape)
        return Example(self.names[index], rng.integers(0, 256, (*shape, 3), dtype=np.uint8), labels)


def only(**shares):
    return AugmentationOptions(**({"splice": "none", "blur": 0, "occlude": 0, "perspective": 0} | shares))


def equal(one, other):
    return (
        one.name == other.name and np.array_equal(one.image, other.image) and np.array_equal(one.labels, other.labels)
    )


@pytest.mark.parametrize("options", [AugmentationOptions(), ALWAYS])
def test_an_example_is_the_same_in_every_batch(options):
    augmenter = Augmenter(Pictures(), options, seed=3)
    alone = [augmenter.examples([index], epoch=2)[0] for index in range(5)]
    for indices in ([4, 0, 2, 1, 3], [1, 1, 0], [3, -1]):
        together = augmenter.examples(indices, epoch=2)
        assert all(equal(made, alone[index]) for made, index in zip(together, indices, strict=True))
    again = Augmenter(Pictures(), options, seed=3).examples(range(5), epoch=2)
    assert all(map(equal, again, alone))
    assert augmenter.examples([]) == []


def test_seed_epoch_and_number_each_draw_anew():
    data = Pictures([(16, 24)] * 5)
    first = Augmenter(data, ALWAYS, seed=0).examples([0])[0]
    others = [
        Augmenter(data, ALWAYS, seed=1).examples([0])[0],
        Augmenter(data, ALWAYS, seed=0).examples([0], epoch=1)[0],
        Augmenter(data, ALWAYS, seed=0).examples([1])[0],
    ]
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_nothing_is_drawn_where_all_shares_are_zero():
    data = Pictures()
    made = Augmenter(data, only()).examples(range(5))
    assert all(equal(one, data[index]) for index, one in enumerate(made))


def test_blur_leaves_labels_as_they_are():
    data = Pictures()
    made = Augmenter(data, only(blur=1)).examples(range(5))
    for index, one in enumerate(made):
        assert one.labels.tobytes() == data[index].labels.tobytes()
        blurred = gaussian_blur(torch.from_numpy(data[index].image)[None], [3])[
            0
        ]  # such small ones have no other length
        assert np.array_equal(one.image, blurred.numpy())


def test_a_splice_holds_the_example_and_others():
    data = Pictures([(16, 24)] * 5)
    found = set()
    for epoch in range(12):
        (made,) = Augmenter(data, only(splice="2x2=1", splice_size="full")).examples([2], epoch)
        quarters = [made.labels[y : y + 16, x : x + 24] for y in (0, 16) for x in (0, 24)]
        parts = [next(n for n in range(5) if np.array_equal(data[n].labels, quarter)) for quarter in quarters]
        assert 2 in parts and made.name == "picture-2"
        assert np.array_equal(made.image, splice([(data[n].image, data[n].labels) for n in parts], (2, 2), "full")[0])
        found.add(tuple(parts))
    assert len({parts.index(2) for parts in found}) > 1  # its place is drawn
    assert len(found) > 6 and {part for parts in found for part in parts} == set(range(5))


def test_an_occlusion_is_a_patch_of_another_example():
    data = Pictures([(16, 24)] * 4)
    for index in range(4):
        (made,) = Augmenter(data, only(occlude=1, occlude_area="0.2-0.4")).examples([index])
        changed = (made.image != data[index].image).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.15 < box[2] * box[3] / changed.size < 0.45
        own = data[index].image, data[index].labels
        candidates = [occlude(own, (data[n].image, data[n].labels), box) for n in range(4) if n != index]
        assert any(
            np.array_equal(made.image, image) and np.array_equal(made.labels, labels) for image, labels in candidates
        )


def test_perspective_alone_is_that_of_its_corners():
    data = Pictures([(16, 24)])
    (made,) = Augmenter(data, only(perspective=1, perspective_shift=0.1), seed=5).examples([0], epoch=7)
    rng = Random(draw_seed(5, 7, 0, "perspective"))
    rng.random()  # whether at all
    corners = torch.tensor([draw_corners(rng, 0.1)], dtype=torch.float64)
    image, labels = (torch.from_numpy(part)[None] for part in (data[0].image, data[0].labels))
    expected = perspective(image, labels, corners)
    assert np.array_equal(made.image, expected[0][0].numpy())
    assert np.array_equal(made.labels, expected[1][0].numpy())


def test_one_image_alone():
    data = Pictures([(16, 24)])
    (made,) = Augmenter(data, only(splice="2x2=1", splice_size="full")).examples([0])
    assert np.array_equal(made.labels, np.tile(data[0].labels, (2, 2)))  # a splice repeats it
    with pytest.raises(DiffuMaskError, match="there is one alone: add images, or do without occlusion"):
        Augmenter(data)


@pytest.mark.parametrize("shares", [{"blur": 1.5}, {"occlude": 2}, {"perspective": 7}, {"splice": "2x2=0.7,3x3=0.5"}])
def test_probabilities_are_at_most_one(shares):
    with pytest.raises(DiffuMaskError, match=f"`{next(iter(shares))}` comes to .*: in training it is a probability"):
        Augmenter(Pictures(), only(**shares))


def test_shares_are_how_often_something_is_done():
    data, options = Pictures([(4, 4)] * 2000), only(blur=0.3)
    made = Augmenter(data, options).examples(range(2000))
    assert sum(not np.array_equal(one.image, data[index].image) for index, one in enumerate(made)) == pytest.approx(
        600, abs=4 * math.sqrt(2000 * 0.3 * 0.7)
    )


def test_what_is_drawn_is_in_its_range():
    rng = Random(0)
    assert {draw_other(rng, index, 3) == index for index in range(3) for _ in range(50)} == {False}
    assert {draw_other(rng, 1, 3) for _ in range(50)} == {0, 2}
    assert set(draw_parts(rng, 200, 3)) == {0, 1, 2}
    assert {draw_length(rng, (512, 700), (6, 22)) for _ in range(300)} == set(range(7, 22, 2))
    for _ in range(200):
        top, left, height, width = draw_box(rng, (50, 80), (0.1, 0.5))
        assert 0.09 < height * width / 4000 < 0.51 and 0 <= top <= 50 - height and 0 <= left <= 80 - width
        for (x, y), (u, v) in zip(draw_corners(rng, 0.2), ((0, 0), (1, 0), (1, 1), (0, 1)), strict=True):
            assert abs(x - u) <= 0.2 and abs(y - v) <= 0.2
    assert draw_box(rng, (2, 3), (0, 0))[2:] == (1, 1) and draw_box(rng, (5, 7), (1, 1)) == (0, 0, 5, 7)
    grids = [draw_grid(rng, {(1, 2): Fraction(1, 40), (2, 2): Fraction(3, 40)}) for _ in range(4000)]
    assert set(grids) == {(1, 2), (2, 2)} and grids.count((1, 2)) == pytest.approx(1000, abs=4 * math.sqrt(750))


def test_seeds_are_the_same_on_every_machine():
    assert draw_seed(0, 2, 17, "blur") == 8676816981216981
