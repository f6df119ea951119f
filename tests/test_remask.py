"""dataset/remask.py: new masks of stored maps are those that drawing would have made."""

import dataclasses
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from samples import draw, requests
from test_generation import options as generate_options
from test_generation import silent
from typer.testing import CliRunner

from diffumask_fast.cli import app
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.remask import recorded_options, remask
from diffumask_fast.dataset.run import open_run
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.learning.filtering import filter_dataset
from diffumask_fast.learning.options import FilterOptions, PruneOptions
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import NOT_FINITE
from diffumask_fast.prompts.vocabulary import Vocabulary

LENIENT = MaskOptions(refine="none", min_area=0, max_area=1, min_quality=0)


def dataset(folder, change=lambda sample: sample, **keywords):
    drawn_with = {"aggregation": "finest", "propagate": 1, "threshold": "otsu"}
    plan = requests(7, **keywords)
    with open_run(folder, plan, drawn_with, {}, 3, vocabulary=Vocabulary.parse("dog,car")) as run:
        for index in run.missing_shards():
            run.write(index, [change(draw(request)) for request in run.requests_of(index)])
    return folder


def rows(folder):
    return list(read_rows(folder, accepted_only=False))


def test_the_process_keeps_its_number_of_threads(tmp_path):
    def later():
        torch.zeros(8).sum()  # a thread takes the process's number with its first operation
        found.append(torch.get_num_threads())

    found, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        remask(dataset(tmp_path / "a"), tmp_path / "b")
        thread = threading.Thread(target=later)
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *found] == [2, 2]
    finally:
        torch.set_num_threads(before)


def test_what_was_pruned_is_judged_anew_and_the_record_does_not_claim_otherwise(tmp_path):
    source = dataset(tmp_path / "a", lambda sample: dataclasses.replace(sample, accepted=True, reason=""))
    filter_dataset(FilterOptions(source, tmp_path / "b", PruneOptions(0.5, rank="quality")))
    remask(tmp_path / "b", tmp_path / "c", LENIENT)
    assert not all(row.accepted for row in rows(tmp_path / "b")) and all(row.accepted for row in rows(tmp_path / "c"))
    recorded = [json.loads((tmp_path / name / "dataset.json").read_text())["options"] for name in "bc"]
    assert ["filter" in one for one in recorded] == [True, False]


def test_masks_of_generation_come_back(tiny_folder, tmp_path):
    run_generate(generate_options(tmp_path / "a", tiny_folder, classes_per_image=2), silent)
    summary = remask(tmp_path / "a", tmp_path / "b")
    assert summary["images"] == 6
    for drawn, made in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert drawn.values["image"] == made.values["image"] and np.array_equal(drawn.maps, made.maps)
        both, either = (drawn.mask > 0) & (drawn.mask == made.mask), (drawn.mask > 0) | (made.mask > 0)
        assert both.sum() >= 0.98 * either.sum()
        assert made.quality == pytest.approx(drawn.quality, abs=1e-4)
        assert (drawn.accepted, drawn.reason) == (made.accepted, made.reason)
        pixels = drawn.mask.size
        assert drawn.maps[0].nbytes <= 12 * 1024 * pixels / 512**2


@pytest.mark.parametrize("classes_per_image", [1, 2])
def test_options_reach_the_masks_and_all_else_stays(tmp_path, classes_per_image):
    before = dataset(tmp_path / "a", classes_per_image=classes_per_image)
    options = MaskOptions(threshold=0.6, refine="none", ignore_band=1)
    remask(before, tmp_path / "b", options)
    for old, new in zip(rows(before), rows(tmp_path / "b"), strict=True):
        maps, image, ids = (torch.tensor(np.array(x))[None] for x in (old.maps, old.image, old.class_ids))
        mask, quality = make_masks(maps, image, options, ids)
        assert np.array_equal(new.mask, mask[0].numpy()) and new.quality == pytest.approx(quality[0].tolist(), abs=1e-5)
        made = ("mask", "quality", "accepted", "reason")
        assert all(np.array_equal(old.values[name], new.values[name]) for name in old.values if name not in made)
    there, now = (json.loads((folder / "dataset.json").read_text()) for folder in (before, tmp_path / "b"))
    assert now["options"] == there["options"] | dataclasses.asdict(options)
    assert {k: v for k, v in there.items() if k != "options"} == {k: v for k, v in now.items() if k != "options"}


def test_what_is_left_out_is_as_the_run_was_drawn(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    best = {"mask": {"threshold": 0.6, "eps": 0.01, "min_area": 0, "max_area": 1}}
    few = {"few_steps": {"2": {"threshold": 0.3, "refine": "none"}}}
    (tmp_path / "model/diffumask.json").write_text(json.dumps(best | few))
    run_generate(generate_options(tmp_path / "a", tmp_path / "model", steps=2), silent)
    for name, flags, changed in (("b", [], {}), ("c", ["--ignore-band", "1"], {"ignore_band": 1})):
        shown = CliRunner().invoke(app, ["remask", str(tmp_path / "a"), str(tmp_path / name), *flags])
        assert shown.exit_code == 0, shown.output
        recorded = recorded_options(tmp_path / name)
        assert recorded == MaskOptions(threshold=0.3, eps=0.01, refine="none", min_area=0, max_area=1, **changed)
    remask(tmp_path / "c", tmp_path / "d")
    assert recorded_options(tmp_path / "d") == recorded_options(tmp_path / "c")
    for drawn, made in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert (drawn.mask == made.mask).mean() > 0.99


def test_a_record_of_what_is_no_option_is_refused(tmp_path):
    source = dataset(tmp_path / "a")
    record = json.loads((source / "dataset.json").read_text())
    assert recorded_options(source) == MaskOptions()
    (source / "dataset.json").write_text(json.dumps(record | {"options": record["options"] | {"threshold": 6}}))
    with pytest.raises(DiffuMaskError, match="dataset.json is damaged .`threshold` must be .*: bring back the old one"):
        remask(source, tmp_path / "b")


def test_what_was_not_finite_stays_rejected(tmp_path):
    def spoil(sample):
        return dataclasses.replace(sample, accepted=False, reason=NOT_FINITE)

    remask(dataset(tmp_path / "a", spoil), tmp_path / "b", MaskOptions(min_area=0, max_area=1))
    assert {row.reason for row in rows(tmp_path / "b")} == {NOT_FINITE}


def test_refuses_what_it_cannot_do(tmp_path):
    bare = dataset(tmp_path / "bare", lambda sample: dataclasses.replace(sample, maps=None))
    with pytest.raises(DiffuMaskError, match="stores no maps"):
        remask(bare, tmp_path / "b")
    with pytest.raises(DiffuMaskError, match="dataset.json is missing"):
        remask(tmp_path, tmp_path / "b")
