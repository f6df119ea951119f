"""generation/shard_log.py: one line for each shard that is written, with its own figures."""

import json
import logging

import pytest
from test_generation import options, silent

from diffumask_fast.console import log_to
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.masks.options import MaskOptions


@pytest.fixture
def logged(tmp_path):
    """Run with a log, and give its lines that are of shards."""
    logger = logging.getLogger("diffumask_fast")
    before, level = list(logger.handlers), logger.level

    def run(asked):
        log_to(tmp_path / "log")
        summary = run_generate(asked, silent)
        logger.handlers[:] = before
        lines = map(json.loads, (tmp_path / "log").read_text().splitlines())
        return summary, [line for line in lines if "shard" in line]

    yield run
    logger.handlers[:] = before
    logger.setLevel(level)


def test_each_shard_has_its_line(logged, tiny_folder, tmp_path):
    asked = options(tmp_path / "out", tiny_folder, num=10, mask=MaskOptions(min_quality=0.05))
    summary, lines = logged(asked)
    assert [line["shard"] for line in lines] == [0, 1, 2] and [line["rows"] for line in lines] == [4, 4, 2]
    flags = [row.accepted for row in read_rows(tmp_path / "out", accepted_only=False, columns=["accepted"])]
    assert [line["accepted"] for line in lines] == [sum(flags[:4]), sum(flags[4:8]), sum(flags[8:])]
    assert 0 < sum(flags) < 10
    stages = {"denoise", "decode", "masks", "encode", "write"}
    assert all(line["seconds"].keys() == stages and line["retries"] == 0 for line in lines)
    denoise = sum(line["seconds"]["denoise"] for line in lines)
    assert min(line["seconds"]["denoise"] for line in lines) > 0
    assert denoise == pytest.approx(summary["seconds"]["denoise"], abs=0.01)
    assert all(line["host_peak_bytes"] > 10**7 and line["device_peak_bytes"] is None for line in lines)
    assert all(line["level"] == "INFO" and line["message"].startswith("shard ") and line["time"] for line in lines)


def test_a_rerun_appends_what_it_draws(logged, tiny_folder, tmp_path):
    asked = options(tmp_path / "out", tiny_folder)
    logged(asked)
    (tmp_path / "out" / "data" / "shard-00001.parquet").unlink()
    assert [line["shard"] for line in logged(asked)[1]] == [0, 1, 1]


def test_the_dataset_does_not_depend_on_the_log(logged, tiny_folder, tmp_path):
    logged(options(tmp_path / "out", tiny_folder))
    run_generate(options(tmp_path / "plain", tiny_folder), silent)
    for name in ("dataset.json", "data/shard-00000.parquet", "data/shard-00001.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
