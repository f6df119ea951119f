"""report/entries.py: what a page holds of a row is small, and is the row."""

import dataclasses
import io
import json
from base64 import b64decode

import numpy as np
from PIL import Image
from samples import draw, requests

from diffumask_fast.dataset.reader import Row, shard_paths
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.dataset.writer import make_folder, write_shard
from diffumask_fast.prompts.vocabulary import voc_palette
from diffumask_fast.report.entries import MOST_TEXT, entry_of, rows_at, within
from diffumask_fast.show import colour


def entry(height=24, width=40, **changes):
    row = Row(make_row(dataclasses.replace(draw(requests(1, classes_per_image=2)[0], height, width), **changes)))
    row.values["maps"] = np.asarray(row.values["maps"])
    return entry_of(row, voc_palette())


def picture(text):
    return Image.open(io.BytesIO(b64decode(text)))


def test_an_entry_is_its_row():
    sample = draw(requests(1, classes_per_image=2)[0])
    shown = entry()
    assert shown["key"] == sample.request.key and shown["seed"] == str(sample.request.seed)
    assert shown["prompt"] == sample.request.prompt and shown["classes"] == [12, 7] and shown["size"] == [40, 24]
    assert np.allclose(shown["quality"], sample.quality, atol=6e-4)
    mask = picture(shown["mask"])
    assert mask.mode == "P" and np.array_equal(np.asarray(mask.convert("RGB")), colour(sample.mask))
    assert np.array_equal(np.asarray(mask.convert("RGBA"))[..., 3] == 0, sample.mask == 0)
    assert [np.asarray(picture(one)).tolist() for one in shown["maps"]] == sample.maps.tolist()
    assert picture(shown["image"]).size == (40, 24) and json.loads(json.dumps(shown)) == shown


def test_what_is_not_there_is_left_out():
    shown = entry(maps=None, quality=[float("nan")] * 2, accepted=True, reason="")
    assert not {"maps", "quality", "reason", "negative", "made", "sources", "damaged"} & shown.keys()


def test_a_mask_without_objects_and_one_without_background():
    for value, alpha in ((0, 0), (12, 255), (255, 255)):
        shown = entry(mask=np.full((24, 40), value, np.uint8))
        assert np.all(np.asarray(picture(shown["mask"]).convert("RGBA"))[..., 3] == alpha)


def test_large_pictures_become_small_and_keep_their_shape():
    shown = entry(600, 900)
    assert picture(shown["image"]).size == (256, 171) == picture(shown["mask"]).size and shown["size"] == [900, 600]


def test_a_damaged_row_says_so():
    values = make_row(draw(requests(1)[0]))
    values["image"]["bytes"] = b"no picture"
    shown = entry_of(Row(values), voc_palette())
    assert "cannot be decoded" in shown["damaged"] and "image" not in shown and shown["key"] == "dog-000000"


def test_long_texts_are_cut():
    sample = draw(requests(1)[0])
    request = dataclasses.replace(sample.request, prompt="x" * 5000)
    shown = entry_of(Row(make_row(dataclasses.replace(sample, request=request))), voc_palette())
    assert len(shown["prompt"]) == MOST_TEXT and shown["prompt"].endswith("x…")


def test_entries_beyond_the_room_are_left_out_the_last_first():
    entries = {number: {"key": "x" * 80} for number in range(5)}
    assert list(within(entries, [4, 2, 4, 0, 1, 3], most=300)) == [4, 2, 0]
    assert list(within(entries, [4, 9], most=1000)) == [4]


def test_rows_by_their_number(tmp_path):
    make_folder(tmp_path / "data")
    made = [make_row(draw(request)) for request in requests(9)]
    for shard in range(3):
        write_shard(tmp_path, shard, made[3 * shard : 3 * shard + 3])
    (tmp_path / "data/shard-00001.parquet").write_bytes(b"damaged")
    paths = [path for path in shard_paths(tmp_path) if path.stem != "shard-00001"]
    assert [(number, row.key) for number, row in rows_at(paths, {0, 4, 5}, 10**6)] == [
        (0, made[0]["key"]), (4, made[7]["key"]), (5, made[8]["key"]),
    ]  # fmt: skip
