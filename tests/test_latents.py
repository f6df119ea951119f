"""mini/latents.py: scenes encoded once are those that training would have composed."""

import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTokenizer

from diffumask_fast.mini.latents import compose, encode, encode_scenes, load_latents, load_vae, save_latents
from diffumask_fast.mini.tokenizer import write_tokenizer
from diffumask_fast.mini.world import World, load_sprites


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4, scaling_factor=2.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return World(load_sprites())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_the_latents_are_those_of_the_scenes_and_scaled(world, tokenizer):
    vae = tiny_vae()
    latents, ids, shares = encode_scenes(vae, world, tokenizer, seed=3, first=5, num=4)
    images, masks, prompts = compose(world, 3, 5, 4)
    assert latents.shape == (4, 4, 16, 16) and ids.shape == (4, 77) and shares.shape == (4, 1, 16, 16)
    assert torch.allclose(latents, 2 * encode(vae, images)) and latents.dtype == torch.float32
    with torch.no_grad():
        exact = vae.encode(images.float() / 127.5 - 1).latents
    assert (encode(vae, images) - exact).abs().max() < 0.02 * exact.std() + 0.02
    assert [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids] == prompts
    assert torch.allclose(shares.mean((1, 2, 3)), (masks > 0).float().mean((1, 2)))


def test_files_are_read_as_one_pool(world, tokenizer, tmp_path):
    vae = tiny_vae()
    parts = [encode_scenes(vae, world, tokenizer, 0, first, 3) for first in (0, 3)]
    for name, part in zip("ab", parts, strict=True):
        save_latents(tmp_path / f"{name}.safetensors", *part)
    pool = load_latents(tmp_path)
    for found, one, other in zip(pool, *parts, strict=True):
        wanted = torch.cat([one, other])
        assert found.dtype == wanted.dtype and torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_ready_vae_is_loaded_strictly(tmp_path):
    from safetensors.torch import save_file

    state = AutoencoderTiny().state_dict()
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "whole.safetensors")
    vae = load_vae(tmp_path / "whole.safetensors")
    assert next(vae.parameters()).dtype == torch.float32
    assert all(torch.allclose(tensor, state[name], atol=1e-3) for name, tensor in vae.state_dict().items())
    save_file({"encoder.layers.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_vae(tmp_path / "part.safetensors")


def test_the_command_writes_what_training_reads(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    file = tmp_path / "latents" / "0.safetensors"
    command = [sys.executable, "-m", "diffumask_fast.mini.latents", str(file), "--vae", str(tmp_path / "vae")]
    file.parent.mkdir()
    done = subprocess.run([*command, "--num", "3", "--first", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    latents, ids, shares = load_latents(file.parent)
    assert len(latents) == len(ids) == len(shares) == 3
