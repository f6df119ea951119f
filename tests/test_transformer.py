"""Maps of joint attention: equal to an explicit store of all probabilities, with the plain pipeline's images."""

import copy
import gc
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw, relative, sharpen
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    ParallelConfig,
    StableDiffusion3PAGPipeline,
)
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from test_collect import live_bytes
from tiny_mmdit import make_sd3_transformer, new_pipe

from diffumask_fast import collect_maps
from diffumask_fast.attention.phrases import PhraseNotFound
from diffumask_fast.attention.transformer import TransformerWithMaps, packed_size
from diffumask_fast.errors import DiffuMaskError

PROMPTS = ["a photo of a potted plant and a dog on the sofa", "the cat on the sofa", "a red bus, a car and a bus"]
PHRASES = [["potted plant", "dog"], ["sofa"], ["bus", "car", "red"]]
CLIP = [[[5, 6, 7], [10]], [[5]], [[3, 9], [6], [2]]]  # 0 is the start token
T5 = [[[4, 5], [8]], [[4, 5]], [[2, 8], [5], [1]]]
LENGTH = 24  # of T5's text
WIDE = dict(height=64, width=96, max_sequence_length=LENGTH)


class Recorder:
    """Keeps explicit fp32 probabilities [B, H, queries, keys] of all products in a transformer, call by call."""

    def __init__(self, transformer, monkeypatch):
        self.calls, self.inside = [], False
        product = F.scaled_dot_product_attention

        def recorded(query, key, value, *args, **kwargs):
            if self.inside:
                scores = query.float() @ key.float().transpose(2, 3) / math.sqrt(query.shape[-1])
                self.calls[-1].append(scores.softmax(-1))
            return product(query, key, value, *args, **kwargs)

        def begin(module, args):
            self.inside = True
            self.calls.append([])

        def end(module, args, output):
            self.inside = False

        monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
        self.hooks = transformer.register_forward_pre_hook(begin), transformer.register_forward_hook(end)

    def remove(self):
        for hook in self.hooks:
            hook.remove()


@pytest.fixture
def record(monkeypatch):
    """Give a function that draws plainly: images, and the probabilities of each call."""

    def recorded(pipe, prompts, **kwargs):
        with monkeypatch.context() as patch:
            recorder = Recorder(pipe.transformer, patch)
            images = draw(pipe, prompts, **kwargs)
            recorder.remove()
        return images, recorder.calls

    return recorded


def columns(positions, offset=0):
    """Weigh the tokens of phrases that stand in a text: a matrix for each prompt."""
    most = max(map(len, positions))
    out = torch.zeros(len(positions), 300, most)
    for row, phrases in enumerate(positions):
        for at, tokens in enumerate(phrases):
            out[row, [offset + token for token in tokens], at] = 1 / len(tokens)
    return out


def joined(clip, t5):
    """Join positions of CLIP's part and of T5's after it."""
    pairs = zip(clip, t5, strict=True)
    return [[[*a, *(77 + i for i in b)] for a, b in zip(*pair, strict=True)] for pair in pairs]


def explicit(calls, select, rows, pixels, text_first, over="all"):
    """Make the maps of each call [Bc, K, N], and each call's mean matrix of what the image takes from itself."""
    maps, own = [], []
    for layers in calls:
        joint = [probs[rows] for probs in layers if probs.shape[3] > pixels]
        tokens = joint[0].shape[3] - pixels
        image, text = slice(0, pixels), slice(pixels, None)
        if text_first:
            image, text = slice(tokens, None), slice(0, tokens)
        seen = [probs[:, :, image, text] for probs in joint]
        if over == "text":
            seen = [probs / probs.sum(-1, keepdim=True) for probs in seen]
        mean = torch.stack([probs.mean(1) for probs in seen]).mean(0)
        maps.append((mean @ select[:, :tokens]).transpose(1, 2))
        alone = [probs[rows] for probs in layers if probs.shape[3] == pixels]
        own.append(torch.stack([p.mean(1) for p in (*(p[:, :, image, image] for p in joint), *alone)]).mean(0))
    return maps, own


def check(pipe, record, prompts, phrases, select, rows, text_first, size=(4, 6), per_step=1, **kwargs):
    """Plain images and all probabilities first, then the same with maps, which are propagated in the last call.

    Args:
        select: the weights of the tokens of all text.
        rows: the conditional ones.
        text_first: whether it stands before the image.
        size: of the maps.
        per_step: how many calls a step has, the first of which draws the prompts.
    """
    plain, calls = record(pipe, prompts, **kwargs)
    calls = calls[::per_step]
    before = footprint(pipe)
    with collect_maps(pipe, phrases, propagate=1) as maps:
        assert np.array_equal(draw(pipe, prompts, **kwargs), plain)
    assert footprint(pipe) == before and np.array_equal(draw(pipe, prompts, **kwargs), plain)
    assert maps.store.sizes == {"0": size} and maps.store.calls == maps.store.num_calls == len(calls) == 3
    truth, own = explicit(calls, select, rows, math.prod(size), text_first)
    expected = torch.stack(truth).mean(0)
    assert_close(maps.levels["0"], expected, phrases)
    prior = torch.stack(truth[:2]).mean(0)
    assert_close(maps.store.propagated["0"], prior @ own[2].transpose(1, 2), phrases)
    return maps


def assert_close(maps, expected, phrases):
    for row, names in enumerate(phrases):
        for at in range(len(names)):
            assert relative(maps[row, at], expected[row, at]) < 1e-5
            assert relative(torch.full_like(expected[row, at], expected.mean()), expected[row, at]) > 0.05
        assert (maps[row, len(names) :] == 0).all()


def footprint(pipe):
    """Return what collecting must leave as it is."""
    processors = {name: id(processor) for name, processor in pipe.transformer.attn_processors.items()}
    modules = [set(vars(module)) for module in pipe.transformer.modules()]
    return {name for name in vars(pipe) if not name.startswith("_")}, modules, processors


@pytest.mark.parametrize("guidance", [7.0, 1.0])
@pytest.mark.parametrize("num", [1, 3])
def test_sd3_equals_the_store_of_all_probabilities(sd3, record, num, guidance):
    select = columns(joined(CLIP[:num], T5[:num]))
    rows = slice(num, 2 * num) if guidance > 1 else slice(0, num)
    check(sd3, record, PROMPTS[:num], PHRASES[:num], select, rows, False, guidance_scale=guidance, **WIDE)


@pytest.mark.parametrize("size", [(64, 64), (112, 48)])
def test_sd3_of_other_sizes(sd3, record, size):
    sizes = dict(height=size[0], width=size[1], max_sequence_length=LENGTH)
    select, tokens = columns(joined(CLIP[:1], T5[:1])), (size[0] // 16, size[1] // 16)
    maps = check(sd3, record, PROMPTS[:1], PHRASES[:1], select, slice(1, 2), False, tokens, **sizes)
    assert maps.class_maps().shape == (1, 2, *tokens)


@pytest.mark.parametrize("num", [1, 3])
def test_flux_with_distilled_guidance(flux, record, num):
    select = columns(T5[:num])
    check(flux, record, PROMPTS[:num], PHRASES[:num], select, slice(0, num), True, guidance_scale=3.5, **WIDE)


@pytest.mark.parametrize("negative", ["a horse", "the cat on the sofa"])
def test_flux_with_a_negative_prompt_of_its_own_call(flux, record, negative):
    """Be it the prompt itself."""
    rest = dict(negative_prompt=[negative], true_cfg_scale=3.0, **WIDE)
    check(flux, record, PROMPTS[1:2], PHRASES[1:2], columns(T5[1:2]), slice(0, 1), True, per_step=2, **rest)


def test_guidance_that_skips_layers_is_not_counted(sd3, record):
    skipping = dict(skip_guidance_layers=[1], skip_layer_guidance_start=-1.0, skip_layer_guidance_stop=1.0)
    select = columns(joined(CLIP[:1], T5[:1]))
    check(sd3, record, PROMPTS[:1], PHRASES[:1], select, slice(1, 2), False, per_step=2, **skipping, **WIDE)


def test_sd3_without_t5_has_zeros_in_its_place(sd3, record):
    sd3.text_encoder_3 = sd3.tokenizer_3 = None
    check(sd3, record, PROMPTS[:2], PHRASES[:2], columns(CLIP[:2]), slice(2, 4), False, **WIDE)


def test_several_images_for_each_prompt(sd3, flux, record):
    clip, t5 = ([row for row in rows[:2] for _ in range(2)] for rows in (CLIP, T5))
    phrases = [row for row in PHRASES[:2] for _ in range(2)]
    for pipe, select, rows in ((sd3, columns(joined(clip, t5)), slice(4, 8)), (flux, columns(t5), slice(0, 4))):
        plain, calls = record(pipe, PROMPTS[:2], num_images_per_prompt=2, **WIDE)
        with collect_maps(pipe, PHRASES[:2]) as maps:
            assert np.array_equal(draw(pipe, PROMPTS[:2], num_images_per_prompt=2, **WIDE), plain)
        truth, _ = explicit(calls, select, rows, 24, pipe is flux)
        assert_close(maps.levels["0"], torch.stack(truth).mean(0), phrases)
        assert maps["dog"].rows == [0, 1] and maps["sofa"].rows == [2, 3]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_maps_as_shares_of_the_text(request, record, name):
    pipe, is_flux = request.getfixturevalue(name), name == "flux"
    select, rows = (columns(T5[:1]), slice(0, 1)) if is_flux else (columns(joined(CLIP[:1], T5[:1])), slice(1, 2))
    plain, calls = record(pipe, PROMPTS[0], **WIDE)
    with collect_maps(pipe, PHRASES[0], denoiser=TransformerWithMaps(pipe.transformer, over="text")) as maps:
        assert np.array_equal(draw(pipe, PROMPTS[0], **WIDE), plain)
    truth, own = explicit(calls, select, rows, 24, is_flux, over="text")
    assert_close(maps.levels["0"], torch.stack(truth).mean(0), PHRASES[:1])
    prior = torch.stack(truth[:2]).mean(0)
    assert_close(maps.store.propagated["0"], prior @ own[2].transpose(1, 2), PHRASES[:1])
    with pytest.raises(DiffuMaskError, match="over is 'image': use all or text"):
        TransformerWithMaps(pipe.transformer, over="image")


def test_an_image_beside_the_one_that_is_drawn(parts_of_flux, monkeypatch):
    """Kontext's tokens of the given image come after those of its own."""
    pipe = new_pipe(FluxKontextPipeline, parts_of_flux)
    rest = dict(image=Image.new("RGB", (96, 64), (200, 100, 50)), max_area=64 * 96, _auto_resize=False, **WIDE)
    draws = dict(prompt=PROMPTS[0], num_inference_steps=3, output_type="np", **rest)

    def images():
        return pipe(generator=torch.Generator().manual_seed(0), **draws).images

    with monkeypatch.context() as patch:
        recorder = Recorder(pipe.transformer, patch)
        plain = images()
        recorder.remove()
    with collect_maps(pipe, PHRASES[0]) as maps:
        assert np.array_equal(images(), plain)
    assert maps.store.sizes == {"0": (4, 6)}
    own = slice(LENGTH, LENGTH + 24)
    assert all(layer.shape[3] == LENGTH + 2 * 24 for layer in recorder.calls[0])
    means = [torch.stack([probs[:, :, own, :LENGTH].mean(1) for probs in call]).mean(0) for call in recorder.calls]
    expected = (torch.stack(means).mean(0) @ columns(T5[:1])[:, :LENGTH]).transpose(1, 2)
    assert_close(maps.levels["0"], expected, PHRASES[:1])
    image = [torch.stack([probs[:, :, own, own].mean(1) for probs in call]).mean(0) for call in recorder.calls]
    prior = (torch.stack(means[:2]).mean(0) @ columns(T5[:1])[:, :LENGTH]).transpose(1, 2)
    assert_close(maps.store.propagated["0"], prior @ image[2].transpose(1, 2), PHRASES[:1])


def test_an_image_to_begin_with(parts_of_flux, record):
    pipe = new_pipe(FluxImg2ImgPipeline, parts_of_flux)
    rest = dict(image=Image.new("RGB", (96, 64), (200, 100, 50)), strength=0.6, steps=5, **WIDE)
    check(pipe, record, PROMPTS[:1], PHRASES[:1], columns(T5[:1]), slice(0, 1), True, **rest)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_fused_projections(request, record, name):
    pipe, is_flux = request.getfixturevalue(name), name == "flux"
    plain = sharpen(make_sd3_transformer(dual_attention_layers=(), qk_norm=None))
    pipe.transformer = copy.deepcopy(pipe.transformer) if is_flux else plain
    pipe.transformer.fuse_qkv_projections()
    select, rows = (columns(T5[:1]), slice(0, 1)) if is_flux else (columns(joined(CLIP[:1], T5[:1])), slice(1, 2))
    check(pipe, record, PROMPTS[:1], PHRASES[:1], select, rows, is_flux, **WIDE)


def test_ip_adapter_on_flux(flux, record):
    """Its second product is over the tokens of another image, and is not read."""
    projection = ImageProjection(cross_attention_dim=32, image_embed_dim=20, num_image_text_embeds=4)
    adapter = dict(hidden_size=32, cross_attention_dim=32, num_tokens=(4,), scale=0.7)
    flux.transformer = copy.deepcopy(flux.transformer)
    flux.transformer.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    flux.transformer.set_attn_processor(
        {
            name: processor if name.startswith("single") else FluxIPAdapterAttnProcessor(**adapter)
            for name, processor in flux.transformer.attn_processors.items()
        }
    )
    with_image = dict(ip_adapter_image_embeds=[torch.randn(1, 1, 20)])
    with_image |= dict(negative_ip_adapter_image_embeds=[torch.zeros(1, 1, 20)], **WIDE)
    plain, calls = record(flux, PROMPTS[0], **with_image)
    with collect_maps(flux, PHRASES[0]) as maps:
        assert np.array_equal(draw(flux, PROMPTS[0], **with_image), plain)
    assert [layer.shape[3] for layer in calls[0]] == [48, 4, 48, 4, 48, 48]
    calls = [[layer for layer in call if layer.shape[3] == 48] for call in calls]
    truth, _ = explicit(calls, columns(T5[:1]), slice(0, 1), 24, True)
    assert_close(maps.levels["0"], torch.stack(truth).mean(0), PHRASES[:1])


def test_a_phrase_that_only_one_text_has(sd3, record):
    """The second text is T5's; CLIP's ends at 77 tokens, T5's at 24."""
    cases = [
        (dict(prompt=PROMPTS[0], prompt_3="a red bus"), ["dog", "red"], [[[10], [78]]]),
        (dict(prompt="on " * 80 + "dog", max_sequence_length=100), ["dog"], [[[77 + 80]]]),
        (dict(prompt="on " * 40 + "dog"), ["dog"], [[[41]]]),
    ]
    for arguments, phrases, positions in cases:
        arguments = {**WIDE, **arguments}
        prompt = arguments.pop("prompt")
        plain, calls = record(sd3, prompt, **arguments)
        with collect_maps(sd3, phrases) as maps:
            assert np.array_equal(draw(sd3, prompt, **arguments), plain)
        truth, _ = explicit(calls, columns(positions), slice(1, 2), 24, False)
        assert_close(maps.levels["0"], torch.stack(truth).mean(0), [phrases])


def test_a_phrase_that_no_text_has(sd3, flux):
    with pytest.raises(PhraseNotFound, match="'horse' is not there as whole words"), collect_maps(sd3, ["horse"]):
        draw(sd3, PROMPTS[0], **WIDE)
    with pytest.raises(PhraseNotFound, match="'dog' is only past token 24"), collect_maps(flux, ["dog"]):
        draw(flux, "on " * 40 + "dog", **WIDE)
    with pytest.raises(PhraseNotFound, match="'dog' is only past token 77"), collect_maps(sd3, ["dog"]):
        draw(sd3, "on " * 100 + "dog", **WIDE)
    with pytest.raises(DiffuMaskError, match="two text encoders have the phrases at different positions"):
        with collect_maps(sd3, ["dog"]):
            draw(sd3, "a dog", prompt_2="a photo of a dog", **WIDE)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_embeddings_need_token_indices(request, name):
    pipe, is_flux = request.getfixturevalue(name), name == "flux"
    with torch.no_grad():
        found = pipe.encode_prompt(PROMPTS[:2], *[None] * (1 if is_flux else 2), max_sequence_length=LENGTH)
    given = dict(prompt_embeds=found[0], pooled_prompt_embeds=found[1 if is_flux else 2], height=64, width=96)
    if not is_flux:
        given |= dict(negative_prompt_embeds=found[1], negative_pooled_prompt_embeds=found[3])
    with pytest.raises(DiffuMaskError, match="give token_indices="), collect_maps(pipe, PHRASES[:2]):
        draw(pipe, None, **given)
    with collect_maps(pipe, PHRASES[:2]) as truth:
        plain = draw(pipe, PROMPTS[:2], **WIDE)
    indices = T5[:2] if is_flux else joined(CLIP[:2], T5[:2])
    with collect_maps(pipe, PHRASES[:2], token_indices=indices) as maps:
        assert np.array_equal(draw(pipe, None, **given), plain)
    assert torch.equal(maps.levels["0"], truth.levels["0"])


@pytest.mark.parametrize("name", [pytest.param("sd3", marks=pytest.mark.slow), "flux"])
def test_live_bytes_do_not_grow_with_the_steps(request, name):
    pipe = request.getfixturevalue(name)

    def at_the_end(steps):
        seen = []

        def look(pipe, step, timestep, tensors):
            if step == steps - 1:
                gc.collect()
                seen.append(live_bytes())
            return {}

        draw(pipe, PROMPTS[:2], steps=steps, callback_on_step_end=look, **WIDE)
        return seen[0]

    extra = []
    for steps in (2, 8):
        plain = at_the_end(steps)
        with collect_maps(pipe, PHRASES[:2]) as maps:
            extra.append(at_the_end(steps) - plain)
        kept = maps.store.num_bytes
        del maps
    assert extra[0] == extra[1] >= kept > 0


@pytest.mark.parametrize("where", ["callback", "layer"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_pipeline_is_restored_after_an_exception(request, name, where):
    pipe = request.getfixturevalue(name)
    before, plain = footprint(pipe), draw(pipe, PROMPTS[0], **WIDE)

    def fail(*_, **__):
        raise KeyboardInterrupt

    hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fail) if where == "layer" else None
    rest = WIDE if hook else dict(callback_on_step_end=fail, **WIDE)
    with pytest.raises(KeyboardInterrupt), collect_maps(pipe, ["dog"]):
        draw(pipe, PROMPTS[0], **rest)
    if hook:
        hook.remove()
    assert footprint(pipe) == before and np.array_equal(draw(pipe, PROMPTS[0], **WIDE), plain)


def test_blocks_compiled_by_themselves(flux):
    torch._dynamo.reset()
    with collect_maps(flux, ["dog"]) as truth:
        plain = draw(flux, PROMPTS[0], **WIDE)
    flux.transformer = copy.deepcopy(flux.transformer)
    flux.transformer.compile_repeated_blocks(backend="eager")
    with collect_maps(flux, ["dog"]) as maps:
        assert np.array_equal(draw(flux, PROMPTS[0], **WIDE), plain)
    assert torch.equal(maps.levels["0"], truth.levels["0"])
    torch._dynamo.reset()
    flux.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with pytest.raises(DiffuMaskError, match="compiled with fullgraph=True, and attention with maps is not compiled"):
        with collect_maps(flux, ["dog"]):
            draw(flux, PROMPTS[0], **WIDE)


def test_attention_that_cannot_be_read_is_refused(parts_of_sd3, flux):
    transformer = make_sd3_transformer(dual_attention_layers=(), qk_norm=None)
    parts = {**parts_of_sd3, "transformer": transformer}
    pag = new_pipe(StableDiffusion3PAGPipeline, parts, pag_applied_layers=["blocks.1"])
    with pytest.raises(DiffuMaskError, match="order .* in PAGCFGJointAttnProcessor2_0 is not known"):
        with collect_maps(pag, ["dog"]):
            draw(pag, PROMPTS[0], **WIDE)
    with pytest.raises(DiffuMaskError, match="FluxAttnProcessor does not make one product over all 48 tokens"):
        with attention_backend("flex"), collect_maps(flux, ["dog"]):
            draw(flux, PROMPTS[0], **WIDE)
    flux.transformer = copy.deepcopy(flux.transformer)
    flux.transformer._parallel_config = ParallelConfig()
    with pytest.raises(DiffuMaskError, match="divided between devices"), collect_maps(flux, ["dog"]):
        draw(flux, PROMPTS[0], **WIDE)
    with pytest.raises(DiffuMaskError, match="Linear has no layers of joint attention as diffusers has them"):
        TransformerWithMaps(torch.nn.Linear(2, 2))


def test_packed_tokens_that_are_no_rectangle_are_refused():
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.bfloat16)
    other = ids + torch.tensor([1, 0, 0])
    assert packed_size(ids) == packed_size(torch.cat([ids, other])) == packed_size((ids + 2)[None]) == (3, 5)
    for wrong in (ids[:-1], ids.flip(0), torch.stack([ids, other], 1).flatten(0, 1), ids[:, [0, 2, 1]]):
        with pytest.raises(DiffuMaskError, match="img_ids do not say that .* tokens are a rectangle, row by row"):
            packed_size(wrong)


def test_a_scheduler_with_two_calls_a_step(sd3):
    sd3.scheduler = FlowMatchHeunDiscreteScheduler()
    plain = draw(sd3, PROMPTS[0], **WIDE)
    with collect_maps(sd3, PHRASES[0]) as maps:
        assert np.array_equal(draw(sd3, PROMPTS[0], **WIDE), plain)
    assert maps.store.calls == maps.store.num_calls == 5


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_callback_that_writes_over_the_embeddings(request, name, caplog):
    pipe = request.getfixturevalue(name)

    def forget(pipe, step, timestep, tensors):
        tensors["prompt_embeds"].zero_()
        return {}

    rest = dict(callback_on_step_end=forget, callback_on_step_end_tensor_inputs=["prompt_embeds"], **WIDE)
    rest |= dict(guidance_scale=1.0) if name == "sd3" else {}  # else the two prompts' embeddings are joined, a copy
    with collect_maps(pipe, ["dog"]) as maps:
        draw(pipe, PROMPTS[0], **rest)
    assert maps.store.calls == 1 and "the maps are of 1 of 3 transformer calls" in caplog.text
