"""generation/stopping.py: SIGTERM ends a run after the shard at hand, a second one at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from samples import contents
from test_generation import options, silent

from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.stopping import stop_on_sigterm

PROGRAM = str(Path(sys.executable).with_name("diffumask-fast"))
WAITING = """
import time
from diffumask_fast.generation.stopping import stop_on_sigterm
with stop_on_sigterm() as stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def test_a_sigterm_is_noted_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_is_noted():
    asked = []

    def work():
        with stop_on_sigterm() as stop:
            asked.append(stop.asked)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False] and signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def started():
    """Start processes, and leave none behind."""
    processes = []

    def start(*command, **keywords):
        processes.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **keywords))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def test_a_second_sigterm_ends_the_process_at_once(started):
    process = started(sys.executable, "-c", WAITING)
    for word in ("ready", "asked"):
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_a_run_ends_after_the_shard_at_hand_and_is_finished_by_the_same_command(started, tiny_folder, tmp_path):
    command = [
        PROGRAM, "generate", tmp_path / "out", "--model", tiny_folder, "--classes", "dog,cat", "--num", "48",
        "--steps", "10", "--shard-size", "4", "--device", "cpu", "--log", tmp_path / "log",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = started(*command, stderr=subprocess.PIPE, env=environment)
    shards = tmp_path / "out" / "data"
    deadline = time.monotonic() + 120
    while not list(shards.glob("shard-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    missing = 12 - len(list(shards.iterdir()))
    sentence = (
        f"stopped by SIGTERM after a whole shard, with {missing} of 12 shards missing: run the same command again"
    )
    assert process.returncode == 1 and error.startswith(sentence) and error.count("\n") == 1 and 1 <= missing <= 11
    assert not list((tmp_path / "out").rglob("*.tmp"))
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["shard"] for line in lines if "shard" in line] == list(range(12 - missing))
    again = started(*command, env=environment)
    again.communicate(timeout=300)
    run_generate(options(tmp_path / "whole", tiny_folder, num=48, steps=10, shard_size=4, batch_size="auto"), silent)
    assert again.returncode == 0 and contents(tmp_path / "out") == contents(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["shard"] for line in lines if "shard" in line] == list(range(12))
