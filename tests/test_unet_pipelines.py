"""Pipelines with a UNet, each with what makes it its own: images as without maps, maps as in a store of all scores."""

import copy

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NOISE, draw, make_unet, new_pipe, relative, sharpen
from loras import write_lora
from PIL import Image
from torch.overrides import TorchFunctionMode

from diffumask_fast import DiffuMaskPipeline, collect_maps
from diffumask_fast.attention.phrases import phrase_columns

PROMPTS = ["a photo of a dog on the grass", "the cat on the red sofa"]
PHRASES = [["dog", "grass"], ["cat"]]
PICTURE = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
HALF = Image.fromarray(np.repeat([[0], [255]], 32, 0).repeat(64, 1).astype(np.uint8))
TOKENS = 77


class Scores(TorchFunctionMode):
    """An independent store: the fp32 softmax of each product over the prompts' tokens, in calls of one UNet."""

    def __init__(self, unet):
        super().__init__()
        self.found, self.inside, self.hooks = {}, False, []
        self.hooks.append(unet.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)))
        self.hooks.append(unet.register_forward_hook(lambda *_: setattr(self, "inside", False)))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and self.inside and args[1].shape[2] == TOKENS:
            q, k = (x.float() for x in args[:2])
            probs = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1).mean(1)
            self.found.setdefault(q.shape[2], []).append(probs)
        return func(*args, **(kwargs or {}))

    def maps(self, select, rows):
        """Return a list of [Bc, K, N], the finest level first."""
        levels = (self.found[pixels] for pixels in sorted(self.found, reverse=True))
        return [(torch.stack([p[rows] for p in level]).mean(0) @ select).transpose(1, 2) for level in levels]


def check(pipe, *, guided=True, **kwargs):
    """Draw plainly with a store of all scores, then with maps, then as a DiffuMaskPipeline."""
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"steps": 2, **kwargs}
    scores = Scores(pipe.unet)
    with scores:
        plain = draw(pipe, PROMPTS, **kwargs)
    for hook in scores.hooks:
        hook.remove()
    rows = slice(2, 4) if guided else slice(0, 2)
    tokenizer = pipe.tokenizer or pipe.tokenizer_2
    truth = scores.maps(phrase_columns(tokenizer, PROMPTS, PHRASES, length=TOKENS), rows)
    with collect_maps(pipe, PHRASES) as maps:
        assert np.array_equal(draw(pipe, PROMPTS, **kwargs), plain)
    assert list(maps.levels) == [str(i) for i in range(len(truth))]
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))
    assert all(relative(torch.full_like(one, 1 / TOKENS), one) > 0.1 for one in truth)
    assert np.array_equal(draw(pipe, PROMPTS, **kwargs), plain)
    made = dict(num_inference_steps=kwargs.pop("steps"), output_type="np", **kwargs)
    out = DiffuMaskPipeline.from_pipe(pipe)(PROMPTS, PHRASES, generator=torch.Generator().manual_seed(0), **made)
    assert np.array_equal(out.images, plain) and out.masks.shape == plain.shape[:3]
    return plain, maps


def with_unet(tiny, kind=None, **changes):
    """Return a pipeline like a tiny one with a UNet of another kind."""
    torch.manual_seed(3)
    parts = {name: part for name, part in tiny.components.items() if name != "scheduler"}
    return new_pipe(kind or type(tiny), {**parts, "unet": sharpen(make_unet(**changes))}, requires_safety_checker=False)


@pytest.fixture
def pipe(tiny_sd):
    """A pipeline whose models may be changed."""
    tiny_sd.unet = copy.deepcopy(tiny_sd.unet)
    tiny_sd.text_encoder = copy.deepcopy(tiny_sd.text_encoder)
    return tiny_sd


def test_stable_diffusion_2_predicts_velocity(tiny_sd):
    pipe = with_unet(tiny_sd, sample_size=12, use_linear_projection=True, attention_head_dim=(2, 2, 4))
    pipe.scheduler = diffusers.DDIMScheduler(**NOISE, prediction_type="v_prediction")
    plain, maps = check(pipe)
    assert plain.shape[1] == 96 and maps.store.sizes["0"] == (12, 12)
    pipe.scheduler = diffusers.DDIMScheduler(**NOISE)
    assert not np.array_equal(draw(pipe, PROMPTS, steps=2), plain)


@pytest.mark.parametrize("guided", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sdxl_with_its_conditions(tiny_sdxl, guided):
    own = dict(original_size=(96, 96), target_size=(64, 64), crops_coords_top_left=(8, 0))
    check(tiny_sdxl, guided=guided, guidance_scale=5.0 if guided else 1.0, height=64, width=64, **own)


def test_sdxl_s_refiner(tokenizer, sdxl_parts):
    torch.manual_seed(4)
    unet = make_unet(
        cross_attention_dim=32, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 5 * 8,
    )  # fmt: skip
    parts = {**sdxl_parts, "unet": sharpen(unet), "text_encoder": None, "tokenizer": None}
    rest = dict(requires_aesthetics_score=True, add_watermarker=False)
    pipe = new_pipe(diffusers.StableDiffusionXLImg2ImgPipeline, parts, **rest)
    check(pipe, image=[PICTURE] * 2, strength=0.5, steps=4, aesthetic_score=7.0)


def test_lcm_with_an_embedding_of_its_guidance(tiny_sd):
    pipe = with_unet(tiny_sd, diffusers.LatentConsistencyModelPipeline, time_cond_proj_dim=16)
    pipe.scheduler = diffusers.LCMScheduler(**{**NOISE, "clip_sample": False})
    plain, maps = check(pipe, guided=False, guidance_scale=8.0)
    assert maps.store.calls == maps.store.num_calls == 2
    assert not np.array_equal(draw(pipe, PROMPTS, steps=2, guidance_scale=2.0), plain)


@pytest.mark.parametrize(("name", "steps"), [("EulerAncestralDiscreteScheduler", 1), ("EulerDiscreteScheduler", 2)])
def test_turbo_and_lightning(tiny_sdxl, name, steps):
    pipe = tiny_sdxl
    pipe.scheduler = getattr(diffusers, name)(**{k: v for k, v in NOISE.items() if k != "clip_sample"})
    pipe.scheduler.register_to_config(timestep_spacing="trailing")
    _, maps = check(pipe, guided=False, steps=steps, guidance_scale=0.0, height=64, width=64)
    assert maps.store.calls == maps.store.num_calls == steps


def test_weights_stored_as_fp8(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.dtype == torch.float8_e4m3fn
    check(pipe)


@pytest.mark.parametrize("channels", [pytest.param(4, marks=pytest.mark.slow), 9])
def test_inpainting(tiny_sd, channels):
    pipe = with_unet(tiny_sd, diffusers.StableDiffusionInpaintPipeline, in_channels=channels)
    check(pipe, image=PICTURE, mask_image=HALF, strength=0.8, steps=4)


@pytest.mark.parametrize("guess_mode", [pytest.param(False, marks=pytest.mark.slow), True])
def test_controlnets(tiny_sd, guess_mode):
    nets = [diffusers.ControlNetModel.from_unet(tiny_sd.unet) for _ in range(2)]
    for net in nets:
        torch.nn.init.normal_(net.controlnet_mid_block.weight)
    rest = dict(controlnet=diffusers.MultiControlNetModel(nets), requires_safety_checker=False)
    pipe = diffusers.StableDiffusionControlNetPipeline(**tiny_sd.components, **rest)
    images = [[PICTURE] * 2, [HALF.convert("RGB")] * 2]
    plain, _ = check(pipe, image=images, controlnet_conditioning_scale=[1.0, 0.5], guess_mode=guess_mode)
    assert not np.array_equal(plain, draw(tiny_sd, PROMPTS, steps=2))


def test_t2i_adapters(tiny_sd):
    torch.manual_seed(5)
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[32, 32, 64], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter"
    )
    parts = {name: part for name, part in tiny_sd.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    plain, _ = check(pipe, image=[PICTURE] * 2)
    assert not np.array_equal(plain, draw(tiny_sd, PROMPTS, steps=2))


def test_freeu(pipe):
    before = draw(pipe, PROMPTS, steps=2)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    plain, _ = check(pipe)
    assert not np.array_equal(plain, before)


def ip_adapter(unet, width=16, tokens=4):
    """Return an IP-Adapter's weights: a picture's embedding becomes tokens, which each cross-attention sees as well."""
    inner = unet.config.cross_attention_dim
    layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
    return {
        "image_proj": {
            "proj.weight": torch.randn(tokens * inner, width), "proj.bias": torch.zeros(tokens * inner),
            "norm.weight": torch.ones(inner), "norm.bias": torch.zeros(inner),
        },
        "ip_adapter": {
            f"{2 * at + 1}.{name}.weight": torch.randn(layer.to_q.out_features, inner) / inner**0.5
            for at, layer in enumerate(layers) for name in ("to_k_ip", "to_v_ip")
        },
    }  # fmt: skip


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ip_adapters(pipe, masked):
    before = draw(pipe, PROMPTS, steps=2)
    num = 2 if masked else 1
    pipe.load_ip_adapter([ip_adapter(pipe.unet) for _ in range(num)], [""] * num, [""] * num, image_encoder_folder=None)
    pipe.set_ip_adapter_scale([0.7] * num)
    seen = dict(ip_adapter_image_embeds=[torch.randn(4, 1, 16) for _ in range(num)])
    if masked:
        left = diffusers.image_processor.IPAdapterMaskProcessor().preprocess(HALF, height=64, width=64)
        seen["cross_attention_kwargs"] = {"ip_adapter_masks": [left, 1 - left]}
    plain, _ = check(pipe, **seen)
    assert not np.array_equal(plain, before)
    pipe.unload_ip_adapter()
    assert np.array_equal(draw(pipe, PROMPTS, steps=2), before)


@pytest.mark.slow
def test_a_lora_of_unet_and_text_encoder_and_what_may_become_of_it(pipe, tmp_path):
    pytest.importorskip("peft")
    bare = draw(pipe, PROMPTS, steps=2)
    first = write_lora(tmp_path / "first.safetensors", pipe, encoder=True)
    second = write_lora(tmp_path / "second.safetensors", pipe, seed=5)
    pipe.load_lora_weights(first, adapter_name="first")
    one, _ = check(pipe)
    half, _ = check(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.load_lora_weights(second, adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.8, -0.5])
    two, _ = check(pipe)
    pipe.fuse_lora(adapter_names=["first", "second"])
    fused, _ = check(pipe)
    assert relative(torch.from_numpy(fused), torch.from_numpy(two)) < 1e-3
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    last, _ = check(pipe)
    drawn = [bare, one, half, two]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert relative(torch.from_numpy(last), torch.from_numpy(bare)) < 1e-3


def test_loras_that_are_swapped_between_calls_of_one_collector(pipe, tmp_path):
    pytest.importorskip("peft")
    files = [write_lora(tmp_path / f"{seed}.safetensors", pipe, seed=seed) for seed in (0, 9)]
    pipe.load_lora_weights(files[0], adapter_name="style")
    plain, found = [], []
    for file in files:
        pipe.load_lora_weights(file, adapter_name="style", hotswap=True)
        plain.append(draw(pipe, PROMPTS, steps=2))
        with collect_maps(pipe, PHRASES) as maps:
            draw(pipe, PROMPTS, steps=2)
        found.append(maps.levels["0"])
    with collect_maps(pipe, PHRASES) as maps:
        for file, image, truth in zip(files, plain, found, strict=True):
            pipe.load_lora_weights(file, adapter_name="style", hotswap=True)
            assert np.array_equal(draw(pipe, PROMPTS, steps=2), image) and torch.equal(maps.levels["0"], truth)
    assert not np.array_equal(*plain) and not torch.equal(*found)
