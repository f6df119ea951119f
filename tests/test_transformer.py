"""Maps of joint attention: equal to an explicit store of all probabilities, with the plain pipeline's images."""

import gc
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw, relative
from diffusers import FluxKontextPipeline, FluxPipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from PIL import Image
from tiny_mmdit import flux_parts, new_pipe, sd3_parts, t5_parts

from diffumask_fast import collect_maps
from diffumask_fast.attention.transformer import TransformerWithMaps, packed_size
from diffumask_fast.errors import DiffuMaskError

PROMPTS = ["a photo of a potted plant and a dog on the sofa", "the cat on the sofa", "a red bus, a car and a bus"]
PHRASES = [["potted plant", "dog"], ["sofa"], ["bus", "car", "red"]]
CLIP = [[[5, 6, 7], [10]], [[5]], [[3, 9], [6], [2]]]  # 0 is the start token
T5 = [[[4, 5], [8]], [[4, 5]], [[2, 8], [5], [1]]]
LENGTH = 24  # of T5's text
WIDE = dict(height=64, width=96, max_sequence_length=LENGTH)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    torch.manual_seed(2)
    return t5_parts(tmp_path_factory.mktemp("t5") / "tokenizer")


@pytest.fixture(scope="module")
def parts_of_sd3(tokenizer, t5):
    return sd3_parts(tokenizer, t5)


@pytest.fixture(scope="module")
def parts_of_flux(tokenizer, t5):
    return flux_parts(tokenizer, t5)


@pytest.fixture
def sd3(parts_of_sd3):
    return new_pipe(StableDiffusion3Pipeline, parts_of_sd3)


@pytest.fixture
def flux(parts_of_flux):
    return new_pipe(FluxPipeline, parts_of_flux)


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
    """Plain images and all probabilities first, then the same with maps, which are propagated in the last call."""
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
