"""dataset/schema.py: what goes into a row comes out of it."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from samples import draw, requests

from diffumask_fast.dataset.schema import AUGMENTED_SCHEMA, SCHEMA, decode_maps, decode_png, encode_png, make_row
from diffumask_fast.errors import DiffuMaskError

COLUMNS = "key image mask classes class_ids prompt negative_prompt seed quality maps map_sizes accepted reason"


def sample(**changes):
    return dataclasses.replace(draw(requests(1, classes_per_image=2)[0]), **changes)


def test_columns():
    assert SCHEMA.names == COLUMNS.split()
    assert SCHEMA.field("maps").type == pa.list_(pa.uint8()) and SCHEMA.field("seed").type == pa.int64()
    assert SCHEMA.metadata[b"schema_version"] == b"1"
    assert SCHEMA.field("image").type == SCHEMA.field("mask").type
    assert [field.name for field in SCHEMA.field("image").type] == ["bytes", "path"]


def test_augmented_rows_have_two_columns_more():
    assert AUGMENTED_SCHEMA.names == [*SCHEMA.names, "augmentation", "sources"]
    assert AUGMENTED_SCHEMA.metadata.keys() == SCHEMA.metadata.keys()
    assert b'"sources": {"feature": {"dtype": "string"' in AUGMENTED_SCHEMA.metadata[b"huggingface"]


def test_row_holds_the_sample():
    drawn = sample(accepted=False, reason="too small")
    row = make_row(drawn)
    (back,) = pa.Table.from_pylist([row], SCHEMA).to_pylist()
    assert np.array_equal(decode_png(back["image"]), drawn.image)
    assert np.array_equal(decode_png(back["mask"]), drawn.mask)
    assert np.array_equal(decode_maps(back), drawn.maps) and back["map_sizes"] == [[3, 5], [3, 5]]
    assert back["quality"] == pytest.approx(drawn.quality)
    assert back["key"] == "dog+car-000000" and back["classes"] == ["dog", "car"] and back["class_ids"] == [12, 7]
    assert (back["prompt"], back["seed"]) == (drawn.request.prompt, drawn.request.seed)
    assert (back["accepted"], back["reason"]) == (False, "too small")
    assert back["image"]["path"] != back["mask"]["path"]


def test_masks_are_grey_pngs(tmp_path):
    row = make_row(sample())
    (tmp_path / "mask.png").write_bytes(row["mask"]["bytes"])
    with Image.open(tmp_path / "mask.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (40, 24))


def test_pictures_that_are_views_and_huge_seeds():
    image = np.arange(24 * 40 * 3, dtype=np.uint32).reshape(24, 40, 3).astype(np.uint8)[:, ::-1]
    assert np.array_equal(decode_png({"bytes": encode_png(image)}), image)
    request = dataclasses.replace(requests(1)[0], seed=2**63 - 1)
    table = pa.Table.from_pylist([make_row(draw(request))], SCHEMA)
    assert table["seed"][0].as_py() == 2**63 - 1


def test_rows_without_maps():
    row = make_row(sample(maps=None))
    assert decode_maps(pa.Table.from_pylist([row], SCHEMA).to_pylist()[0]) is None


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"image": np.zeros((24, 40, 3), np.float32)}, "image must be uint8"),
        ({"image": np.zeros((24, 40), np.uint8)}, "image must be"),
        ({"mask": np.zeros((40, 24), np.uint8)}, "mask must be"),
        ({"mask": np.zeros((24, 40), np.int64)}, "mask must be uint8"),
        ({"maps": np.zeros((2, 3, 5), np.float32)}, "maps must be uint8"),
        ({"maps": np.zeros((1, 3, 5), np.uint8)}, "maps must be"),
        ({"quality": [0.5]}, "1 numbers for 2 classes"),
    ],
)
def test_refuses(changes, word):
    with pytest.raises(DiffuMaskError, match=word):
        make_row(sample(**changes))
