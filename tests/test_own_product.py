"""attention/own_product.py: maps of layers that have processors of their own, against what torch was really given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import draw, relative
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

from diffumask_fast import collect_maps
from diffumask_fast.attention.phrases import phrase_columns
from diffumask_fast.errors import DiffuMaskError

PROMPT = "a photo of a dog on the grass"


def heads(attn, x):
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class Explicit(AttnProcessor2_0):
    """Draws with `context` and `mask` of its own, and keeps explicit fp32 probabilities of its cross-attention."""

    def __init__(self):
        super().__init__()
        self.probs = []

    def context(self, attn, states):
        return states

    def mask(self, num):
        return None

    def product(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states)
        states = self.context(attn, encoder_hidden_states)
        q, k, v = (heads(attn, x) for x in (attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states)))
        mask = self.mask(hidden_states.shape[1])
        scores = q.double() @ k.double().transpose(2, 3) / q.shape[-1] ** 0.5
        self.probs.append((scores if mask is None else scores + mask).softmax(-1).mean(1))
        return attn.to_out[0](self.product(q, k, v, mask).transpose(1, 2).flatten(2))


class Context(Explicit):
    def context(self, attn, states):
        return 2 * states.flip(-1)


class Region(Explicit):
    def mask(self, num):
        mask = torch.zeros(1, 1, num, 77)
        mask[..., : num // 2, 5] = -1e4
        return mask


class Causal(Explicit):
    """A mask of booleans, given by position."""

    def mask(self, num):
        mask = torch.zeros(1, 1, num, 77)
        mask[..., 30:] = float("-inf")
        return mask

    def product(self, q, k, v, mask):
        return torch._C._nn.scaled_dot_product_attention(q, k, v, mask == 0)


@pytest.fixture
def pipe(tiny_sd):
    tiny_sd.unet = copy.deepcopy(tiny_sd.unet)
    return tiny_sd


@pytest.mark.parametrize("kind", [Explicit, Context, Region, Causal])
def test_maps_are_of_the_product_that_draws(pipe, kind):
    processor = kind()
    pipe.unet.set_attn_processor(processor)
    plain = draw(pipe, PROMPT)
    select = phrase_columns(pipe.tokenizer, [PROMPT], ["dog", "grass"], length=77).double()
    pixels = sorted({p.shape[1] for p in processor.probs}, reverse=True)
    truth = [torch.stack([p[1:] for p in processor.probs if p.shape[1] == n]).mean(0) @ select for n in pixels]
    with collect_maps(pipe, ["dog", "grass"]) as maps:
        assert (draw(pipe, PROMPT) == plain).all()
    for found, expected in zip(maps.levels.values(), truth, strict=True):
        assert relative(found.double(), expected.transpose(1, 2)) < 1e-5
        assert relative(torch.full_like(expected, 1 / 77), expected) > 0.1


@pytest.mark.parametrize("make", [AttnProcessor, lambda: SlicedAttnProcessor(1), lambda: SlicedAttnProcessor(3)])
def test_explicit_scores_are_read_whole_or_in_slices(pipe, make):
    with collect_maps(pipe, ["dog"], propagate=2) as truth:
        draw(pipe, PROMPT, steps=4)
    pipe.unet.set_attn_processor(make())
    plain = draw(pipe, PROMPT, steps=4)
    with collect_maps(pipe, ["dog"], propagate=2) as maps:
        assert (draw(pipe, PROMPT, steps=4) == plain).all()
    assert all(relative(maps.levels[key], truth.levels[key]) < 1e-4 for key in truth.levels)
    propagated = truth.store.propagated
    assert propagated and all(relative(maps.store.propagated[key], propagated[key]) < 1e-4 for key in propagated)


class InHalves(Explicit):
    def product(self, q, k, v, mask):
        rows = zip(*(x.split(1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*row) for row in rows])


class Twice(Explicit):
    def product(self, q, k, v, mask):
        return (super().product(q, k, v, mask) + super().product(q, 2 * k, v, mask)) / 2


class ByHand(Explicit):
    def product(self, q, k, v, mask):
        return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("kind", [InHalves, Twice, ByHand])
def test_a_product_that_cannot_be_read_is_refused(pipe, kind):
    pipe.unet.set_attn_processor(kind())
    with pytest.raises(DiffuMaskError, match=f"^{kind.__name__} does not make one product over all tokens"):
        with collect_maps(pipe, ["dog"]):
            draw(pipe, PROMPT)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_blocks_compiled_by_themselves_share_their_graphs(pipe, fullgraph):
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    with collect_maps(pipe, ["dog"]) as truth:
        plain = draw(pipe, PROMPT)
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=fullgraph)
    with collect_maps(pipe, ["dog"]) as maps:
        assert (draw(pipe, PROMPT) == plain).all()
    assert all(relative(maps.levels[key], truth.levels[key]) < 1e-6 for key in truth.levels)
    assert counted["unique_graphs"] == 6  # of 10 layers: one for each level, and one more where maps are propagated
