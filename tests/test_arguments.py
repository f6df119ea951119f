"""models/arguments.py: what a pipeline is called with, where the caller says nothing."""

import pytest
from diffusers import LatentConsistencyModelPipeline

from diffumask_fast.models.arguments import steps_and_guidance


@pytest.mark.parametrize(
    ("arguments", "steps", "guidance"),
    [
        ({}, 50, 5.0),
        ({"num_inference_steps": 7}, 7, 5.0),
        ({"guidance_scale": 1.0}, 50, 1.0),
        ({"timesteps": [900, 600, 300]}, 3, 5.0),
        ({"timesteps": None, "sigmas": [3.0, 1.0], "num_inference_steps": 7}, 2, 5.0),
    ],
)
def test_what_is_not_given_is_the_pipelines_own(tiny_sdxl, arguments, steps, guidance):
    assert steps_and_guidance(tiny_sdxl, arguments) == {"num_inference_steps": steps, "guidance_scale": guidance}


def test_each_kind_of_pipeline_has_its_own(tiny_sd):
    assert steps_and_guidance(tiny_sd, {}) == {"num_inference_steps": 50, "guidance_scale": 7.5}
    lcm = LatentConsistencyModelPipeline(**tiny_sd.components, requires_safety_checker=False)
    assert steps_and_guidance(lcm, {}) == {"num_inference_steps": 4, "guidance_scale": 8.5}
