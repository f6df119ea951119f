"""bench/reproduce.py: each cell becomes a row, once."""

import json
from dataclasses import replace

import pytest
from rich.progress import Progress

from diffumask_fast.bench.protocol import CELLS, HEADLINE, SUITE, Scale
from diffumask_fast.bench.protocol_tables import all_tables
from diffumask_fast.bench.regressions import read_rows
from diffumask_fast.bench.reproduce import Protocol, chosen, main
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.segmenters import read_record
from diffumask_fast.mini.world import HOME

TOY = Scale(images=20, tests=6, steps=2, finetune_steps=1, ablation_steps=1, fold_steps=1)
QUICK = [cell for cell in CELLS if cell.name in ("headline/real", "zero-shot/real")]


def protocol(folder, scale=TOY):
    return Protocol(folder, scale, folder / "rows.jsonl", progress=lambda total: Progress(disable=True))


def run(folder, cells, seeds=1, scale=TOY):
    own = protocol(folder, scale)
    return [own.measure(cell, seed) for cell, seed in own.missing(cells, seeds)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    return folder, run(folder, QUICK)


def test_each_cell_becomes_a_row(measured):
    folder, rows = measured
    assert [one["name"] for one in rows] == ["headline/real", "zero-shot/real"]
    for one in rows:
        config = one["config"]
        assert (one["suite"], config["seed"], config["steps"], config["dtype"]) == (SUITE, 0, 2, "fp32")
        assert config["scale"]["tests"] == config["tests"]["held-out"]["n"] == 6
        assert one["value"] == round(config["tests"]["kept"]["miou"], 5) and config["torch"]
        assert set(config["tests"]["kept"]["per_class_iou"]) == set(HOME)
        assert {"seen_miou", "unseen_miou", "harmonic_mean"} <= set(config["tests"]["kept"])
    assert rows[0]["config"]["images"] == 20 > rows[1]["config"]["images"]
    assert read_rows(folder / "rows.jsonl") == rows


def test_a_row_that_is_there_is_not_made_again(measured):
    folder, rows = measured
    again = protocol(folder)
    assert again.missing(QUICK, 1) == []
    assert [(cell.name, seed) for cell, seed in again.missing(QUICK, 2)] == [(cell.name, 1) for cell in QUICK]
    assert again.rows == rows


def test_a_row_that_was_lost_is_made_of_the_segmenter_that_is_there(measured, tmp_path):
    folder, rows = measured
    kept = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    weights = folder / "seed-0" / "models" / "zero-shot" / "real" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    (made,) = run(folder, QUICK)
    (folder / "rows.jsonl").write_text(kept)
    assert made == rows[1] and weights.stat().st_mtime_ns == before


def test_rows_of_another_scale_are_refused(measured):
    folder, _ = measured
    with pytest.raises(DiffuMaskError, match="holds rows of another scale: name another file by `rows`"):
        protocol(folder, replace(TOY, steps=3))


def test_tables_bring_what_they_start_from_and_are_compared_with():
    assert chosen("") == list(CELLS)
    assert [cell.name for cell in chosen("zero-shot")] == [
        "headline/synthetic", "zero-shot/real", "zero-shot/real-then-synthetic", "zero-shot/synthetic-then-real",
    ]  # fmt: skip
    pruning = ["default", "pruning/0.3", "pruning/0.5", "pruning/0.7"]
    assert [cell.name for cell in chosen(" pruning, headline ")] == [*(cell.name for cell in HEADLINE), *pruning]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--only", "headlines"], "--only must be some of headline, masks, pruning, augmentation, zero-shot"),
        (["--scale", "huge"], "--scale must be one of full, small"),
        (["--seeds", "0"], "--seeds must be a whole number from 1 on"),
    ],
)
def test_bad_values(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), *flags])
    assert stopped.value.code == 1 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_finished_is_printed(tmp_path, measured, monkeypatch, capsys):
    monkeypatch.setattr("diffumask_fast.bench.reproduce.SCALES", {"small": TOY})
    monkeypatch.setattr("diffumask_fast.bench.reproduce.CELLS", QUICK[:1])
    folder, rows = measured
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--scale", "small", "--seeds", "1", "--rows", str(folder / "rows.jsonl")])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == all_tables(rows) + "\n"


@pytest.mark.slow
def test_every_cell_at_toy_scale(tmp_path):
    scale = replace(TOY, images=54)
    rows = {one["name"]: one for one in run(tmp_path, CELLS, scale=scale)}
    assert set(rows) == {cell.name for cell in CELLS}
    synthetic = rows["headline/synthetic"]["config"]
    assert synthetic["images"] == 54 and 0.7 < synthetic["masks_iou"] < 1
    pruned = {name: one["config"]["images"] for name, one in rows.items() if name.startswith("pruning/")}
    assert pruned == {"pruning/0.3": 36, "pruning/0.5": 18, "pruning/0.7": 18}  # 1, 2 and 2 of the three of each class
    folds = [tmp_path / "seed-0" / "pruned" / alpha / "folds" for alpha in ("0.3", "0.7")]
    trained = [[file.read_bytes() for file in sorted(folder.rglob("model.safetensors"))] for folder in folds]
    assert trained[0] == trained[1] and len(trained[0]) == 6  # three in each of two rounds
    models = tmp_path / "seed-0" / "models"
    start = read_record(models / "headline" / "synthetic")["classes"]
    assert set(start.values()) == {"background", *HOME}
    for cell in CELLS:
        record = read_record(models / cell.name)
        assert record["classes"] == start and record["plan"]["steps"] == getattr(scale, cell.steps)
        assert record["plan"]["augment"] == (
            "splice,blur,occlude,perspective" if cell.augment == "all" else cell.augment
        )
