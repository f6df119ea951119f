import copy
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from conftest import footprint, make_unet, new_pipe, relative
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.engines.compiled import CompiledDenoiser, compile_pipe
from diffumask_fast.engines.decoder import CompiledDecoder
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models import find
from diffumask_fast.models.find import ModelInfo
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.request import Request
from diffumask_fast.prompts.vocabulary import names_in, phrases_and_ids

PROMPTS = ["a photo of a dog on the grass", "a cat and a car on the street", "a red sofa", "a potted plant"]
CLASSES = [["dog"], ["cat", "car"], ["sofa"], ["pottedplant"]]
STEPS = dict(num_inference_steps=3, guidance_scale=4.0)


@pytest.fixture
def pipe(tiny_sd):
    return DiffuMaskPipeline.from_pipe(tiny_sd)


@pytest.fixture(scope="module")
def mini():
    pipe = DiffuMaskPipeline.from_pretrained("mini", device="cpu")
    pipe.pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(batch, side=8):
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("propagate", ["none", 1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_images_are_those_of_the_plain_pipeline(pipe, propagate, guidance_scale):
    x = latents(4)
    plain = pipe.pipe(PROMPTS, latents=x, num_inference_steps=4, guidance_scale=guidance_scale, output_type="np").images
    options = MapOptions(propagate=propagate)
    out = pipe(
        PROMPTS,
        CLASSES,
        latents=x,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        output_type="np",
        maps=options,
    )
    assert np.array_equal(plain, out.images) and plain.std() > 0


@pytest.mark.parametrize("propagate", ["none", 1])
def test_mini_draws_what_plain_diffusers_draws(mini, propagate):
    x = latents(3, 16)
    prompts = ["a photo of a dog on the grass", "a photo of a boat on the water", "a photo of an aeroplane in the sky"]
    plain = mini.pipe(prompts, latents=x, output_type="pil", **STEPS).images
    out = mini(prompts, [["dog"], ["boat"], ["aeroplane"]], latents=x, maps=MapOptions(propagate=propagate), **STEPS)
    for one, other in zip(plain, out.images, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_the_output_holds_what_it_says(pipe):
    out = pipe(PROMPTS, CLASSES, seeds=[1, 2, 3, 4], **STEPS)
    assert [image.size for image in out.images] == [(64, 64)] * 4
    assert out.masks.shape == (4, 64, 64) and out.masks.dtype == np.uint8
    assert out.class_ids == [(12,), (8, 7), (18,), (16,)]
    assert [len(row) for row in out.quality] == [1, 2, 1, 1]
    assert {key: tuple(level.shape) for key, level in out.maps.items()} == {
        "0": (4, 2, 64), "1": (4, 2, 16), "2": (4, 2, 4)
    }  # fmt: skip
    for row, ids in zip(out.masks, out.class_ids, strict=True):
        assert set(np.unique(row)) <= {0, *ids}
    assert out.provenance["seeds"] == [1, 2, 3, 4] and out.provenance["maps"]["propagate"] == 1


def test_output_types_and_tuples(pipe):
    tuple_ = pipe("a red dog", [["dog"]], seeds=[1], return_dict=False, **STEPS)
    assert len(tuple_) == 3
    as_pt = pipe("a red dog", [["dog"]], seeds=[1], output_type="pt", **STEPS).images
    assert as_pt.shape == (1, 3, 64, 64)
    assert np.array_equal((as_pt[0].permute(1, 2, 0) * 255).round().byte().numpy(), np.asarray(tuple_[0][0]))


def test_classes_are_found_in_the_prompt(pipe):
    assert names_in("A Potted Plant, a dog and a cat; hotdogs, carpets, a potted-cow") == ["pottedplant", "dog", "cat"]
    assert pipe("a cat and a dog", seeds=[1], **STEPS).class_ids == [(8, 12)]
    with pytest.raises(DiffuMaskError, match="No known class is named"):
        pipe("a red table", seeds=[1], **STEPS)


def test_nouns_outside_voc_have_ids_of_their_own():
    assert phrases_and_ids([["zebra", "dog"], ["giraffe"]]) == ([["zebra", "dog"], ["giraffe"]], [[21, 12], [22]])


def test_several_images_per_prompt_have_a_mask_each(pipe):
    out = pipe(PROMPTS[:2], CLASSES[:2], seeds=[1, 2, 3, 4], num_images_per_prompt=2, **STEPS)
    assert out.masks.shape[0] == 4 and out.class_ids == [(12,), (12,), (8, 7), (8, 7)]


def test_sizes_that_are_not_square(pipe):
    out = pipe("a red dog", [["dog"]], seeds=[1], height=64, width=96, **STEPS)
    assert out.images[0].size == (96, 64) and out.masks.shape == (1, 64, 96)
    with pytest.raises(DiffuMaskError, match="height 60 is not a multiple of 8: use 64"):
        pipe("a red dog", [["dog"]], seeds=[1], height=60, **STEPS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(seeds=[1], generator=torch.Generator()), "give one of them"),
        (dict(seeds=[1, 2]), "1 images and 2 seeds"),
        (dict(output_type="latent"), "output_type latent"),
        (dict(classes=[["dog"], ["cat"]]), "1 prompts and 2 lists"),
        (dict(classes=[["horse"]]), "horse"),
        (dict(prompt="a " * 80 + "dog"), "77"),
        (dict(prompt=[]), "at least one prompt"),
    ],
)
def test_bad_calls_are_one_sentence(pipe, arguments, message):
    call = dict(prompt="a red dog", classes=[["dog"]]) | arguments
    with pytest.raises(DiffuMaskError, match=message):
        pipe(**call, **STEPS)


def requests(count):
    names = [("dog", 12), ("cat", 8), ("boat", 4), ("car", 7), ("horse", 13)]
    picks = [names[i % 5] for i in range(count)]
    return [
        Request(f"{name}-{i:06d}", f"a photo of a {name} on the grass", "", (name,), (class_id,), 100 + i)
        for i, (name, class_id) in enumerate(picks)
    ]


def test_a_sample_is_the_same_in_every_batch(mini):
    drawn = {size: list(mini.stream(requests(8), size, num_inference_steps=8)) for size in (1, 3, 8)}
    for size in (1, 3):
        ious, differences = [], []
        for one, other in zip(drawn[size], drawn[8], strict=True):
            assert one.request == other.request
            a, b = one.mask > 0, other.mask > 0
            assert a.any()
            ious.append((a & b).sum() / (a | b).sum())
            differences.append(np.abs(one.image.astype(int) - other.image).mean())
        assert np.mean(ious) >= 0.99 and min(ious) >= 0.95
        assert max(differences) <= 1


def test_stream_closes_cleanly_when_left(pipe):
    for result in pipe.stream(requests(6)[:1] * 6, 2, num_inference_steps=2):
        assert result.image.shape == (64, 64, 3)
        break
    assert "decode" not in vars(pipe.pipe.vae) and pipe.pipe._progress_bar_config == {"disable": True}


def test_a_failing_pipeline_is_left_as_it_was(pipe):
    processors = dict(pipe.pipe.unet.attn_processors)

    def fail(*_):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        pipe("a red dog", [["dog"]], seeds=[1], callback_on_step_end=fail, **STEPS)
    assert pipe.pipe.unet.attn_processors == processors
    assert "decode" not in vars(pipe.pipe.vae) and pipe.pipe.unet._compiled_call_impl is None


def test_nan_images_are_rejected_with_a_reason(pipe):
    bias = pipe.pipe.vae.decoder.layers[-1].bias
    kept = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.fill_(float("nan"))
        result = next(iter(pipe.stream(requests(1), 1, num_inference_steps=2)))
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    assert not result.accepted and result.reason == "the image is not finite"


def test_prompt_embeds_with_token_indices(pipe):
    embeds, negative = pipe.pipe.encode_prompt("a red dog", "cpu", 1, True)
    given = dict(prompt_embeds=embeds, negative_prompt_embeds=negative, **STEPS)
    plain = pipe("a red dog", [["dog"]], seeds=[1], output_type="np", **STEPS)
    out = pipe(classes=[["dog"]], token_indices=[[[3]]], seeds=[1], output_type="np", **given)
    assert np.array_equal(out.images, plain.images) and np.array_equal(out.masks, plain.masks)
    with pytest.raises(DiffuMaskError, match="token_indices"):
        pipe(seeds=[1], **given)


def test_one_list_of_names_is_for_all_prompts(pipe):
    prompts = ["a cat and a dog", "a dog and a cat"]
    assert pipe(prompts, ["dog", "cat"], seeds=[1, 2], **STEPS).class_ids == [(12, 8), (12, 8)]


def test_stream_refuses_what_requests_say(pipe):
    with pytest.raises(DiffuMaskError, match="stream takes negative_prompt"):
        pipe.stream(requests(1), 1, negative_prompt="")
    with pytest.raises(DiffuMaskError, match="`batch_size` must be auto or a whole number from 1 on"):
        pipe.stream(requests(1), 0)


def test_negative_prompts_reach_the_pipeline(pipe):
    plain, negated = (
        Request("dog-000000", "a red dog", negative, ("dog",), (12,), 3) for negative in ("", "a cat on the grass")
    )
    one, other = pipe.stream([plain, negated], 1, **STEPS)
    assert not np.array_equal(one.image, other.image)
    expected = pipe("a red dog", [["dog"]], seeds=[3], negative_prompt="a cat on the grass", **STEPS)
    assert np.array_equal(np.asarray(expected.images[0]), other.image)


def test_save_and_load_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffuMaskPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    again.pipe.set_progress_bar_config(disable=True)
    one = pipe("a red dog", [["dog"]], seeds=[1], output_type="np", **STEPS)
    other = again("a red dog", [["dog"]], seeds=[1], output_type="np", **STEPS)
    assert np.array_equal(one.images, other.images) and np.array_equal(one.masks, other.masks)


def test_an_fp16_vae_that_must_be_upcast_runs_in_fp32(sd_parts, tiny_sd, tmp_path):
    wide = dict(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, force_upcast=True)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    parts = sd_parts | {"vae": AutoencoderKL(**wide, **blocks)}
    StableDiffusionPipeline(**parts, scheduler=tiny_sd.scheduler, requires_safety_checker=False).save_pretrained(
        tmp_path
    )
    pipe = DiffuMaskPipeline.from_pretrained(tmp_path, device="cpu", dtype="fp16")
    pipe.pipe.set_progress_bar_config(disable=True)
    assert pipe.pipe.vae.dtype == torch.float32 and pipe.pipe.unet.dtype == torch.float16
    images = pipe("a red dog", [["dog"]], seeds=[1], output_type="np", **STEPS).images
    assert np.isfinite(images).all() and images.std() > 0
    config = tmp_path / "vae" / "config.json"
    silent = {key: value for key, value in json.loads(config.read_text()).items() if key != "force_upcast"}
    config.write_text(json.dumps(silent))
    again = DiffuMaskPipeline.from_pretrained(tmp_path, device="cpu", dtype="fp16")
    assert again.pipe.vae.dtype == torch.float16


def test_other_engines_are_refused():
    with pytest.raises(DiffuMaskError, match="no engine warp"):
        DiffuMaskPipeline.from_pretrained("mini", engine="warp")


def test_the_weights_are_hashed_when_they_are_asked_for(tiny_folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(find, "weight_hash", lambda folder: hashed.append(folder) or "0123")
    pipe = DiffuMaskPipeline.from_pretrained(tiny_folder, device="cpu")
    out = pipe("a red dog", [["dog"]], seeds=[1], **STEPS)
    assert hashed == []
    pipe.pipe.scheduler = None
    copied = pickle.loads(pickle.dumps(out))
    assert out.provenance["weights"] == "0123" == out.provenance["weights"] and hashed == [tiny_folder.resolve()]
    assert copied.provenance == out.provenance and out.provenance["scheduler"] != "NoneType"


def test_the_compiled_engine_draws_for_its_pipeline_alone_and_leaves_no_trace(tiny_sd, monkeypatch):
    own = {"unet": copy.deepcopy(tiny_sd.unet), "vae": copy.deepcopy(tiny_sd.vae)}
    stock = StableDiffusionPipeline(**{**tiny_sd.components, **own}, requires_safety_checker=False)
    before = footprint(stock), set(vars(stock.vae.decoder)), vars(stock.vae).keys()
    calls = []
    for kind in (CompiledDenoiser, CompiledDecoder):
        monkeypatch.setattr(kind, "__call__", counting(kind.__call__, calls, kind))
    engine = compile_pipe(stock)
    with torch.compiler.set_stance("force_eager"):
        found, wanted = (
            pipe(PROMPTS[0], [["dog"]], seeds=[1], **STEPS)
            for pipe in (DiffuMaskPipeline(stock, compiled=engine), DiffuMaskPipeline(stock))
        )
    assert calls == [CompiledDenoiser] * 3 + [CompiledDecoder]
    assert [out.provenance["engine"]["name"] for out in (found, wanted)] == ["compile", "torch"]
    assert relative(found.maps["0"], wanted.maps["0"]) < 1e-4
    assert (footprint(stock), set(vars(stock.vae.decoder)), vars(stock.vae).keys()) == before


def counting(method, calls, kind):
    def call(self, *args, **kwargs):
        calls.append(kind)
        return method(self, *args, **kwargs)

    return call


def test_a_composed_pipeline_keeps_its_own_steps_and_guidance(sd_parts):
    parts = sd_parts | {"unet": make_unet(time_cond_proj_dim=32), "scheduler": LCMScheduler()}
    lcm = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    lcm.set_progress_bar_config(disable=True)
    plain = lcm("a red dog", generator=[torch.Generator().manual_seed(1)], output_type="np").images
    out = DiffuMaskPipeline.from_pipe(lcm)("a red dog", [["dog"]], seeds=[1], output_type="np")
    assert np.array_equal(out.images, plain) and out.provenance["unet_calls"] == 4
    assert out.provenance["num_inference_steps"] == 4 and out.provenance["guidance_scale"] == 8.5


def test_few_steps_take_their_options_and_say_what_was_propagated(sd_parts):
    info = ModelInfo("model", mask={"propagate": 2}, few_steps={2: {"aggregation": "finest", "threshold": 0.8}})
    pipe = DiffuMaskPipeline(new_pipe(StableDiffusionPipeline, sd_parts, requires_safety_checker=False), info)
    cases = ((1, "finest", "none", 0.8), (2, "finest", 1, 0.8), (3, "paper", 2, "otsu"))
    for steps, aggregation, propagate, threshold in cases:
        call = dict(num_inference_steps=steps, height=32, width=32)
        made_by = pipe("a red dog", [["dog"]], seeds=[1], **call).provenance
        assert made_by["unet_calls"] == made_by["planned_unet_calls"] == steps
        assert made_by["maps"] == {"aggregation": aggregation, "propagate": propagate}
        assert made_by["mask"]["threshold"] == threshold
        (streamed,) = pipe.stream([Request("dog", "a red dog", "", ("dog",), (12,), seed=1)], **call)
        again = pipe("a red dog", [["dog"]], seeds=[1], **call)
        assert np.array_equal(streamed.mask > 0, again.masks[0] > 0)
    given = pipe(
        "a red dog", [["dog"]], seeds=[1], maps=MapOptions("paper", 1), mask=MaskOptions(), num_inference_steps=2
    )  # fmt: skip
    assert given.provenance["maps"] == {"aggregation": "paper", "propagate": 1}
    assert given.provenance["mask"] == vars(MaskOptions())


@pytest.mark.parametrize("streamed", [False, True])
def test_two_threads_draw_what_one_after_the_other_draws(pipe, streamed):
    pipe.pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.pipe.scheduler.config)

    def work(i):
        if not streamed:
            out = pipe(PROMPTS[i], CLASSES[i : i + 1], seeds=[i], output_type="np", num_inference_steps=8)
            return [(out.images[0], out.masks[0])]
        return [(one.image, one.mask) for one in pipe.stream(requests(6)[3 * i : 3 * i + 3], 1, num_inference_steps=4)]

    def keep(i):
        start.wait()
        found[i] = work(i)

    expected, found, start = [work(i) for i in range(2)], {}, threading.Barrier(2)
    threads = [threading.Thread(target=keep, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate(expected):
        for one, other in zip(found[i], wanted, strict=True):
            assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
