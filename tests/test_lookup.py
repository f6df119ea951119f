"""dataset/lookup.py: rows by number are the rows that reading in order gives."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from samples import draw, requests

from diffumask_fast.dataset.lookup import RowLookup, class_names
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.run import open_run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.vocabulary import Vocabulary


def dataset(folder, vocabulary=None, plan=None):
    with open_run(folder, plan or requests(7), {}, {}, 3, vocabulary=vocabulary) as run:
        for index in run.missing_shards():
            run.write(index, [draw(request) for request in run.requests_of(index)])
    return folder


def same(one, other):
    return one.values.keys() == other.values.keys() and all(
        np.array_equal(one.values[name], other.values[name]) for name in one.values
    )


@pytest.mark.parametrize("accepted_only", [True, False])
@pytest.mark.parametrize("kept_bytes", [1, 2**30])
def test_rows_in_any_order_are_those_of_the_shards(tmp_path, accepted_only, kept_bytes):
    in_order = list(read_rows(dataset(tmp_path / "a"), accepted_only=accepted_only))
    rows = RowLookup(tmp_path / "a", accepted_only=accepted_only, kept_bytes=kept_bytes)
    assert len(rows) == len(in_order) and [entry.key for entry in rows.entries] == [row.key for row in in_order]
    for index in (len(rows) - 1, 0, 2, -1, 1, 0):
        row, truth = rows[index], in_order[index]
        assert same(row, truth)
        assert np.array_equal(row.image, truth.image) and np.array_equal(row.maps, truth.maps)
    assert [row.key for row in rows[1:3]] == [row.key for row in in_order[1:3]]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_no_more_bytes_stay_than_asked_for(tmp_path):
    rows = RowLookup(dataset(tmp_path / "a"), accepted_only=False)
    first = rows._group(rows.entries[0].path, 0)
    few = RowLookup(tmp_path / "a", accepted_only=False, kept_bytes=int(2.2 * first.nbytes))
    for index in (0, 3, 0, 6):
        few[index]
    kept = [path.name for path, _ in few._groups]
    assert kept == ["shard-00000.parquet", "shard-00002.parquet"]  # the one that was asked for longest ago went
    (tmp_path / "a" / "data" / "shard-00000.parquet").unlink()
    assert few[1].key == rows.entries[1].key  # from memory


def test_threads_share_it(tmp_path):
    rows = RowLookup(dataset(tmp_path / "a"), accepted_only=False, kept_bytes=1)
    numbers = list(np.random.default_rng(0).integers(0, 7, 60))
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda number: rows[number].key, numbers))
    assert keys == [rows.entries[number].key for number in numbers]


def test_a_dataset_that_is_not_finished(tmp_path):
    (dataset(tmp_path / "a") / "data" / "shard-00001.parquet").unlink()
    with pytest.raises(DiffuMaskError, match="shard-00001.parquet is missing"):
        RowLookup(tmp_path / "a")
    with pytest.raises(DiffuMaskError, match="dataset.json is missing"):
        RowLookup(tmp_path / "nothing")


def test_classes_are_those_of_the_manifest_and_of_the_rows(tmp_path):
    rows = RowLookup(dataset(tmp_path / "a"))
    assert class_names(rows) == {0: "background", 7: "car", 12: "dog"}
    named = RowLookup(dataset(tmp_path / "b", Vocabulary.parse("dog,car,cat")))
    assert list(class_names(named).items()) == [(0, "background"), (7, "car"), (8, "cat"), (12, "dog")]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"classes": ("cow",)}, "id 12 stands for cow and for dog"),
        ({"class_ids": (33,)}, "dog has the ids 33 and 12"),
    ],
)
def test_a_class_with_two_ids_and_an_id_with_two_classes(tmp_path, changes, sentence):
    plan = list(requests(7))
    plan[0] = dataclasses.replace(plan[0], **changes)
    rows = RowLookup(dataset(tmp_path / "a", plan=plan), accepted_only=False)
    with pytest.raises(DiffuMaskError, match=sentence):
        class_names(rows)


def test_manifests_without_ids(tmp_path):
    dataset(tmp_path / "a", Vocabulary.parse("dog,car"))
    path = tmp_path / "a" / "dataset.json"
    rows = RowLookup(tmp_path / "a", accepted_only=False)
    for entry in rows.manifest["classes"]:
        del entry["id"]
    assert class_names(rows) == {0: "background", 7: "car", 12: "dog"}
    assert json.loads(path.read_text())["classes"][0]["id"] == 12
