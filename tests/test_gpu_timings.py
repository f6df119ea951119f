"""The goals on a GPU, a row each; `make gpu` comes here once every kernel is right."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from diffumask_fast.bench import goals
from diffumask_fast.bench.rows import append_rows
from diffumask_fast.kernels.account import MODELS

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]
GEOMETRIES = ("sd15", "sd21", "sdxl")


def keep(rows):
    """Append rows to the machine's file in the checkout, which `make gpu` does not import from; losing ones too."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip() or None
    found = 0
    for row in rows:
        config = row["config"]
        assert row["value"] > 0 and config["gpu"] and config["driver"] and config["torch"] and config["triton"]
        slug = re.sub("[^a-z0-9]+", "-", config["gpu"].lower()).strip("-")
        file = ROOT / "bench" / "results" / f"{slug}-{os.cpu_count()}.jsonl"
        append_rows(file, [{**row, "config": {**config, "commit": commit}}])
        found += 1
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_each_layer(geometry):
    layers = len(MODELS[GEOMETRIES.index(geometry)].layers)
    assert keep(goals.run(geometry, "cuda", names=("attention",))) == 3 * layers + 1


def test_refinement_of_512_x_512_pixels():
    assert keep(goals.run("sd15", "cuda", names=("refinement",))) == 4


def test_denoising_with_maps_and_without():
    assert keep(goals.run("sd15", "cuda", names=("denoising",))) >= 4


def test_whole_runs_and_diffusers():
    assert keep(goals.run("sd15", "cuda", names=("stock",))) == 1
