"""attention/processor.py: a UNet that its user gave to xformers. What other layers draw and give is in test_unet.py."""

import copy

import pytest
import torch
from conftest import draw, footprint, relative
from diffusers.models.attention_processor import XFormersAttnProcessor
from test_unet import inputs, plain

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.attention.unet import UNetWithMaps, attention_places


@pytest.fixture(params=["sd", "sdxl"])
def unet(request, sd_parts, sdxl_parts):
    return copy.deepcopy({"sd": sd_parts, "sdxl": sdxl_parts}[request.param]["unet"])


def num_self(unet, levels=None):
    places = attention_places(unet).values()
    return sum(not place.cross and (levels is None or place.level in levels) for place in places)


@torch.no_grad()
def test_xformers_draws_self_attention_and_the_maps_are_exact(unet, recording, xformers):
    call = inputs(unet, size=(13, 9))
    with recording(unet) as recorder:
        expected = plain(unet, call)
    op = (object(), object())
    unet.set_attn_processor(XFormersAttnProcessor(op))
    noise_pred, maps, _ = UNetWithMaps(unet)(UNetCall(**call))
    assert len(xformers) == num_self(unet) and {one["op"] for one in xformers} == {op}
    assert all(one["query"].shape == one["key"].shape for one in xformers)
    assert relative(noise_pred, expected) < 1e-5
    truth = recorder.maps(call["select"], slice(2, 4))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.values(), truth, strict=True))
    assert all(relative(value.mean(-1, keepdim=True), value) > 0.1 for value in truth)


@torch.no_grad()
def test_a_level_that_is_propagated_is_drawn_by_the_product_that_propagates(unet, recording, xformers):
    call = inputs(unet)
    with recording(unet) as recorder:
        expected = plain(unet, call)
    unet.set_attn_processor(XFormersAttnProcessor())
    denoiser = UNetWithMaps(unet)
    pixels = {key: value.shape[-1] for key, value in denoiser(UNetCall(**call))[1].items()}
    xformers.clear()
    prior = {"1": torch.rand(2, 3, pixels["1"])}
    noise_pred, maps, propagated = denoiser(UNetCall(**call, prior=prior))
    assert len(xformers) == num_self(unet, set(denoiser.keys) - {"1"})
    assert relative(noise_pred, expected) < 1e-5
    assert relative(propagated["1"], recorder.propagate(prior["1"], slice(2, 4))) < 1e-5
    truth = recorder.maps(call["select"], slice(2, 4))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.values(), truth, strict=True))


@torch.no_grad()
def test_a_mask_on_the_tokens_is_obeyed(sd_parts, xformers):
    unet = copy.deepcopy(sd_parts["unet"])
    call, mask = inputs(unet), torch.ones(4, 77)
    mask[:, 50:] = 0
    truth = UNetWithMaps(unet)(UNetCall(**call, unet_kwargs={"encoder_attention_mask": mask}))
    unet.set_attn_processor(XFormersAttnProcessor())
    found = UNetWithMaps(unet)(UNetCall(**call, unet_kwargs={"encoder_attention_mask": mask}))
    assert xformers and relative(found[0], truth[0]) < 1e-5
    assert all(relative(found[1][key], truth[1][key]) < 1e-5 for key in truth[1])


def test_a_pipeline_keeps_its_processors_and_its_image(tiny_sd, xformers):
    expected = draw(tiny_sd, "a photo of a dog")
    with collect_maps(tiny_sd, ["dog"], propagate="none") as truth:
        draw(tiny_sd, "a photo of a dog")
    kept = tiny_sd.unet.attn_processors
    tiny_sd.unet.set_attn_processor(XFormersAttnProcessor())
    try:
        before = footprint(tiny_sd)
        with collect_maps(tiny_sd, ["dog"], propagate="none") as maps:
            image = draw(tiny_sd, "a photo of a dog")
        assert footprint(tiny_sd) == before and len(xformers) == 3 * num_self(tiny_sd.unet)
    finally:
        tiny_sd.unet.set_attn_processor(kept)
    assert abs(image - expected).max() < 1e-4
    assert all(relative(maps.levels[key], truth.levels[key]) < 1e-4 for key in truth.levels)


@torch.no_grad()
def test_a_compiler_gets_our_product_in_every_layer(sd_parts, xformers):
    torch._dynamo.reset()
    unet = copy.deepcopy(sd_parts["unet"])
    call = inputs(unet)
    truth = UNetWithMaps(unet)(UNetCall(**call))
    unet.set_attn_processor(XFormersAttnProcessor())
    found = torch.compile(UNetWithMaps(unet), fullgraph=True, backend="eager")(UNetCall(**call))
    assert not xformers and torch.equal(found[0], truth[0])
    assert all(torch.equal(found[1][key], truth[1][key]) for key in truth[1])


@pytest.mark.gpu
@pytest.mark.parametrize("prompt_size", [64, 96])
def test_the_real_xformers_draws_and_the_maps_are_exact(tiny_sd, prompt_size):
    """On CUDA, in fp16, against SDPA with the same weights."""
    pytest.importorskip("xformers")
    pipe = copy.deepcopy(tiny_sd).to("cuda", torch.float16)
    pipe.set_progress_bar_config(disable=True)
    size = dict(height=prompt_size, width=prompt_size)
    drawn = []
    for enable in (False, True):
        if enable:
            pipe.enable_xformers_memory_efficient_attention()
            assert {type(p) for p in pipe.unet.attn_processors.values()} == {XFormersAttnProcessor}
        with collect_maps(pipe, ["dog"], propagate=1) as maps:
            drawn.append((draw(pipe, "a photo of a dog", **size), maps.levels))
    (image, levels), (other, other_levels) = drawn
    assert abs(image - other).max() < 0.05
    assert all(relative(other_levels[key], levels[key]) < 0.05 for key in levels)
