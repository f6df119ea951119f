import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench.regressions import compare_rows, read_rows
from diffumask_fast.bench.rows import append_rows, row

PROGRAM = str(Path(sys.executable).with_name("diffumask-fast"))
BEFORE = [
    row("end_to_end", "maps_overhead", 1.0, low=0.99, high=1.01, n=14, config={"geometry": "mini", "commit": "a"}),
    row("end_to_end", "speedup_vs_daam", 2.0, low=1.9, high=2.1, n=14, config={"geometry": "mini", "commit": "a"}),
]


def changed(index, factor):
    rows = copy.deepcopy(BEFORE)
    for key in ("value", "low", "high"):
        rows[index][key] *= factor
    rows[index]["config"]["commit"] = "b"
    return rows


def worse(after, threshold=0.05):
    return [one["name"] for one in compare_rows(BEFORE, after, threshold) if one["regression"]]


def test_the_same_rows_are_no_regression():
    assert worse(BEFORE) == [] and [one["change"] for one in compare_rows(BEFORE, BEFORE, 0.05)] == [0, 0]


@pytest.mark.parametrize(("index", "factor"), [(0, 1.2), (1, 0.7)])
def test_a_change_for_the_worse_is_found(index, factor):
    assert worse(changed(index, factor)) == [BEFORE[index]["name"]]
    assert worse(changed(index, factor), threshold=0.5) == []


@pytest.mark.parametrize(("index", "factor"), [(0, 0.5), (1, 3.0)])
def test_a_change_for_the_better_is_none(index, factor):
    assert worse(changed(index, factor)) == []


def test_ranges_that_meet_are_noise():
    after = changed(0, 1.1)
    after[0]["low"] = 1.0
    assert worse(after) == []


def test_the_last_row_of_a_file_counts():
    assert worse(changed(0, 2) + BEFORE) == []


def test_other_settings_are_other_rows():
    after = copy.deepcopy(BEFORE)
    after[0]["config"]["batch"] = 4
    assert [one["name"] for one in compare_rows(BEFORE, after, 0.05)] == ["speedup_vs_daam"]
    with pytest.raises(DiffuMaskError, match="no row in common"):
        compare_rows(BEFORE[:1], after[:1], 0.05)


def test_the_command_and_its_exit_code(tmp_path):
    before, after, same = (tmp_path / f"{name}.jsonl" for name in ("before", "after", "same"))
    append_rows(before, BEFORE)
    append_rows(after, changed(0, 1.2))
    same.write_text(json.dumps({"environment": {}, "rows": BEFORE}))
    command = [PROGRAM, "bench", "compare", str(before)]
    assert subprocess.run([*command, str(same)], capture_output=True).returncode == 0
    done = subprocess.run([*command, str(after), "--threshold", "0.1"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Worse by more than 10%: maps_overhead;")
    assert "+20.0%  worse" in done.stdout
    done = subprocess.run([*command, str(after), "--threshold", "0.3", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["rows"][0]["change"] == 0.2


def rewritten(**changes):
    return json.dumps(BEFORE[0] | changes)


NO_NUMBERS = [
    rewritten(value=float("nan")), rewritten(low=float("inf")), rewritten(high=None), rewritten(value="2"),
    rewritten(value=True),
]  # fmt: skip


@pytest.mark.parametrize("text", ["no json", '{"suite": "x"}', "[1]", "3", *NO_NUMBERS])
def test_what_is_no_row_is_named(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(BEFORE[0]) + "\n" + text + "\n")
    with pytest.raises(DiffuMaskError, match="rows.jsonl line 2 is no row"):
        read_rows(path)
