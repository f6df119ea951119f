"""attention/lean.py and forwards.py: the same results, fewer products."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_unet, make_vae, relative
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffumask_fast import compiled
from diffumask_fast.attention import UNetWithMaps, forwards
from diffumask_fast.attention.forwards import cheaper_forwards, double_and_convolve, swapped
from diffumask_fast.attention.lean import LeanUNet
from diffumask_fast.compiled import CompiledDenoiser

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def inputs(unet, images=2, twins=True, size=8):
    """Return a call's arguments: latents in pairs, priors at both levels."""
    half = torch.randn(images, 4, size, size)
    return dict(
        latents=torch.cat([half, half if twins else torch.randn_like(half)]), timestep=torch.tensor(500),
        encoder_hidden_states=torch.randn(2 * images, 77, unet.config.cross_attention_dim),
        select=torch.rand(images, 77, 3),
        prior={"0": torch.rand(images, 3, size**2), "1": torch.rand(images, 3, size**2 // 4)},
    )  # fmt: skip


def same(found, truth, limit=1e-5):
    assert relative(found[0], truth[0]) < limit
    for levels, wanted in zip(found[1:], truth[1:], strict=True):
        assert levels.keys() == wanted.keys()
        assert all(relative(levels[key], wanted[key]) < limit for key in wanted)


def flops(call, **arguments):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(**arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 5, 1, 1), (3, 2, 5, 3)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_a_doubled_image_is_convolved_from_the_image(shape, biased):
    image, conv = torch.randn(shape), nn.Conv2d(shape[1], 7, 3, padding=1, bias=biased)
    truth = conv(F.interpolate(image, scale_factor=2.0, mode="nearest"))
    found = double_and_convolve(image, conv.weight, conv.bias)
    assert found.shape == truth.shape and relative(found, truth) < 1e-5
    counts = [flops(f) for f in (lambda: double_and_convolve(image, conv.weight, conv.bias), lambda: conv(
        F.interpolate(image, scale_factor=2.0, mode="nearest")))]  # fmt: skip
    assert counts[0] * 9 == counts[1] * 4


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 10, 7])
@pytest.mark.parametrize("twins", [True, False])
def test_what_is_found_is_the_plain_units(size, twins):
    unet = make_unet()
    call, lean = inputs(unet, twins=twins, size=8), LeanUNet(unet)
    if size != 8:
        call |= {"latents": F.interpolate(call["latents"], (size, size)), "prior": {}}
    same(lean(**call, text=lean.text(call["encoder_hidden_states"]), twins=twins), UNetWithMaps(unet)(**call))
    assert not any("forward" in vars(module) for module in unet.modules())


def test_each_saving_takes_products_away():
    unet = make_unet()
    call, lean = inputs(unet), LeanUNet(unet)
    with torch.no_grad():
        text = lean.text(call["encoder_hidden_states"])
    plain = flops(UNetWithMaps(unet), **call)
    bare = flops(lean, **call)
    assert bare < plain  # the doubled images
    assert flops(lean, **call, text=text) < bare
    assert flops(lean, **call, text=text, twins=True) < flops(lean, **call, text=text)


def test_a_feed_forward_in_pieces_is_the_whole(monkeypatch):
    unet = make_unet()
    call = inputs(unet)
    with torch.no_grad():
        truth = UNetWithMaps(unet)(**call)
        monkeypatch.setattr(forwards, "PIECE_BYTES", 1)
        for module in unet.modules():
            if isinstance(module, FeedForward):
                module.net[0].register_forward_hook(lambda _, given, __: rows.add(len(given[0])))
        rows: set[int] = set()
        same(LeanUNet(unet)(**call), truth)
    assert rows == {1}


@torch.no_grad()
def test_a_decoder_is_the_same():
    decoder = make_vae().decoder
    latents = torch.randn(2, 4, 5, 3)
    truth, found = decoder(latents), cheaper_forwards(decoder)
    assert len(found) == 6  # three doublings and their convolutions
    with swapped("forward", found):
        assert relative(decoder(latents), truth) < 1e-5


def test_forwards_are_back_after_an_exception():
    layer = nn.Linear(2, 2)
    own = layer.forward
    with pytest.raises(ZeroDivisionError), swapped("forward", {layer: lambda x: 1 / 0}):
        layer(torch.ones(2))
    assert "forward" not in vars(layer) and layer.forward == own


def test_text_is_left_to_layers_with_a_processor_of_their_own():
    unet = make_unet()
    lean, states = LeanUNet(unet), torch.randn(2, 77, unet.config.cross_attention_dim)
    assert lean.text(states)[0][0].shape[1] == 80
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    assert lean.text(states) is None


@torch.no_grad()
def test_compiled_twins_and_text_are_found_by_looking(monkeypatch):
    unet = make_unet()
    found, truth, seen = CompiledDenoiser(unet), UNetWithMaps(unet), []
    monkeypatch.setattr(found, "model", LeanUNet(unet))  # what it asks for, not what a compiler makes of it
    monkeypatch.setattr(found.model, "text", lambda states: seen.append(states) or LeanUNet.text(found.model, states))
    run = found._run
    monkeypatch.setattr(found, "_run", lambda given: (asked.append(given["twins"]), run(given))[1])
    asked: list[bool] = []
    call = inputs(unet, images=3)
    for _ in range(2):
        same(found(**call), truth(**call))
    assert asked == [True, True] and len(seen) == 1
    call["encoder_hidden_states"].mul_(2)  # the same tensor, other values
    same(found(**call), truth(**call))
    assert len(seen) == 2
    call["latents"][0, 0, 0, 0] += 1
    same(found(**call), truth(**call))
    assert asked[-1] is False
    fewer = inputs(unet, images=2)
    same(found(**fewer), truth(**fewer))
    alone = {key: value[:3] for key, value in call.items() if key in ("latents", "encoder_hidden_states", "select")}
    same(found(**alone, timestep=torch.tensor(3))[:2], truth(**alone, timestep=torch.tensor(3))[:2])


def test_what_is_not_plain_keeps_its_own_forward():
    decoder = make_vae().decoder
    convs = [layer for layer in decoder.layers if type(layer) is nn.Conv2d]
    assert sum(conv in cheaper_forwards(decoder) for conv in convs) == 3
    for conv in convs:
        conv.padding_mode = "circular"
    assert cheaper_forwards(decoder) == {}
    unet = make_unet()
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2

    class Adapted(nn.Linear):
        pass

    attn.to_k.__class__ = Adapted
    assert LeanUNet(unet).text(torch.randn(2, 77, unet.config.cross_attention_dim)) is None


@torch.no_grad()
def test_a_decoder_in_pieces_and_one_with_an_image_beside_its_latents(monkeypatch):
    monkeypatch.setattr(compiled, "PIECE_BYTES", 1)
    monkeypatch.setattr(
        torch, "compile", lambda forward, dynamic: lambda *given: rows.append(len(given[0])) or forward(*given)
    )
    decoder, rows, latents = make_vae().decoder, [], torch.randn(3, 4, 2, 2)
    truth = decoder(latents)
    compiled._compile_decoder(decoder, 8)
    assert relative(decoder(latents), truth) < 1e-5 and rows == [1, 1, 1]
    decoder, seen = make_vae().decoder, []
    monkeypatch.setattr(decoder, "forward", lambda *given: seen.append([len(x) for x in given]))
    compiled._compile_decoder(decoder, 8)
    decoder(latents, latents, latents)
    assert seen == [[3, 3, 3]] and rows == [1, 1, 1]
