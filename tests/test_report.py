import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffumask_fast import DiffuMaskError
from diffumask_fast.bench import report, scaling
from diffumask_fast.bench.options import BenchOptions
from diffumask_fast.bench.rows import results_file, row

PROGRAM = str(Path(sys.executable).with_name("diffumask-fast"))
ROW = row("scaling", "images_per_s", 2.0, unit="images/s", config={"batch": 1})


def call(*arguments, code=0):
    done = subprocess.run([PROGRAM, "bench", *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, (done.returncode, done.stdout[-500:], done.stderr[-1500:])
    return done


def test_the_command_prints_one_json_object_and_keeps_the_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = call("--suite", "masks", "--device", "cpu", "--pairs", 1, "--json", "--output", out)
    found = json.loads(done.stdout)
    assert set(found) == {"environment", "rows"} and found["environment"]["device"] == "cpu"
    assert [json.loads(line) for line in out.read_text().splitlines()] == found["rows"]
    assert {one["name"] for one in found["rows"]} == {"make_masks", "guided_filter", "otsu"}


def test_the_command_for_people(tmp_path):
    arguments = [
        "--suite",
        "end_to_end",
        "--device",
        "cpu",
        "--rows",
        "memory_vs_steps",
        "--out",
        tmp_path / "rows.jsonl",
    ]
    done = call(*arguments)
    assert done.stdout.startswith("memory_vs_steps") and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--geometry", "sd3"], "--geometry must be one of mini, sd15"),
        (["--suite", "goals"], "--suite must be one of cluster, end_to_end, engines, gpu_targets"),
        (["--suite", "masks", "--steps", "3"], "The suite masks has no --steps"),
        (["compare", "nowhere.jsonl", "nowhere.jsonl"], "Cannot read the rows in nowhere.jsonl"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments, sentence):
    done = call(*arguments, code=1)
    assert sentence in done.stderr and "\n" not in done.stderr.strip() and done.stdout == ""


def stopping(rows):
    def run(geometry="mini", device="auto"):
        yield from rows
        raise KeyboardInterrupt

    return run


def test_stopping_leaves_the_finished_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "run", stopping([ROW, ROW]))
    out = tmp_path / "rows.jsonl"
    assert report.measure(BenchOptions("scaling", device="cpu", output=out), as_json=True) == 130
    assert len(out.read_text().splitlines()) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"] == [ROW, ROW] and "2 finished rows were kept" in printed.err


def test_ctrl_c_leaves_the_finished_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [PROGRAM, "bench", "--suite", "scaling", "--device", "cpu", "--output", str(out)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not out.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "finished rows were kept" in errors and "Traceback" not in errors
    assert all(json.loads(line)["suite"] == "scaling" for line in out.read_text().splitlines())


def test_plots_need_matplotlib_before_anything_starts(tmp_path, monkeypatch):
    from diffumask_fast.bench import plots

    monkeypatch.setattr(scaling, "run", None)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    monkeypatch.setattr(report.inspect, "signature", lambda run: None)
    with pytest.raises(DiffuMaskError, match="Plots need matplotlib"):
        report.measure(BenchOptions("scaling", device="cpu", plot=tmp_path))


def test_the_machines_own_file():
    path = results_file("cpu")
    assert path.parent.parts[-2:] == ("bench", "results") and path.name.endswith(f"-{os.cpu_count()}.jsonl")


def test_rows_are_not_appended_to_another_s_file(tmp_path):
    (tmp_path / "notes").write_text("my notes\n")
    with pytest.raises(DiffuMaskError, match="notes line 1 is no row"):
        report.measure(BenchOptions("masks", output=tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "my notes\n"


def test_rows_go_neither_through_a_link_nor_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "run", stopping([ROW]))
    (tmp_path / "link.jsonl").symlink_to("elsewhere")
    for path, words in ((tmp_path / "link.jsonl", "is a link, and writing"), (tmp_path, "Cannot read the rows in")):
        with pytest.raises(DiffuMaskError, match=words):
            report.measure(BenchOptions("scaling", device="cpu", output=path))
    assert not (tmp_path / "elsewhere").exists()
