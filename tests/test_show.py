"""show.py: what notebooks show is self-contained, and texts in it stay texts."""

import io
import re
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
from PIL import Image
from samples import draw, requests

from diffumask_fast.dataset.reader import Row
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.show import caption_of, colour, overlay, sample_html, webp

SAMPLE = draw(requests(1)[0])


def pictures_in(html):
    """Return the pictures in HTML, after checking that it asks for nothing and runs nothing."""
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(html)
    assert {tag for tag, _ in tags} <= {"figure", "img", "figcaption", "p"}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert all(attributes["alt"] for tag, attributes in tags if tag == "img")
    return [Image.open(io.BytesIO(b64decode(source.partition(",")[2]))) for source in sources]


def test_overlay_keeps_the_background():
    image, mask = SAMPLE.image, SAMPLE.mask
    mixed = overlay(image, mask)
    assert np.array_equal(mixed[mask == 0], image[mask == 0])
    wanted = (image[mask == 12].astype(float) + (64, 0, 128)) / 2
    assert np.abs(mixed[mask == 12] - wanted).max() <= 0.5


def test_colours_are_those_of_voc():
    assert colour(np.array([[0, 1, 255]], np.uint8)).tolist() == [[[0, 0, 0], [128, 0, 0], [224, 224, 192]]]
    assert colour(np.array([[1]], np.uint8), [0, 0, 0, 9, 8, 7, *[0] * 762]).tolist() == [[[9, 8, 7]]]


def test_large_pictures_are_made_smaller():
    assert Image.open(io.BytesIO(webp(np.zeros((300, 600, 3), np.uint8), 200))).size == (200, 100)


def test_image_overlay_and_mask_stand_side_by_side():
    image = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 1
    (picture,) = pictures_in(sample_html(image, mask, "a"))
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape == (32, 3 * 32 + 2 * 4, 3)
    places = {
        5: (200, 200, 200),
        27: (200, 200, 200),
        36 + 5: (200, 200, 200),
        36 + 27: (164, 100, 100),
        72 + 27: (128, 0, 0),
    }
    for x, wanted in places.items():
        assert np.abs(pixels[16, x] - wanted).max() < 30, x
    assert pictures_in(sample_html(image[:9], mask, "a"))[0].size == (32, 32)


def test_texts_stay_texts():
    nasty = '<script>alert(1)</script>" onload="x'
    html = sample_html(SAMPLE.image, SAMPLE.mask, nasty)
    pictures_in(html)
    assert "<script" not in html and html.count("&lt;script&gt;") == 2


def test_captions():
    assert (
        caption_of("k", "a dog", ["dog", "car"], [0.25], "too small") == "k; a dog; dog 0.25, car; rejected: too small"
    )
    assert caption_of("k", "", [], []) == "k"


def test_rows_show_themselves_where_their_pictures_were_read():
    values = make_row(SAMPLE)
    html = Row(values)._repr_html_()
    assert len(pictures_in(html)) == 1 and "dog-000000; a photo of a dog" in re.sub("<[^>]*>", "", html)
    assert Row({"key": "a", "mask": values["mask"]})._repr_html_() is None
    assert pictures_in(Row({"image": values["image"], "mask": values["mask"], "key": "b"})._repr_html_())
