import copy
import gc
import threading
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import NOISE, draw, footprint, make_unet, relative, sharpen
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image

from diffumask_fast import DiffuMaskPipeline, collect_maps
from diffumask_fast.attention.phrases import PhraseNotFound, phrase_columns
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.errors import DiffuMaskError

PROMPTS = ["a photo of a potted plant and a dog", "the cat on the sofa", "a red bus, a car and a bus", "a horse"]
PHRASES = [["potted plant", "dog"], ["cat"], ["bus", "car", "red"], ["horse"]]
SCHEDULERS = {
    "DDIMScheduler": 6,
    "DDPMScheduler": 6,
    "PNDMScheduler": 15,
    "EulerDiscreteScheduler": 6,
    "EulerAncestralDiscreteScheduler": 6,
    "DPMSolverMultistepScheduler": 6,
    "HeunDiscreteScheduler": 11,
    "UniPCMultistepScheduler": 6,
    "LCMScheduler": 6,
}


def check_against_the_recorder(pipe, recording, prompts, phrases, guidance, **kwargs):
    """Plain images and all probabilities first, then the same with maps."""
    num = len(prompts)
    with recording(pipe.unet) as recorder:
        plain = draw(pipe, prompts, guidance_scale=guidance, **kwargs)
    select = phrase_columns(pipe.tokenizer, prompts, phrases, length=77)
    before = footprint(pipe)
    with collect_maps(pipe, phrases) as maps:
        drawn = draw(pipe, prompts, guidance_scale=guidance, **kwargs)
    assert footprint(pipe) == before
    assert np.array_equal(drawn, plain) and np.array_equal(
        draw(pipe, prompts, guidance_scale=guidance, **kwargs), plain
    )
    truth = recorder.maps(select, slice(num, 2 * num) if guidance > 1 else slice(0, num))
    assert list(maps.levels) == [str(i) for i in range(len(truth))]
    for level, expected in zip(maps.levels.values(), truth, strict=True):
        assert relative(level, expected) < 1e-5
        for b, row in enumerate(phrases):
            for k in range(len(row)):
                assert relative(level[b, k], expected[b, k]) < 1e-5
            assert (level[b, len(row) :] == 0).all()
        assert relative(torch.full_like(expected, 1 / 77), expected) > 0.1
    return maps


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("num", [1, 4])
def test_maps_equal_the_store_of_all_probabilities(tiny_sd, recording, num, guidance):
    maps = check_against_the_recorder(tiny_sd, recording, PROMPTS[:num], PHRASES[:num], guidance)
    assert maps.store.calls == 3 and maps.levels["0"].shape == (num, 2 if num == 1 else 3, 64)
    assert maps.store.sizes == {"0": (8, 8), "1": (4, 4), "2": (2, 2)}


@pytest.mark.parametrize(("height", "width"), [(64, 96), (104, 72)])
def test_maps_of_other_sizes(tiny_sd, recording, height, width):
    maps = check_against_the_recorder(tiny_sd, recording, PROMPTS[:2], PHRASES[:2], 7.5, height=height, width=width)
    assert maps.store.sizes["0"] == (height // 8, width // 8)
    assert maps.class_maps().shape == (2, 2, height // 8, width // 8)


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_sdxl(tiny_sdxl, recording, guidance):
    maps = check_against_the_recorder(tiny_sdxl, recording, PROMPTS[:2], PHRASES[:2], guidance, height=64, width=64)
    assert maps.store.sizes == {"0": (4, 4), "1": (2, 2)}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("propagate", ["none", "auto", 3])
def test_images_are_bit_equal_with_every_scheduler(tiny_sd, name, propagate):
    settings = {"clip_sample": False} if name == "DDPMScheduler" else {}
    make = getattr(diffusers, name)
    tiny_sd.scheduler = make.from_config({k: v for k, v in {**NOISE, **settings}.items()})
    plain = draw(tiny_sd, PROMPTS[:2], steps=6)
    with collect_maps(tiny_sd, PHRASES[:2], propagate=propagate) as maps:
        assert np.array_equal(draw(tiny_sd, PROMPTS[:2], steps=6), plain)
    calls = SCHEDULERS[name]
    assert maps.store.calls == maps.store.num_calls == calls
    orders = maps.store._propagated.get("0", [])
    last_third = -(-calls // 3)
    counts = {"none": [], "auto": [last_third], 3: [max(3, last_third) - i for i in range(3)]}
    assert [mean.weight for mean in orders] == counts[propagate]


@pytest.mark.parametrize(
    ("name", "steps", "calls"),
    [("LCMScheduler", 1, 1), ("LCMScheduler", 2, 2), ("TCDScheduler", 2, 2), ("HeunDiscreteScheduler", 1, 1),
     ("HeunDiscreteScheduler", 2, 3), ("KDPM2DiscreteScheduler", 2, 3), ("EulerDiscreteScheduler", 1, 1)],
)  # fmt: skip
def test_every_call_of_few_steps_counts_once_and_the_last_ones_propagate(tiny_sd, recording, name, steps, calls):
    tiny_sd.scheduler = getattr(diffusers, name).from_config(NOISE)
    plain = draw(tiny_sd, PROMPTS[0], steps=steps)
    with recording(tiny_sd.unet) as recorder:
        draw(tiny_sd, PROMPTS[0], steps=steps)
    with collect_maps(tiny_sd, ["dog"]) as maps:
        assert np.array_equal(draw(tiny_sd, PROMPTS[0], steps=steps), plain)
    assert maps.store.calls == maps.store.num_calls == calls and maps.store.is_complete
    assert [mean.weight for mean in maps.store._propagated.get("0", [])] == ([1] if calls > 1 else [])
    truth = recorder.maps(phrase_columns(tiny_sd.tokenizer, PROMPTS[:1], [["dog"]], length=77), slice(1, 2))
    assert all(relative(level, mean) < 1e-5 for level, mean in zip(maps.levels.values(), truth, strict=True))
    assert maps.class_maps().isfinite().all()


def test_propagated_maps_are_self_attention_on_the_prior(tiny_sd, recording):
    with collect_maps(tiny_sd, ["dog"], propagate="none") as earlier:
        draw(tiny_sd, PROMPTS[0], steps=1)
    with recording(tiny_sd.unet) as recorder:
        draw(tiny_sd, PROMPTS[0], steps=1)
    denoiser = UNetWithMaps(tiny_sd.unet)
    priors = []

    def spy(call):
        priors.append(call.prior)
        return denoiser(call)

    with recording(tiny_sd.unet) as recorder, collect_maps(tiny_sd, ["dog"], denoiser=spy) as maps:
        draw(tiny_sd, PROMPTS[0], steps=3)
    assert [bool(prior) for prior in priors] == [False, False, True] and set(priors[2]) == {"0", "1", "2"}
    del earlier
    recorder.own = recorder.own[-10:]
    for key, prior in priors[2].items():
        assert relative(maps.store._propagated[key][-1].mean(), recorder.propagate(prior, slice(1, 2))) < 1e-6


def test_several_images_for_each_prompt(tiny_sd):
    negative = ["red", "a dog"]
    with collect_maps(tiny_sd, PHRASES[:2]) as maps:
        images = draw(tiny_sd, PROMPTS[:2], num_images_per_prompt=2, negative_prompt=negative)
    twice = [[x for x in items for _ in range(2)] for items in (PROMPTS[:2], PHRASES[:2], negative)]
    with collect_maps(tiny_sd, twice[1]) as truth:
        assert np.array_equal(draw(tiny_sd, twice[0], negative_prompt=twice[2]), images)
    assert all(torch.equal(maps.levels[key], truth.levels[key]) for key in truth.levels)
    assert maps["dog"].rows == [0, 1] and maps["cat"].rows == [2, 3] and maps.levels["0"].shape[0] == 4


def test_image_to_image_propagates_in_the_last_third_of_its_own_calls(tiny_sd):
    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    plain = draw(pipe, PROMPTS[0], steps=12, image=image, strength=0.5)
    with collect_maps(pipe, ["dog"]) as maps:
        assert np.array_equal(draw(pipe, PROMPTS[0], steps=12, image=image, strength=0.5), plain)
    assert maps.store.calls == maps.store.num_calls == 6 and maps.store._propagated["0"][0].weight == 2


def test_sdxl_image_to_image(tiny_sdxl):
    parts = {k: v for k, v in tiny_sdxl.components.items() if v is not None}
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    plain = draw(pipe, PROMPTS[0], steps=4, image=image, strength=0.5)
    with collect_maps(pipe, ["dog", "potted plant"]) as maps:
        assert np.array_equal(draw(pipe, PROMPTS[0], steps=4, image=image, strength=0.5), plain)
    assert maps.levels["0"].shape == (1, 2, 16)


def test_embeddings_need_token_indices(tiny_sd):
    embeds, negative = tiny_sd.encode_prompt(PROMPTS[:2], "cpu", 1, True)
    given = dict(prompt_embeds=embeds, negative_prompt_embeds=negative)
    with pytest.raises(DiffuMaskError, match="give token_indices="), collect_maps(tiny_sd, ["dog"]):
        draw(tiny_sd, None, **given)
    with collect_maps(tiny_sd, PHRASES[:2]) as truth:
        draw(tiny_sd, PROMPTS[:2])
    with collect_maps(tiny_sd, PHRASES[:2], token_indices=[[[5, 6, 7], [10]], [[2]]]) as maps:
        draw(tiny_sd, None, **given)
    assert all(torch.equal(maps.levels[key], truth.levels[key]) for key in truth.levels)
    with pytest.raises(DiffuMaskError, match=r"for \[1, 1\] phrases, there are \[2, 1\]"):
        with collect_maps(tiny_sd, PHRASES[:2], token_indices=[[[5]], [[2]]]):
            draw(tiny_sd, None, **given)


def test_textual_inversion_of_several_tokens(tiny_sd):
    pipe = diffusers.StableDiffusionPipeline(
        **{**tiny_sd.components, "tokenizer": copy.deepcopy(tiny_sd.tokenizer)}, requires_safety_checker=False
    )
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion({"<toy>": torch.randn(2, 32)}, token="<toy>")
    with collect_maps(pipe, ["<toy>", "sofa"]) as maps:
        draw(pipe, "a <toy> on the sofa")
    assert [c.nonzero().flatten().tolist() for c in pipe_select(pipe, "a <toy> on the sofa")] == [[2, 3], [6]]
    assert (maps.levels["0"].amax(-1) > 0).all()
    for phrase in ("toy", "<TOY>"):  # the same word, of all its vectors
        with collect_maps(pipe, [phrase]) as other:
            draw(pipe, "a <toy> on the sofa")
        assert torch.equal(other.levels["0"][:, 0], maps.levels["0"][:, 0])


@pytest.mark.parametrize("indices", [[5], [["5"]], [[5.0]], [[True]], 5, "5", [[[5]], [5]], None])
def test_token_indices_of_another_form_are_refused(tiny_sd, indices):
    embeds = torch.zeros(1, 77, 32)
    words = "give token_indices=" if indices is None else "token_indices are .*: give a list of token positions"
    with pytest.raises(DiffuMaskError, match=words), collect_maps(tiny_sd, ["dog"], token_indices=indices):
        draw(tiny_sd, None, prompt_embeds=embeds, negative_prompt_embeds=embeds)


def pipe_select(pipe, prompt):
    rows = [pipe.maybe_convert_prompt(p, pipe.tokenizer) for p in ("<toy>", "sofa")]
    return phrase_columns(pipe.tokenizer, [pipe.maybe_convert_prompt(prompt, pipe.tokenizer)], rows, length=77)[0].T


def test_padding_to_a_run_maximum_changes_nothing_else(tiny_sd):
    with collect_maps(tiny_sd, ["dog"]) as one:
        draw(tiny_sd, PROMPTS[0])
    with collect_maps(tiny_sd, ["dog"], pad_to=4) as four:
        draw(tiny_sd, PROMPTS[0])
    assert four.levels["0"].shape == (1, 4, 64) and (four.class_maps()[:, 1:] == 0).all()
    assert torch.equal(four.class_maps()[:, :1], one.class_maps())


def test_each_call_of_the_pipeline_begins_anew(tiny_sd):
    with collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, "a cat and a dog", steps=4)
        first = maps.levels
        draw(tiny_sd, "a dog", seed=1)
    assert maps.store.calls == 3 and not torch.allclose(maps.levels["0"], first["0"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "layer"])
def test_the_pipeline_is_restored_after_an_exception(tiny_sd, error, where):
    before, plain = footprint(tiny_sd), draw(tiny_sd, PROMPTS[0])

    def fail(*_, **__):
        raise error

    hook = tiny_sd.unet.mid_block.register_forward_pre_hook(fail) if where == "layer" else None
    with pytest.raises(error), collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, PROMPTS[0], callback_on_step_end=fail)
    if hook:
        hook.remove()
        assert maps._store.calls == 0
    assert footprint(tiny_sd) == before and np.array_equal(draw(tiny_sd, PROMPTS[0]), plain)


def test_a_call_that_fails_at_once_leaves_no_warning(tiny_sd, caplog):
    def fail(call):
        raise RuntimeError

    with pytest.raises(RuntimeError), collect_maps(tiny_sd, ["dog"], denoiser=fail):
        draw(tiny_sd, PROMPTS[0])
    assert "UNet calls" not in caplog.text


def test_a_missing_phrase_is_an_error_before_anything_is_drawn(tiny_sd):
    before, calls = footprint(tiny_sd), []
    hook = tiny_sd.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(PhraseNotFound, match="'sofa' is not there"), collect_maps(tiny_sd, ["sofa"]):
        draw(tiny_sd, PROMPTS[0])
    with pytest.raises(PhraseNotFound, match="'dog' is only past token 77"), collect_maps(tiny_sd, ["dog"]):
        draw(tiny_sd, "on " * 80 + "dog")
    hook.remove()
    assert footprint(tiny_sd) == before and not calls


def test_nothing_captured_says_what_was_seen(tiny_sd):
    with (
        pytest.raises(DiffuMaskError, match="the pipeline was not called in the context"),
        collect_maps(tiny_sd, ["dog"]),
    ):
        pass
    with (
        pytest.raises(DiffuMaskError, match="encoded, but not by a call of the pipeline"),
        collect_maps(tiny_sd, ["dog"]),
    ):
        embeds = tiny_sd.encode_prompt("a dog", "cpu", 1, False)[0]
        tiny_sd.unet(torch.randn(1, 4, 8, 8), 1, embeds)

    def other_states(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.randn(2, 77, 32)}

    changing = dict(callback_on_step_end=other_states, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, "a dog", **changing)
    assert maps.store.calls == 1 and not maps.store.is_complete
    with pytest.raises(DiffuMaskError, match="the transformer of SimpleNamespace is a int"):
        collect_maps(SimpleNamespace(transformer=1), ["dog"])


def test_a_collector_that_is_entered_again_forgets_its_maps(tiny_sd):
    collector = collect_maps(tiny_sd, ["dog"])
    with collector:
        draw(tiny_sd, PROMPTS[0])
    assert collector.store.calls == 3
    with pytest.raises(DiffuMaskError, match="the pipeline was not called in the context"), collector:
        pass
    with collector:
        draw(tiny_sd, "a dog", steps=4)
    assert collector.store.calls == 4


def test_guidance_may_be_turned_off_on_the_way(tiny_sd):
    def turn_off(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    rest = dict(callback_on_step_end=turn_off, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    plain = draw(tiny_sd, PROMPTS[:2], steps=4, **rest)
    with collect_maps(tiny_sd, PHRASES[:2]) as maps:
        assert np.array_equal(draw(tiny_sd, PROMPTS[:2], steps=4, **rest), plain)
    assert maps.store.calls == 4


def test_a_foreign_denoiser_stands_at_the_same_place(tiny_sd):
    seen, inner = [], UNetWithMaps(tiny_sd.unet)

    def denoiser(call):
        seen.append((call.latents.shape, call.select.shape, sorted(call.prior)))
        return inner(call)

    plain = draw(tiny_sd, PROMPTS[:2])
    with collect_maps(tiny_sd, PHRASES[:2], denoiser=denoiser) as maps:
        assert np.array_equal(draw(tiny_sd, PROMPTS[:2]), plain)
    assert maps.store.calls == 3
    assert seen[0] == ((4, 4, 8, 8), (2, 77, 2), []) and seen[2][2] == ["0", "1", "2"]


def live_bytes():
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {storage._cdata: storage.nbytes() for storage in (x.untyped_storage() for x in tensors)}
    return sum(storages.values())


def test_live_bytes_for_maps_do_not_grow_with_the_steps(tiny_sd):
    def at_the_end(steps):
        seen = []

        def look(pipe, step, timestep, tensors):
            if step == steps - 1:
                gc.collect()
                seen.append(live_bytes())
            return {}

        draw(tiny_sd, PROMPTS[:2], steps=steps, callback_on_step_end=look)
        return seen[0]

    extra = []
    for steps in (2, 12):
        plain = at_the_end(steps)
        with collect_maps(tiny_sd, PHRASES[:2]) as maps:
            extra.append(at_the_end(steps) - plain)
        kept = maps.store.num_bytes
        del maps
    assert extra[0] == extra[1] >= kept > 0


def test_rows_are_found_where_the_prompt_is_first(tiny_sd, recording):
    torch.manual_seed(3)
    parts = {**tiny_sd.components, "unet": sharpen(make_unet(in_channels=8))}
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    rest = dict(image=[Image.new("RGB", (64, 64), (200, 100, 50))] * 2)
    with recording(pipe.unet) as recorder:
        plain = draw(pipe, PROMPTS[:2], **rest)
    with collect_maps(pipe, PHRASES[:2]) as maps:
        assert np.array_equal(draw(pipe, PROMPTS[:2], **rest), plain)
    truth = recorder.maps(phrase_columns(pipe.tokenizer, PROMPTS[:2], PHRASES[:2], length=77), slice(0, 2))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))
    assert "_encode_prompt" not in pipe.__dict__


def test_controlnet_residuals_reach_the_unet(tiny_sd):
    net = diffusers.ControlNetModel.from_unet(tiny_sd.unet)
    torch.nn.init.normal_(net.controlnet_mid_block.weight)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **tiny_sd.components, controlnet=net, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    rest = dict(image=Image.new("RGB", (64, 64), (200, 100, 50)))
    plain = draw(pipe, PROMPTS[0], **rest)
    assert not np.array_equal(plain, draw(tiny_sd, PROMPTS[0]))
    with collect_maps(pipe, ["dog"]):
        assert np.array_equal(draw(pipe, PROMPTS[0], **rest), plain)


@pytest.mark.parametrize("propagate", ["none", "auto"])
def test_a_pipeline_that_is_stopped_says_so(tiny_sd, recording, caplog, propagate):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = pipe._interrupt or step == 1
        return tensors

    with recording(tiny_sd.unet) as recorder:
        plain = draw(tiny_sd, PROMPTS[0], steps=6, callback_on_step_end=stop)
    with collect_maps(tiny_sd, ["dog"], propagate=propagate) as maps:
        assert np.array_equal(draw(tiny_sd, PROMPTS[0], steps=6, callback_on_step_end=stop), plain)
    assert (maps.store.calls, maps.store.num_calls, maps.store.is_complete) == (2, 6, False)
    assert "the maps are of 2 of 6 UNet calls: the pipeline was stopped" in caplog.text
    truth = recorder.maps(phrase_columns(tiny_sd.tokenizer, PROMPTS[:1], ["dog"], length=77), slice(1, 2))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))
    caplog.clear()
    with collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, PROMPTS[0])
    assert maps.store.is_complete and "UNet calls" not in caplog.text


def test_an_error_is_all_that_is_said_of_a_call_that_fails(tiny_sd, caplog):
    def fail(pipe, step, timestep, tensors):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, PROMPTS[0], callback_on_step_end=fail)
    assert (maps.store.calls, maps.store.num_calls) == (1, 3) and not caplog.text


def test_a_call_in_another_thread_does_not_take_the_place_of_the_one_that_runs(tiny_sd, caplog):
    with collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, PROMPTS[0])
    alone, began = maps.levels, threading.Event()
    beside = threading.Thread(target=lambda: (began.wait(60), draw(tiny_sd, "a dog and a cat", seed=5)))

    def wait(pipe, step, timestep, tensors):
        if step == 0:
            began.set()
            beside.join(60)
        return tensors

    beside.start()
    with collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, PROMPTS[0], callback_on_step_end=wait)
    assert (maps.store.calls, maps.store.num_calls) == (3, 3)
    assert all(torch.equal(level, alone[key]) for key, level in maps.levels.items())
    assert "in two threads at once" in caplog.text
    with collect_maps(tiny_sd, ["dog"]) as maps:  # from another thread alone
        beside = threading.Thread(target=draw, args=(tiny_sd, PROMPTS[0]))
        beside.start()
        beside.join(60)
    assert all(torch.equal(level, alone[key]) for key, level in maps.levels.items())


def test_a_unet_of_another_kind_is_refused_by_name(tiny_sd):
    motion = dict(block_out_channels=(32, 32, 64), motion_layers_per_block=1, motion_norm_num_groups=8)
    adapter = diffusers.MotionAdapter(**motion, motion_num_attention_heads=2)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    video = diffusers.AnimateDiffPipeline(**{n: getattr(tiny_sd, n) for n in names}, motion_adapter=adapter)
    with pytest.raises(DiffuMaskError, match="the UNet of AnimateDiffPipeline is a UNetMotionModel"):
        collect_maps(video, ["dog"])
    tiny_sd.unet = torch.nn.DataParallel(tiny_sd.unet)
    with pytest.raises(DiffuMaskError, match="the UNet of StableDiffusionPipeline is a DataParallel"):
        collect_maps(tiny_sd, ["dog"])


def of_another_kind():
    """Return a pipeline of videos, and Kandinsky 3, which has no vae_scale_factor."""
    blocks = dict(down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), sample_size=8, layers_per_block=1)
    blocks |= dict(up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), block_out_channels=(32, 64), norm_num_groups=8)
    video = diffusers.UNet3DConditionModel(**blocks, cross_attention_dim=32, attention_head_dim=16)
    blocks = dict(in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=1)
    kandinsky = diffusers.Kandinsky3UNet(**blocks, block_out_channels=(8, 16), cross_attention_dim=4)
    scheduler = diffusers.DDPMScheduler()
    text = dict(tokenizer=None, text_encoder=None, scheduler=scheduler)
    return [
        diffusers.TextToVideoSDPipeline(**text, unet=video, vae=None),
        diffusers.Kandinsky3Pipeline(**text, unet=kandinsky, movq=None),
    ]


def test_videos_and_kandinsky_are_refused_when_they_are_given():
    for pipe, kind in zip(of_another_kind(), ("UNet3DConditionModel", "Kandinsky3UNet"), strict=True):
        refused = f"the UNet of {type(pipe).__name__} is a {kind}"
        with pytest.raises(DiffuMaskError, match=refused):
            collect_maps(pipe, ["dog"])
        with pytest.raises(DiffuMaskError, match=refused):
            DiffuMaskPipeline.from_pipe(pipe)


class OneAfterTheOther(diffusers.StableDiffusionPipeline):
    """Encodes the negative text first, by a call of its own."""

    @torch.no_grad()
    def __call__(self, text, negative, num_inference_steps, generator, output_type):
        return self.loop(self.encode(negative), self.encode(text), num_inference_steps, generator)

    def encode(self, text):
        return self.encode_prompt(text, "cpu", 1, False)[0]

    def loop(self, negative, own, steps, generator):
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * 2), t, encoder_hidden_states=torch.cat([negative, own])).sample
            latents = self.scheduler.step(noise[:1] + 7.5 * (noise[1:] - noise[:1]), t, latents).prev_sample
        return diffusers.ImagePipelineOutput(latents.numpy())


class TextByName(OneAfterTheOther):
    """Says which text it draws."""

    @torch.no_grad()
    def __call__(self, prompt, negative, num_inference_steps, generator, output_type):
        return self.loop(self.encode(negative), self.encode(prompt), num_inference_steps, generator)


def test_texts_that_are_encoded_one_after_the_other(tiny_sd, recording):
    texts = ("a dog", "dog dog a cat")
    pipe = OneAfterTheOther(**tiny_sd.components, requires_safety_checker=False)
    with pytest.raises(DiffuMaskError, match="OneAfterTheOther encodes several texts .* by the name prompt"):
        with collect_maps(pipe, ["dog"]):
            draw(pipe, texts[0], negative=texts[1])
    pipe = TextByName(**tiny_sd.components, requires_safety_checker=False)
    with recording(pipe.unet) as recorder:
        draw(pipe, texts[0], negative=texts[1])
    with collect_maps(pipe, ["dog"]) as maps:
        draw(pipe, texts[0], negative=texts[1])
    truth = recorder.maps(phrase_columns(pipe.tokenizer, [texts[0]], ["dog"], length=77), slice(1, 2))
    assert all(relative(a, b) < 1e-5 for a, b in zip(maps.levels.values(), truth, strict=True))
