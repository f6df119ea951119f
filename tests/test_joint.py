import pytest
import torch
from conftest import relative
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from diffumask_fast.attention.joint import SCALE, JointTap, joint_with_maps
from diffumask_fast.errors import DiffuMaskError

SELECT = torch.tensor([[[1.0, 0.0], [0.0, 0.5], [0.0, 0.5]]])  # of 3 tokens of text, 2 phrases
PRIOR = {"0": torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])}  # of 4 pixels


def test_columns_are_the_phrases_beside_the_earlier_maps():
    tap = JointTap(SELECT, PRIOR, 0, num_image=5, num_pixels=4)
    image = torch.tensor([[[0.2], [0.4], [0.6], [0.8], [0.0]]])  # the largest is brought to between 1/2 and 1
    assert torch.equal(tap.image, image)
    phrases = SELECT[0] * SCALE
    assert torch.equal(tap.image_first[0, :5, :1], image[0]) and torch.equal(tap.image_first[0, 5:, 1:], phrases)
    assert torch.equal(tap.text_first[0, 3:, :1], image[0]) and torch.equal(tap.text_first[0, :3, 1:], phrases)
    for columns in (tap.image_first, tap.text_first):
        assert columns.shape == (1, 8, 3) and columns.count_nonzero() == 4 + 3
    assert JointTap(SELECT, {}, 0, 4, 4).image.shape == (1, 4, 0)


@pytest.mark.parametrize("text_first", [True, False])
def test_means_are_of_the_layers_that_ran(text_first):
    tap = JointTap(SELECT, PRIOR, 0, num_image=5, num_pixels=4)
    assert tap.means("maps") == tap.means("propagated") == {}
    layers = [torch.rand(1, 3, 8) for _ in range(2)]
    pixels = slice(3, 7) if text_first else slice(0, 4)
    alone = torch.rand(1, 1, 5)
    for layer in layers:
        tap.put(layer, text_first)
    tap.put_image(alone)
    own = [layer[..., pixels] for layer in layers]
    assert torch.allclose(tap.means("maps")["0"], (own[0] + own[1])[:, 1:] / 2 / SCALE)
    assert torch.allclose(tap.means("propagated")["0"], (own[0][:, :1] + own[1][:, :1] + alone[..., :4]) / 3 / 2)


def test_a_processor_draws_as_it_does_alone():
    torch.manual_seed(0)
    attn = FluxAttention(32, heads=2, dim_head=16, added_kv_proj_dim=32, context_pre_only=False, bias=True)
    image, text = torch.randn(2, 4, 32), torch.randn(2, 3, 32)
    tap = JointTap(SELECT, PRIOR, 1, num_image=4, num_pixels=4)
    plain, wrapped = attn.processor(attn, image, text), joint_with_maps(attn.processor, True)
    assert all(torch.equal(a, b) for a, b in zip(wrapped(attn, image, text, tap=tap), plain, strict=True))
    assert tap.means("maps")["0"].shape == (1, 2, 4) and tap.means("propagated")["0"].shape == (1, 1, 4)


@pytest.mark.parametrize("over_text", [False, True])
def test_probabilities_too_small_for_half_precision(over_text):
    """Of all that a pixel gives, the text gets a ten-millionth, as of thousands of tokens that are no text."""
    torch.manual_seed(0)
    attn = FluxAttention(32, heads=2, dim_head=16, added_kv_proj_dim=32, context_pre_only=False, bias=True)
    with torch.no_grad():
        attn.to_q.weight.mul_(0.2), attn.to_q.bias.fill_(1)
        attn.add_k_proj.weight.mul_(0.2), attn.add_k_proj.bias.fill_(-1)
        attn.norm_added_k.weight.fill_(2.3)
    image, text = torch.randn(1, 1024, 32), torch.randn(1, 3, 32)
    prior = {"0": 1e-7 * torch.rand(1, 2, 1024) ** 4 * torch.tensor([[[1.0], [0.1]]])}
    found = []
    for dtype in (torch.float32, torch.float16):
        attn, tap = attn.to(dtype), JointTap(SELECT, prior, 0, 1024, 1024, over_text)
        with torch.no_grad():
            joint_with_maps(attn.processor, True)(attn, image.to(dtype), text.to(dtype), tap=tap)
        found.append(torch.cat([tap.means("maps")["0"], tap.means("propagated")["0"]], 1)[0])
    assert over_text or found[0][:2].mean() < 3e-7
    assert all(relative(half, single) < 0.02 for single, half in zip(*found, strict=True))


class Mirrored(JointAttnProcessor2_0):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return super().__call__(attn, hidden_states.flip(1), encoder_hidden_states)


class Renamed(FluxAttnProcessor):
    pass


def test_only_processors_whose_order_is_known():
    with pytest.raises(DiffuMaskError, match="the order of text and image in Mirrored is not known"):
        joint_with_maps(Mirrored(), True)
    assert joint_with_maps(Renamed(), True).text_first and not joint_with_maps(JointAttnProcessor2_0(), True).text_first
