"""learning/batches.py: what a step sees depends on data, seed and step alone, and labels lie where the pixels do."""

import numpy as np
import pytest
import torch

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augmenter import Augmenter
from diffumask_fast.learning.batches import GREY, Batches, crop
from diffumask_fast.learning.class_lists import channels
from diffumask_fast.learning.data import Example
from diffumask_fast.learning.options import AugmentationOptions

CLASSES = {0: "background", 3: "bird", 9: "chair"}


class Squares:
    """Images whose red tells the label: 0, 100 or 200, grey elsewhere."""

    def __init__(self, count=5, height=40, width=56, ignored=()):
        self.classes, self.ignored, self.size = CLASSES, ignored, (height, width)
        self.names = [f"square-{index}" for index in range(count)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        labels = np.zeros(self.size, np.uint8)
        labels[8:32, 4 + index : 28 + index] = 3 if index % 2 else 9
        if index in self.ignored:
            labels[:] = 255
        image = np.zeros((*self.size, 3), np.uint8)
        image[..., 0] = np.where(labels == 3, 100, np.where(labels == 9, 200, 0))
        return Example(self.names[index], image, labels)


def batches(data=None, seed=(0, 0), batch_size=2, size=(32, 32), **keywords):
    return Batches(data or Squares(), channels(CLASSES), batch_size, size, seed, **keywords)


def test_a_step_is_a_function_of_seed_and_step():
    first, again = batches(), batches()
    order = [3, 0, 2, 3]
    for step in order:
        assert all(torch.equal(*pair) for pair in zip(first[step], again[step], strict=True))
    assert not torch.equal(first[0][0], batches(seed=(1, 0))[0][0])
    assert not torch.equal(first[0][0], batches(seed=(0, 1))[0][0])
    images, labels = first[0]
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert labels.shape == (2, 32, 32) and set(labels.unique().tolist()) <= {0, 1, 2, 255}


def test_an_epoch_shows_each_example_once():
    class Looked(Squares):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    seen = []
    parts = batches(Looked())
    for step in range(5):  # two epochs of five in batches of two
        parts[step]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]


def test_augmented_examples_are_those_of_their_epoch():
    data = Squares()
    plain, spliced = batches(data), batches(data, augmenter=Augmenter(data, AugmentationOptions(splice="2x2=1")))
    first = spliced[0]
    assert not torch.equal(first[1], plain[0][1])
    assert all(torch.equal(*pair) for pair in zip(first, spliced[0], strict=True))


def test_labels_lie_where_their_pixels_do():
    for seed in range(20):
        image, labels = crop(Squares()[1], (48, 64), np.random.default_rng(seed))
        inner = torch.nn.functional.max_pool2d((labels != 3)[None].float(), 5, 1, 2)[0] == 0  # away from edges
        outer = torch.nn.functional.max_pool2d((labels != 0)[None].float(), 5, 1, 2)[0] == 0
        red = image[0]
        assert red[inner].min() > red[outer].max() + 20
        assert red[inner].std() < 1


def test_what_lies_beyond_the_image_is_grey_and_ignored():
    image, labels = crop(Squares()[0], (96, 96), np.random.default_rng(0))
    beyond = labels == 255
    assert 0.3 < beyond.float().mean() < 0.9
    assert image[1][beyond].std() < 1e-3 and abs(image[1][beyond].mean() - GREY) < 60


def test_one_example_of_which_nothing_is_known_is_passed_over_and_a_batch_of_them_refused():
    data = Squares(count=2, ignored=(0,))
    assert (batches(data)[0][1] == 255).flatten(1).all(1).sum() == 1
    with pytest.raises(DiffuMaskError, match="nothing can be learnt from square-0: every pixel .* is 255"):
        batches(Squares(count=1, ignored=(0,)), batch_size=1)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scaled_label_is_that_of_the_pixel_under_its_centre(axis, monkeypatch):
    """Where the red of an image rises by 4 a pixel, and labels count the pixels, red tells where a label lies."""
    monkeypatch.setattr("diffumask_fast.learning.batches.GAIN", 0)
    monkeypatch.setattr("diffumask_fast.learning.batches.OFFSET", 0)
    labels = np.broadcast_to(np.arange(60, dtype=np.uint8), (60, 60)).swapaxes(0, 1 - axis)
    image = np.zeros((60, 60, 3), np.uint8)
    image[..., 0] = 4 * labels
    for seed in range(12):
        pixels, places = crop(Example("ramp", image, labels), (32, 32), np.random.default_rng(seed))
        inner = (places > 1) & (places < 58)
        away = (pixels[0] / 4 - places)[inner]
        assert away.abs().max() < 0.55 and away.mean().abs() < 0.1


def test_crops_are_mirrored_scaled_and_coloured_by_chance():
    example, sizes, mirrored, reds = Squares()[1], [], [], []  # a square of 24 pixels, nearer to the left
    for seed in range(200):
        image, labels = crop(example, (96, 96), np.random.default_rng(seed))
        square = labels == 3
        columns, known = square.any(0).nonzero()[:, 0], (labels != 255).any(0).nonzero()[:, 0]
        sizes.append(len(columns))
        mirrored.append(bool(columns[0] - known[0] > known[-1] - columns[-1]))
        reds.append(image[0][square].mean().item())
    assert 18 <= min(sizes) < 20 and 32 < max(sizes) <= 34  # 0.75 to 1.4 times as large
    assert 70 < sum(mirrored) < 130
    assert 95 < np.mean(reds) < 105 and 12 < np.std(reds) < 19  # 100 of 10 % and 12 levels
