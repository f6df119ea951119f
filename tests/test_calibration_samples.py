"""learning/calibration_samples.py: one drawing has the maps of all options, and is not made twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_generation import options

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.draw import draw_batches
from diffumask_fast.generation.job import make_job, open_pipe
from diffumask_fast.learning.calibration_samples import draw_samples, variants


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """Return pipeline, job, requests, samples, and the folder that keeps them; 7 steps allow 3 propagations."""
    asked = options(tmp_path_factory.mktemp("out"), tiny_folder, num=4, steps=7, batch_size=2, classes_per_image=2)
    pipe = open_pipe(asked, "cpu")
    job = make_job(asked, pipe)
    requests, work = list(job.plan(pipe)), tmp_path_factory.mktemp("work") / "new"
    return pipe, job, requests, draw_samples(pipe, job, requests, work), work


@pytest.mark.parametrize(
    "maps",
    [MapOptions("paper", 2), MapOptions("reference", "none"), MapOptions("finest", 1), MapOptions("2", 3),
     MapOptions("0,1", 1), MapOptions("1,2", "none")],
    ids=str,
)  # fmt: skip
def test_maps_are_those_that_a_run_with_these_options_has(made, maps):
    pipe, job, requests, samples, _ = made
    results = draw_batches(pipe, replace(job, maps=maps), [requests[:2], requests[2:]])
    for sample, result in zip(samples, results, strict=True):
        assert (sample.key, sample.classes, sample.class_ids) == (
            result.request.key, result.request.classes, result.request.class_ids,
        )  # fmt: skip
        assert np.abs(sample.image.astype(int) - result.image).max() <= 1
        assert sample.maps[maps].shape == result.maps.shape
        assert np.abs(sample.maps[maps].astype(int) - result.maps).max() <= 2  # of 255: rounding


def test_what_was_drawn_is_not_drawn_again(made):
    _, job, requests, samples, work = made
    told = []
    again = draw_samples(None, job, requests, work, told.append)
    assert told == [2, 2]
    for one, other in zip(samples, again, strict=True):
        assert one.key == other.key and np.array_equal(one.image, other.image)
        assert all(np.array_equal(one.maps[maps], other.maps[maps]) for maps in one.maps)
    other = replace(job, mask=replace(job.mask, threshold=0.3), maps=MapOptions("2", 1))  # makes no other images
    assert len(draw_samples(None, other, requests, work)) == 4


def test_a_half_written_batch_is_drawn_again_and_another_one_is_refused(made, tmp_path):
    pipe, job, requests, samples, _ = made
    work = tmp_path / "work"
    draw_samples(pipe, job, requests[:2], work)
    file = work / "batch-00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-9])
    again = draw_samples(pipe, job, requests[:2], work)
    assert np.array_equal(again[0].image, samples[0].image) and file.read_bytes() == data
    with pytest.raises(DiffuMaskError, match="holds images of another calibration: name another folder by `work`"):
        draw_samples(pipe, replace(job, steps=8), requests[:2], work)
    assert [path.name for path in work.iterdir()] == [file.name]


def test_images_of_other_prompts_are_another_calibration_s(made, tmp_path):
    pipe, job, requests, _, _ = made
    draw_samples(pipe, job, requests[:1], tmp_path / "work")
    other = replace(requests[0], prompt="a photo of the horse", phrases=("horse", "photo"))
    with pytest.raises(DiffuMaskError, match="holds images of another calibration"):
        draw_samples(pipe, job, [other], tmp_path / "work")


def test_every_rule_and_every_run_of_levels_is_tried():
    options = variants(["0", "1", "2"], 2, MapOptions("0,2", 4))
    rules = {one.aggregation for one in options}
    assert rules == {"paper", "reference", "finest", "0", "1", "2", "0,1", "1,2", "0,1,2", "0,2"}
    assert {one.propagate for one in options} == {"none", 1, 2} and len(options) == len(set(options)) == 30


def test_few_steps_allow_few_propagations(made, tmp_path):
    pipe, job, requests, _, _ = made
    sample, *_ = draw_samples(pipe, replace(job, steps=2), requests[:1])
    assert {maps.propagate for maps in sample.maps} == {"none", 1}
    own = replace(job, steps=2, maps=MapOptions("paper", 2))  # the model's own are among them in any case
    assert own.maps in draw_samples(pipe, own, requests[:1])[0].maps
    assert torch.is_grad_enabled()
