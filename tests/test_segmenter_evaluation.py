"""learning/segmenter_evaluation.py: a segmenter's masks meet the data's by the names of the classes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from learning_samples import dataset, tiny_model
from PIL import Image
from typer.testing import CliRunner

from diffumask_fast.cli import app
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.data import open_data
from diffumask_fast.learning.evaluation import evaluate
from diffumask_fast.learning.options import EvaluateOptions
from diffumask_fast.learning.segmenters import TransformersSegmenter, load_segmenter, new_segmenter

CLASSES = {0: "background", 5: "dog", 9: "car", 20: "tree"}  # other ids than the data's, and one class more


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a segmenter that has learnt nothing, and data; VOC's ids are 12 for dog and 7 for car."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(3)
    new_segmenter(str(tiny_model("segformer", folder / "start")), CLASSES, 64).save(folder / "model", {})
    return folder / "model", dataset(folder / "data", num=9)


def options(model, data, **keywords):
    return EvaluateOptions(str(model), data, device="cpu", **keywords)


def test_figures_are_counted_by_hand(made):
    model, source = made
    segmenter, data = load_segmenter(model), open_data(source)
    own = {0: 0, 5: 12, 9: 7, 20: 99}
    right = np.stack([data[index].labels for index in range(len(data))])
    said = segmenter.masks(np.stack([data[index].image for index in range(len(data))]))
    said = np.vectorize(own.get)(said)
    known = right != 255
    figures = evaluate(options(model, source))
    for name, value in (("dog", 12), ("car", 7)):
        both, either = ((right == value) & (said == value), (right == value) | (said == value))
        assert figures["per_class_iou"][name] == pytest.approx((both & known).sum() / (either & known).sum())
    assert list(figures["per_class_iou"]) == ["car", "dog"]  # tree is in no data, and has no figure
    assert figures["pixel_accuracy"] == pytest.approx((right == said)[known].mean())
    assert figures["n"] == len(data) == 6  # rejected rows are left out
    merged = evaluate(options(model, source, merge="thing=dog,car,tree"))
    both, either = ((right > 0) & (said > 0), (right > 0) | (said > 0))
    assert merged["per_class_iou"] == {"thing": pytest.approx((both & known).sum() / (either & known).sum())}


def test_classes_that_the_segmenter_lacks(made, tmp_path):
    model, _ = made
    source = dataset(tmp_path / "data", classes="dog,bus")
    with pytest.raises(DiffuMaskError, match="does not know bus: say by `others`"):
        evaluate(options(model, source))
    ignored, background = (evaluate(options(model, source, others=word)) for word in ("ignored", "background"))
    assert list(ignored["per_class_iou"]) == list(background["per_class_iou"]) == ["dog"]
    assert ignored["ignored_share"] > background["ignored_share"] > 0
    with pytest.raises(DiffuMaskError, match="knows none of the classes"):
        evaluate(options(model, dataset(tmp_path / "none", classes="bus,cat"), others="ignored"))


def test_a_sheet_of_the_worst_and_a_table(made, tmp_path):
    model, source = made
    words = ["evaluate", str(model), str(source), "--device", "cpu", "--unseen", "car"]
    table = CliRunner().invoke(app, [*words, "--sheet", str(tmp_path / "worst.png")])
    assert table.exit_code == 0, table.output
    for word in ("miou_with_background", "harmonic_mean", "left out", "its pixels are predicted as", "dog"):
        assert word in table.stdout
    with Image.open(tmp_path / "worst.png") as picture:
        assert picture.size[0] > 3 * 4 * 40
    figures = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert figures["unseen_miou"] == figures["per_class_iou"]["car"]


def test_voc_layout_with_grey_and_cmyk_photographs(made, tmp_path):
    model, _ = made
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name, mode in (("a", "L"), ("b", "CMYK"), ("c", "RGB")):
        Image.new(mode, (50, 40)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        mask = np.zeros((40, 50), np.uint8)
        mask[5:30, 5:30] = 12
        Image.fromarray(mask).save(tmp_path / "SegmentationClass" / f"{name}.png")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\n")
    figures = evaluate(options(model, tmp_path, split="val", others="background"))
    assert figures["n"] == 3 and list(figures["per_class_iou"]) == ["car", "dog"]


def test_what_cannot_be_judged_is_one_sentence(made, tmp_path):
    model, source = made
    with pytest.raises(DiffuMaskError, match="`accepted` is for mini-oracle"):
        evaluate(options(model, source, accepted=True))
    with pytest.raises(DiffuMaskError, match="`merge` is for a segmenter that is judged"):
        evaluate(replace(options(model, source, merge="a=dog,car"), model="mini-oracle"))
    with pytest.raises(DiffuMaskError, match="is no segmenter: name mini-oracle"):
        evaluate(options(tmp_path, source))

    def unknown(sample):
        sample.mask[:], sample.accepted, sample.reason = 255, True, ""
        return sample

    with pytest.raises(DiffuMaskError, match="no pixel to judge"):
        evaluate(options(model, dataset(tmp_path / "unknown", change=unknown)))


def test_a_class_is_known_that_is_merged_with_one_that_is(made, tmp_path):
    """The segmenter takes each bus for a car at best; merged, that is right."""
    model, _ = made
    source = dataset(tmp_path / "data", classes="dog,bus")
    segmenter, data = load_segmenter(model), open_data(source)
    right = np.stack([data[index].labels for index in range(len(data))])
    said = segmenter.masks(np.stack([data[index].image for index in range(len(data))]))
    both, either = ((right == 6) & (said == 9), ((right == 6) | (said == 9)) & (right != 255))
    for others in ("refuse", "background", "ignored"):
        figures = evaluate(options(model, source, merge="vehicle=car,bus", others=others))
        assert figures["per_class_iou"]["vehicle"] == pytest.approx(both.sum() / either.sum())
        assert list(figures["per_class_iou"]) == ["vehicle", "dog"]
    with pytest.raises(DiffuMaskError, match="does not know beast: say by `others`"):
        evaluate(options(model, dataset(tmp_path / "cats", classes="dog,bus,cat"), merge="beast=bus,cat"))


def test_a_sheet_that_cannot_be_written_is_found_before_the_work(made, tmp_path):
    model, source = made
    with pytest.raises(DiffuMaskError, match="nowhere is no folder: make it, or name another place"):
        evaluate(options(model, source, sheet=tmp_path / "nowhere" / "worst.png"), progress=None)


def test_images_are_predicted_as_they_are(made, monkeypatch):
    """EoMT sees an image at one size: nothing is added to it before."""
    model, source = made
    shapes, masks = [], TransformersSegmenter.masks
    monkeypatch.setattr(
        TransformersSegmenter, "masks", lambda self, images: shapes.append(images.shape) or masks(self, images)
    )
    evaluate(options(model, source))
    assert {shape[1:3] for shape in shapes} == {(24, 40)}
