"""convert/item.py: pictures as they are wanted, masks in the numbers of the format."""

import io
import json

import numpy as np
import pytest
from foreign import drawn
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffumask_fast.convert.item import encode_image, make_item, mask_png
from diffumask_fast.dataset.reader import Row
from diffumask_fast.dataset.schema import encode_png, make_row
from diffumask_fast.errors import DiffuMaskError

NUMBERS = {0: 0, 12: 1, 21: 2}
NAMES = {0: "background", 1: "dog", 2: "traffic light"}


def row(**changes):
    return Row({**make_row(drawn(3)), **changes})


def decoded(data):
    return np.array(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_png_and_webp_are_without_loss(image_format):
    item = make_item(row(), "train", 7, image_format, NUMBERS, NAMES)
    assert (
        decoded(item.image) == drawn(3).image
    ).all() and item.file_name == f"dog+traffic-light-000003.{image_format}"


def test_what_is_stored_so_already_is_copied():
    stored = make_row(drawn(3))["image"]["bytes"]
    assert make_item(row(), "train", 1, "png", NUMBERS, NAMES).image == stored
    stream = io.BytesIO()
    Image.fromarray(drawn(3).image).save(stream, "JPEG", quality=70)
    picture = {"bytes": stream.getvalue(), "path": "x.jpg"}
    assert make_item(row(image=picture), "train", 1, "jpg", NUMBERS, NAMES).image == stream.getvalue()


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_the_mark_of_what_made_the_image_is_kept(image_format):
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>trainedAlgorithmicMedia</x:xmpmeta>"
    stream = io.BytesIO()
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    Image.fromarray(drawn(3).image).save(stream, "PNG", pnginfo=info)
    picture = Image.open(io.BytesIO(stream.getvalue()))
    picture.load()
    for one in (picture, picture.resize((64, 64))):
        written = Image.open(io.BytesIO(encode_image(b"", one, image_format, "x")))
        assert (written.format, written.info["xmp"]) == ({"jpg": "JPEG", "webp": "WEBP"}[image_format], xmp)


@pytest.mark.parametrize(
    ("image_format", "size", "xmp"),
    [("jpg", (1, 65501), b""), ("webp", (16384, 1), b""), ("jpg", (1, 1), b"x" * 70000)],
)
def test_what_a_format_does_not_hold_is_one_sentence(image_format, size, xmp):
    picture = Image.new("RGB", size)
    picture.info["xmp"] = xmp
    with pytest.raises(DiffuMaskError, match=r"the image dog-000001 of \d+x\d+ pixels cannot be written as") as error:
        encode_image(b"", picture, image_format, "dog-000001")
    assert "give another `image_format`" in str(error.value) and "\n" not in str(error.value)


def test_numbers_of_classes_and_ignored_pixels():
    item, mask = make_item(row(), "val", 7, "png", NUMBERS, NAMES), drawn(3).mask
    expected = np.select([mask == 12, mask == 21, mask == 255], [1, 2, 255], 0)
    assert (item.mask == expected).all() and item.present() == [1, 2] and (mask == 255).any()
    assert item.classes == {1: "dog", 2: "traffic light"} and item.facts["seed"] == 3


def test_facts_are_json():
    item = make_item(row(quality=[float("nan"), 0.1 + 0.2]), "val", 7, "png", NUMBERS, NAMES)
    assert json.loads(json.dumps(dict(item.facts), allow_nan=False))["quality"] == [None, 0.3]


def test_palette_and_grey():
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    coloured = Image.open(io.BytesIO(mask_png(mask, list(range(256)) * 3)))
    assert (coloured.mode, coloured.getpalette("RGB")[:6]) == ("P", [0, 1, 2, 3, 4, 5]) and (
        np.array(coloured) == mask
    ).all()
    assert Image.open(io.BytesIO(mask_png(mask))).mode == "L" and (decoded(mask_png(mask)) == mask).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"image": {"bytes": encode_png(np.zeros((5, 5, 3), np.uint8)), "path": ""}},
            "has 5x5 pixels and its mask 24x40",
        ),
        ({"image": {"bytes": b"GIF89a", "path": ""}}, "cannot be decoded"),
        ({"image": {"bytes": None, "path": ""}}, "cannot be decoded"),
        ({"image": {"bytes": encode_png(np.zeros((24, 40), np.uint8)), "path": ""}}, "has mode L: images have RGB"),
        ({"mask": {"bytes": encode_png(np.full((24, 40), 9, np.uint8)), "path": ""}}, "holds 9, which is no class"),
        ({"key": "../../etc/x"}, "is no safe file name"),
    ],
)
def test_rows_that_do_not_fit_are_refused(changes, sentence):
    fitting = {**make_row(drawn(0)), **changes}
    with pytest.raises(DiffuMaskError, match=sentence):
        make_item(Row(fitting), "train", 1, "png", NUMBERS, NAMES)


def test_a_picture_too_large_is_refused_before_it_is_decoded():
    bomb = encode_png(np.zeros((3000, 3000, 3), np.uint8))
    with pytest.raises(DiffuMaskError, match="3000x3000, more than 1000000 pixels"):
        make_item(
            Row({**make_row(drawn(0)), "image": {"bytes": bomb, "path": ""}}, None, 10**6),
            "train",
            1,
            "jpg",
            NUMBERS,
            NAMES,
        )
