from types import SimpleNamespace

import pytest
import torch
from conftest import draw
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline

from diffumask_fast.decoding import decode, decodes_later, timed_decoding
from diffumask_fast.results import Seconds


@pytest.fixture(params=["sd", "sdxl", "sdxl with moments"])
def pipe(request, tiny_sd, tiny_sdxl):
    if request.param == "sd":
        return tiny_sd
    if request.param == "sdxl with moments":
        moments = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 2.0, 1.0])
        tiny_sdxl.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **moments).eval()
    return tiny_sdxl


@torch.no_grad()
def test_pixels_are_those_of_the_call(pipe):
    seconds = Seconds()
    assert decodes_later(pipe)
    found = decode(pipe, draw(pipe, "a red dog", output_type="latent"), seconds)
    assert torch.equal(found, draw(pipe, "a red dog", output_type="pt")) and found.std() > 0.01
    assert seconds.decode > 0


@torch.no_grad()
def test_an_fp32_vae_decodes_bf16_latents(tiny_sd):
    tiny_sd.unet.to(torch.bfloat16), tiny_sd.text_encoder.to(torch.bfloat16)
    found = decode(tiny_sd, draw(tiny_sd, "a red dog", output_type="latent"), Seconds())
    with timed_decoding(tiny_sd, Seconds()):
        assert torch.equal(found, draw(tiny_sd, "a red dog", output_type="pt"))


def test_what_does_more_than_decode_decodes_in_its_call(tiny_sd, tiny_sdxl):
    tiny_sd.safety_checker = SimpleNamespace()
    tiny_sdxl.watermark = SimpleNamespace()
    assert not decodes_later(tiny_sd) and not decodes_later(tiny_sdxl)
    tiny_sd.safety_checker = tiny_sdxl.watermark = None
    assert decodes_later(tiny_sd) and decodes_later(tiny_sdxl)
    tiny_sd.vae._hf_hook = None
    assert not decodes_later(tiny_sd)
    other = StableDiffusionImg2ImgPipeline(**tiny_sd.components, requires_safety_checker=False)
    assert not decodes_later(other)


def test_a_vae_to_be_upcast_decodes_in_its_call(tiny_sdxl):
    tiny_sdxl.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, force_upcast=True)
    assert decodes_later(tiny_sdxl)
    tiny_sdxl.vae.half()
    assert not decodes_later(tiny_sdxl)
