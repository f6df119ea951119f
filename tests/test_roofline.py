"""bench/roofline.py: the committed page is what the command writes, and its sums are right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffumask_fast.bench import roofline
from diffumask_fast.bench.roofline import GPUS
from diffumask_fast.kernels.shapes import MODELS, STABLE_DIFFUSION

NOTHING = {"fp32": 0.0, "loads": 0.0}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "notes" / "kernels.md"


def test_the_committed_account_is_the_commands():
    assert PAGE.read_text(encoding="utf-8").startswith(roofline.account())


@pytest.mark.slow
def test_the_committed_page_is_the_commands(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "diffumask_fast.bench.roofline", str(tmp_path / "page.md")]
    subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_the_cost_of_one_layer_by_hand():
    layer = MODELS["sdxl"].layers[1]
    # 16 blocks of 64 pixels, 20 heads in 5 groups of 4, 4 warps of 16 pixels a block
    assert layer.shape == (1024, 20, 64)
    blocks, groups, fixed = roofline.grid(layer, 3)
    assert (blocks, groups, fixed["GROUP"], fixed["BLOCK_K"], fixed["BLOCK_N"]) == (16, 5, 4, 3, 64)
    cost = roofline.attention(layer)
    assert cost.bytes == 2 * (1024 * 1280 * 2 + 77 * 1280 * 2)
    assert cost.cache == 2 * (1024 * 1280 * 2 + 16 * 77 * 1280 * 2)  # each block reads k and v
    assert cost.fp16 == 2 * 2 * 20 * 1024 * (64 + 16) * 64
    assert cost.issue == 16 * 4 * 20 * roofline.ISSUED["attend"][64]
    assert roofline.covered(160) == 160 and roofline.covered(40) == 48 and roofline.covered(5) == 16
    added = roofline.maps(layer, 3)
    assert added.bytes == 4 * 3 * (1024 * 12 + 77)  # read and write the maps, write and read 5 parts; the columns once
    assert added.cache == 4 * 3 * (1024 * 12 + 16 * 5 * 77)
    # the conditional sample adds its 80 probabilities up over 20 heads; in each of 5 groups they meet 3 columns
    assert added.fp32 == 2 * 1024 * 80 * 20 + 2 * 1024 * 80 * 5 * 3
    assert added.issue == 16 * 4 * (20 * 16 * 80 / 32 + 5 * 3 * roofline.COLUMN)
    assert roofline.maps(layer, 9).fp32 == 2 * 1024 * 80 * (20 + 5 * 12)  # nine take turns of four
    assert roofline.maps(MODELS["sd15"].layers[0], 1).bytes == 4 * (2 * 4096 + 77)
    alone = roofline.maps_alone(layer, 3)
    assert alone.bytes == added.bytes + 2 * 1280 * (1024 + 77) and alone.fp16 == cost.fp16 / 2
    assert alone.cache == added.cache + 2 * 1280 * (1024 + 16 * 77)
    assert alone.issue == added.issue + 16 * 4 * 20 * roofline.ISSUED["attend_maps"][64]


def test_a_time_is_that_of_the_limit_that_binds():
    h100, cost = GPUS[0], roofline.Cost(3.35e6, cache=11e6, fp16=989e6, issue=132 * 4 * 1.755e3)
    assert cost.parts(h100) == pytest.approx({"bytes": 1e-6, "cache": 2e-6, "fp16": 1e-6, "issue": 1e-6} | NOTHING)
    assert cost.seconds(h100) == pytest.approx(2e-6) and cost.serial_seconds(h100) == pytest.approx(3e-6)


@pytest.mark.parametrize("model", STABLE_DIFFUSION, ids=lambda model: model.name)
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_maps_cost_a_fifth_of_a_percent_at_most(model, gpu):
    for num in roofline.PHRASES:
        assert 0 < roofline.overhead(model, num, gpu) <= roofline.overhead_at_most(model, num, gpu)
        assert roofline.overhead(model, num, gpu) <= roofline.BOUND == 0.002
        assert roofline.overhead_alone(model, num, gpu) > roofline.overhead(model, num, gpu)


def test_the_page_says_for_how_many_phrases():
    for share, least in ((roofline.overhead, (18, 33, 30)), (roofline.overhead_at_most, (4, 8, 7))):
        assert tuple(roofline.most_phrases(share, model, GPUS[0]) for model in STABLE_DIFFUSION) == least
        for model, most in zip(STABLE_DIFFUSION, least, strict=True):
            assert share(model, most, GPUS[0]) <= 0.002 < share(model, most + 1, GPUS[0])
