"""dataset/preview.py: the sheet shows what is in the rows."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from samples import draw, requests

from diffumask_fast.dataset.preview import write_preview
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.dataset.writer import make_folder, write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.show import colour, overlay

DRAWN = [draw(request) for request in requests(5)]


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "data")
    write_shard(tmp_path, 0, [make_row(sample) for sample in DRAWN])
    return tmp_path


def find(sheet, piece):
    """Return every (y, x) at which the sheet shows piece."""
    height, width = piece.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (height, width, 3))[:, :, 0]
    return np.argwhere((windows == piece).all((2, 3, 4))).tolist()


def test_shows_image_overlay_and_mask_side_by_side(folder):
    path = write_preview(folder, limit=4)
    assert path == folder / "preview.png"
    sheet = np.asarray(Image.open(path))
    places = []
    for sample in DRAWN[:4]:
        pictures = (sample.image, overlay(sample.image, sample.mask), colour(sample.mask))
        (found,) = zip(*(find(sheet, picture) for picture in pictures), strict=True)
        assert len({y for y, _ in found}) == 1
        assert [x - found[0][1] for _, x in found] == [0, 42, 84]
        places.append(found[0])
    assert places == sorted(places) and len({y for y, _ in places}) == 2  # three beside each other, then the next line
    assert find(sheet, DRAWN[4].image) == []


def test_is_the_same_twice_and_leaves_no_other_file(folder):
    first = write_preview(folder).read_bytes()
    assert write_preview(folder).read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == ["data", "preview.png"]


def test_large_pictures_are_made_smaller(tmp_path):
    make_folder(tmp_path / "data")
    write_shard(tmp_path, 0, [make_row(draw(requests(1)[0], 300, 200))])
    with Image.open(write_preview(tmp_path, side=150)) as sheet:
        assert 3 * 100 <= sheet.width < 3 * 100 + 40 and 150 <= sheet.height < 200


def test_rejected_rows_are_marked_and_any_key_is_drawn(tmp_path):
    make_folder(tmp_path / "data")
    samples = [dataclasses.replace(sample, accepted=True) for sample in DRAWN[:2]]
    samples[1] = dataclasses.replace(samples[1], accepted=False, reason="too small")
    samples[0].request = dataclasses.replace(samples[0].request, key="犬-000000")
    write_shard(tmp_path, 0, [make_row(sample) for sample in samples])
    pixels = np.asarray(Image.open(write_preview(tmp_path, columns=2))).astype(int)
    top = pixels[: find(pixels.astype(np.uint8), samples[0].image)[0][0]]
    red = (top[..., 0] > top[..., 1] + 60).any(0)
    assert red[red.size // 2 :].any() and not red[: red.size // 2].any()


def test_a_picture_that_does_not_decode_is_a_red_field(folder):
    rows = [make_row(sample) for sample in DRAWN]
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:100]
    rows[4]["mask"] = make_row(draw(requests(1)[0], 30, 40))["mask"]
    write_shard(folder, 0, rows)
    sheet = np.asarray(Image.open(write_preview(folder)))
    assert find(sheet, DRAWN[2].image) and find(sheet, np.full((160, 160, 3), (176, 0, 32), np.uint8))
    assert not find(sheet, colour(DRAWN[3].mask))


@pytest.mark.parametrize("number", [0, -1, 2.5])
def test_numbers_that_show_nothing(folder, number):
    for name in ("limit", "side", "columns"):
        with pytest.raises(DiffuMaskError, match=f"`{name}` must be a whole number"):
            write_preview(folder, **{name: number})


def test_nothing_to_show(tmp_path):
    with pytest.raises(DiffuMaskError, match="holds no data"):
        write_preview(tmp_path)
