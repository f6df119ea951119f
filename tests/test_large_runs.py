"""dataset/: a run of many rows takes as much memory as a small one, to write and to read."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = r"""
import json, re, sys, time
from collections import Counter
from pathlib import Path
from diffumask_fast.dataset.reader import read_rows
from diffumask_fast.dataset.run import open_run
from diffumask_fast.dataset.schema import make_row
from diffumask_fast.prompts.planner import plan
from diffumask_fast.prompts.vocabulary import Vocabulary
sys.path.insert(0, sys.argv[1])
from samples import draw

folder, num, task = sys.argv[2], int(sys.argv[3]), sys.argv[4]
requests = plan(Vocabulary.parse("dog,car"), num)
start = time.perf_counter()
if task == "write":
    row = make_row(draw(requests[0]))  # one picture: what is measured is not the drawing
    with open_run(folder, requests, {}, {}, 64) as run:
        for index in run.missing_shards():
            names = [(request.key, request.seed) for request in run.requests_of(index)]
            run.write_rows(index, [{**row, "key": key, "seed": seed} for key, seed in names])
else:
    shapes = Counter(row.image.shape for row in read_rows(folder, accepted_only=False))
    assert shapes == {(24, 40, 3): num}
seconds = time.perf_counter() - start
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # getrusage's would be that of who started the process
print(json.dumps({"rows_per_s": num / seconds, "peak_mib": peak}))
"""


def measured(folder, num, task):
    command = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__), str(folder / str(num)), str(num), task]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-1000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_rows(tmp_path):
    figures = {
        task: [measured(tmp_path, num, task) for num in (10_000, 100_000)] for task in ("write", "read")
    }  # fmt: skip
    print(json.dumps(figures))
    for few, many in figures.values():
        assert many["peak_mib"] < 1.1 * few["peak_mib"]
