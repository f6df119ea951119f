"""kernels/account.py: the committed page is what the command writes, and its sums are right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffumask_fast.kernels import account
from diffumask_fast.kernels.account import GPUS, MODELS, Layer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"


def test_the_committed_account_is_the_commands():
    assert PAGE.read_text(encoding="utf-8").startswith(account.account())


@pytest.mark.slow
def test_the_committed_page_is_the_commands(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "diffumask_fast.kernels.account", str(tmp_path / "page.md")]
    subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_the_cost_of_one_layer_by_hand():
    cost = account.attention(Layer(1, 1024, 20, 64))
    assert cost.bytes == 2 * (1024 * 1280 * 2 + 77 * 1280 * 2)
    assert cost.fp16 == 2 * 2 * 20 * 1024 * (64 + 16) * 64
    assert account.covered(160) == 160 and account.covered(40) == 48 and account.covered(5) == 16
    # 20 heads in 5 groups: read and write the maps, write and read 5 parts; the columns once
    assert account.maps(Layer(1, 1024, 20, 64), 3).bytes == 4 * 3 * (1024 * 12 + 77)
    assert account.maps(Layer(1, 4096, 8, 40), 1).bytes == 4 * (2 * 4096 + 77)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_maps_cost_a_fifth_of_a_percent_at_most(model, gpu):
    for num in account.PHRASES:
        assert 0 < account.overhead(model, num, gpu) <= account.overhead_at_most(model, num, gpu)
        assert account.overhead(model, num, gpu) <= account.BOUND == 0.002


def test_the_page_says_for_how_many_phrases():
    for share, least in ((account.overhead, (17, 31, 27)), (account.overhead_at_most, (8, 16, 16))):
        assert tuple(account.most_phrases(share, model, GPUS[0]) for model in MODELS) == least
        for model, most in zip(MODELS, least, strict=True):
            assert share(model, most, GPUS[0]) <= 0.002 < share(model, most + 1, GPUS[0])
