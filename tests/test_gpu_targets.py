"""bench/gpu_targets.py: its rows, on a CPU and in small."""

import pytest
import torch

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import gpu_targets, tables
from diffumask_fast.bench.geometries import cross_layers
from diffumask_fast.bench.rows import append_rows


@pytest.fixture(scope="module")
def rows():
    return list(gpu_targets.run("mini", "cpu", batch=2, batches=(1, 2), steps=2, pairs=1, engines=("torch",)))


def named(rows, name):
    return [row for row in rows if row["name"] == name]


def test_every_layer_has_its_rows_and_all_are_summed(rows):
    layers = cross_layers("mini")
    *each, whole = named(rows, "attend_over_sdpa_without_maps")
    assert [row["config"]["case"] for row in each] == ["x".join(map(str, layer)) for layer in layers]
    assert [row["config"]["layers"] for row in each] == list(layers.values())
    sums = [row["config"]["layers"] * row["config"]["baseline_s"] for row in each]
    assert whole["config"]["case"] == "all layers" and whole["config"]["layers"] == 10
    assert whole["config"]["baseline_s"] == pytest.approx(sum(sums), abs=1e-3)
    ratios = [row["config"]["raw"] for row in each]
    assert min(ratios) * 0.999 <= whole["value"] <= max(ratios) * 1.001
    shares = named(rows, "attend_copy_share")
    assert len(shares) == len(layers) and all(row["value"] > 0 for row in shares)
    moved = 4 * (2 * 2 * 256 * 64 + 2 * 2 * 77 * 64 + 2 * 1 * 256 + 77 * 1)
    assert shares[0]["config"]["bytes"] == moved


def test_maps_on_and_off_at_each_batch_and_whole_runs_against_diffusers(rows):
    for name in ("maps_overhead", "propagation_overhead"):
        assert [row["config"]["batch"] for row in named(rows, name)] == [1, 2]
    (stock,) = named(rows, "speedup_over_stock")
    assert stock["config"]["engine"] == "torch" and stock["config"]["num_inference_steps"] == 2
    assert stock["config"]["mask"]["refine"] == "guided" and 0 < stock["value"] < 3


def test_a_unet_call_with_maps_is_compared_with_the_same_engines_without(rows):
    for name in ("unet_maps_overhead", "unet_propagation_overhead"):
        (row,) = named(rows, name)
        assert row["config"]["engine"] == "torch" and row["config"]["batch"] == 1 and 0.5 < row["value"] < 3


def test_refinement_is_timed_for_an_image_by_each_implementation_that_runs_here(rows):
    for name, images, case in (
        ("guided_filter_and_otsu", 2, "torch"), ("mean_field", 1, "torch"), ("make_masks", 2, "auto"),
    ):  # fmt: skip
        (row,) = named(rows, name)
        assert (row["unit"], row["config"]["case"], row["config"]["batch"]) == ("ms/image", case, images)
        assert 0 < row["low"] <= row["value"] <= row["high"]
    assert gpu_targets.filter_impls(torch.device("cuda")) == ("torch", "triton")


def test_the_rows_are_read_back_each_as_itself(rows, tmp_path):
    append_rows(tmp_path / "a.jsonl", rows)
    append_rows(tmp_path / "a.jsonl", rows)
    assert tables.latest_rows(tmp_path) == rows


def test_unknown_parts_and_engines_are_said():
    with pytest.raises(DiffuMaskError, match="no part speed"):
        gpu_targets.run("mini", "cpu", names=("speed",))
    with pytest.raises(DiffuMaskError, match="takes one engine"):
        gpu_targets.run("mini", "cpu", engines=("torch", "compile"))
