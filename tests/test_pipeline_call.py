"""attention/pipeline_call.py: rows, steps and windows of one call of a pipeline."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import draw, relative
from PIL import Image

from diffumask_fast import collect_maps
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.attention.pipeline_call import PipelineCall, Steps
from diffumask_fast.errors import DiffuMaskError

PROMPT = "a photo of a dog on the grass"


@pytest.mark.parametrize(
    ("timesteps", "timestep", "left"),
    [
        (None, 5, None),
        ([], 5, None),
        ([9, 7, 7, 5, 3], 7, 4),
        ([9, 7, 7, 5, 3], torch.tensor([5, 5]), 2),
        ([9, 7, 7, 5, 3], 8, 5),
    ],
)
def test_the_calls_that_are_left_are_counted(timesteps, timestep, left):
    assert Steps(timesteps if timesteps is None else torch.tensor(timesteps)).left(timestep) == left


@pytest.mark.parametrize("copied", [False, True])
def test_each_step_of_a_schedule_is_made_once(copied):
    timesteps = torch.tensor([9, 7, 7, 5, 3])
    given = [int(t) for t in timesteps] if copied else list(timesteps)
    steps = Steps(timesteps)
    assert all(steps.advance(t) for t in given)
    for again in range(5):
        steps = Steps(timesteps)
        assert all(steps.advance(t) for t in given[: again + 1])
        repeated = again if not copied or again != 1 else 0  # of two equal timesteps the second is still to come
        assert not steps.advance(given[repeated])
    assert Steps(timesteps).advance(4) and Steps(None).advance(4)


def call(embeds, is_doubled=False):
    return PipelineCall(None, [["dog"]] * len(embeds), torch.zeros(len(embeds), 7, 1), embeds, is_doubled)


def test_the_rows_of_the_prompts_are_found_where_they_stand():
    embeds, other = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    made = call(embeds)
    for blocks, first in (([other, embeds], 2), ([embeds, other, other], 0), ([embeds], 0), ([other], None)):
        assert made.first_row(torch.cat(blocks)) == first
    assert made.first_row(torch.randn(2, 9, 16)) is None
    assert made.seen.endswith("called with encoder_hidden_states of (2, 9, 16) that do not contain them")


def test_where_negative_prompts_are_the_prompts_the_first_rows_are_theirs():
    embeds = torch.randn(2, 7, 16)
    assert call(embeds, True).first_row(torch.cat([embeds] * 3)) == 2
    assert call(embeds).first_row(torch.cat([embeds] * 2)) == 0


def test_rows_that_were_changed_in_place_are_looked_at_again():
    embeds = torch.randn(1, 7, 16)
    made, states = call(embeds), embeds.clone()
    assert made.first_row(states) == 0
    states.mul_(2)
    assert made.first_row(states) is None


def test_rows_in_another_dtype_are_the_same():
    embeds = torch.randn(1, 7, 16)
    assert call(embeds).first_row(torch.cat([torch.zeros_like(embeds), embeds]).half()) == 1


@pytest.fixture
def panorama(tiny_sd):
    pipe = diffusers.StableDiffusionPanoramaPipeline(**tiny_sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("rest", [{}, {"view_batch_size": 2}, {"circular_padding": True}])
def test_windows_of_a_larger_image_are_refused_at_the_first(panorama, rest):
    calls = []
    hook = panorama.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(DiffuMaskError, match="draws latents of 64x72 in windows of 64x64.* ask for an image of one"):
        with collect_maps(panorama, ["dog"]):
            draw(panorama, PROMPT, height=512, width=576, steps=1, **rest)
    hook.remove()
    assert not calls


def test_one_window_is_the_image(panorama, recording):
    call = dict(height=512, width=512, steps=1)
    with recording(panorama.unet) as recorder:
        plain = draw(panorama, PROMPT, **call)
    with collect_maps(panorama, ["dog"]) as maps:
        assert np.array_equal(draw(panorama, PROMPT, **call), plain)
    truth = recorder.maps(phrase_columns(panorama.tokenizer, [PROMPT], ["dog"], length=77), slice(1, 2))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))


class InTwoParts(diffusers.StableDiffusionPipeline):
    """Predicts the noise of the left and of the right half by themselves, as tiled programs do."""

    def __call__(self, prompt, **kwargs):
        embeds, _ = self.encode_prompt(prompt, "cpu", 1, False)
        whole = torch.randn(1, 4, 8, 16, generator=kwargs["generator"])
        self.scheduler.set_timesteps(kwargs["num_inference_steps"])
        for t in self.scheduler.timesteps:
            parts = [self.unet(x, t, encoder_hidden_states=embeds).sample for x in whole.chunk(2, -1)]
            whole = self.scheduler.step(torch.cat(parts, -1), t, whole).prev_sample
        return diffusers.ImagePipelineOutput([Image.new("RGB", (64, 64))])


@torch.no_grad()
def test_parts_of_an_image_that_nobody_names_are_refused(tiny_sd):
    pipe = InTwoParts(**tiny_sd.components, requires_safety_checker=False)
    with pytest.raises(DiffuMaskError, match="calls the UNet more than once for these prompts in one step"):
        with collect_maps(pipe, ["dog"]):
            draw(pipe, PROMPT)
