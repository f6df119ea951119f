import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_mmdit import save

from diffumask_fast import DiffuMaskError
from diffumask_fast.attention.unet import attention_places
from diffumask_fast.bench import geometries
from diffumask_fast.bench.geometries import check_memory, free_bytes, open_geometry, reference_bytes, unet_config

# parameters of the published UNets, and their cross-attention layers at each level, the finest first
PUBLISHED = {
    "sd15": (859_520_964, [5, 5, 5, 1]),
    "sd21": (865_910_724, [5, 5, 5, 1]),
    "sdxl": (2_567_463_684, [10, 60]),
}


@pytest.mark.parametrize("geometry", PUBLISHED)
def test_the_shapes_are_the_published_ones(geometry):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(geometry))
    parameters, layers = PUBLISHED[geometry]
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    places = [place for place in attention_places(unet).values() if place.cross]
    assert [sum(place.level == level for place in places) for level in sorted({p.level for p in places})] == layers


def test_the_references_store_of_sd15_is_what_was_published():
    # facts of the reference program: about 10.9 GiB at the end of a call, 98 % of it self-attention
    assert reference_bytes("sd15") / 2**30 == pytest.approx(10.9, abs=0.05)


def test_the_references_store_of_mini_is_what_it_holds():
    from diffumask_fast.bench.contenders import Contenders
    from diffumask_fast.bench.memory import against_reference

    _, config = against_reference(Contenders(open_geometry("mini", "cpu"), 1, 1))
    assert 2 * config["reference_kept_gib"] == pytest.approx(reference_bytes("mini") / 2**30, abs=2e-4)


def test_random_weights_are_the_same_each_time(monkeypatch):
    small = dict(block_out_channels=(32, 32, 32, 32), norm_num_groups=8, attention_head_dim=2)
    monkeypatch.setitem(geometries.UNETS, "sd15", geometries.UNETS["sd15"] | small)
    text = dict(hidden_size=768, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setitem(geometries.TEXTS, "sd15", (text,))
    monkeypatch.setattr(geometries, "VAE", geometries.VAE | dict(block_out_channels=(32,) * 4))
    before = torch.get_rng_state()
    one, two = open_geometry("sd15", "cpu"), open_geometry("sd15", "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(one.pipe.unet.parameters(), two.pipe.unet.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and any(a.std() > 0 for a, _ in pairs)
    out = one(["a photo of a dog"], classes=[["dog"]], num_inference_steps=1, height=64, width=64)
    assert out.masks.shape == (1, 64, 64)


def test_memory():
    assert free_bytes() > 2**28
    check_memory("mini")


@pytest.mark.parametrize("reference", [True, False])
def test_too_little_memory(monkeypatch, reference):
    monkeypatch.setattr(geometries, "free_bytes", lambda device: 2**32)
    with pytest.raises(DiffuMaskError, match="Geometry sdxl .*GiB in fp32, and 4.0 GiB are free"):
        check_memory("sdxl", reference=reference)


def test_an_unknown_geometry():
    with pytest.raises(DiffuMaskError, match="no geometry sd3: use mini, sd15, sd21, sdxl"):
        open_geometry("sd3")


def test_a_model_without_a_unet(flux, tmp_path):
    with pytest.raises(DiffuMaskError, match="model has no UNet, and what is compared here draws with one"):
        open_geometry("mini", "cpu", model=save(flux, tmp_path / "model"))
