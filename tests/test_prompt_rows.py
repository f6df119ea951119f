"""attention/prompt_rows.py: rows of the prompts in pipelines of other people, whatever the order."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from conftest import draw, relative
from diffusers import StableDiffusionPipeline

from diffumask_fast import collect_maps
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.errors import DiffuMaskError

PROMPTS = ["a photo of a dog on the grass", "the dog and a cat"]
NEGATIVES = ["a red dog", "dog dog dog"]


class Own(StableDiffusionPipeline):
    """A program of its own: returns the negative prompts first, and joins as its attributes say."""

    returns_negative_first = True
    draws_negative_first = True
    in_one_call = False
    weight = 1.0

    def encode_prompt(self, prompt, num_images_per_prompt=1, guided=True, negative_prompt=None):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        avoid = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(prompt)
        if self.in_one_call:
            both = self._states([*avoid, *prompt]).chunk(2)
        else:
            both = self._states(avoid), self._states(prompt)
        negative, own = (x.repeat_interleave(num_images_per_prompt, 0) for x in both)
        negative = negative if guided else None
        return (negative, own) if self.returns_negative_first else (own, negative)

    def _states(self, texts):
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids)[0] * self.weight

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps, generator, negative_prompt=None, guided=True, **rest):
        both = self.encode_prompt(prompt, rest.get("num_images_per_prompt", 1), guided, negative_prompt)
        negative, own = both if self.returns_negative_first else both[::-1]
        parts = [own] if not guided else [negative, own] if self.draws_negative_first else [own, negative]
        latents = torch.randn(len(own), 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * len(parts)), t, encoder_hidden_states=torch.cat(parts)).sample
            if guided:
                first, second = noise.chunk(2)
                negative_noise, noise = (first, second) if self.draws_negative_first else (second, first)
                noise = negative_noise + 7.5 * (noise - negative_noise)
            latents = self.scheduler.step(noise, t, latents).prev_sample
        return diffusers.ImagePipelineOutput(self.vae.decode(latents).sample.numpy())


def own(tiny_sd, kind=Own, **settings):
    pipe = kind(**tiny_sd.components, requires_safety_checker=False)
    for name, value in settings.items():
        setattr(pipe, name, value)
    return pipe


ORDERS = [dict(returns_negative_first=one, draws_negative_first=two) for one in (True, False) for two in (True, False)]
CHANGES = [{}, {"weight": 1.1}, {"in_one_call": True}]


def check(pipe, recording, prompts, rows, copies=1, **call):
    """Compare with all probabilities of the rows that the program is known to put the prompts in."""
    call |= {"prompt": prompts, "num_images_per_prompt": copies}
    with recording(pipe.unet) as recorder:
        plain = draw(pipe, **call)
    with collect_maps(pipe, ["dog"]) as maps:
        assert np.array_equal(draw(pipe, **call), plain)
    select = phrase_columns(pipe.tokenizer, prompts, ["dog"], length=77).repeat_interleave(copies, 0)
    for found, truth in zip(maps.levels.values(), recorder.maps(select, rows), strict=True):
        assert relative(found, truth) < 1e-5
    return recorder, select, maps


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize(("num", "copies"), [(1, 1), (2, 2)])
def test_maps_are_of_the_prompts_in_every_order(tiny_sd, recording, order, change, num, copies):
    pipe, rows = own(tiny_sd, **order, **change), num * copies
    first = rows if pipe.draws_negative_first else 0
    of_prompts, of_negative = slice(first, first + rows), slice(rows - first, 2 * rows - first)
    call = dict(negative_prompt=NEGATIVES[:num], copies=copies)
    recorder, select, maps = check(pipe, recording, PROMPTS[:num], of_prompts, **call)
    for found, wrong in zip(maps.levels.values(), recorder.maps(select, of_negative), strict=True):
        assert relative(found, wrong) > 0.05


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_negative_prompts_that_are_the_prompts(tiny_sd, recording, order):
    check(own(tiny_sd, **order), recording, PROMPTS, slice(2, 4), negative_prompt=list(PROMPTS))
    pipe = own(tiny_sd, **order)
    rows = slice(2, 4) if pipe.draws_negative_first else slice(0, 2)
    check(pipe, recording, PROMPTS, rows, negative_prompt=PROMPTS[::-1])


@pytest.mark.parametrize("order", ORDERS[::2], ids=str)
def test_without_guidance(tiny_sd, recording, order):
    check(own(tiny_sd, **order), recording, PROMPTS, slice(0, 4), guided=False, copies=2)


@pytest.mark.parametrize(("prompt", "negative"), [("dog (a photo)", "dog, a photo"), ("! ? dog", "dog ?!")])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_negative_prompt_of_the_same_letters(tiny_sd, recording, prompt, negative, order):
    pipe = own(tiny_sd, **order)
    rows = slice(1, 2) if pipe.draws_negative_first else slice(0, 1)
    check(pipe, recording, [prompt], rows, negative_prompt=negative)


class Noisy(Own):
    """Encodes to something else each time."""

    def _states(self, texts):
        return super()._states(texts) + 0.01 * torch.randn(1, 77, 32)


class Tiled(Own):
    """Puts the images of a prompt far apart."""

    def encode_prompt(self, prompt, num_images_per_prompt=1, guided=True, negative_prompt=None):
        both = super().encode_prompt(prompt, 1, guided, negative_prompt)
        return tuple(x.repeat(num_images_per_prompt, 1, 1) for x in both)


class Renamed(Own):
    """Weighs what it encodes, and calls the negative prompts otherwise."""

    def encode_prompt(self, prompt, num, guided, avoid):
        return tuple(1.1 * x for x in super().encode_prompt(prompt, num, guided, avoid))


@pytest.mark.parametrize("kind", [Noisy, Renamed])
def test_rows_that_are_not_known_are_refused_before_anything_is_drawn(tiny_sd, kind):
    pipe, calls = own(tiny_sd, kind), []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(DiffuMaskError, match=f"which of the rows that {kind.__name__} encodes are of the prompts"):
        with collect_maps(pipe, ["dog"]):
            draw(pipe, PROMPTS, negative_prompt=NEGATIVES)
    hook.remove()
    assert not calls


def test_images_of_a_prompt_that_are_not_side_by_side_are_refused(tiny_sd):
    pipe = own(tiny_sd, Tiled, weight=1.1)  # known by its negative prompts alone
    with pytest.raises(DiffuMaskError, match="does not put the 2 images of a prompt side by side"):
        with collect_maps(pipe, ["dog"]):
            draw(pipe, PROMPTS, num_images_per_prompt=2)


def test_embeddings_that_are_given_are_found(tiny_sd, recording):
    embeds, negative = tiny_sd.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
    call = dict(prompt_embeds=embeds, negative_prompt_embeds=negative, num_images_per_prompt=2)
    with recording(tiny_sd.unet) as recorder:
        draw(tiny_sd, None, **call)
    with collect_maps(tiny_sd, ["dog"], token_indices=[[[5]], [[2]]]) as maps:
        draw(tiny_sd, None, **call)
    select = phrase_columns(tiny_sd.tokenizer, PROMPTS, ["dog"], length=77).repeat_interleave(2, 0)
    for found, truth in zip(maps.levels.values(), recorder.maps(select, slice(4, 8)), strict=True):
        assert relative(found, truth) < 1e-5


@pytest.mark.parametrize("guidance", [1, 7.5])
def test_embeddings_that_are_no_numbers_are_said(tiny_sd, guidance):
    tiny_sd.text_encoder = copy.deepcopy(tiny_sd.text_encoder)
    next(tiny_sd.text_encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(DiffuMaskError, match="encodes texts to values that are no numbers .*: use `dtype=fp32`"):
        with collect_maps(tiny_sd, ["dog"]):
            draw(tiny_sd, PROMPTS[0], guidance_scale=guidance)


@pytest.mark.parametrize("skip", [None, 1])
def test_prompts_of_two_text_encoders(tiny_sdxl, recording, skip):
    call = dict(prompt=PROMPTS, negative_prompt=NEGATIVES, height=64, width=64, clip_skip=skip)
    with recording(tiny_sdxl.unet) as recorder:
        plain = draw(tiny_sdxl, **call)
    with collect_maps(tiny_sdxl, ["dog"]) as maps:
        assert np.array_equal(draw(tiny_sdxl, **call), plain)
    select = phrase_columns(tiny_sdxl.tokenizer, PROMPTS, ["dog"], length=77)
    for found, truth in zip(maps.levels.values(), recorder.maps(select, slice(2, 4)), strict=True):
        assert relative(found, truth) < 1e-5
