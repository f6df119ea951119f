"""models/arguments.py: what a pipeline is called with, where the caller says nothing."""

from dataclasses import replace

import pytest
from conftest import make_unet, new_pipe
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    TCDScheduler,
)
from test_generation import options, silent

from diffumask_fast.dropin.command import run as run_dropin
from diffumask_fast.dropin.options import DropinOptions
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.models.arguments import check_arguments, check_draws_from_prompts, steps_and_guidance, suited
from diffumask_fast.models.find import ModelInfo
from diffumask_fast.pipeline import DiffuMaskPipeline


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


class Custom(StableDiffusionImg2ImgPipeline):
    """A pipeline of somebody else, which may take more than it names."""


def test_what_a_pipeline_would_pass_over_is_refused(tiny_sd):
    check_arguments(tiny_sd, {"num_inference_steps": 4, "height": 64, "callback": None, "guidance_rescale": 0.7})
    for name, near in (("steps", "num_inference_steps"), ("heigth", "height"), ("nonsense", None)):
        told = f"takes no {name}: leave it out, " + (f"or say {near}, as" if near else "as")
        with pytest.raises(DiffuMaskError, match=told):
            check_arguments(tiny_sd, {name: 4})
    check_arguments(Custom(**tiny_sd.components, requires_safety_checker=False), {"steps": 4})
    for wrong in (0, -1, 1.5, None):
        with pytest.raises(DiffuMaskError, match="`num_inference_steps` must be a whole number from 1 on"):
            check_arguments(tiny_sd, {"num_inference_steps": wrong})
    pipe = DiffuMaskPipeline.from_pipe(tiny_sd)
    with pytest.raises(DiffuMaskError, match="takes no steps"):
        pipe("a dog", ["dog"], steps=4)
    with pytest.raises(DiffuMaskError, match="takes no steps"):
        pipe.stream([], steps=4)


@pytest.mark.parametrize(
    ("scheduler", "embedded", "taken", "doubt"),
    [
        (LCMScheduler(), 32, (4, 8.5), ""),
        (LCMScheduler(), None, (4, 1.0), ""),
        (TCDScheduler(), None, (4, 1.0), ""),
        (DDIMScheduler(), None, (30, 7.5), ""),
        (DDIMScheduler(), 32, (30, 7.5), "its UNet takes guidance as an embedding, as an LCM's does"),
        (EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), None, (30, 7.5), "its timesteps are trailing"),
        (DDIMScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True), None, (30, 7.5), ""),
    ],
)
def test_steps_and_guidance_are_what_the_parts_of_a_model_tell(tiny_sd, scheduler, embedded, taken, doubt):
    tiny_sd.scheduler, tiny_sd.unet = scheduler, make_unet(time_cond_proj_dim=embedded)
    info = suited(ModelInfo("model", num_inference_steps=9), tiny_sd)
    assert (info.num_inference_steps, info.guidance_scale) == taken and info.origin
    assert info.doubt.startswith(doubt) and bool(info.doubt) == bool(doubt)
    says = replace(info, scenes={}, num_inference_steps=9)
    assert suited(says, tiny_sd) is says


@pytest.mark.parametrize(("embeds", "guidance"), [(True, 3.5), (False, 0.0)])
def test_a_transformer_that_takes_no_guidance_is_given_none(parts_of_flux, embeds, guidance):
    config = {**parts_of_flux["transformer"].config, "guidance_embeds": embeds}
    pipe = new_pipe(FluxPipeline, {**parts_of_flux, "transformer": FluxTransformer2DModel.from_config(config)})
    info = suited(ModelInfo("model"), pipe)
    assert (info.num_inference_steps, info.guidance_scale) == (28, guidance)
    assert ("FLUX.1 schnell" in info.doubt) is not embeds and info.origin == "FluxPipeline has them"


def test_a_run_refuses_a_pipeline_that_wants_pictures(tiny_sd, parts_of_flux, tmp_path):
    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd.components, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "model")
    words = "StableDiffusionImg2ImgPipeline draws from a prompt and a picture, and a run has prompts alone"
    with pytest.raises(DiffuMaskError, match=words):
        run_generate(options(tmp_path / "out", tmp_path / "model"), silent)
    asked = DropinOptions(classes="dog", output=tmp_path / "out", image_number=1, model=str(tmp_path / "model"))
    with pytest.raises(DiffuMaskError, match=words):
        run_dropin(asked)
    assert not (tmp_path / "out").exists()
    check_draws_from_prompts(tiny_sd)
    tiny_sd.unet = make_unet(in_channels=9)
    with pytest.raises(DiffuMaskError, match="the UNet takes 9 channels and gives 4, as those for inpainting do"):
        check_draws_from_prompts(tiny_sd)
    check_draws_from_prompts(new_pipe(FluxKontextPipeline, parts_of_flux))
