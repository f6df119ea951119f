"""dataset/reader.py, and the `datasets` library as the consumer."""

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
from samples import draw, requests

from diffumask_fast.dataset import reader, writer
from diffumask_fast.dataset.reader import read_manifest, read_rows, shard_paths
from diffumask_fast.dataset.run import open_run
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.dataset.writer import make_folder, write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import Vocabulary

DRAWN = [draw(request) for request in requests(9)]


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "data")
    for index in range(3):
        write_shard(tmp_path, index, [make_row(sample) for sample in DRAWN[3 * index : 3 * index + 3]])
    return tmp_path


def test_rows_come_in_order_and_rejected_ones_on_demand(folder):
    assert 0 < sum(sample.accepted for sample in DRAWN) < 9
    accepted = [sample.request.key for sample in DRAWN if sample.accepted]
    assert [row.key for row in read_rows(folder)] == accepted
    rows = list(read_rows(folder, accepted_only=False))
    for row, sample in zip(rows, DRAWN, strict=True):
        assert (row.key, row.accepted, row.reason) == (sample.request.key, sample.accepted, sample.reason)
        assert np.array_equal(row.image, sample.image) and np.array_equal(row.mask, sample.mask)
        assert np.array_equal(row.maps, sample.maps) and row.quality == pytest.approx(sample.quality)


def test_only_the_columns_asked_for(folder):
    row = next(read_rows(folder, columns=["key", "maps"]))
    assert row.maps.shape == (1, 3, 5)
    assert set(row.values) == {"key", "maps", "map_sizes", "accepted"}
    with pytest.raises(AttributeError, match="prompt"):
        row.prompt  # noqa: B018
    assert pickle.loads(pickle.dumps(row)).key == row.key


def test_maps_are_arrays_in_batches_of_any_size(folder, monkeypatch):
    for size in (1, 2, 64):
        monkeypatch.setattr(reader, "BATCH", size)
        rows = list(read_rows(folder, accepted_only=False))
        assert {(type(row.values["maps"]), row.values["maps"].dtype) for row in rows} == {(np.ndarray, np.dtype("u1"))}
        assert all(np.array_equal(row.maps, sample.maps) for row, sample in zip(rows, DRAWN, strict=True))
        assert all(row.maps.flags.writeable for row in rows)


def test_more_than_100000_shards_stay_in_order(folder):
    for index in (99_999, 100_000, 100_001):
        write_shard(folder, index, [make_row(DRAWN[0])])
    assert [int(path.stem.split("-")[1]) for path in shard_paths(folder)] == [0, 1, 2, 99_999, 100_000, 100_001]


def test_a_damaged_shard_is_named(folder):
    path = shard_paths(folder)[1]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DiffuMaskError, match="shard-00001.parquet cannot be read .*: run the command again that wrote"):
        list(read_rows(folder))


def test_a_newer_shard_is_refused(folder):
    path = shard_paths(folder)[0]
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"schema_version": "2"}), path)
    with pytest.raises(DiffuMaskError, match="schema version 2"):
        next(read_rows(folder))


def test_no_dataset(tmp_path):
    with pytest.raises(DiffuMaskError, match="holds no data"):
        next(read_rows(tmp_path / "nothing"))
    with pytest.raises(DiffuMaskError, match="is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"schema_version": 99}'])
def test_foreign_manifests(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DiffuMaskError, match="use another folder"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "extra", [{"synonyms": [3]}, {"synonyms": 3}, {"colour": 3}, {"colour": [1, 2, 256]}, {"colour": [1, 2], "id": 3}]
)
def test_classes_that_are_none(tmp_path, extra):
    with open_run(tmp_path, plan(Vocabulary.parse("dog"), 1), {}, {}, vocabulary=Vocabulary.parse("dog")):
        pass
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    manifest["classes"][0] |= extra
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DiffuMaskError, match="use another folder"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_load_dataset_opens_the_folder_as_it_is(folder, tmp_path_factory, shards):
    datasets = pytest.importorskip("datasets")
    for path in shard_paths(folder)[shards:]:
        path.unlink()
    (folder / "dataset.json").write_text(json.dumps({"options": {}}))
    (folder / "preview.png").write_bytes(make_row(DRAWN[0])["image"]["bytes"])
    cache = str(tmp_path_factory.mktemp("cache"))
    loaded = datasets.load_dataset(str(folder), cache_dir=cache, split="train")
    named = datasets.load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), cache_dir=cache)["train"]
    for data in (loaded, named):
        assert data["key"][:] == [sample.request.key for sample in DRAWN[: 3 * shards]]
        row, sample = data[2], DRAWN[2]
        assert (row["image"].mode, row["mask"].mode) == ("RGB", "L")
        assert np.array_equal(np.asarray(row["image"]), sample.image)
        assert np.array_equal(np.asarray(row["mask"]), sample.mask)
        assert np.array_equal(np.asarray(row["maps"], np.uint8), sample.maps.ravel())
        assert row["map_sizes"] == [[3, 5]] and row["class_ids"] == list(sample.request.class_ids)


def test_load_dataset_streams_shards_of_many_row_groups(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(writer, "GROUP_BYTES", 1)
    monkeypatch.setattr(writer, "INDEXED_BYTES", 0)
    make_folder(tmp_path / "out" / "data")
    write_shard(tmp_path / "out", 0, [make_row(sample) for sample in DRAWN])
    with pq.ParquetFile(shard_paths(tmp_path / "out")[0]) as file:
        assert file.num_row_groups == 9
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True, cache_dir=cache)
    assert [row["key"] for row in rows] == [sample.request.key for sample in DRAWN]
    assert np.array_equal(np.asarray(next(iter(rows))["image"]), DRAWN[0].image)
    assert [row.key for row in read_rows(tmp_path / "out", accepted_only=False)] == [row["key"] for row in rows]
