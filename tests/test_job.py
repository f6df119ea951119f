"""generation/job.py: a run as a value that travels between processes."""

import json
import pickle
from dataclasses import replace

import pytest
from test_generation import options

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.job import Job, make_job, open_pipe
from diffumask_fast.masks.options import MaskOptions


@pytest.fixture(scope="module")
def job(tiny_folder, tmp_path_factory):
    asked = options(
        tmp_path_factory.mktemp("out"), tiny_folder, classes="dog,cat,car", classes_per_image=2, num=7, shard_size=3,
        scheduler="ddim", size="64x96", steps=3, maps=MapOptions(propagate=2), mask=MaskOptions(threshold=0.4),
    )  # fmt: skip
    return make_job(asked, open_pipe(asked, "cpu"))


def test_a_job_comes_back_from_pickle_and_json(job):
    assert pickle.loads(pickle.dumps(job)) == job
    assert Job.from_json(json.loads(json.dumps(job.as_json()))) == job
    assert hash(job) == hash(Job.from_json(job.as_json()))


def test_all_is_resolved(job):
    assert job.options["scheduler"] == "DDIMScheduler" and job.options["size"] == "64x96"
    assert job.options["aggregation"] == "paper" and job.options["propagate"] == 2 and job.options["threshold"] == 0.4
    assert job.options["dtype"] == "float32" and job.options["steps"] == 3 and "engine_sha256" not in job.options
    assert '"auto"' not in json.dumps(job.as_json())


def test_the_spacing_of_timesteps_is_recorded_and_drawn_with_again(tiny_folder, tmp_path):
    asked = options(tmp_path / "out", tiny_folder, scheduler="euler-trailing")
    job = make_job(asked, open_pipe(asked, "cpu"))
    assert job.options["scheduler"] == "EulerDiscreteScheduler-trailing"
    scheduler = Job.from_json(job.as_json()).open("cpu").pipe.scheduler
    assert type(scheduler).__name__ == "EulerDiscreteScheduler" and scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize(("steps", "scheduler", "possible"), [(1, "ddim", "none"), (2, "ddim", 1), (2, "heun", 2)])
def test_maps_are_propagated_as_often_as_the_steps_allow(tiny_folder, tmp_path, steps, scheduler, possible):
    asked = options(tmp_path / "out", tiny_folder, scheduler=scheduler, steps=steps)
    pipe = open_pipe(asked, "cpu")
    pipe.info.mask["propagate"] = 2  # the model's own
    assert make_job(asked, pipe).options["propagate"] == possible
    fits = replace(asked, maps=MapOptions(propagate=possible))
    assert make_job(fits, pipe).options["propagate"] == possible
    more = replace(asked, maps=MapOptions(propagate=3))
    words = f"`propagate=3` takes more steps than {steps}, .*: give `propagate={possible}`, or more `steps`"
    with pytest.raises(DiffuMaskError, match=words):
        make_job(more, pipe)


def test_few_steps_take_the_options_that_are_best_for_them(tiny_folder, tmp_path):
    asked = options(tmp_path / "out", tiny_folder, steps=2)
    pipe = open_pipe(asked, "cpu")
    pipe.info.few_steps[2] = {"aggregation": "finest", "threshold": 0.8}
    recorded = make_job(asked, pipe).options
    assert (recorded["aggregation"], recorded["threshold"], recorded["propagate"]) == ("finest", 0.8, 1)
    recorded = make_job(replace(asked, steps=3), pipe).options
    assert (recorded["aggregation"], recorded["threshold"]) == ("paper", "otsu")
    given = replace(asked, maps=MapOptions("paper"), mask=replace(asked.mask, threshold="otsu"))
    recorded = make_job(given, pipe).options
    assert (recorded["aggregation"], recorded["threshold"]) == ("paper", "otsu")


def test_the_pipeline_of_a_job_is_opened_anew(job, tiny_folder):
    again = Job.from_json(json.loads(json.dumps(job.as_json()))).open("cpu")
    assert type(again.pipe.scheduler).__name__ == "DDIMScheduler" and again.weights == job.weights
    with pytest.raises(DiffuMaskError, match="weights.*are not those"):
        Job.from_json({**job.as_json(), "weights": "0" * 64}).open("cpu")


def test_shards_and_batches(job):
    plan = job.plan(job.open("cpu"))
    assert job.num_shards == 3 and [job.num_rows(index) for index in range(3)] == [3, 3, 1]
    assert [[len(batch) for batch in job.batches(plan, index)] for index in range(3)] == [[2, 1], [2, 1], [1]]
    drawn = [request for index in range(3) for batch in job.batches(plan, index) for request in batch]
    assert drawn == list(plan) and len(drawn[0].phrases) == 2


def test_captions_whose_phrase_is_lost_are_dropped_and_counted(job, monkeypatch):
    pipe = job.open("cpu")
    monkeypatch.setattr(pipe.pipe.tokenizer, "model_max_length", 5)
    with pytest.raises(DiffuMaskError, match="no caption fits"):
        job.plan(pipe)[0]
