"""convert/target.py: one folder, one conversion; nobody else's files are touched."""

import json

import pytest
from samples import contents

from diffumask_fast.convert.target import Target, folder, put_file, write_list, write_part
from diffumask_fast.errors import DiffuMaskError

RECORD = {"to": "voc", "val": 0.0, "source": "abc"}


def test_parts_are_what_is_done(tmp_path):
    with Target(tmp_path / "out", RECORD) as target:
        assert target.finished is None
        target.begin()
        write_part(target.path, 1, [{"split": "val", "n": 2}, {"split": "train", "n": 3}])
        assert (target.done(0), target.done(1)) == (False, True)
        write_part(target.path, 0, [{"split": "train", "n": 1}])
    with Target(tmp_path / "out", RECORD) as target:
        assert target.done(0) and [record["n"] for record in target.records(2, "train")] == [1, 3]
        target.finish({"train": 2, "val": 1})
    assert list(contents(tmp_path / "out")) == ["convert.json"]
    with Target(tmp_path / "out", RECORD) as target:
        assert target.finished == {"train": 2, "val": 1}


def test_half_written_files_are_removed(tmp_path):
    with Target(tmp_path, RECORD) as target:
        target.begin()
        put_file(folder(tmp_path, "images", "train") / "a.png", b"whole")
        (tmp_path / "images" / "train" / ".b.png.tmp").write_bytes(b"half")
    with Target(tmp_path, RECORD) as target:
        target.begin()
    assert set(contents(tmp_path)) == {"convert.json", "images/train/a.png"}


@pytest.mark.parametrize("name", ["photo.jpg", ".git", "data.yaml"])
def test_other_peoples_folders_stay_as_they_are(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(DiffuMaskError, match=f"holds {name} and no convert.json: name an empty folder"):
        Target(tmp_path, RECORD)
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("text", ["{half", "[]", "[" * 100_000, '"x"'])
def test_other_peoples_records_stay(tmp_path, text):
    (tmp_path / "convert.json").write_text(text)
    with pytest.raises(DiffuMaskError, match="none of this program's records"):
        Target(tmp_path, RECORD)
    assert (tmp_path / "convert.json").read_text() == text


def test_another_conversion_is_refused_by_what_differs(tmp_path):
    with Target(tmp_path, RECORD) as target:
        target.begin()
    before = contents(tmp_path)
    for change, words in (({"to": "coco"}, "`to` was voc and is coco now"), ({"source": "xyz"}, "the dataset was abc")):
        with pytest.raises(DiffuMaskError, match=words):
            Target(tmp_path, RECORD | change)
    assert contents(tmp_path) == before


def test_one_writer_at_a_time(tmp_path):
    with Target(tmp_path, RECORD), pytest.raises(DiffuMaskError, match="another run is writing"):
        Target(tmp_path, RECORD)
    with Target(tmp_path, RECORD):
        pass


def test_links_are_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiffuMaskError, match="images is a link"):
        folder(tmp_path / "out", "images", "train")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_long_lists_are_json(tmp_path):
    write_list(tmp_path / "x.json", {"a": ({"n": n} for n in range(3)), "b": iter(())}, {"c": [1], "d": "ü"})
    content = json.loads((tmp_path / "x.json").read_text())
    assert content == {"a": [{"n": 0}, {"n": 1}, {"n": 2}], "b": [], "c": [1], "d": "ü"}
