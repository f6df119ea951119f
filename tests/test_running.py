"""attention/running.py: UNet calls that do not draw the image are not counted, whoever makes them."""

import inspect
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import NOISE, draw, relative
from diffusers import DDIMScheduler, ImagePipelineOutput, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from diffumask_fast import collect_maps
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.errors import DiffuMaskError

PROMPT = "a photo of a dog on the grass"
IMAGE = Image.new("RGB", (64, 64), (200, 100, 50))


def sharing(kind, pipe):
    """Return a pipeline of this kind with the same parts, and a scheduler of its own."""
    parts = {**pipe.components, "scheduler": DDIMScheduler(**NOISE)}
    other = kind(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@contextmanager
def left_out(recorder):
    """Let a recorder forget what it sees inside; None is none."""
    if recorder is None:
        yield
        return
    kept, recorder.cross = recorder.cross, []
    yield
    recorder.cross = kept


def preview(pipe, latents, timestep):
    """Draw the same prompt by another pipeline on the same UNet."""
    draw(sharing(StableDiffusionPipeline, pipe), PROMPT, steps=1, seed=9)
    return latents


def again(pipe, latents, timestep):
    """Draw the same prompt by the pipeline itself, which keeps its state."""
    kept = pipe.scheduler, pipe._guidance_scale, pipe._num_timesteps
    pipe.scheduler = DDIMScheduler(**NOISE)
    draw(pipe, PROMPT, steps=1, seed=9)
    pipe.scheduler, pipe._guidance_scale, pipe._num_timesteps = kept
    return latents


def look_ahead(pipe, latents, timestep):
    """Predict the noise of the same prompts in the same way as the pipeline."""
    states = torch.cat(pipe.encode_prompt(PROMPT, "cpu", 1, True)[::-1])
    noise = pipe.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=states).sample
    return latents - 0.1 * noise[1:]


def guide_by_loss(pipe, latents, timestep):
    """Follow the gradient of a loss on what the UNet predicts."""
    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        states = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
        noise = pipe.unet(latents, timestep, encoder_hidden_states=states).sample
        return latents.detach() - torch.autograd.grad(noise.square().sum(), latents)[0]


@pytest.mark.parametrize("work", [preview, again, look_ahead, guide_by_loss])
def test_calls_in_a_callback_are_drawn_and_not_counted(tiny_sd, recording, work):
    def run(recorder=None):
        def callback(pipe, step, timestep, tensors):
            with left_out(recorder):
                return {"latents": work(pipe, tensors["latents"], timestep)}

        return draw(tiny_sd, PROMPT, callback_on_step_end=callback)

    with recording(tiny_sd.unet) as recorder:
        plain = run(recorder)
    with collect_maps(tiny_sd, ["dog"]) as maps:
        assert np.array_equal(run(), plain)
    truth = recorder.maps(phrase_columns(tiny_sd.tokenizer, [PROMPT], ["dog"], length=77), slice(1, 2))
    assert maps.store.calls == maps.store.num_calls == 3
    for found, expected in zip(maps.levels.values(), truth, strict=True):
        assert relative(found, expected) < 1e-5 and not found.requires_grad


@pytest.mark.parametrize(("side", "strength"), [(64, 1.0), (128, 0.5)])
def test_a_second_pipeline_on_the_same_unet_is_drawn_and_not_counted(tiny_sd, side, strength):
    second = sharing(StableDiffusionImg2ImgPipeline, tiny_sd)
    refine = dict(image=IMAGE.resize((side, side)), strength=strength, seed=3)
    with collect_maps(tiny_sd, ["dog"]) as alone:
        draw(tiny_sd, PROMPT)
    plain = draw(second, PROMPT, **refine)
    with collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, PROMPT)
        assert np.array_equal(draw(second, PROMPT, **refine), plain)
    assert maps.store.calls == 3
    assert all(torch.equal(maps.levels[key], alone.levels[key]) for key in alone.levels)


class WithGradients(StableDiffusionPipeline):
    """Draws without torch.no_grad."""

    __call__ = inspect.unwrap(StableDiffusionPipeline.__call__)


def test_a_call_with_gradients_on_is_drawn_and_keeps_them(tiny_sd):
    pipe, weight = sharing(WithGradients, tiny_sd), tiny_sd.unet.conv_in.weight
    gradients = []

    def run():
        latents = draw(pipe, PROMPT, output_type="latent")
        latents.square().sum().backward()
        gradients.append(weight.grad.clone())
        pipe.unet.zero_grad()
        pipe.text_encoder.zero_grad()
        return latents

    plain = run()
    with pytest.raises(DiffuMaskError, match="gradients on: draw under torch.no_grad"):
        with collect_maps(pipe, ["dog"]) as maps:
            assert torch.equal(run(), plain)
    assert maps._store is None and torch.equal(*gradients) and gradients[0].abs().amax() > 0


class GuidedByLoss(StableDiffusionPipeline):
    """Follows a gradient before each step, in its own call."""

    def __call__(self, prompt, **kwargs):
        embeds = self.encode_prompt(prompt, "cpu", 1, False)[0].detach()
        latents = torch.randn(1, 4, 8, 8, generator=kwargs["generator"])
        self.scheduler.set_timesteps(kwargs["num_inference_steps"])
        for t in self.scheduler.timesteps:
            with torch.enable_grad():
                latents.requires_grad_()
                loss = self.unet(latents, t, encoder_hidden_states=embeds).sample.square().sum()
                latents = latents.detach() - torch.autograd.grad(loss, latents)[0]
            with torch.no_grad():
                noise = self.unet(latents, t, encoder_hidden_states=embeds).sample
            latents = self.scheduler.step(noise, t, latents).prev_sample
        return ImagePipelineOutput(latents)


def test_steps_between_calls_with_gradients_have_maps_without_a_graph(tiny_sd, recording):
    pipe = sharing(GuidedByLoss, tiny_sd)
    with recording(pipe.unet) as recorder:
        plain = draw(pipe, PROMPT)
    with collect_maps(pipe, ["dog"]) as maps:
        assert torch.equal(draw(pipe, PROMPT), plain)
    layers = len(recorder.cross) // 6
    recorder.cross = [p for i, p in enumerate(recorder.cross) if i // layers % 2]
    truth = recorder.maps(phrase_columns(pipe.tokenizer, [PROMPT], ["dog"], length=77), slice(1))
    assert maps.store.calls == 3
    for found, expected in zip(maps.levels.values(), truth, strict=True):
        assert relative(found, expected) < 1e-5 and not found.requires_grad


class Previewing(StableDiffusionPipeline):
    """Draws a preview by another pipeline on its UNet in each step, in its own call."""

    is_shown = True

    def __call__(self, prompt, **kwargs):
        embeds = self.encode_prompt(prompt, "cpu", 1, False)[0]
        latents = torch.randn(1, 4, 8, 8, generator=kwargs["generator"])
        self.scheduler.set_timesteps(kwargs["num_inference_steps"])
        for t in self.scheduler.timesteps:
            noise = self.unet(latents, t, encoder_hidden_states=embeds).sample
            latents = self.scheduler.step(noise, t, latents).prev_sample
            if self.is_shown:
                self.second(prompt, num_inference_steps=1, guidance_scale=1.0)
        return ImagePipelineOutput(latents)


@torch.no_grad()
def test_another_pipeline_inside_the_pipelines_own_call_is_not_counted(tiny_sd):
    pipe = sharing(Previewing, tiny_sd)
    pipe.second = sharing(StableDiffusionPipeline, tiny_sd)
    with collect_maps(pipe, ["dog"]) as maps:
        draw(pipe, PROMPT)
    pipe.is_shown = False
    with collect_maps(pipe, ["dog"]) as alone:
        draw(pipe, PROMPT)
    assert maps.store.calls == alone.store.calls == 3
    assert all(torch.equal(maps.levels[key], alone.levels[key]) for key in alone.levels)
