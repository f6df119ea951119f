import json
import os
import subprocess
import sys

import pytest

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import kernels
from diffumask_fast.bench.kernel_cases import convolutions
from diffumask_fast.kernels.shapes import MODELS


def test_a_row_for_each_case_with_bytes_flops_and_the_share_of_the_ceiling():
    rows = list(kernels.run("mini", "cpu", seconds=0.02))
    names = [row["name"] for row in rows]
    assert names.count("cross_attention_maps") == 4 * len(MODELS["mini"].layers) and names.count("guided_filter") == 1
    assert names.count("mean_field") == 1 and names.count("convolution") == 4 * len(convolutions("mini", 16))
    for row in rows:
        assert (row["suite"], row["unit"]) == ("kernels", "ms") and 0 < row["low"] <= row["value"] <= row["high"]
        # where a library's matrix product is slow, its convolution may do more than that "ceiling"
        most = 3 if row["name"] == "convolution" else 1.5
        assert row["config"]["bytes"] > 0 and 0 < row["config"]["fraction"] < most
    ceilings = [row["config"]["fraction"] for row in rows if row["name"].startswith("ceiling")]
    assert ceilings == pytest.approx([1] * 3)
    (largest,) = [row for row in rows if row["config"]["case"] == "sdpa-fp32-16x256x4x16"]
    assert largest["config"]["flops"] == 4 * 16 * 256 * 77 * 64 + 2 * 8 * 4 * 256 * 77 * 2
    flops = {row["config"]["case"]: row["config"]["flops"] for row in rows if row["name"] == "convolution"}
    assert flops["direct-fp32-16x64x64x16"] == 4 * flops["winograd-fp32-16x64x64x16"] == 2 * 16 * 256 * 9 * 64 * 64
    assert largest["config"]["bytes"] == 4 * 16 * 64 * (2 * 256 + 2 * 77) + 8 * 8 * 2 * 256 + 4 * 8 * 77 * 2


def test_the_convolutions_are_those_of_the_unets():
    assert convolutions("mini", 16) == [(16, 64, 64, 16), (16, 128, 128, 8), (16, 160, 160, 4), (2, 32, 32, 128)]
    assert convolutions("sd15", 2) == [(2, 320, 320, 64), (2, 640, 640, 32)]
    assert convolutions("sdxl", 2) == [(2, 320, 320, 128), (2, 640, 640, 64)]


def test_on_a_gpu_every_implementation_has_its_case():
    listed = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", str(kernels.CASES), "--collect-only", "-q", "-c", os.devnull],
        capture_output=True,
        text=True,
        env=os.environ | {"DIFFUMASK_FAST_KERNELS": json.dumps({"geometry": "sd15", "device": "cuda"})},
    ).stdout
    for case in ("guided_filter[{}-512]", "mean_field[{}-512]"):
        assert all(case.format(impl) in listed for impl in ("torch", "triton"))
    assert "cross_attention_maps[triton-fp16-2x4096x8x40]" in listed and "maps[sdpa-bf16-2x64x8x160]" in listed


def test_a_missing_library_and_a_failing_case_are_said(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(DiffuMaskError, match="needs pytest-benchmark"):
        kernels.run("mini", "cpu")
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "CASES", kernels.CASES.with_name("nowhere.py"))
    with pytest.raises(DiffuMaskError, match="The kernel cases failed"):
        list(kernels.run("mini", "cpu"))
