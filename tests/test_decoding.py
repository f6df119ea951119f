from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import draw
from diffusers import (
    AutoencoderKL,
    ConsistencyDecoderVAE,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from diffumask_fast.models.decoding import decode, decodes_later, timed_decoding
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
    for name in ("unet", "text_encoder"):  # copies: other tests share the parts
        setattr(tiny_sd, name, deepcopy(getattr(tiny_sd, name)).to(torch.bfloat16))
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
    kind = type("StableDiffusionPipeline", (StableDiffusionPipeline,), {})
    assert not decodes_later(kind(**tiny_sd.components, requires_safety_checker=False))


def test_a_vae_that_draws_noise_decodes_in_its_call(tiny_sd):
    tiny_sd.vae = ConsistencyDecoderVAE.__new__(ConsistencyDecoderVAE)
    assert not decodes_later(tiny_sd)


@torch.no_grad()
def test_an_image_processor_that_does_not_normalise_changes_nothing(tiny_sd):
    tiny_sd.image_processor.register_to_config(do_normalize=False)
    found = decode(tiny_sd, draw(tiny_sd, "a red dog", output_type="latent"), Seconds())
    assert torch.equal(found, draw(tiny_sd, "a red dog", output_type="pt"))


def test_a_vae_to_be_upcast_decodes_in_the_call_of_sdxl(tiny_sdxl, tiny_sd):
    tiny_sdxl.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, force_upcast=True)
    assert decodes_later(tiny_sdxl)
    tiny_sdxl.vae.half()
    assert not decodes_later(tiny_sdxl)
    tiny_sd.vae = tiny_sdxl.vae  # Stable Diffusion's call does not upcast
    assert decodes_later(tiny_sd)


@pytest.fixture
def stored_as_fp8(pipe):
    """A VAE whose weights are fp8, computing in fp32."""
    wide = dict(block_out_channels=(8,) * 4, norm_num_groups=4)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    pipe.vae = AutoencoderKL(**wide, **blocks).eval()
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.vae.decoder.conv_out.weight.dtype == torch.float8_e4m3fn
    return pipe


@torch.no_grad()
def test_a_vae_stored_as_fp8_decodes_as_its_call_does(stored_as_fp8):
    pipe, size = stored_as_fp8, dict(height=64, width=64)
    plain = draw(pipe, "a red dog", output_type="pt", **size)
    found = decode(pipe, draw(pipe, "a red dog", output_type="latent", **size), Seconds())
    assert torch.equal(found, plain) and plain.std() > 0.01
    with timed_decoding(pipe, Seconds()):
        assert torch.equal(draw(pipe, "a red dog", output_type="pt", **size), plain)


@torch.no_grad()
def test_a_vae_stored_as_fp8_encodes_as_its_call_does(stored_as_fp8):
    kind = {"StableDiffusionPipeline": StableDiffusionImg2ImgPipeline}
    kind = kind.get(type(stored_as_fp8).__name__, StableDiffusionXLImg2ImgPipeline)
    pipe = kind.from_pipe(stored_as_fp8)
    given = dict(image=torch.rand(1, 3, 64, 64), strength=0.9, output_type="pt")
    plain = draw(pipe, "a red dog", **given)
    with timed_decoding(pipe, Seconds()):
        assert torch.equal(draw(pipe, "a red dog", **given), plain)
