"""report/twins.py: copies of an image are found, and different images are not."""

import io

import numpy as np
import pytest
from PIL import Image

from diffumask_fast.mini.world import World, load_sprites
from diffumask_fast.report.twins import MOST_BITS, groups_of_twins, perceptual_hash


def copy_of(image, kind):
    picture, stream = Image.fromarray(image), io.BytesIO()
    if kind == "jpeg":
        picture.save(stream, "JPEG", quality=85)
        return np.asarray(Image.open(stream))
    return (
        np.asarray(picture.resize((100, 90), Image.Resampling.BICUBIC))
        if kind == "size"
        else (image * 0.9).astype(np.uint8)
    )


def hashes_of(images):
    return np.stack([np.frombuffer(perceptual_hash(image), np.uint8) for image in images])


@pytest.mark.parametrize("kind", ["jpeg", "size", "darker"])
def test_copies_are_found_and_other_scenes_are_not(kind):
    world = World(load_sprites())
    scenes = [world.scene(5, index).image for index in range(40)]
    copies = [copy_of(scenes[index], kind) for index in (3, 17, 17)]
    assert groups_of_twins(hashes_of([*scenes, *copies])) == [[17, 41, 42], [3, 40]]


def differing(bits, start=0):
    hash_ = np.zeros(16, np.uint8)
    for bit in range(start, start + bits):
        hash_[bit // 8] ^= 1 << (bit % 8)
    return hash_


def test_as_many_bits_as_are_allowed_and_one_more():
    one, most, more = differing(0), differing(MOST_BITS), differing(MOST_BITS + 1, start=64)
    assert groups_of_twins(np.stack([one, most, more])) == [[0, 1]]


def test_seven_bits_in_seven_bands_are_found():
    other = np.zeros(16, np.uint8)
    other[:14:2] = 1
    assert groups_of_twins(np.stack([np.zeros(16, np.uint8), other])) == [[0, 1]]


def test_many_in_one_bucket_are_compared_in_blocks():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (2500, 16), dtype=np.uint8)
    hashes[:, :2] = 7
    hashes[2400], hashes[1200] = hashes[10] ^ differing(2, 40), hashes[1100]
    assert groups_of_twins(hashes) == [[10, 2400], [1100, 1200]]


def test_none_one_and_all_equal():
    assert groups_of_twins(np.zeros((0, 16), np.uint8)) == [] == groups_of_twins(np.zeros((1, 16), np.uint8))
    assert groups_of_twins(np.zeros((3, 16), np.uint8)) == [[0, 1, 2]]


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (1024, 8)])
def test_any_size_has_a_hash(size):
    assert len(perceptual_hash(np.zeros((*size, 3), np.uint8))) == 16
