"""learning/calibration_images.py: images of a run, drawn again or as they are stored; or new ones."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_generation import options, silent
from test_verify import rewrite

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.schema import encode_png
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.captions import with_captions
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.job import make_job, open_pipe
from diffumask_fast.generation.options import GenerateOptions, PromptOptions
from diffumask_fast.learning.calibration_images import new_images, run_images
from diffumask_fast.learning.calibration_judges import SegmenterJudge, open_judge
from diffumask_fast.learning.options import CalibrateOptions
from diffumask_fast.models.find import find_model

CPU = torch.device("cpu")


def by_hand(folder: Path, masks: dict[str, np.ndarray], images: dict[str, np.ndarray]) -> Path:
    """Write masks as a person hands them in, in VOC's layout."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(masks))
    for key, mask in masks.items():
        Image.fromarray(mask).save(folder / "SegmentationClass" / f"{key}.png")
        Image.fromarray(images[key]).save(folder / "JPEGImages" / f"{key}.png")
    return folder


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """Return a run of 6 images, and the masks of 3 of them made by hand."""
    folder = tmp_path_factory.mktemp("made")
    run_generate(options(folder / "run", tiny_folder, maps=MapOptions("finest", 1)), silent)
    rows = {row.key: row for row in read_rows(folder / "run", accepted_only=False)}
    keys = ["cat-000002", "dog-000000", "dog-000001"]
    masks = {key: np.full((64, 64), rows[key].class_ids[0], np.uint8) for key in keys}
    return folder / "run", by_hand(folder / "hand", masks, {key: rows[key].image for key in keys}), rows


def asked(made, model, **changes):
    run, hand, _ = made
    return CalibrateOptions(str(model), str(hand), **{"run": run, "device": "cpu", **changes})


def images_of(asked):
    return run_images(asked, open_judge(asked, CPU), find_model(asked.model), lambda count, total: None)


def test_images_that_were_drawn_again_have_maps_of_all_options(made, tiny_folder):
    images = images_of(asked(made, tiny_folder))
    rows = made[2]
    assert [one.key for one in images.samples] == ["cat-000002", "dog-000000", "dog-000001"] and images.fixed == ""
    assert images.own.maps == MapOptions("paper", 1) and images.facts["seed"] == 0 and images.facts["weights"]
    for one in images.samples:
        row = rows[one.key]
        assert np.array_equal(one.image, row.image) and one.class_ids == tuple(row.class_ids)
        assert np.abs(one.maps[MapOptions("finest", 1)].astype(int) - row.maps).max() <= 2
        assert {MapOptions("2", "none"), images.own.maps} <= set(one.maps)


def test_stored_maps_need_no_drawing_and_fix_their_options(made, tiny_folder, monkeypatch):
    monkeypatch.setattr("diffumask_fast.learning.calibration_images.draw_samples", None)
    images = images_of(asked(made, tiny_folder, redraw=False))
    assert images.own.maps == MapOptions("finest", 1) and "stay finest and 1" in images.fixed
    for one in images.samples:
        assert np.array_equal(one.maps[images.own.maps], made[2][one.key].maps)


def test_what_does_not_fit_together_is_one_sentence(made, tiny_folder, tmp_path):
    run, hand, rows = made
    with pytest.raises(DiffuMaskError, match="name their dataset by `run`"):
        images_of(asked(made, tiny_folder, run=None))
    with pytest.raises(DiffuMaskError, match="weights of mini are not those"):
        images_of(asked(made, "mini"))
    masks = {"horse-000000": np.zeros((64, 64), np.uint8)}
    other = by_hand(tmp_path / "other", masks, {"horse-000000": rows["dog-000000"].image})
    with pytest.raises(DiffuMaskError, match="has no image horse-000000, of which .* has a mask: take it out"):
        images_of(replace(asked(made, tiny_folder), judge=str(other)))
    with pytest.raises(DiffuMaskError, match="does not say how its images were drawn: name their dataset"):
        images_of(replace(asked(made, tiny_folder), run=hand))


def test_an_image_that_is_not_drawn_again_as_it_is_stored_is_refused(made, tiny_folder, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")

    def invert(rows):
        for row in rows:
            row["image"]["bytes"] = encode_png(255 - made[2][row["key"]].image)

    rewrite(copy, 0, invert)
    with pytest.raises(DiffuMaskError, match="drawn again, is not the image that .* stores"):
        images_of(asked(made, tiny_folder, run=copy))
    assert images_of(asked(made, tiny_folder, run=copy, redraw=False)).samples


def test_new_images_are_those_of_a_plan(tiny_folder):
    wanted = CalibrateOptions(
        str(tiny_folder), "mini-oracle", classes="dog,cat", num=16, steps=2, seed=3, size="32x32", device="cpu",
        batch_size=8,
    )  # fmt: skip
    told = []
    images = new_images(wanted, SegmenterJudge("mini-oracle", CPU), lambda *numbers: told.append(numbers))
    assert told == [(8, 16)] * 2 and len(images.samples) == 16 and images.samples[0].image.shape == (32, 32, 3)
    assert images.facts["seed"] == 3 and images.facts["size"] == "32x32" and images.own.maps == MapOptions("paper", 1)
    with pytest.raises(DiffuMaskError, match="mini-oracle does not know zebra"):
        new_images(replace(wanted, classes="zebra,dog"), SegmenterJudge("mini-oracle", CPU), lambda *_: None)


def test_images_are_drawn_from_prompts_as_generate_makes_them(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "captions.txt").write_text("\n".join(f"the dog {number}" for number in range(12)))
    words = PromptOptions("none", captions=tmp_path / "captions.txt", retrieval="words")
    wanted = CalibrateOptions(
        str(tiny_folder), "mini-oracle", classes="dog,cat", prompts=words, num=16, steps=2, seed=3, size="32x32",
        device="cpu", batch_size=8, work=tmp_path / "work",
    )  # fmt: skip
    asked, judge = [], SegmenterJudge("mini-oracle", CPU)

    def drawn(pipe, job, requests, *others):
        asked[:] = requests
        return []

    monkeypatch.setattr("diffumask_fast.learning.calibration_images.draw_samples", drawn)
    new_images(wanted, judge, lambda *_: None)
    assert {one.prompt for one in asked if one.classes == ("dog",)} <= {f"Photo of the dog {n}" for n in range(12)}
    assert not any("Photo of the" in one.prompt for one in asked if one.classes == ("cat",))
    run = GenerateOptions(
        tmp_path / "run", str(tiny_folder), classes="dog,cat", prompts=words, num=16, steps=2, seed=3, size="32x32",
        device="cpu", batch_size=8,
    )  # fmt: skip
    pipe = open_pipe(run, "cpu")
    job = with_captions(make_job(run, pipe), words, pipe)
    assert asked == list(job.plan(pipe))
    counts = {}
    for kinds in ("auto", "none"):
        new_images(replace(wanted, prompts=PromptOptions(kinds)), judge, lambda *_: None)
        counts[kinds] = sum("a photo of a dog " in one.prompt or "a photo of a cat " in one.prompt for one in asked)
    assert counts["auto"] < counts["none"] == 16


def test_prompts_are_not_for_images_that_are_there(made, tiny_folder, tmp_path):
    for words, name in ((PromptOptions(3), "sub_classes"), (PromptOptions(captions=tmp_path / "c.txt"), "captions")):
        with pytest.raises(DiffuMaskError, match=f"are there already: leave out `{name}`"):
            images_of(asked(made, tiny_folder, prompts=words))
