"""convert/webdataset.py, read by webdataset and by Hugging Face's datasets."""

import io
import json
import tarfile

import datasets
import numpy as np
import webdataset
from foreign import converted, dataset, rows_by_name
from PIL import Image

NUMBER = np.arange(256, dtype=np.uint8)
NUMBER[[12, 21]] = 1, 2


def test_every_mask_by_webdataset(tmp_path):
    source = dataset(tmp_path / "a", 60)
    out, rows = converted(source, tmp_path / "b", "webdataset", val=0.2), rows_by_name(source)
    assert json.loads((out / "classes.json").read_text()) == ["background", "dog", "traffic light"]
    seen = []
    for split in ("train", "val"):
        tars = sorted(path.name for path in out.glob(f"{split}-*.tar"))
        assert tars == [f"{split}-{number:06d}.tar" for number in range(len(tars))]  # without gaps
        urls = f"{out}/{split}-{{000000..{len(tars) - 1:06d}}}.tar"
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pill"):
            row = rows[sample["__key__"]]
            assert (np.array(sample["mask.png"]) == NUMBER[row.mask]).all()
            facts = sample["json"]
            assert (facts["prompt"], facts["seed"], facts["classes"]) == (row.prompt, row.seed, row.classes)
            assert facts["class_numbers"] == [1, 2]
            seen.append(sample["__key__"])
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            assert (np.array(Image.open(io.BytesIO(sample["png"]))) == rows[sample["__key__"]].image).all()
    assert sorted(seen) == sorted(rows) and len(seen) == 59


def test_every_mask_by_datasets(tmp_path):
    source = dataset(tmp_path / "a")
    out, rows = converted(source, tmp_path / "b", "webdataset"), rows_by_name(source)
    files = sorted(map(str, out.glob("train-*.tar")))
    loaded = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert [sample["__key__"] for sample in loaded] == list(rows)
    for sample in loaded:
        row = rows[sample["__key__"]]
        assert (np.array(sample["mask.png"]) == NUMBER[row.mask]).all() and (np.array(sample["png"]) == row.image).all()


def test_every_sample_has_the_same_members_and_nothing_of_this_machine(tmp_path):
    out = converted(dataset(tmp_path / "a"), tmp_path / "b", "webdataset", image_format="jpg")
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert [member.name.partition(".")[2] for member in members] == ["jpg", "mask.png", "json"] * (
            len(members) // 3
        )
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
