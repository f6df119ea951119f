import json
import subprocess
import sys

import pytest
import torch

from diffumask_fast.mini import train
from diffumask_fast.mini.latents import compose, encode, save_latents
from diffumask_fast.mini.world import World, load_sprites
from diffumask_fast.pipeline import DiffuMaskPipeline


def run(out, *arguments):
    command = [sys.executable, "-m", "diffumask_fast.mini.train", str(out), "--pool", "40", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "mini"
    run(out, "--stage", "vae", "--steps", 3)
    run(out, "--stage", "unet", "--steps", 2, "--batch-size", 4)
    return out


def test_the_stages_make_a_folder_that_draws(trained):
    pipe = DiffuMaskPipeline.from_pretrained(trained, device="cpu")
    pipe.pipe.set_progress_bar_config(disable=True)
    out = pipe("a photo of a dog on the grass", seeds=[0], num_inference_steps=2)
    assert out.images[0].size == (128, 128) and out.class_ids == [(12,)]
    rows = [json.loads(line) for line in (trained / "training.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["steps"]) for row in rows] == [("vae", 3), ("unet", 2)]


def test_weights_are_fp16_safetensors_and_load_as_fp32(trained):
    from safetensors.torch import load_file
    from transformers import CLIPTextModel

    files = sorted(trained.rglob("*.safetensors"))
    assert len(files) == 3
    tensors = [tensor for path in files for tensor in load_file(path).values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert CLIPTextModel.from_pretrained(trained / "text_encoder").dtype == torch.float32
    assert not list(trained.glob(".*.tmp"))


def test_init_from_goes_on_with_the_weights(trained, tmp_path):
    import shutil

    from safetensors.torch import load_file

    out = shutil.copytree(trained, tmp_path / "more")
    run(out, "--stage", "unet", "--steps", 1, "--batch-size", 4, "--init-from", trained, "--lr", 1e-9)
    before, after = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (trained, out))
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-3) for name in before)


def test_the_decoder_stage_leaves_the_latents_as_they_are(trained, tmp_path):
    import shutil

    from safetensors.torch import load_file

    out = shutil.copytree(trained, tmp_path / "decoder")
    run(out, "--stage", "decoder", "--steps", 2, "--init-from", trained, "--outline-weight", 6)
    name = "vae/diffusion_pytorch_model.safetensors"
    before, after = load_file(trained / name), load_file(out / name)
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder"}
    assert (out / "vae" / "config.json").read_text() == (trained / "vae" / "config.json").read_text()


def test_a_ready_vae_is_taken_and_its_latents_scaled(tmp_path):
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = AutoencoderTiny().state_dict()
    save_file(state, tmp_path / "vae.safetensors")
    run(tmp_path / "out", "--stage", "ready", "--vae", tmp_path / "vae.safetensors")
    vae = AutoencoderTiny.from_pretrained(tmp_path / "out" / "vae")
    assert all(torch.allclose(tensor, state[name], atol=1e-3) for name, tensor in vae.state_dict().items())
    images = compose(World(load_sprites()), 0, 0, 64)[0]
    assert (encode(vae, images) * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.1)


def test_encoded_scenes_take_the_place_of_composed_ones(trained, tmp_path):
    import shutil

    from transformers import CLIPTokenizer

    out = shutil.copytree(trained, tmp_path / "more")
    shutil.rmtree(out / "vae")  # nothing is encoded any more
    tokenizer = CLIPTokenizer.from_pretrained(trained / "tokenizer")
    (tmp_path / "latents").mkdir()
    ids = train.tokens(tokenizer, ["a photo of a dog"] * 8)
    save_latents(tmp_path / "latents" / "0.safetensors", torch.randn(8, 4, 16, 16), ids, torch.rand(8, 1, 16, 16))
    run(
        out,
        "--stage",
        "unet",
        "--steps",
        1,
        "--batch-size",
        4,
        "--init-from",
        trained,
        "--latents",
        tmp_path / "latents",
    )
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_outlines_weigh_more_than_insides():
    inside = torch.zeros(1, 16, 16, dtype=torch.bool)
    inside[0, 4:12, 4:12] = True
    plain, outlined = (train.pixel_weights(inside, weight)[0, 0] for weight in (0.0, 6.0))
    assert plain[0, 0] == outlined[0, 0] == 1 and plain[8, 8] == outlined[8, 8] == 3
    assert plain[4, 8] == 3 and outlined[4, 8] == outlined[3, 8] == 9 and outlined[2, 8] == 3


def test_a_token_state_depends_on_the_token_alone(trained):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(trained / "tokenizer")
    text = CLIPTextModel.from_pretrained(trained / "text_encoder")
    one, other = (text(train.tokens(tokenizer, [prompt]))[0] for prompt in ("a dog", "a cat"))
    assert torch.equal(one[:, :2], other[:, :2]) and torch.equal(one[:, 3:], other[:, 3:])
    assert not torch.equal(one[:, 2], other[:, 2])


def test_ema_follows_the_weights():
    module = torch.nn.Linear(1, 1)
    ema = train.Ema([module], decay=0.5)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    ema.update()
    assert torch.allclose(ema.averages[0].weight, start + 1 - 2 / 11)
