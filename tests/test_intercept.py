import copy
import threading

import diffusers
import numpy as np
import torch
from conftest import NOISE, draw, footprint

from diffumask_fast import collect_maps

PROMPTS = ["a photo of a potted plant and a dog", "the cat on the sofa"]


def test_contexts_nest_and_may_be_left_out_of_order(tiny_sd):
    before, plain = footprint(tiny_sd), draw(tiny_sd, PROMPTS[0])
    outer, inner = collect_maps(tiny_sd, ["dog"]), collect_maps(tiny_sd, ["potted plant"])
    outer.__enter__()
    inner.__enter__()
    assert np.array_equal(draw(tiny_sd, PROMPTS[0]), plain)
    outer.__exit__(None, None, None)
    assert np.array_equal(draw(tiny_sd, PROMPTS[0]), plain)
    inner.__exit__(None, None, None)
    assert footprint(tiny_sd) == before
    with collect_maps(tiny_sd, ["dog", "potted plant"]) as both:
        draw(tiny_sd, PROMPTS[0])
    assert torch.allclose(both.levels["0"][:, :1], outer.levels["0"])
    assert torch.allclose(both.levels["0"][:, 1:], inner.levels["0"])


def test_a_copy_made_in_the_context_is_plain(tiny_sd):
    with collect_maps(tiny_sd, ["dog"]):
        twin = copy.deepcopy(tiny_sd.unet)
        draw(tiny_sd, PROMPTS[0])
    assert "_compiled_call_impl" not in twin.__dict__


def test_a_compiled_unet_stays_compiled(tiny_sd):
    plain, before = draw(tiny_sd, PROMPTS[0]), tiny_sd.unet
    calls = []

    def compiled(*args, **kwargs):
        calls.append(1)
        return tiny_sd.unet._call_impl(*args, **kwargs)

    tiny_sd.unet._compiled_call_impl = compiled
    try:
        with collect_maps(tiny_sd, ["dog"]) as maps:
            assert np.array_equal(draw(tiny_sd, PROMPTS[0]), plain)
        assert len(calls) == maps.store.calls == 3 and tiny_sd.unet._compiled_call_impl is compiled
    finally:
        del before._compiled_call_impl


def test_calls_of_another_thread_pass_through(tiny_sd):
    with collect_maps(tiny_sd, ["dog"]) as maps:
        draw(tiny_sd, PROMPTS[0])
        kept = {key: value.clone() for key, value in maps.levels.items()}
        thread = threading.Thread(target=draw, args=(tiny_sd, "a red dog"))
        thread.start()
        thread.join()
    assert maps.store.calls == 3 and all(torch.equal(maps.levels[key], kept[key]) for key in kept)


def test_two_threads_share_one_unet(tiny_sd):
    def pipeline():
        own = {"tokenizer": copy.deepcopy(tiny_sd.tokenizer), "scheduler": diffusers.DDIMScheduler(**NOISE)}
        pipe = diffusers.StableDiffusionPipeline(**{**tiny_sd.components, **own}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def collect(pipe, prompt, phrase, results):
        with collect_maps(pipe, [phrase]) as maps:
            results[phrase] = (draw(pipe, prompt, steps=8), maps.levels)

    work = [(pipeline(), prompt, phrase) for prompt, phrase in zip(PROMPTS, ("dog", "cat"), strict=True)]
    alone, together = {}, {}
    for item in work:
        collect(*item, alone)
    threads = [threading.Thread(target=collect, args=(*item, together)) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for phrase, (image, levels) in alone.items():
        assert np.array_equal(together[phrase][0], image)
        assert all(torch.equal(together[phrase][1][key], levels[key]) for key in levels)
    assert "_compiled_call_impl" not in tiny_sd.unet.__dict__
