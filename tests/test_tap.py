"""attention/tap.py: layers that did not run, or ran on other tokens than one for each pixel."""

import copy

import numpy as np
import pytest
import torch
from conftest import draw, relative

from diffumask_fast import collect_maps
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.errors import DiffuMaskError

PROMPT = "a photo of a dog on the grass"


@pytest.fixture
def pipe(tiny_sd):
    tiny_sd.unet = copy.deepcopy(tiny_sd.unet)
    return tiny_sd


def parts(unet, where):
    """Return parts of a UNet: one transformer of the finest level, all of it, or all from the second level down."""
    fine = [*unet.down_blocks[0].attentions, *unet.up_blocks[2].attentions]
    deep = [unet.down_blocks[1], unet.down_blocks[2], unet.mid_block, unet.up_blocks[0], unet.up_blocks[1]]
    return {"one": fine[1:2], "fine": fine, "deep": deep}[where]


def cache(module):
    """Let a module run in every other call, and give its last output in the rest, as DeepCache does."""
    forward, kept = module.forward, []

    def cached(*args, **kwargs):
        if len(kept) % 2 == 0:
            kept.append(forward(*args, **kwargs))
        else:
            kept.append(kept[-1])
        return kept[-1]

    module.forward = cached


@pytest.mark.parametrize("where", ["one", "fine", "deep"])
@pytest.mark.parametrize("propagate", ["none", 1])
def test_a_level_is_the_mean_of_the_layers_that_ran(pipe, recording, where, propagate):
    for module in parts(pipe.unet, where):
        cache(module)
    calls = []
    with recording(pipe.unet) as recorder:
        hook = pipe.unet.conv_in.register_forward_pre_hook(lambda *_: calls.append(len(recorder.cross)))
        plain = draw(pipe, PROMPT, steps=4)
        hook.remove()
    with collect_maps(pipe, ["dog"], propagate=propagate) as maps:
        assert np.array_equal(draw(pipe, PROMPT, steps=4), plain)
    select = phrase_columns(pipe.tokenizer, [PROMPT], ["dog"], length=77)
    groups = [recorder.cross[a:b] for a, b in zip(calls, [*calls[1:], None], strict=True)]
    assert len({len(group) for group in groups}) == 2
    for found, pixels in zip(maps.levels.values(), (64, 16, 4), strict=True):
        ran = [[p[1:].mean(1) for p in group if p.shape[2] == pixels] for group in groups]
        truth = torch.stack([torch.stack(group).mean(0) for group in ran if group]).mean(0) @ select
        assert relative(found, truth.transpose(1, 2)) < 1e-5


def merge(attn, by):
    """Let a layer run on means of neighbouring tokens, and give each of them its answer, as token merging does."""
    forward = attn.forward

    def merged(hidden_states, *args, **kwargs):
        few = hidden_states.unflatten(1, (-1, by)).mean(2)
        return forward(few, *args, **kwargs).repeat_interleave(by, 1)

    attn.forward = merged


def layers(unet, name, where):
    return [getattr(block, name) for part in parts(unet, where) for block in part.transformer_blocks]


@pytest.mark.parametrize("by", [2, 4, 16])
def test_merged_tokens_of_all_cross_attention_of_a_level_are_refused(pipe, by):
    for attn in layers(pipe.unet, "attn2", "fine"):
        merge(attn, by)
    steps = []
    with pytest.raises(DiffuMaskError, match="no cross-attention of level 0 ran on all of its pixels"):
        with collect_maps(pipe, ["dog"]):
            draw(pipe, PROMPT, callback_on_step_end=lambda *rest: steps.append(1) or rest[-1])
    assert not steps


def test_merged_tokens_of_one_layer_leave_the_mean_of_the_others(pipe, recording):
    merge(layers(pipe.unet, "attn2", "one")[0], 2)
    with recording(pipe.unet) as recorder:
        plain = draw(pipe, PROMPT)
    with collect_maps(pipe, ["dog"]) as maps:
        assert np.array_equal(draw(pipe, PROMPT), plain)
    recorder.cross = [p for p in recorder.cross if p.shape[2] != 32]
    truth = recorder.maps(phrase_columns(pipe.tokenizer, [PROMPT], ["dog"], length=77), slice(1, 2))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))


@pytest.mark.parametrize("by", [2, 4])
def test_merged_tokens_of_self_attention_have_maps_but_cannot_propagate(pipe, recording, by):
    for attn in layers(pipe.unet, "attn1", "fine"):
        merge(attn, by)
    with recording(pipe.unet) as recorder:
        plain = draw(pipe, PROMPT)
    with collect_maps(pipe, ["dog"], propagate="none") as maps:
        assert np.array_equal(draw(pipe, PROMPT), plain)
    truth = recorder.maps(phrase_columns(pipe.tokenizer, [PROMPT], ["dog"], length=77), slice(1, 2))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))
    steps = []
    with pytest.raises(DiffuMaskError, match="self-attention of level 0 does not run on all .* `propagate=none`"):
        with collect_maps(pipe, ["dog"]):
            draw(pipe, PROMPT, callback_on_step_end=lambda *rest: steps.append(1) or rest[-1])
    assert not steps
