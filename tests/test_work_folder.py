"""learning/work_folder.py: what stands in the way is said before anything is trained."""

import json

import pytest
from learning_samples import dataset

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.options import PruneOptions
from diffumask_fast.learning.work_folder import BEGUN, begin, work_folder


def folder_of(out):
    return work_folder(out, "work", "nets", "name a folder")


def test_other_options_are_named_once_something_is_trained(tmp_path):
    folder = folder_of(tmp_path / "out")
    assert folder == tmp_path / "out" / "work" and not folder.exists()
    begin(folder, PruneOptions(folds=2))
    begin(folder, PruneOptions(folds=3))  # the first could not even start, as without enough images for the folds
    assert json.loads((folder / BEGUN).read_text())["folds"] == 3
    (folder / "net").mkdir()
    (folder / "net" / "checkpoint.safetensors").write_bytes(b"weights")
    begin(folder_of(tmp_path / "out"), PruneOptions(folds=3))
    with pytest.raises(DiffuMaskError, match="begun with other options: `alpha` was 0.7 and is 0.1 now; use another"):
        begin(folder, PruneOptions(0.1, folds=3))
    (folder / BEGUN).write_text("{")
    with pytest.raises(DiffuMaskError, match="options.json is damaged: remove .*work, and the work begins anew"):
        begin(folder, PruneOptions())


def test_what_is_not_ours_is_left(tmp_path):
    theirs = tmp_path / "out" / "work" / "seeds" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(DiffuMaskError, match="holds seeds, which was not made here: name another folder for `out`"):
        folder_of(tmp_path / "out")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "work").symlink_to(theirs.parent)
    with pytest.raises(DiffuMaskError, match="work is a link"):
        folder_of(tmp_path / "link")
    (tmp_path / "picture").mkdir()
    (tmp_path / "picture" / "preview.png").write_bytes(b"theirs")
    with pytest.raises(DiffuMaskError, match="preview.png is there and was not written by this program"):
        folder_of(tmp_path / "picture")
    with pytest.raises(DiffuMaskError, match="holds another dataset"):
        folder_of(dataset(tmp_path / "data"))
    assert theirs.read_text() == "mine"
