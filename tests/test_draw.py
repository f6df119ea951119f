"""generation/draw.py: any shard, in any order, in any process, gives the rows of the run; no failure is lost."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import draw, requests
from test_generation import options, silent

from diffumask_fast.dataset.origin import is_drawn
from diffumask_fast.dataset.reader import read_manifest
from diffumask_fast.dataset.schema import decode_png, make_row
from diffumask_fast.dataset.shard_check import mark_of
from diffumask_fast.dataset.writer import shard_path, write_shard
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation import draw as drawing
from diffumask_fast.generation.draw import Encoders, draw_shards
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.job import make_job, open_pipe


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A finished run of shards of 3, 3 and 1 images, its job and a pipeline."""
    asked = options(tmp_path_factory.mktemp("run") / "out", tiny_folder, num=7, shard_size=3)
    run_generate(asked, silent)
    pipe = open_pipe(asked, "cpu")
    return asked.out, make_job(asked, pipe), pipe


def shards_of(folder: Path) -> list[bytes]:
    return [shard_path(folder, index).read_bytes() for index in range(3)]


def mark(folder, index, rows):
    return mark_of(read_manifest(folder), index, [(row["key"], row["seed"]) for row in rows])


@pytest.mark.parametrize("indices", [[2, 0], [1], [2, 1, 0]])
def test_shards_in_any_order_are_those_of_the_run(run, tmp_path, indices):
    out, job, pipe = run
    (tmp_path / "data").mkdir()
    seen = []
    for index, rows in draw_shards(pipe, job, indices, seen.append):
        write_shard(tmp_path, index, rows, mark(out, index, rows))
        assert len(seen) == sum(map(job.num_rows, indices[: indices.index(index) + 1]))
        assert all(is_drawn(row["image"]["bytes"]) and not is_drawn(row["mask"]["bytes"]) for row in rows)
    assert all(shard_path(tmp_path, index).read_bytes() == shards_of(out)[index] for index in indices)
    assert pipe.seconds.encode > 0


OTHER_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[4])
from test_draw import mark
from diffumask_fast.dataset.writer import write_shard
from diffumask_fast.generation.draw import draw_shards
from diffumask_fast.generation.job import Job
job = Job.from_json(json.loads(sys.argv[1]))
for index, rows in draw_shards(job.open("cpu"), job, [2, 0]):
    write_shard(sys.argv[2], index, rows, mark(sys.argv[3], index, rows))
"""


def test_another_process_draws_the_same_bytes(run, tmp_path):
    out, job, _ = run
    (tmp_path / "data").mkdir()
    command = [sys.executable, "-c", OTHER_PROCESS, json.dumps(job.as_json()), tmp_path, out, Path(__file__).parent]
    subprocess.run(command, check=True)
    assert [shard_path(tmp_path, index).read_bytes() for index in (2, 0)] == [shards_of(out)[i] for i in (2, 0)]


def test_leaving_early_leaves_a_pipeline_that_draws(run):
    out, job, pipe = run
    shards = draw_shards(pipe, job, [0, 1])
    first = next(shards)
    shards.close()
    again = dict(draw_shards(pipe, job, [0]))
    assert [row["image"] for row in again[0]] == [row["image"] for row in first[1]]


@contextmanager
def memory_for(pipe, images):
    """Let the UNet run out of memory, by torch's own error, where it gets more images at once than `images()`."""

    def refuse(module, arguments):
        if arguments[0].shape[0] > 2 * images():  # two rows for an image, with guidance
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    hook = pipe.pipe.unet.conv_in.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def test_where_memory_is_short_the_shard_is_drawn_anew_in_smaller_batches(run):
    _, job, pipe = run
    job = replace(job, batch_size=3)
    wanted, seen, told, drawn = dict(draw_shards(pipe, job, [0, 1, 2])), [], [], {}
    with memory_for(pipe, lambda: 1 if seen else 3):
        shards = draw_shards(pipe, job, [0, 1, 2], seen.append, lambda size, left: told.append((size, list(left))))
        for index, rows in shards:
            drawn[index] = rows
    assert told == [(1, [1, 2])]
    assert [result.request.key for result in seen] == [row["key"] for rows in wanted.values() for row in rows]
    assert [row["image"] for row in drawn[0]] == [row["image"] for row in wanted[0]] and list(drawn) == [0, 1, 2]
    for index in (1, 2):
        for row, other in zip(drawn[index], wanted[index], strict=True):
            assert (row["key"], row["seed"], row["prompt"]) == (other["key"], other["seed"], other["prompt"])
            image, truth = (decode_png(one["image"]).astype(int) for one in (row, other))
            mask, expected = (decode_png(one["mask"]) > 0 for one in (row, other))
            assert abs(image - truth).max() <= 2
            assert (mask & expected).sum() >= 0.99 * (mask | expected).sum()


def test_a_failure_in_the_middle_of_a_shard_tells_no_image_twice(run):
    _, job, pipe = run
    job, seen = replace(job, batch_size=2, shard_size=6, recipe=replace(job.recipe, num=6)), []
    with memory_for(pipe, lambda: 1 if len(seen) == 2 else 2):
        ((_, rows),) = draw_shards(pipe, job, [0], seen.append)
    assert [result.request.key for result in seen] == [row["key"] for row in rows] and len(rows) == 6


def test_too_little_memory_for_one_image_is_told(run):
    _, job, pipe = run
    with memory_for(pipe, lambda: 0), pytest.raises(DiffuMaskError, match="a single image of 64x64.*smaller `size`"):
        next(draw_shards(pipe, job, [0]))
    with memory_for(pipe, fail), pytest.raises(RuntimeError, match="another error"):
        next(draw_shards(pipe, job, [0]))


def fail():
    raise RuntimeError("another error")


def test_no_more_than_so_many_samples_wait(monkeypatch):
    gate, begun = threading.Event(), []

    def slow(sample):
        begun.append(sample)
        gate.wait()
        return make_row(sample)

    monkeypatch.setattr(drawing, "make_row", slow)
    samples = [draw(request) for request in requests(5)]
    with Encoders(2) as encoders:
        added = threading.Thread(target=lambda: [encoders.add(sample) for sample in samples])
        added.start()
        added.join(0.3)
        assert added.is_alive() and len(encoders._rows) == 2
        gate.set()
        added.join()
        assert [row["key"] for row in encoders.take()] == [sample.request.key for sample in samples]
        assert encoders.take() == [] and encoders.waited > 0


def test_a_sample_that_cannot_be_encoded_is_told():
    sample = draw(requests(1)[0])
    sample.image = sample.image.astype(np.float64)
    with Encoders(2) as encoders:
        encoders.add(sample)
        with pytest.raises(DiffuMaskError, match="must be uint8"):
            encoders.take()
