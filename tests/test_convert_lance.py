"""convert/lance.py, read back by pylance and by `datasets`."""

import io
import json

import numpy as np
import pytest
from foreign import converted, dataset, killed_lance, rows_by_name
from killed import kill_at
from PIL import Image

lance = pytest.importorskip("lance")

NUMBER = np.arange(256, dtype=np.uint8)
NUMBER[[12, 21]] = 1, 2


def decoded(data):
    return np.array(Image.open(io.BytesIO(data)))


def test_every_row_by_pylance(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows, seen = converted(source, tmp_path / "b", "lance", val=0.2), rows_by_name(source), []
    for split in ("train", "val"):
        data = lance.dataset(str(out / f"{split}.lance"))
        assert data.version == 1 and data.count_rows() > 0
        assert json.loads(data.schema.metadata[b"classes"]) == ["background", "dog", "traffic light"]
        for found in data.to_table().to_pylist():
            row = rows[found["key"]]
            mask = Image.open(io.BytesIO(found["mask"]))
            assert (decoded(found["image"]) == row.image).all()
            assert mask.mode == "L" and (np.array(mask) == NUMBER[row.mask]).all()
            assert (found["prompt"], found["seed"], found["quality"]) == (row.prompt, row.seed, [0.5, 0.25])
            assert (found["classes"], found["class_numbers"]) == (["dog", "traffic light"], [1, 2])
            seen.append(row.key)
    assert sorted(seen) == sorted(rows) and len(seen) == 59
    assert data.take([0], columns=["key"]).to_pylist()[0]["key"] in rows  # as trainers read: by number


def test_the_fragments_are_the_shards_and_no_file_is_left_over(tmp_path):
    out = converted(dataset(tmp_path / "a"), tmp_path / "b", "lance")
    data = lance.dataset(str(out / "train.lance"))
    assert [fragment.count_rows() for fragment in data.get_fragments()] == [4, 5, 2]
    assert sorted(path.name for path in (out / "train.lance" / "data").iterdir()) == [
        f"{number:06d}.lance" for number in range(3)
    ]


def test_killed_it_ends_with_the_same_rows_and_files(tmp_path):
    source = dataset(tmp_path / "a")
    whole = converted(source, tmp_path / "whole", "lance", val=0.3)
    for call in (2, 4):
        kill_at(call, killed_lance, source, tmp_path / "b")
    out = converted(source, tmp_path / "b", "lance", val=0.3)
    for split in ("train", "val"):
        tables = [lance.dataset(str(folder / f"{split}.lance")).to_table() for folder in (whole, out)]
        assert tables[0] == tables[1] and tables[0].num_rows in (8, 3)
        files = [sorted((folder / f"{split}.lance" / "data").iterdir()) for folder in (whole, out)]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_datasets_gives_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    source = dataset(tmp_path / "a")
    out, rows = converted(source, tmp_path / "b", "lance"), rows_by_name(source)
    found = datasets.load_dataset("lance", data_dir=str(out / "train.lance"), cache_dir=str(tmp_path / "c"))["train"]
    assert len(found) == 11
    for one in found:
        assert (np.array(one["image"]) == rows[one["key"]].image).all()
        assert (np.array(one["mask"]) == NUMBER[rows[one["key"]].mask]).all()
