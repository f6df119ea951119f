"""learning/calibration.py: a model's best options are found, written beside it, and taken by what draws with it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_calibration_images import by_hand
from test_cli import rows_of
from test_generation import options, silent
from typer.testing import CliRunner

from diffumask_fast import mini
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.cli import app
from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.job import make_job, open_pipe
from diffumask_fast.learning import calibration
from diffumask_fast.learning.calibration import calibrate, told
from diffumask_fast.learning.calibration_images import new_images
from diffumask_fast.learning.calibration_judges import SegmenterJudge
from diffumask_fast.learning.calibration_samples import draw_samples
from diffumask_fast.learning.calibration_search import halves
from diffumask_fast.learning.calibration_trials import Choice, Trials
from diffumask_fast.learning.options import CalibrateOptions
from diffumask_fast.masks.make import make_masks
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.find import ModelInfo, find_model, with_options
from diffumask_fast.pipeline import DiffuMaskPipeline

HAND = MapOptions("1", "none"), MaskOptions(threshold=0.7, refine="none")  # what the masks by hand agree with


def program(*arguments):
    """Run a command in this process."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None:
        raise done.exception
    return done


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A model, a run of 20 images, their masks by hand, which maps of one level agree with, and what was found."""
    folder = tmp_path_factory.mktemp("made")
    model = shutil.copytree(tiny_folder, folder / "model")
    wanted = options(folder / "run", model, num=20, batch_size=8, size="48x48", shard_size=64)
    run_generate(wanted, silent)
    pipe = open_pipe(wanted, "cpu")
    job = make_job(wanted, pipe)
    masks, images = {}, {}
    for one in draw_samples(pipe, job, list(job.plan(pipe))):
        maps, image = torch.from_numpy(one.maps[HAND[0]])[None], torch.from_numpy(one.image)[None]
        masks[one.key] = make_masks(maps, image, HAND[1], torch.tensor([one.class_ids]))[0][0].numpy()
        images[one.key] = one.image
    hand = by_hand(folder / "hand", masks, images)
    before = find_model(model).weights
    asked = CalibrateOptions(str(model), str(hand), run=folder / "run", device="cpu")
    return asked, calibrate(asked), before


def test_the_options_that_the_masks_agree_with_are_found(made):
    asked, summary, _ = made
    assert summary["switched"] and summary["images"] == 20 and summary["judged"] >= 16 and summary["trials"] > 100
    assert summary["before"]["aggregation"] == "paper" and summary["best"] == summary["after"] != summary["before"]
    before, after = (summary["figures"][name] for name in ("before", "best"))
    assert after["foreground_iou"] > max(0.85, before["foreground_iou"])
    assert summary["difference"] == pytest.approx(after["score"] - before["score"], abs=1e-4)
    assert summary["difference"] > 2 * summary["standard_error"] and summary["fixed"] == ""
    lines = told(summary)
    assert " -> " in lines[-2] and "no better" not in lines[-2]
    assert lines[-1] == f"Written to {asked.model}/diffumask.json, for runs of up to 2 steps."


def test_the_file_says_how_it_was_found_and_the_model_stays_the_same(made):
    asked, summary, before = made
    info = find_model(asked.model)
    assert info.few_steps == {2: summary["after"]} and info.classes == () and info.weights == before
    assert info.mask == {} and info.best_options(3) == {} and summary["up_to_steps"] == 2
    known = json.loads((info.folder / "diffumask.json").read_text())["calibration"]
    assert known["figures"] == summary["figures"] and known["judge"] == "hand" and known["switched"]
    assert known["images_drawn_by"]["weights"] == before and known["images_drawn_by"]["seed"] == 0
    assert known["versions"].keys() == {"diffumask_fast", "torch", "diffusers", "transformers"}
    assert known["before_sha256"] == ""


def test_what_draws_takes_the_options_and_an_explicit_one_wins(made, tmp_path):
    asked, summary, _ = made
    tiny = [
        "--model",
        asked.model,
        "--classes",
        "dog",
        "--num",
        "1",
        "--size",
        "32x32",
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    program("generate", tmp_path / "own", *tiny)
    recorded = read_manifest(tmp_path / "own")["options"]
    assert {name: recorded[name] for name in summary["after"]} == summary["after"]
    program("generate", tmp_path / "flags", *tiny, "--threshold", "0.95", "--refine", "none", "--propagate", "none")
    recorded = read_manifest(tmp_path / "flags")["options"]
    assert [recorded[name] for name in ("threshold", "refine", "propagate")] == [0.95, "none", "none"]
    assert recorded["aggregation"] == summary["after"]["aggregation"]
    row, other = rows_of(tmp_path / "own")[0], rows_of(tmp_path / "flags")[0]
    assert row["image"] == other["image"] and row["mask"] != other["mask"]

    pipe = DiffuMaskPipeline.from_pretrained(asked.model, device="cpu")
    call_of = dict(classes=[["dog"]], seeds=[1], num_inference_steps=2, height=48, width=48)
    provenance = pipe("a photo of a dog", **call_of).provenance
    drawn = {**provenance["maps"], **provenance["mask"]}
    assert {name: drawn[name] for name in summary["after"]} == summary["after"]
    explicit = pipe("a photo of a dog", mask=MaskOptions(), **call_of).provenance["mask"]
    assert explicit == vars(MaskOptions())


def test_options_of_a_file(made, tiny_folder, tmp_path):
    asked, summary, _ = made
    file = tmp_path / "options.json"
    shutil.copy(f"{asked.model}/diffumask.json", file)
    pipe = DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", model_options=file)
    assert pipe.info.best_options(2) == summary["after"]
    wanted = options(tmp_path / "out", tiny_folder, model_options=file, mask=MaskOptions(eps=0.5))
    job = make_job(wanted, open_pipe(wanted, "cpu"))
    assert vars(job.maps) == {name: summary["after"][name] for name in ("aggregation", "propagate")}
    assert job.mask == MaskOptions(eps=0.5)
    file.write_text('{"mask": {"threshold": 3}}')
    with pytest.raises(DiffuMaskError, match="is damaged .*'threshold' must be"):
        DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", model_options=file)
    with pytest.raises(DiffuMaskError, match="there is no file"):
        DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu", model_options=tmp_path / "none.json")


def test_a_file_of_another_model_is_refused_and_one_that_does_not_say_is_told(made, tmp_path, caplog):
    asked, summary, weights = made
    file = tmp_path / "options.json"
    known = json.loads(Path(asked.model, "diffumask.json").read_text())
    file.write_text(json.dumps(known))
    with pytest.raises(DiffuMaskError, match="was calibrated for model, and the weights of mini are others: name"):
        DiffuMaskPipeline.from_pretrained("mini", device="cpu", model_options=file)
    with pytest.raises(DiffuMaskError, match="was calibrated for model"):
        calibrate(CalibrateOptions("mini", "mini-oracle", out=file))
    info = find_model("mini")
    assert with_options(info, file, weights).few_steps == {2: summary["after"]}  # an engine's weights count
    assert caplog.text == ""
    del known["calibration"]["images_drawn_by"]
    file.write_text(json.dumps(known))
    assert with_options(info, file).few_steps and "does not say for which model" in caplog.text
    caplog.clear()
    file.write_text(json.dumps({"few_steps": known["few_steps"]}))
    assert with_options(info, file).few_steps and caplog.text == ""


def test_stored_maps_of_another_model_are_refused(made, tmp_path):
    with pytest.raises(DiffuMaskError, match="was drawn by model, and the weights of mini are others: name the model"):
        calibrate(replace(made[0], model="mini", redraw=False, out=tmp_path / "out.json"))


def test_stored_maps_and_the_lines_of_the_command(made, tmp_path):
    asked, summary, _ = made
    out = tmp_path / "again.json"
    where = ["--run", asked.run, "--no-redraw", "--device", "cpu", "--out", out]
    lines = program("calibrate", asked.model, "--judge", asked.judge, *where).stdout.splitlines()
    known = json.loads(out.read_text())
    assert known["calibration"]["images_drawn_by"]["weights"] == find_model(asked.model).weights
    few = known["few_steps"]["2"]
    assert known["calibration"]["before_sha256"] == "" and few["aggregation"] == "paper"  # as the maps are
    assert known["calibration"]["switched"] or few == {**summary["after"], "aggregation": "paper",
                                                                "propagate": 1}  # fmt: skip
    assert lines[0].startswith("20 images, ") and lines[-1] == f"Written to {out}, for runs of up to 2 steps."
    assert lines[-2].startswith("--aggregation and --propagate stay paper and 1")
    assert [line.split()[0] for line in lines[2:6]] == ["class_iou", "foreground_iou", "boundary_iou", "score"]
    assert known["calibration"]["switched"] != ("nothing is changed" in lines[6])
    with pytest.raises(DiffuMaskError, match="are there already: leave out `work`"):
        program("calibrate", asked.model, "--judge", asked.judge, *where, "--work", tmp_path / "work")
    with pytest.raises(DiffuMaskError, match="are there already: leave out `steps`"):
        program("calibrate", asked.model, "--judge", asked.judge, "--run", asked.run, "--steps", 3, "--out", out)


def test_a_file_keeps_what_it_has_for_other_numbers_of_steps(made, tmp_path):
    asked, _, _ = made
    out = tmp_path / "options.json"
    out.write_text('{"mask": {"eps": 0.5}, "few_steps": {"4": {"threshold": 0.6}}, "classes": ["x"]}')
    calibrate(replace(asked, redraw=False, out=out))
    known = json.loads(out.read_text())
    assert known["mask"] == {"eps": 0.5} and known["few_steps"]["4"] == {"threshold": 0.6} and "classes" not in known
    assert known["few_steps"].keys() == {"2", "4"}
    out.write_text('{"few_steps": {"4": {"threshold": 6}}}')
    with pytest.raises(DiffuMaskError, match="options.json is damaged .*'threshold' must be"):
        calibrate(replace(asked, redraw=False, out=out))


@pytest.mark.parametrize(
    ("steps", "recommended", "up_to"),
    [(1, 30, 1), (8, 30, 8), (9, 30, None), (4, 4, None), (2, 4, 2), (None, 30, None)],
)
def test_few_steps_have_options_of_their_own_where_a_model_draws_in_more(steps, recommended, up_to):
    assert calibration._up_to(steps, ModelInfo("model", num_inference_steps=recommended)) == up_to


def test_a_judge_that_sees_too_little_is_refused_and_nothing_is_written(made, tmp_path):
    asked, _, _ = made
    rows = {row["key"]: row for row in rows_of(asked.run)}
    masks = {key: np.zeros((48, 48), np.uint8) for key in rows}
    images = {key: np.zeros((48, 48, 3), np.uint8) for key in rows}
    empty = by_hand(tmp_path / "empty", masks, images)
    with pytest.raises(DiffuMaskError, match="sees what was asked for in 0 of 20 images"):
        calibrate(replace(asked, judge=str(empty), redraw=False, out=tmp_path / "out.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_where_options_may_not_go_is_said_before_anything_is_drawn(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "open_judge", None)
    with pytest.raises(DiffuMaskError, match="mini is a part of this program: say by `out`"):
        program("calibrate", "mini", "--judge", "mini-oracle")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "notes.json")
    cases = {"notes.json": "holds no options of a model", "no/x.json": "is no folder", "link.json": "is a link"}
    for name, words in cases.items():
        with pytest.raises(DiffuMaskError, match=words):
            calibrate(CalibrateOptions(str(tiny_folder), "mini-oracle", out=tmp_path / name))
    if os.geteuid():
        closed = shutil.copytree(tiny_folder, tmp_path / "closed")
        closed.chmod(0o555)
        with pytest.raises(DiffuMaskError, match="cannot be written: name by `out`"):
            calibrate(CalibrateOptions(str(closed), "mini-oracle"))
        with pytest.raises(DiffuMaskError, match="cannot be written: name by `out`"):
            calibrate(CalibrateOptions(str(tiny_folder), "mini-oracle", out=closed / "out.json"))


@pytest.mark.slow
def test_mini_with_spoiled_options_finds_its_way_back(tmp_path):
    model = shutil.copytree(mini.folder(), tmp_path / "mini")
    known = json.loads((model / "diffumask.json").read_text())
    spoiled = {**known, "mask": {"aggregation": "2", "propagate": "none", "threshold": 0.8}}
    (model / "diffumask.json").write_text(json.dumps(spoiled))
    asked = CalibrateOptions(str(model), "mini-oracle", num=36, steps=10, device="cpu", work=tmp_path / "work")
    summary = calibrate(asked)
    assert summary["switched"] and summary["figures"]["before"]["foreground_iou"] < 0.6
    written = json.loads((model / "diffumask.json").read_text())
    assert written["classes"] == known["classes"] and written["mask"] == summary["after"] != spoiled["mask"]

    judge = SegmenterJudge("mini-oracle", torch.device("cpu"))
    samples = new_images(asked, judge, lambda count, total: None).samples  # which are not drawn again
    trials = Trials(samples, judge.labels(samples), torch.device("cpu"))
    _, confirming = halves([sample.classes for sample in samples])
    shipped = trials.figures(Choice(MapOptions(**known["mask"]), MaskOptions()), confirming).mean(0)
    best = summary["figures"]["best"]
    assert summary["judged"] == len(samples)
    assert best["foreground_iou"] > shipped[1] - 0.01 and best["boundary_iou"] > shipped[2] - 0.02
