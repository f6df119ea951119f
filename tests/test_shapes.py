"""kernels/shapes.py: the table is what the UNets' configurations give."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from diffumask_fast.bench import GEOMETRIES
from diffumask_fast.bench.geometries import cross_layers, unet_config
from diffumask_fast.kernels.shapes import KEYS, MODELS, STABLE_DIFFUSION


def flops(geometry):
    """Count the FLOPs of one forward of one sample, on tensors without storage."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        unet = UNet2DConditionModel.from_config(unet_config(geometry))
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)} if geometry == "sdxl" else None
        latents = torch.zeros(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        states = torch.zeros(1, KEYS, unet.config.cross_attention_dim)
        unet(latents, torch.zeros(1), states, added_cond_kwargs=added)
    return counted.get_total_flops()


def test_there_is_a_model_for_every_geometry():
    assert tuple(MODELS) == GEOMETRIES and len(STABLE_DIFFUSION) == len(MODELS) - 1


@pytest.mark.parametrize("geometry", MODELS)
def test_the_layers_and_flops_are_those_of_the_unet(geometry):
    model = MODELS[geometry]
    assert {layer.shape: layer.count for layer in model.layers} == cross_layers(geometry)
    assert flops(geometry) == pytest.approx(model.flops, rel=1e-3)
    side = 8 * unet_config(geometry)["sample_size"]
    assert f", {side} x {side}" in model.name
