"""masks/colour.py: maps move to where the colours part."""

import pytest
import torch
from test_make import LEFT, ONE, RIGHT, iou, picture

from diffumask_fast.kernels.guided_filter import guided_filter
from diffumask_fast.masks import colour
from diffumask_fast.masks.colour import sharpen_by_colour


def soft(shape):
    return torch.nn.functional.avg_pool2d(shape[None, None].float(), 25, 1, 12, count_include_pad=False)


def sharp(maps, image, threshold=0.5, steps=2):
    guide = image.permute(2, 0, 1)[None] / 255
    cut = torch.full(maps.shape[:2], threshold)
    return sharpen_by_colour(maps, cut, guide, steps=steps, radius=4, eps=1e-4)


@pytest.mark.parametrize("threshold", [0.35, 0.5, 0.65])
def test_a_wrong_threshold_is_mended_by_the_colours(threshold):
    maps = soft(ONE)
    out = sharp(maps, picture(ONE), threshold)
    assert out.min() >= 0 and out.max() <= 1
    assert iou(out[0, 0] > 0.5, ONE) > 0.97 > iou(maps[0, 0] > threshold, ONE)


def test_far_places_of_the_same_colour_do_not_join():
    image = picture(LEFT | RIGHT)
    out = sharp(soft(LEFT), image)
    assert iou(out[0, 0] > 0.5, LEFT) > 0.95 and not (out[0, 0] > 0.5)[RIGHT].any()


def test_an_image_of_one_colour_decides_nothing():
    maps = soft(ONE)
    out = sharp(maps, torch.full((96, 96, 3), 90, dtype=torch.uint8))
    assert iou(out[0, 0] > 0.5, maps[0, 0] > 0.5) > 0.95


def test_a_few_pixels_one_level_off_are_nothing_to_follow():
    maps, image = soft(ONE), torch.full((96, 96, 3), 90, dtype=torch.uint8)
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) < 0.02
    image += noise.to(torch.uint8)
    assert iou(sharp(maps, image)[0, 0] > 0.5, maps[0, 0] > 0.5) > 0.95


@pytest.mark.parametrize("dim", [1, 2])
def test_mirrored_images_have_mirrored_masks(dim):
    maps, image = soft(ONE), torch.full((96, 96, 3), 90, dtype=torch.uint8)
    image.narrow(dim - 1, 48, 48).fill_(140)
    mirrored = sharp(maps.flip(dim + 1), image.flip(dim - 1))
    assert torch.allclose(sharp(maps, image), mirrored.flip(dim + 1), atol=1e-4)


def test_texture_is_how_much_there_is_to_follow_within_twice_the_radius():
    guide = torch.full((1, 3, 24, 20), 0.2)
    guide[:, 2, :, 10:] = 0.7  # one channel changes, from column 9 to column 10
    texture = colour._texture(guide, 2)
    near = (torch.arange(20) - 9.5).abs() < 5
    assert (texture[..., ~near] == 0).all() and (texture[..., near] > 0.1).all() and texture.max() > 0.99
    assert torch.allclose(colour._texture(guide.mT, 2), texture.mT, atol=1e-6)


def test_empty_maps_stay_empty_and_batch_changes_nothing():
    maps = torch.cat([soft(ONE), torch.zeros(1, 1, 96, 96), soft(LEFT)], 1)
    out = sharp(maps, picture(ONE))
    assert out[0, 1].max() == 0
    assert torch.allclose(out[:, 2:], sharp(maps[:, 2:], picture(ONE)), atol=1e-5)


def test_the_last_two_runs_are_the_filter_alone(monkeypatch):
    maps, image = soft(ONE), picture(ONE)
    monkeypatch.setattr(colour, "FLAT", 1e-12)  # all of the image has texture
    whole = sharp(maps, image)
    monkeypatch.setattr(colour, "SMOOTHINGS", 0)
    inside = sharp(maps, image)
    assert not torch.allclose(whole, inside, atol=1e-2)
    guide = image.permute(2, 0, 1)[None] / 255
    for _ in range(2):
        inside = guided_filter(guide, ((inside - 0.5) * colour.STEEPEN).sigmoid(), 4, 1e-4).clamp(0, 1)
    assert torch.allclose(whole, inside, atol=1e-5)


def test_the_order_of_the_pixels_changes_no_bit():
    rng = torch.Generator().manual_seed(0)
    inside, index = torch.rand(2, 3, 5000, generator=rng), torch.randint(0, 40, (2, 1, 5000), generator=rng)
    pixels = index.new_zeros(2, 1, colour.BINS**3).scatter_add_(2, index, torch.ones_like(index))
    index, blur = index.expand(-1, 3, -1), torch.eye(colour.BINS)
    order = torch.randperm(5000, generator=rng)
    mixed = colour._log_ratio(inside[..., order], index[..., order], pixels, blur)
    found = colour._log_ratio(inside, index, pixels, blur)
    assert torch.equal(mixed, found[..., order])
    share = torch.zeros(2, 3, colour.BINS**3).scatter_add_(2, index, inside)
    truth = [(x / x.sum(2, keepdim=True) + colour.FLOOR).double() for x in (share, pixels - share)]
    assert torch.allclose(found.double(), (truth[0] / truth[1]).log().gather(2, index), atol=1e-5)
