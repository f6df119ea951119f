import copy
import functools
import threading

import diffusers
import numpy as np
import pytest
import torch
from conftest import NOISE, draw, footprint, relative

from diffumask_fast import collect_maps
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.errors import DiffuMaskError

PROMPT = "a photo of a potted plant and a dog"
TAKEN = "maps of this UNet are being collected already: leave the other collect_maps first"


def another_pipeline(pipe):
    """Return a pipeline of its own with the same UNet."""
    own = {"tokenizer": copy.deepcopy(pipe.tokenizer), "scheduler": diffusers.DDIMScheduler(**NOISE)}
    other = diffusers.StableDiffusionPipeline(**{**pipe.components, **own}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def enter(pipe, errors):
    try:
        with collect_maps(pipe, ["dog"]):
            draw(pipe, PROMPT)
    except DiffuMaskError as error:
        errors.append(str(error))


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("same_pipeline", [True, False])
def test_a_second_collector_is_refused_and_the_first_goes_on(tiny_sd, same_pipeline, in_thread):
    before = footprint(tiny_sd)
    with collect_maps(tiny_sd, ["dog"]) as alone:
        image = draw(tiny_sd, PROMPT)
    second, errors = tiny_sd if same_pipeline else another_pipeline(tiny_sd), []
    with collect_maps(tiny_sd, ["dog"]) as maps:
        if in_thread:
            thread = threading.Thread(target=enter, args=(second, errors))
            thread.start()
            thread.join()
        else:
            enter(second, errors)
        assert np.array_equal(draw(tiny_sd, PROMPT), image)
    assert len(errors) == 1 and TAKEN in errors[0]
    assert all(torch.equal(maps.levels[key], alone.levels[key]) for key in alone.levels)
    assert footprint(tiny_sd) == before
    enter(second, errors)
    assert len(errors) == 1 and "encode_prompt" not in vars(second)


def test_entering_one_collector_twice_is_refused(tiny_sd):
    before = footprint(tiny_sd)
    collector = collect_maps(tiny_sd, ["dog"])
    with collector as maps:
        with pytest.raises(DiffuMaskError, match=TAKEN), collector:
            pass
        draw(tiny_sd, PROMPT)
    assert maps.store.calls == 3 and footprint(tiny_sd) == before


def test_a_copy_made_in_the_context_is_plain(tiny_sd):
    with collect_maps(tiny_sd, ["dog"]):
        twin = copy.deepcopy(tiny_sd.unet)
        draw(tiny_sd, PROMPT)
    assert "_compiled_call_impl" not in vars(twin)


def test_a_compiled_unet_stays_compiled(tiny_sd):
    plain, unet = draw(tiny_sd, PROMPT), tiny_sd.unet
    calls = []

    def compiled(*args, **kwargs):
        calls.append(1)
        return unet._call_impl(*args, **kwargs)

    unet._compiled_call_impl = compiled
    try:
        with collect_maps(tiny_sd, ["dog"]) as maps:
            assert np.array_equal(draw(tiny_sd, PROMPT), plain)
        assert len(calls) == maps.store.calls == 3 and unet._compiled_call_impl is compiled
    finally:
        del unet._compiled_call_impl


def test_a_pipeline_with_an_encode_prompt_of_its_own_gets_it_back(tiny_sd):
    own = tiny_sd.encode_prompt
    seen = []

    @functools.wraps(own)
    def encode_prompt(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    tiny_sd.encode_prompt = encode_prompt
    with collect_maps(tiny_sd, ["dog"]):
        draw(tiny_sd, PROMPT)
    assert seen == [1] and tiny_sd.encode_prompt is encode_prompt


def test_a_pipeline_without_encode_prompt_is_refused(tiny_sd):
    class Prompts:
        unet = tiny_sd.unet

    with pytest.raises(DiffuMaskError, match="Prompts has no encode_prompt"):
        collect_maps(Prompts(), ["dog"])


@pytest.mark.parametrize("safety", [5000, 0])
@pytest.mark.parametrize("num", [1, 2])
def test_rows_of_the_prompts_are_known_where_negative_ones_are_returned_first(tiny_sd, recording, safety, num):
    pipe = diffusers.StableDiffusionPipelineSafe(**tiny_sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_concept = "red horse"
    call = dict(prompt=[PROMPT, "a dog"][:num], negative_prompt=["a red sofa", "the cat"][:num])
    call["sld_guidance_scale"] = safety
    with recording(pipe.unet) as recorder:
        plain = draw(pipe, **call)
    with collect_maps(pipe, ["dog"]) as maps:
        assert np.array_equal(draw(pipe, **call), plain)
    select = phrase_columns(pipe.tokenizer, call["prompt"], ["dog"], length=77)
    truth, other = recorder.maps(select, slice(num, 2 * num)), recorder.maps(select, slice(num))
    for found, expected, wrong in zip(maps.levels.values(), truth, other, strict=True):
        assert relative(found, expected) < 1e-5 < 0.05 < relative(wrong, expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_the_pipeline_made_in_the_context_is_plain(tiny_sd, copied):
    plain, before = draw(tiny_sd, "the cat"), vars(tiny_sd).keys() - {"_interrupt"}
    with collect_maps(tiny_sd, ["dog"]) as maps:
        twin = copied(tiny_sd)
        assert vars(twin).keys() - {"_interrupt"} == before
        image = draw(tiny_sd, PROMPT)
        assert maps.store.calls == 3
        assert np.array_equal(draw(twin, "the cat"), plain) and maps.store.calls == 3
    assert np.array_equal(draw(twin, "the cat"), plain) and np.array_equal(draw(twin, PROMPT), image)
    with collect_maps(twin, ["cat"]) as maps:
        draw(twin, "the cat")
    assert maps.store.calls == 3


def test_a_copy_encodes_by_its_own_text_encoder(tiny_sd):
    with collect_maps(tiny_sd, ["dog"]):
        twin = copy.copy(tiny_sd)
        draw(tiny_sd, PROMPT)
    twin.text_encoder = copy.deepcopy(tiny_sd.text_encoder)
    torch.nn.init.normal_(twin.text_encoder.get_input_embeddings().weight)
    assert not torch.equal(*(pipe.encode_prompt("a dog", "cpu", 1, False)[0] for pipe in (twin, tiny_sd)))


class CopiesItself(diffusers.StableDiffusionPipeline):
    def __copy__(self):
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin


def test_a_copy_that_kept_our_encode_prompt_is_refused(tiny_sd):
    pipe = CopiesItself(**tiny_sd.components, requires_safety_checker=False)
    with collect_maps(pipe, ["dog"]):
        twin = copy.copy(pipe)
        draw(pipe, PROMPT)
    with pytest.raises(DiffuMaskError, match="CopiesItself that was copied while .* copy it outside"):
        draw(twin, PROMPT)
    draw(copy.copy(pipe), PROMPT)
