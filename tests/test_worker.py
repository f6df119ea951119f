import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_pipeline import requests

from diffumask_fast import pipeline
from diffumask_fast.engines.worker import IN_FLIGHT, StreamWorker
from diffumask_fast.pipeline import DiffuMaskPipeline


def test_on_the_cpu_work_is_done_at_once_by_the_caller():
    with StreamWorker(torch.device("cpu")) as worker:
        assert worker.submit(threading.get_ident).result() == threading.get_ident()
        assert worker.submit(threading.get_ident).result() == threading.get_ident()


def test_a_thread_takes_all_but_the_first_piece():
    with StreamWorker(torch.device("cpu"), threaded=True) as worker:
        first, second, third = (worker.submit(threading.get_ident).result() for _ in range(3))
    assert first == threading.get_ident() != second == third


def test_leaving_drops_what_has_not_begun():
    gate, ran = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), StreamWorker(torch.device("cpu"), threaded=True) as worker:
        worker.submit(bool)
        worker.submit(gate.wait)
        worker.submit(partial(ran.append, 1))
        threading.Timer(0.2, gate.set).start()
        raise KeyboardInterrupt
    assert gate.is_set() and not ran  # it waited for what had begun


def test_streams_are_the_same_and_two_batches_are_in_flight(tiny_sd, monkeypatch):
    pipe = DiffuMaskPipeline.from_pipe(tiny_sd)
    wished = [replace(requests(1)[0], seed=seed) for seed in range(9)]
    wanted = list(pipe.stream(wished, 2, num_inference_steps=2))
    finish, denoise, threads, events = pipe._finish, pipe._denoise, set(), []

    def finishing(*arguments):
        threads.add(threading.get_ident())
        time.sleep(0.2)  # more than a denoising takes
        drawn = finish(*arguments)
        events.append("finished")
        return drawn

    def denoising(*arguments, **kwargs):
        events.append("denoising")
        return denoise(*arguments, **kwargs)

    monkeypatch.setattr(pipe, "_finish", finishing)
    monkeypatch.setattr(pipe, "_denoise", denoising)
    monkeypatch.setattr(pipeline, "StreamWorker", partial(StreamWorker, threaded=True))
    found = list(pipe.stream(wished, 2, num_inference_steps=2))
    assert len(threads) == 2 and len(found) == 9
    ahead = [
        events[: position + 1].count("denoising") - events[:position].count("finished")
        for position, event in enumerate(events)
        if event == "denoising"
    ]
    assert max(ahead) == IN_FLIGHT == 2
    for one, other in zip(found, wanted, strict=True):
        assert one.request == other.request and one.quality == other.quality
        for name in ("image", "mask", "maps"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_failure_in_the_thread_reaches_the_reader(tiny_sd, monkeypatch):
    pipe = DiffuMaskPipeline.from_pipe(tiny_sd)
    finish, calls = pipe._finish, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return finish(*arguments)

    monkeypatch.setattr(pipe, "_finish", failing)
    monkeypatch.setattr(pipeline, "StreamWorker", partial(StreamWorker, threaded=True))
    results = pipe.stream(requests(1) * 3, 1, num_inference_steps=2)
    next(results)
    with pytest.raises(RuntimeError, match="no memory"):
        list(results)


def test_batches_are_drawn_as_they_are_handed_in(tiny_sd, monkeypatch):
    pipe, found = DiffuMaskPipeline.from_pipe(tiny_sd), []
    denoise = pipe._denoise

    def counting(prompts, *arguments, **kwargs):
        found.append(len(prompts))
        return denoise(prompts, *arguments, **kwargs)

    monkeypatch.setattr(pipe, "_denoise", counting)
    wished = [replace(requests(1)[0], seed=seed) for seed in range(7)]
    assert [result.request for result in pipe.stream(wished, 3, num_inference_steps=1)] == wished
    assert found == [3, 3, 1] and list(pipe.stream([], 3)) == []
    handed_in = iter([wished[:1], wished[1:4], wished[4:]])
    results = pipe.stream_batches(handed_in, num_phrases=1, use_negative_prompts=False, num_inference_steps=1)
    assert next(results).request == wished[0] and found[3:] == [1] and len(next(handed_in)) == 3


def test_there_is_no_thread_under_autocast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    assert StreamWorker(torch.device("cuda"))._pool is not None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert StreamWorker(torch.device("cuda"))._pool is None
