"""bench/rows.py: what a row keeps, how it is told, and the file of them."""

import json
from pathlib import Path

import pytest
import torch

from diffumask_fast.bench.harness import Ratio
from diffumask_fast.bench.rows import append_rows, describe, environment, row


def test_a_row_of_a_ratio_keeps_how_it_was_measured() -> None:
    ratio = Ratio(1.04, 1.03, 1.06, 14, raw=1.05, deviation=0.01, baseline_s=2.0, clock="process CPU time")
    made = row("end_to_end", "maps_overhead", ratio, config={"batch": 8})
    assert list(made) == ["suite", "name", "value", "unit", "low", "high", "n", "config"]
    assert (made["value"], made["low"], made["high"], made["n"], made["unit"]) == (1.04, 1.03, 1.06, 14, "ratio")
    assert made["config"] == {
        "batch": 8, "raw": 1.05, "control_deviation": 0.01, "baseline_s": 2.0, "clock": "process CPU time",
    }  # fmt: skip


def test_a_row_of_a_number_is_its_own_bounds() -> None:
    made = row("masks", "guided_filter", 0.25, unit="ms")
    assert (made["value"], made["low"], made["high"], made["n"], made["config"]) == (0.25, 0.25, 0.25, 1, {})


def test_a_row_is_described_with_its_control() -> None:
    ratio = Ratio(1.04, 1.03, 1.06, 14, raw=1.05, deviation=0.01, baseline_s=2.0, clock="process CPU time")
    text = describe(row("end_to_end", "maps_overhead", ratio))
    assert text == "maps_overhead                       1.040 ratio (1.030 to 1.060, n 14; control 1.010, subtracted)"
    assert (
        describe(row("s", "x", 2.0, unit="ms")) == "x                                   2.000 ms (2.000 to 2.000, n 1)"
    )


def test_rows_are_appended_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "results" / "end_to_end.jsonl"
    first, second = row("s", "a", 1.0, unit="s"), row("s", "b", 2.0, unit="s", config=environment())
    append_rows(path, [first])
    append_rows(path, [second])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [first, second]


def test_environment_says_what_a_timing_depends_on() -> None:
    facts = environment("cpu", threads=1)
    assert facts["torch"] == torch.__version__
    assert (facts["device"], facts["threads"]) == ("cpu", 1)
    assert facts["diffusers"] and facts["cpu"]
    assert "commit" in facts
    json.dumps(facts)


@pytest.mark.gpu
def test_the_environment_names_the_gpu() -> None:
    assert environment("cuda")["gpu"]
