"""learning/calibration_judges.py: what the right masks are, in the ids of the images' own classes."""

import json
import shutil

import numpy as np
import pytest
import torch
from learning_samples import dataset, tiny_model
from test_calibration_search import samples

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.calibration_judges import DataJudge, SegmenterJudge, open_judge, seen
from diffumask_fast.learning.evaluation import ORACLE
from diffumask_fast.learning.options import CalibrateOptions
from diffumask_fast.learning.segmenters import load_pretrained, new_segmenter
from diffumask_fast.mini.oracle import load_oracle

CPU = torch.device("cpu")
NAMES = {0: "wall", 1: "dog ", 2: "sky", 3: "tree", 4: "car"}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A segmenter as others write it: transformers' files, the names of its labels, no background."""
    torch.manual_seed(3)
    folder = tiny_model("segformer", tmp_path_factory.mktemp("foreign") / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": NAMES, "label2id": {name: value for value, name in NAMES.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_oracle_judges_by_its_own_masks():
    made, _ = samples(2)
    judge = SegmenterJudge(ORACLE, CPU)
    judge.check(["dog", "car"])
    with pytest.raises(DiffuMaskError, match="mini-oracle does not know zebra: name other `classes`"):
        judge.check(["dog", "zebra"])
    masks = load_oracle().masks(np.stack([one.image for one in made]))
    for labels, mask in zip(judge.labels(made), masks, strict=True):
        assert np.array_equal(labels, np.where(mask == 12, 12, 0))  # VOC's dog; all else is background


def test_a_foreign_segmenter_judges_by_the_names_of_its_labels(foreign):
    segmenter = load_pretrained(foreign)
    assert segmenter.classes == {number + 1: name.strip() for number, name in NAMES.items()}
    made, _ = samples(2)
    judge = open_judge(CalibrateOptions("mini", str(foreign)), CPU)
    judge.check(["dog", "wall"])
    masks = segmenter.masks(np.stack([one.image for one in made]))
    for labels, mask in zip(judge.labels(made), masks, strict=True):
        assert np.array_equal(labels, np.where(mask == 2, 12, 0))


def test_a_segmenter_without_a_trained_head_is_refused(foreign, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(foreign, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "classifier" not in name}
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(DiffuMaskError, match="is no trained segmenter, for it lacks decode_head.classifier"):
        load_pretrained(copy)


def test_a_segmenter_of_ours_and_a_named_background(foreign, tmp_path):
    segmenter = new_segmenter(str(foreign), {0: "background", 5: "dog"}, 64)
    segmenter.save(tmp_path / "ours", {})
    judge = open_judge(CalibrateOptions("mini", str(tmp_path / "ours")), CPU)
    judge.check(["dog"])
    assert {value for labels in judge.labels(samples(2)[0]) for value in np.unique(labels)} <= {0, 12}
    assert load_pretrained(tmp_path / "ours").classes == {0: "background", 1: "dog"}


def test_masks_made_by_hand_are_found_by_key(tmp_path):
    made, _ = samples(2)
    folder = dataset(tmp_path / "data", num=4, classes="cat,dog", height=32, width=32)
    judge = open_judge(CalibrateOptions("mini", str(folder)), CPU)
    assert isinstance(judge, DataJudge) and set(judge.keys) == {f"{c}-00000{i}" for c in ("cat", "dog") for i in (0, 1)}
    judge.check(["dog", "bus"])
    with pytest.raises(DiffuMaskError, match="knows none of the run's classes"):
        judge.check(["bus"])
    labels = judge.labels(made)
    assert all({0, 12} <= set(np.unique(mask)) <= {0, 12, 255} for mask in labels)
    with pytest.raises(DiffuMaskError, match="is not 32x32 as its image"):
        small = dataset(tmp_path / "small", num=4, classes="cat,dog")
        open_judge(CalibrateOptions("mini", str(small)), CPU).labels(made)


def test_images_in_which_nothing_is_seen_are_known():
    made, labels = samples(3)
    labels[1] = np.zeros_like(labels[1])
    assert seen(made, labels) == [0, 2]


def test_what_is_no_judge_is_refused(tmp_path):
    with pytest.raises(DiffuMaskError, match="holds no data"):
        open_judge(CalibrateOptions("mini", str(tmp_path)), CPU)
    for change in ({"run": "x"}, {"split": "val"}, {"redraw": False}):
        with pytest.raises(DiffuMaskError, match="judges new images of the model"):
            open_judge(CalibrateOptions("mini", ORACLE, **change), CPU)
