"""learning/augmentations.py: pixels against other ways to compute them, labels exactly."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.augmentations import (
    _kernel,
    gaussian_blur,
    kernel_lengths,
    occlude,
    perspective,
    scaled,
    splice,
)

RNG = np.random.default_rng(0)


def picture(height, width):
    image = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, RNG.choice(np.array([0, 3, 12, 255], np.uint8), (height, width))


def batch(size, height, width):
    images, labels = zip(*(picture(height, width) for _ in range(size)), strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (3, 3), (5, 5), (8, 8)])
@pytest.mark.parametrize("size", ["same", "full"])
def test_splices_equal_tiles_pasted_by_hand(grid, size):
    rows, columns = grid
    parts = [picture(24, 40) for _ in range(rows * columns)]
    image, labels = splice(parts, grid, size)
    if size == "full":
        for axis, made in enumerate((image, labels)):
            lines = [
                np.concatenate([part[axis] for part in parts[row * columns : (row + 1) * columns]], axis=1)
                for row in range(rows)
            ]
            assert np.array_equal(made, np.concatenate(lines))
        return
    page, page_labels = Image.new("RGB", (40, 24)), Image.new("L", (40, 24))
    tops, lefts = (np.arange(n + 1) * side // n for n, side in ((rows, 24), (columns, 40)))
    for number, (pixels, classes) in enumerate(parts):
        top, bottom = tops[number // columns : number // columns + 2].tolist()
        left, right = lefts[number % columns : number % columns + 2].tolist()
        tile = right - left, bottom - top
        page.paste(Image.fromarray(pixels).resize(tile, Image.Resampling.BILINEAR), (left, top))
        page_labels.paste(Image.fromarray(classes).resize(tile, Image.Resampling.NEAREST), (left, top))
    assert np.array_equal(image, np.array(page)) and np.array_equal(labels, np.array(page_labels))


def test_labels_of_tiles_are_those_of_the_nearest_pixels():
    parts = [picture(21, 34) for _ in range(6)]
    _, labels = splice(parts, (2, 3))
    tops, lefts = (0, 10, 21), (0, 11, 22, 34)
    for y in range(21):
        for x in range(34):
            row, column = int(y >= 10), int(x >= 11) + int(x >= 22)
            height, width = tops[row + 1] - tops[row], lefts[column + 1] - lefts[column]
            there = int((y - tops[row] + 0.5) * 21 / height), int((x - lefts[column] + 0.5) * 34 / width)
            assert labels[y, x] == parts[row * 3 + column][1][there]


def test_parts_of_other_sizes_become_as_large_as_the_first():
    parts = [picture(16, 24), picture(40, 9), picture(1, 1), picture(16, 24)]
    image, labels = splice(parts, (2, 2), "full")
    assert image.shape == (32, 48, 3)
    assert np.array_equal(image[16:, 24:], parts[3][0]) and np.array_equal(labels[:16, :24], parts[0][1])
    assert np.array_equal(image[:16, 24:], np.array(Image.fromarray(parts[1][0]).resize((24, 16), 2)))
    assert (labels[16:, :24] == parts[2][1][0, 0]).all() and (image[16:, :24] == parts[2][0][0, 0]).all()


def test_splices_that_cannot_be_made():
    with pytest.raises(DiffuMaskError, match="splice 8x8 of 4x40 pixels cannot be made"):
        splice([picture(4, 40)] * 64, (8, 8))
    with pytest.raises(DiffuMaskError, match="the whole may have 1000"):
        splice([picture(16, 24)] * 4, (2, 2), "full", max_pixels=1000)


def test_occlusion_is_a_patch_with_its_labels_and_nothing_else():
    own, other = picture(20, 30), picture(40, 15)
    before = [part.copy() for part in (*own, *other)]
    image, labels = occlude(own, other, (5, 7, 6, 10))
    patch = np.zeros((20, 30), bool)
    patch[5:11, 7:17] = True
    there = scaled(other, (20, 30))
    assert np.array_equal(labels, np.where(patch, there[1], own[1]))
    assert np.array_equal(image, np.where(patch[..., None], there[0], own[0]))
    assert all(map(np.array_equal, before, (*own, *other)))


@pytest.mark.parametrize(
    "side, lengths", [(512, range(7, 22, 2)), (128, [3, 5]), (256, range(3, 12, 2)), (1024, range(13, 44, 2)), (4, [3])]
)
def test_lengths_are_odd_and_in_proportion(side, lengths):
    assert list(kernel_lengths((side, 2 * side), (6, 22))) == list(lengths)
    assert list(kernel_lengths((2 * side, side), (6, 22))) == list(lengths)


def exactly_blurred(image, length):
    """Return the blurred image in fp64, from the definition."""
    sigma, half = 0.3 * ((length - 1) * 0.5 - 1) + 0.8, length // 2
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(image.astype(np.float64), ((half, half), (half, half), (0, 0)), "edge")
    for axis in (0, 1):
        padded = np.apply_along_axis(lambda line: np.convolve(line, weights, "valid"), axis, padded)
    return padded


@pytest.mark.parametrize("shape", [(33, 47), (1, 1), (2, 50), (64, 64)])
def test_blur_is_the_gaussian_to_six_tenths_of_a_level(shape):
    images, _ = batch(4, *shape)
    images[3] = torch.randint(0, 2, images[3].shape) * 255
    lengths = [3, 7, 21, 13]
    made = gaussian_blur(images, lengths).numpy()
    for image, length, blurred in zip(images.numpy(), lengths, made, strict=True):
        assert np.abs(blurred - exactly_blurred(image, length)).max() < 0.6


@pytest.mark.parametrize("length", [3, 21, 127])
def test_weights_sum_to_one_exactly(length):
    weights = _kernel(length, 131)
    half = length // 2
    assert weights.sum() == 2**16 and torch.equal(weights, weights.flip(0))  # else the sums could overflow
    assert weights[65 - half] > 0 and not weights[: 65 - half].any()


def test_blur_leaves_one_colour_and_its_input_as_they_are():
    images = torch.full((2, 9, 12, 3), 255, dtype=torch.uint8)
    images[1] = 1
    before = images.clone()
    assert torch.equal(gaussian_blur(images, [3, 127]), before) and torch.equal(images, before)


def homography(corners, height, width):
    """Return the matrix from the result's points to the picture's, by eight equations."""
    here = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
    there = np.array(corners) * (width, height)
    rows, values = [], []
    for (x, y), (u, v) in zip(here, there, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(rows, values), 1).reshape(3, 3)


CORNERS = [
    [(0.1, -0.05), (0.95, 0.1), (1.1, 1.02), (-0.13, 0.9)],
    [(-0.2, -0.2), (1.2, -0.2), (1.2, 1.2), (-0.2, 1.2)],
    [(0.24, 0.24), (0.8, 0.2), (1.24, 1.24), (0.2, 0.8)],
]


@pytest.mark.parametrize("shape", [(31, 45), (64, 64), (5, 90)])
def test_perspective_equals_the_map_of_each_pixel(shape):
    height, width = shape
    images, labels = batch(3, height, width)
    made_images, made_labels = perspective(images, labels, torch.tensor(CORNERS, dtype=torch.float64))
    for number, corners in enumerate(CORNERS):
        matrix, image = homography(corners, height, width), images[number].numpy().astype(float)
        for i in range(height):
            for j in range(width):
                x, y, depth = matrix @ (j + 0.5, i + 0.5, 1)
                x, y = x / depth, y / depth
                if not (0 <= x < width and 0 <= y < height):
                    assert made_labels[number, i, j] == 255 and not made_images[number, i, j].any()
                    continue
                assert made_labels[number, i, j] == labels[number, int(y), int(x)]
                columns, rows = np.clip([x - 0.5, x + 0.5], 0, width - 1), np.clip([y - 0.5, y + 0.5], 0, height - 1)
                right, low = (x - 0.5) % 1, (y - 0.5) % 1
                (left, beside), (top, below) = np.floor(columns).astype(int), np.floor(rows).astype(int)
                expected = (1 - low) * ((1 - right) * image[top, left] + right * image[top, beside])
                expected += low * ((1 - right) * image[below, left] + right * image[below, beside])
                assert np.abs(made_images[number, i, j].numpy() - expected).max() < 0.5 + 1e-6


def test_perspective_of_the_own_corners_changes_nothing():
    images, labels = batch(2, 37, 53)
    corners = torch.tensor([[(0, 0), (1, 0), (1, 1), (0, 1)]] * 2, dtype=torch.float64)
    made = perspective(images, labels, corners)
    assert torch.equal(made[0], images) and torch.equal(made[1], labels)


def test_perspective_by_half_a_picture_is_a_shift():
    images, labels = batch(1, 8, 10)
    corners = torch.tensor([[(0.5, 0), (1.5, 0), (1.5, 1), (0.5, 1)]], dtype=torch.float64)
    made = perspective(images, labels, corners)
    assert torch.equal(made[0][:, :, :5], images[:, :, 5:]) and torch.equal(made[1][:, :, :5], labels[:, :, 5:])
    assert not made[0][:, :, 5:].any() and (made[1][:, :, 5:] == 255).all()
