"""tools/gpu_run.sh: both commands, on the CPU with a stand-in for CUDA; a typo must not cost the run on a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAVELS = ("diffumask_fast", "kernels", "export", "bench", "tests", "tools", "pyproject.toml")
A = "environment warm masks kernels tune rows sdpa timing".split()
B = "whole_runs maps stream engines".split()


def run(root, part, out, **more):
    environment = {**os.environ, "PYTHON": sys.executable, "COMMIT": "a-version", **more}
    command = ["bash", str(root / "tools/gpu_run.sh"), part, str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Run both parts as they are, in a copy without git, as the tree travels."""
    root = tmp_path_factory.mktemp("tree")
    for name in TRAVELS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    found = {}
    for part in "ab":
        out = root / part
        done = run(root, part, out, DRY="1")
        found[part] = out
        assert done.returncode == 0, done.stdout + done.stderr
    return found


def rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_every_step_is_done(dry):
    for part, steps in (("a", A), ("b", B)):
        ended = [line.split()[:2] for line in (dry[part] / "summary.txt").read_text().splitlines()]
        logs = (dry[part] / "log.txt").read_text().split("\n== ")
        bad = [name for name, end in ended if end != "done"]
        said = "\n".join(log[-3000:] for log in logs if log.split()[0] in bad)
        assert ended == [[step, "done"] for step in steps], said


def test_what_comes_back_is_there_and_fits(dry):
    for part, files in (
        ("a", "env.json kernels.xml log.txt masks.xml rows.jsonl summary.txt timing.xml tuned.json"),
        ("b", "engines.xml log.txt rows.jsonl stream.xml summary.txt"),
    ):
        found = sorted(path.name for path in dry[part].iterdir())
        assert found == files.split() and len(found) <= 8


def test_tests_ran_and_passed(dry):
    for part, name in (("a", "masks"), ("a", "kernels"), ("a", "timing"), ("b", "stream")):
        text = (dry[part] / f"{name}.xml").read_text()
        assert 'errors="0" failures="0"' in text and 'tests="0"' not in text


def test_rows_are_those_of_a_gpu(dry):
    names = {row["name"] for row in rows(dry["a"])}
    over = "over_sdpa_without_maps"
    assert names >= {"sdpa", f"attend_{over}", f"sdpa_maps_{over}", f"columns_{over}", "attend_copy_share"}
    assert names >= {"guided_filter_and_otsu", "mean_field", "make_masks"}
    both = rows(dry["a"]) + rows(dry["b"])
    assert all(row["config"]["commit"] == "a-version" and row["config"]["gpu"] == "stand-in" for row in both)
    clocks = {row["config"].get("clock") for row in both if row["name"].endswith(over) and row["n"] > 1}
    assert clocks <= {"CUDA events, graph replays"}
    maps = [row for row in rows(dry["b"]) if row["name"] == "maps_overhead"]
    assert [row["config"]["case"] for row in maps] == ["triton", "sdpa"]
    assert {row["name"] for row in rows(dry["b"])} >= {"speedup_over_stock", "unet_maps_overhead"}


def test_the_tuned_table_is_this_architectures(dry):
    entries = json.loads((dry["a"] / "tuned.json").read_text())["sm_90"]
    assert all("us" in entries[kernel][0] for kernel in ("attend", "guided_filter"))  # measured ones come first
    assert set(entries["attend"][0]["us"]) == {"triton", "sdpa+maps", "torch"}


def test_a_wrong_call_says_how(tmp_path):
    done = run(ROOT, "c", tmp_path)
    assert (done.returncode, done.stderr) == (2, "usage: bash tools/gpu_run.sh a|b OUT\n")
