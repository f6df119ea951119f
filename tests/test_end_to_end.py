import json
import logging

import pytest

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import baselines, end_to_end, geometries
from diffumask_fast.bench.end_to_end import MEMORY, OVERHEADS, ROWS, SPEEDUPS
from diffumask_fast.bench.harness import CPU_CLOCK, Race

FEW = dict(batch=2, steps=1, mask_steps=1, pairs=1, engines=["torch"])


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """The tiny model, with a list of the classes that its tokenizer knows."""
    copy = tmp_path / "model"
    copy.mkdir()
    for part in tiny_folder.iterdir():
        (copy / part.name).symlink_to(part)
    known = {"classes": ["dog", "cat"], "scenes": {"on the grass": ["dog", "cat"]}}
    known |= {"num_inference_steps": 2, "guidance_scale": 3.0}
    (copy / "diffumask.json").write_text(json.dumps(known))
    return copy


def measured(folder, names, **changes):
    return list(end_to_end.run("mini", "cpu", model=folder, names=names, **FEW | changes))


def check(rows):
    for row in rows:
        assert list(row) == ["suite", "name", "value", "unit", "low", "high", "n", "config"]
        assert (row["suite"], row["unit"]) == ("end_to_end", "ratio")
        assert row["low"] <= row["value"] <= row["high"]
        config = row["config"]
        assert (config["geometry"], config["device"], config["threads"]) == ("mini", "cpu", 1)
        assert config["torch"] and config["diffusers"] and config["cpu"]


def test_the_overheads(folder):
    rows = measured(folder, OVERHEADS)
    assert [row["name"] for row in rows] == list(OVERHEADS)
    check(rows)
    for row in rows:
        assert (row["config"]["batch"], row["config"]["guidance_scale"], row["n"]) == (2, 3.0, 1)
        assert "control_deviation" in row["config"]
    assert [row["config"].get("propagate") for row in rows[:2]] == ["none", 1]
    assert rows[2]["config"]["mask"]["refine"] == "guided"
    assert rows[0]["config"]["num_inference_steps"] == 1


def test_the_speedups(folder):
    names = [name for name in SPEEDUPS if name not in end_to_end.LIBRARIES]
    rows = {row["name"]: row for row in measured(folder, names, steps=2)}
    assert sorted(rows) == sorted(names)
    check(rows.values())
    assert rows["iou_vs_reference"]["n"] == 2
    assert all(one["config"]["batch"] == 2 for one in rows.values())
    best = rows["speedup_vs_reference_best"]["config"]
    assert best["dtype"] == "bf16" and 0 <= best["mask_iou"] <= 1
    assert set(best["tried_s"]) == {"torch fp32", "torch bf16"}
    config = rows["speedup_vs_reference_fp32"]["config"]
    assert (config["engine"], config["dtype"], config["num_inference_steps"]) == ("torch", "fp32", 2)
    assert config["mask"]["refine"] == "none" and config["mask"]["aggregation"] == "reference"


def test_the_embedded_models_masks_are_the_references():
    few = FEW | dict(batch=2, steps=4)
    (row,) = end_to_end.run("mini", "cpu", names=["iou_vs_reference"], **few)
    assert row["value"] >= 0.98 and row["low"] > 0.95, row


def test_the_peer_and_the_references_mask_stage(folder, monkeypatch):
    monkeypatch.setattr(baselines, "CRF_THRESHOLDS", (0.45,))
    rows = measured(folder, list(end_to_end.LIBRARIES))
    assert [row["name"] for row in rows] == list(end_to_end.LIBRARIES)
    check(rows)
    assert (rows[0]["config"]["batch"], rows[0]["config"]["peer_version"]) == (2, "1.0.0")
    assert rows[1]["config"]["crf_s"] > 0 and rows[1]["value"] > 1


def test_the_memory_rows(folder):
    rows = measured(folder, MEMORY)
    assert [row["name"] for row in rows] == list(MEMORY)
    check(rows)
    config = rows[0]["config"]
    assert 0 < config["kept_gib"] < config["reference_kept_gib"] < config["reference_peak_gib"]
    assert rows[1]["config"]["steps"] == [10, 50] and 0.9 < rows[1]["value"] <= 1.02


def test_a_speedup_is_the_others_time_for_an_image_over_ours():
    times = {"ours": [2.0] * 3, "reference": [1.0] * 3, "control": [1.1] * 3}
    ratio = Race(times, "reference", CPU_CLOCK).ratio("reference", "ours", scale=8)
    assert (ratio.raw, ratio.deviation, ratio.value) == pytest.approx((4, 0.1, 3.9))


def test_a_large_geometry_gets_one_run_of_each(folder, monkeypatch):
    monkeypatch.setattr(
        end_to_end, "open_geometry", lambda *args, **kwargs: geometries.open_geometry("mini", "cpu", **kwargs)
    )
    rows = list(end_to_end.run("sd15", "cpu", model=folder, steps=1))
    assert [row["name"] for row in rows] == list(end_to_end.UNREPEATED)
    assert all(row["n"] == 1 and row["config"]["repeated"] is False for row in rows)
    assert [row["unit"] for row in rows] == ["s/image"] * 3 + ["ratio"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(geometry="sd3"), "no geometry sd3: use mini, sd15"),
        (dict(names=["maps"]), "no row maps in end_to_end here: use maps_overhead"),
        (dict(engines=["tensorrt"]), "no engine tensorrt to compare: use torch"),
        (dict(device="tpu"), "no device tpu"),
    ],
)
def test_what_there_is_not_is_said_before_anything_starts(arguments, sentence, monkeypatch):
    monkeypatch.setattr(end_to_end, "open_geometry", None)
    with pytest.raises(DiffuMaskError, match=sentence):
        end_to_end.run(**arguments)


def test_a_missing_library_leaves_its_row_out_or_is_an_error_when_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(baselines, "missing", lambda name: None if name == "torch" else f"{name} is not installed")
    with caplog.at_level(logging.WARNING, "diffumask_fast"):
        left = end_to_end._available(ROWS, None)
    assert set(ROWS) - set(left) == set(end_to_end.LIBRARIES)
    assert "speedup_vs_peer is left out: attention_map_diffusers is not installed" in caplog.text
    with pytest.raises(DiffuMaskError, match="attention_map_diffusers is not installed"):
        end_to_end.run(names=["speedup_vs_peer"])


def test_too_little_memory_is_said_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(geometries, "free_bytes", lambda device: 2**33)
    monkeypatch.setattr(end_to_end, "open_geometry", None)
    with pytest.raises(DiffuMaskError, match="sd15 with the reference program's store beside it needs 17.1 GiB"):
        end_to_end.run("sd15", "cpu")
