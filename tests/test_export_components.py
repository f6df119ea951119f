import pytest
import torch
from conftest import draw, relative
from diffusers import StableDiffusionImg2ImgPipeline

from diffumask_fast.attention.collect import collect_maps
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.export.load import load_engine


@pytest.fixture(scope="module")
def hollow(tiny_folder, static_engine):
    return load_engine(tiny_folder, "onnx", static_engine, device="cpu")[0]


@pytest.fixture(scope="module")
def hollow_sdxl(sdxl_folder, sdxl_engine):
    return load_engine(sdxl_folder, "onnx", sdxl_engine, device="cpu")[0]


def test_no_weights_are_in_torch(hollow, hollow_sdxl):
    for pipe in (hollow, hollow_sdxl):
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert len(modules) in (3, 4)
        assert all(parameter.is_meta for module in modules for parameter in module.parameters())
        assert {module.device.type for module in modules} == {"cpu"} and pipe.device.type == "cpu"
        assert not any(module.training for module in modules)


@torch.no_grad()
def test_a_call_without_maps_draws_too(hollow, sd_parts):
    latents, states = torch.randn(2, 4, 8, 12), torch.randn(2, 77, 32)
    truth = sd_parts["unet"](latents, 5, states).sample
    assert relative(hollow.unet(latents, 5, encoder_hidden_states=states).sample, truth) < 1e-4
    assert relative(hollow.unet(latents, 5, states, return_dict=False)[0], truth) < 1e-4
    with pytest.raises(DiffuMaskError, match="has no timestep_cond"):
        hollow.unet(latents, 5, states, timestep_cond=states)


def test_a_pipeline_of_an_engine_alone_gives_maps(hollow, tiny_sd):
    settings = {"height": 64, "width": 96}
    with collect_maps(tiny_sd, ["dog"], propagate="none") as truth:
        image = draw(tiny_sd, "a photo of a dog", **settings)
    with collect_maps(hollow, ["dog"], propagate="none") as found:
        assert abs(draw(hollow, "a photo of a dog", **settings) - image).max() < 1e-3
    assert found.store.calls == 3 and list(found.levels) == list(truth.levels)
    assert all(relative(found.levels[key], truth.levels[key]) < 1e-3 for key in truth.levels)
    assert "denoiser" not in vars(tiny_sd.unet)


@torch.no_grad()
def test_a_keyword_of_the_attention_layers_is_refused(hollow):
    given = {"cross_attention_kwargs": {"scale": 0.5}}
    with pytest.raises(DiffuMaskError, match="has no cross_attention_kwargs"):
        hollow.unet(torch.randn(2, 4, 8, 12), 5, torch.randn(2, 77, 32), **given)


@torch.no_grad()
@pytest.mark.parametrize("name", ["down_block_additional_residuals", "down_intrablock_additional_residuals"])
def test_what_a_controlnet_or_an_adapter_adds_is_refused(hollow, name):
    latents, states = torch.randn(2, 4, 8, 12), torch.randn(2, 77, 32)
    with pytest.raises(DiffuMaskError, match=f"The exported UNet has no {name}: use `engine=torch`"):
        hollow.unet(latents, 5, states, **{name: (latents,)})


def test_an_image_may_begin_from_latents_and_not_from_a_picture(hollow, tiny_sd):
    latents, picture = torch.randn(1, 4, 8, 12), torch.rand(1, 3, 64, 96)

    def drawn(parts, image):
        pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        with collect_maps(pipe, ["dog"], propagate="none") as maps:
            return draw(pipe, "a photo of a dog", image=image, strength=0.8), maps.levels

    (found, maps), (truth, levels) = (drawn(pipe.components, latents) for pipe in (hollow, tiny_sd))
    assert abs(found - truth).max() < 1e-3 and all(relative(maps[key], levels[key]) < 1e-3 for key in levels)
    with pytest.raises(DiffuMaskError, match="An exported AutoencoderTiny has no encode: use `engine=torch`"):
        drawn(hollow.components, picture)


@torch.no_grad()
def test_the_parts_give_what_torch_gives(hollow, hollow_sdxl, sd_parts, sdxl_parts):
    latents, ids = torch.randn(2, 4, 8, 12), torch.randint(0, 90, (2, 77))
    assert relative(hollow.vae.decode(latents).sample, sd_parts["vae"].decode(latents).sample) < 1e-4
    ids[:, 40] = sd_parts["text_encoder"].config.eos_token_id
    assert hollow_sdxl.text_encoder(ids).hidden_states is None
    assert relative(hollow.text_encoder(ids)[0], sd_parts["text_encoder"](ids)[0]) < 1e-4
    for name in ("text_encoder", "text_encoder_2"):
        found, truth = (part(ids, output_hidden_states=True) for part in (getattr(hollow_sdxl, name), sdxl_parts[name]))
        assert relative(found[0], truth[0]) < 1e-4 and found[0].shape == truth[0].shape
        assert relative(found.hidden_states[-2], truth.hidden_states[-2]) < 1e-4


def test_what_an_engine_cannot_do_is_refused_and_never_done_in_silence(hollow, hollow_sdxl, tmp_path):
    ids = torch.zeros(1, 77, dtype=torch.long)
    for call, words in (
        (lambda: hollow.unet.load_lora_adapter({}), "An exported UNet2DConditionModel has no load_lora_adapter: use"),
        (lambda: hollow.enable_freeu(0.9, 0.2, 1.5, 1.6), "An exported UNet2DConditionModel has no enable_freeu"),
        (lambda: hollow.unet.set_attn_processor({}), "no set_attn_processor"),
        (lambda: hollow.text_encoder.resize_token_embeddings(9), "An exported CLIPTextModel has no resize_token_emb"),
        (lambda: hollow.vae.encode(torch.zeros(1, 3, 64, 96)), "An exported AutoencoderTiny has no encode"),
        (lambda: hollow.save_pretrained(tmp_path / "x"), "no save_pretrained"),
        (lambda: hollow.text_encoder(ids, attention_mask=ids), "no attention mask"),
        (lambda: hollow_sdxl.text_encoder(ids, output_hidden_states=True).hidden_states[-3], "no clip_skip"),
        (lambda: hollow.text_encoder(ids, output_hidden_states=True).hidden_states[-2], "no clip_skip"),
        (lambda: hollow.to(torch.float16), "works in torch.float32"),
        (lambda: hollow.unet.to("meta"), "engine is on cpu"),
    ):
        with pytest.raises(DiffuMaskError, match=words):
            call()
    assert hollow.to("cpu") is hollow
