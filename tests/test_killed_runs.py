"""generation/generate.py: a run that is killed at any moment, whole or in parts, is finished by the same commands."""

import multiprocessing
import random
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from samples import contents

from diffumask_fast.dataset.parts import Part
from diffumask_fast.generation.options import GenerateOptions

SETTINGS = {"seed": 3, "device": "cpu", "batch_size": 2, "shard_size": 2}
QUICK = SETTINGS | {"num": 12, "steps": 1}
LONG = SETTINGS | {"num": 24, "steps": 4}
PATIENCE = 300  # seconds

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["diffumask_fast.generation.generate", "diffumask_fast.pipeline"])


def generate(settings):
    import torch

    from diffumask_fast.generation.generate import run_generate

    torch.set_num_threads(1)
    bar = SimpleNamespace(add_task=lambda *_, **__: 0, advance=lambda *_: None)
    run_generate(GenerateOptions(**settings), lambda total: nullcontext(bar))


@contextmanager
def started(**settings):
    """A process that draws; it does not outlive the `with` statement."""
    process = FORKS.Process(target=generate, args=(settings,))
    # the process does not begin with pytest's program
    with patch.object(sys.modules["__main__"], "__file__", None, create=True):
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(PATIENCE)


def ended(process):
    process.join(PATIENCE)
    return process.exitcode


def shards(out):
    return set(out.glob("data/*.parquet"))


def kill_after_a_shard(process, out, before, seconds):
    """Kill a process some seconds after a new shard; return whether it was still at work."""
    deadline = time.monotonic() + PATIENCE
    while shards(out) == before and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    process.join(PATIENCE)
    return alive


@pytest.fixture(scope="module", params=[QUICK])
def uninterrupted(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    with started(out=out, **request.param) as process:
        assert ended(process) == 0
    return request.param, contents(out)


def killed_and_run_again(settings, out, seconds):
    with started(out=out, **settings) as process:
        alive = kill_after_a_shard(process, out, set(), seconds)
    with started(out=out, **settings) as process:
        assert ended(process) == 0
    return alive


def a_part_killed_and_run_again(settings, out, count, seconds, rng):
    """Draw parts at once, kill one of them, draw it again beside the others."""
    victim = rng.randrange(count)
    with ExitStack() as stack:
        parts = [stack.enter_context(started(out=out, part=Part(part, count), **settings)) for part in range(count)]
        alive = kill_after_a_shard(parts[victim], out, set(), seconds)
        parts[victim] = stack.enter_context(started(out=out, part=Part(victim, count), **settings))
        assert [ended(process) for process in parts] == [0] * count
    return alive


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_run_ends_with_the_same_bytes(uninterrupted, tmp_path, seed):
    settings, files = uninterrupted
    killed_and_run_again(settings, tmp_path / "out", random.Random(seed).uniform(0, 1))
    assert contents(tmp_path / "out") == files


def test_a_killed_part_of_two_ends_with_the_same_bytes(uninterrupted, tmp_path):
    settings, files = uninterrupted
    a_part_killed_and_run_again(settings, tmp_path / "out", 2, 0.2, random.Random(0))
    assert contents(tmp_path / "out") == files


@pytest.mark.slow
@pytest.mark.parametrize("uninterrupted", [LONG], indirect=True)
@pytest.mark.parametrize("seed", range(25))
def test_a_run_killed_within_four_seconds_of_a_shard(uninterrupted, tmp_path, seed):
    settings, files = uninterrupted
    alive = killed_and_run_again(settings, tmp_path / "out", random.Random(seed).uniform(0, 4))
    print("killed while it drew" if alive else "killed when it was done")
    assert contents(tmp_path / "out") == files


@pytest.mark.slow
@pytest.mark.parametrize("uninterrupted", [LONG], indirect=True)
@pytest.mark.parametrize("seed", range(10))
def test_one_of_four_parts_killed(uninterrupted, tmp_path, seed):
    settings, files = uninterrupted
    rng = random.Random(seed)
    alive = a_part_killed_and_run_again(settings, tmp_path / "out", 4, rng.uniform(0, 4), rng)
    print("killed while it drew" if alive else "killed when it was done")
    assert contents(tmp_path / "out") == files
