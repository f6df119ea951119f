"""attention/encoded.py: positions of words in what the text encoder was given."""

import copy

import pytest
import torch
from conftest import draw, relative
from diffusers import StableDiffusionPipeline

from diffumask_fast import collect_maps
from diffumask_fast.errors import DiffuMaskError


def positions(pipe, prompt, phrase, **kwargs):
    """Return the positions that the maps are of: those whose one-token maps give them."""
    seen = []
    with collect_maps(pipe, [phrase]) as maps:
        original = maps._begin

        def begin(*args):
            seen.append(original(*args))
            return seen[-1]

        maps._begin = begin
        draw(pipe, prompt, steps=1, **kwargs)
    return seen[0].select[0, :, 0].nonzero().flatten().tolist()


def test_padding_on_the_left(tiny_sd):
    tiny_sd.tokenizer = copy.deepcopy(tiny_sd.tokenizer)
    tiny_sd.tokenizer.padding_side = "left"
    ids = tiny_sd.tokenizer("a photo of a dog", padding="max_length", max_length=77).input_ids
    at = ids.index(tiny_sd.tokenizer("dog", add_special_tokens=False).input_ids[0])
    assert at > 60 and positions(tiny_sd, "a photo of a dog", "dog") == [at]


class Weighting(StableDiffusionPipeline):
    """Takes the brackets of a prompt away before it is encoded."""

    def encode_prompt(self, prompt, *args, **kwargs):
        return super().encode_prompt(prompt.replace("((", "").replace(":1.3))", ""), *args, **kwargs)


def test_brackets_that_are_taken_away_do_not_count(tiny_sd):
    pipe = Weighting(**tiny_sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert positions(pipe, "a ((red:1.3)) dog", "dog") == [3] and positions(pipe, "a ((red:1.3)) dog", "red") == [2]


class Chunks(StableDiffusionPipeline):
    """Encodes a long prompt in two chunks."""

    def encode_prompt(self, prompt, device, num, guidance, negative_prompt=None, **rest):
        def encode(text):
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            both = []
            for part in (ids[:75], ids[75:150]):
                bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
                chunk = [bos, *part, *[eos] * (76 - len(part))]
                both.append(self.text_encoder(torch.tensor([chunk]))[0])
            return torch.cat(both, 1)

        return encode(prompt), encode(negative_prompt or "")


def test_a_word_in_the_second_chunk(tiny_sd):
    pipe = Chunks(**tiny_sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert positions(pipe, "on " * 80 + "dog", "dog") == [77 + 1 + 5]


class Shifted(StableDiffusionPipeline):
    """Puts tokens of its own before those of the prompt."""

    def encode_prompt(self, *args, **kwargs):
        found = super().encode_prompt(*args, **kwargs)
        return tuple(torch.cat([x[:, :3], x], 1) for x in found)


def test_positions_that_are_not_known_must_be_given(tiny_sd):
    pipe = Shifted(**tiny_sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(DiffuMaskError, match=r"given \(1, 77\), \(1, 77\) for .* sees as 80 tokens.*token_indices="):
        with collect_maps(pipe, ["dog"]):
            draw(pipe, "a dog")
    with collect_maps(pipe, ["dog"], token_indices=[[5]]) as maps:
        draw(pipe, "a dog")
    assert maps.levels["0"].amax() > 0


def test_two_prompts_of_one_image_must_agree(tiny_sdxl):
    same = dict(height=64, width=64)
    assert positions(tiny_sdxl, "a red dog", "dog", prompt_2="the red dog", **same) == [3]
    with pytest.raises(DiffuMaskError, match="have the phrases at different positions"):
        positions(tiny_sdxl, "a red dog", "dog", prompt_2="a dog", **same)


def test_a_negative_prompt_with_the_same_word_is_not_taken_for_the_prompt(tiny_sd):
    assert positions(tiny_sd, "a photo of a dog", "dog", negative_prompt="dog") == [5]
    with collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, "a photo of a dog", negative_prompt="a photo of a dog")
    with collect_maps(tiny_sd, ["dog"]) as alone:
        draw(tiny_sd, "a photo of a dog", guidance_scale=1.0)
    assert relative(maps.levels["0"], alone.levels["0"]) < 1e-4
