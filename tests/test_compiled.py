import numpy as np
import pytest
import torch
from conftest import make_unet, make_vae, relative
from torch._dynamo.utils import counters

from diffumask_fast import compiled
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.compiled import CompiledDenoiser, compile_pipe
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import native
from diffumask_fast.pipeline import DiffuMaskPipeline


@torch.no_grad()
def test_maps_and_noise_are_the_eager_ones_and_a_smaller_batch_compiles_nothing():
    torch.manual_seed(0)
    unet = make_unet()
    eager, found = UNetWithMaps(unet), CompiledDenoiser(unet)
    counters.clear()
    for images in (3, 3, 2):
        call = dict(
            latents=torch.randn(2 * images, 4, 8, 8), timestep=torch.tensor(500),
            encoder_hidden_states=torch.randn(2 * images, 77, 32), select=torch.rand(images, 77, 2),
            prior={"1": torch.rand(images, 2, 16)},
        )  # fmt: skip
        (noise, maps, propagated), truth = found(**call), eager(**call)
        assert relative(noise, truth[0]) < 1e-5 and noise.shape == truth[0].shape
        for levels, wanted in ((maps, truth[1]), (propagated, truth[2])):
            assert levels.keys() == wanted.keys() and levels
            assert all(relative(levels[key], wanted[key]) < 1e-5 for key in wanted)
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_a_smaller_batch_is_decoded_by_the_same_code():
    torch.manual_seed(0)
    vae = make_vae().eval()
    latents = torch.randn(3, 4, 8, 8)
    truth = vae.decode(latents).sample
    compiled._compile_decoder(vae.decoder, 8)
    counters.clear()
    for rows in (3, 3, 2, 1):
        assert relative(vae.decode(latents[:rows]).sample, truth[:rows]) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def test_a_machine_without_a_compiler_is_told_before_anything_is_drawn(tiny_sd, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    native.library.cache_clear()
    with pytest.raises(DiffuMaskError, match="needs a C\\+\\+ compiler.*--engine torch"):
        compile_pipe(tiny_sd)


def test_an_engine_path_is_for_other_engines(tmp_path):
    with pytest.raises(DiffuMaskError, match="--engine compile takes no --engine-path"):
        DiffuMaskPipeline.from_pretrained("mini", engine="compile", engine_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, iou", [("fp32", 0.99), ("bf16", 0.90)])
def test_mini_draws_the_same_masks(dtype, iou):
    drawn = []
    for engine, its_dtype in (("torch", "fp32"), ("compile", dtype)):
        pipe = DiffuMaskPipeline.from_pretrained("mini", engine=engine, device="cpu", dtype=its_dtype)
        pipe.pipe.set_progress_bar_config(disable=True)
        prompts = ["a photo of a dog on the grass", "a photo of a car on the street"]
        out = pipe(prompts, [["dog"], ["car"]], seeds=[1, 2])
        assert out.provenance["engine"]["name"] == engine
        drawn.append(out.masks > 0)
    both, either = np.logical_and(*drawn).sum((1, 2)), np.logical_or(*drawn).sum((1, 2))
    assert both.min() > 0 and (both / either).mean() >= iou
