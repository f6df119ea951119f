"""engines/optimized_unet.py and cpu_forwards.py: the same results, fewer products."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_unet, make_vae, relative
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.borrow import patched
from diffumask_fast.engines import cpu_forwards, optimized_unet
from diffumask_fast.engines.compiled import CompiledDenoiser
from diffumask_fast.engines.cpu_forwards import TransformedWeights, cheaper_forwards
from diffumask_fast.engines.decoder import CompiledDecoder
from diffumask_fast.engines.optimized_unet import OptimizedUNet
from diffumask_fast.kernels import ran

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


@pytest.fixture
def convolved(monkeypatch):
    """Name the sizes of what was convolved in Winograd's way."""
    sizes: list[tuple[int, ...]] = []
    own = cpu_forwards.winograd.convolve

    def convolve(*given):
        found = own(*given)
        sizes.append(tuple(found.shape[2:]))
        return found

    monkeypatch.setattr(cpu_forwards.winograd, "convolve", convolve)
    return sizes


def same(found, truth, limit=1e-5):
    assert relative(found[0], truth[0]) < limit
    for levels, wanted in zip(found[1:], truth[1:], strict=True):
        assert levels.keys() == wanted.keys()
        assert all(relative(levels[key], wanted[key]) < limit for key in wanted)


def flops(denoiser, call, **kept):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(call, **kept)
    return counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 10, 7])
@pytest.mark.parametrize("twins", [True, False])
def test_results_are_those_of_the_plain_unet(size, twins):
    unet = make_unet()
    call, optimized = inputs(unet, twins=twins, size=8), OptimizedUNet(unet)
    weights = TransformedWeights(unet).current()
    if size != 8:
        call |= {"latents": F.interpolate(call["latents"], (size, size)), "prior": {}}
    kept = dict(text=optimized.text(call["encoder_hidden_states"]), weights=weights)
    same(optimized(UNetCall(**call), **kept, twins=twins), UNetWithMaps(unet)(UNetCall(**call)))
    assert len(weights) == 24  # all but the first, the last and two that halve the image
    assert not any("forward" in vars(module) for module in unet.modules())


@torch.no_grad()
def test_nothing_selected_makes_no_maps():
    unet = make_unet()
    call, optimized = inputs(unet) | {"select": None, "prior": {}}, OptimizedUNet(unet)
    truth = unet(call["latents"], call["timestep"], call["encoder_hidden_states"]).sample
    for denoise in (optimized, UNetWithMaps(unet)):
        noise, *levels = denoise(UNetCall(**call))
        assert relative(noise, truth) < 1e-5 and levels == [{}, {}]
    given = UNetCall(**call, first_conditional=2)
    twins = optimized(given, twins=True, text=optimized.text(call["encoder_hidden_states"]))
    assert relative(twins[0], truth) < 1e-5 and twins[1:] == ({}, {})


def test_each_saving_takes_products_away():
    unet = make_unet()
    call, optimized = UNetCall(**inputs(unet)), OptimizedUNet(unet)
    with torch.no_grad():
        text = optimized.text(call.encoder_hidden_states)
    plain = flops(UNetWithMaps(unet), call)
    assert flops(optimized, call) == plain
    assert flops(optimized, call, text=text) < plain
    assert flops(optimized, call, text=text, twins=True) < flops(optimized, call, text=text)


def test_a_feed_forward_in_pieces_is_the_whole(monkeypatch):
    unet = make_unet()
    call = inputs(unet)
    with torch.no_grad():
        truth = UNetWithMaps(unet)(UNetCall(**call))
        monkeypatch.setattr(cpu_forwards, "PIECE_BYTES", 1)
        for module in unet.modules():
            if isinstance(module, FeedForward):
                module.net[0].register_forward_hook(lambda _, given, __: rows.add(len(given[0])))
        rows: set[int] = set()
        same(OptimizedUNet(unet)(UNetCall(**call)), truth)
    assert rows == {1}


@torch.no_grad()
def test_a_decoder_is_the_same(convolved):
    decoder = make_vae(32).decoder
    latents = torch.randn(2, 4, 5, 7)
    truth, weights = decoder(latents), TransformedWeights(decoder).current()
    assert len(weights) == 4 * 3 + 3  # all but the first and the last
    with patched("forward", cheaper_forwards(decoder, weights)):
        assert relative(decoder(latents), truth) < 1e-5
    assert convolved == [(10, 14)] * 4 + [(20, 28)] * 4 + [(40, 56)] * 4  # 5x7 would fill too little of its tiles


@torch.no_grad()
def test_an_upsampler_convolves_what_it_doubles(convolved):
    layer = Upsample2D(32, use_conv=True, out_channels=48)
    image, weights = torch.randn(2, 32, 3, 4), TransformedWeights(layer).current()
    truth = layer(image)
    with patched("forward", cheaper_forwards(layer, weights)):
        for size in (None, (6, 8), [6, 8]):
            assert relative(layer(image, size), truth) < 1e-5
        assert convolved == [(6, 8)] * 3
        assert layer(image, (5, 8)).shape == (2, 48, 5, 8) and convolved[3:] == [(5, 8)]
    layer = Upsample2D(32, use_conv=True, norm_type="ln_norm")
    assert layer not in cheaper_forwards(layer, TransformedWeights(layer).current())


@torch.no_grad()
def test_transformed_weights_follow_the_models():
    conv = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1))
    weights, image = TransformedWeights(conv), torch.randn(2, 32, 8, 8)
    (first,) = weights.current().values()
    assert weights.current()["0"] is first
    others = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1)).state_dict()
    for change in (lambda: conv[0].weight.data.mul_(2), conv.bfloat16, lambda: conv.load_state_dict(others)):
        change()
        truth = conv(image.to(conv[0].weight.dtype))
        with patched("forward", cheaper_forwards(conv, weights.current())):
            assert relative(conv(image.to(truth.dtype)), truth) < (1e-5 if truth.dtype == torch.float32 else 2e-2)
    conv[0].register_forward_hook(lambda *_: None)
    assert weights.current() == {}


@torch.no_grad()
def test_an_image_of_another_dtype_or_too_small_keeps_the_layers_forward(convolved):
    conv = nn.Conv2d(32, 32, 3, padding=1)
    with patched("forward", cheaper_forwards(conv, TransformedWeights(conv).current())):
        assert conv(torch.randn(32, 8, 8)).shape == (32, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(torch.randn(2, 32, 8, 8).bfloat16()).dtype == torch.bfloat16
        conv(torch.randn(2, 32, 2, 2))
        assert convolved == []
        conv(torch.randn(2, 32, 8, 8))
        assert convolved == [(8, 8)]


def test_which_convolutions_are_transformed(monkeypatch):
    def taken(*args, dtype=torch.float32, **kwargs):
        return bool(TransformedWeights(nn.Conv2d(*args, **{"padding": 1, **kwargs}).to(dtype)).current())

    monkeypatch.setattr(cpu_forwards, "has_amx", lambda: False)
    assert taken(32, 64, 3) and taken(32, 48, 3, bias=False) and taken(32, 32, 3, dtype=torch.bfloat16)
    assert not any(taken(*sizes, 3) for sizes in ((16, 64), (64, 16), (40, 64), (64, 40), (640, 656)))
    others = ({"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding": 0}, {"padding_mode": "circular"})
    assert not any(taken(32, 64, 3, **other) for other in others)
    assert not taken(32, 64, 1) and not taken(32, 64, 3, dtype=torch.float16) and not taken(32, 64, 3, device="meta")
    monkeypatch.setattr(cpu_forwards, "has_amx", lambda: True)
    assert taken(32, 64, 3) and not taken(32, 64, 3, dtype=torch.bfloat16)


@torch.no_grad()
def test_a_doubling_sequence_under_autocast_and_with_shared_or_hooked_layers(convolved):
    def relative_of(sequence, calls):
        image = torch.randn(2, 32, 8, 8)
        truth, weights = sequence(image), TransformedWeights(sequence).current()
        with patched("forward", cheaper_forwards(sequence, weights)):
            convolved.clear()
            assert relative(sequence(image), truth) < 1e-5 and len(convolved) == calls
            with torch.autocast("cpu", torch.bfloat16):
                assert relative(sequence(image.bfloat16()).float(), truth) < 0.05

    conv, double = nn.Conv2d(32, 32, 3, padding=1), nn.Upsample(scale_factor=2)
    relative_of(nn.Sequential(double, conv, nn.ReLU(), conv), 2)
    relative_of(nn.Sequential(double, nn.Conv2d(32, 8, 3, padding=1)), 0)
    relative_of(nn.Sequential(nn.Sequential(double, conv), double, nn.Conv2d(32, 8, 3, padding=1)), 1)
    relative_of(nn.Sequential(nn.Upsample(scale_factor=3), conv), 1)
    seen = []
    double.register_forward_hook(lambda *given: seen.append(given[2].shape[2]))
    relative_of(nn.Sequential(double, conv), 1)
    assert seen == [16, 16, 16]


@torch.no_grad()
def test_what_changes_after_the_weights_were_made_keeps_its_own_forward(convolved):
    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, image):
            return self.base_layer(image) + 1

    model, image = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), torch.randn(2, 32, 8, 8)
    weights, truth = TransformedWeights(model).current(), model(image)
    conv, model[0] = model[0], Adapter(model[0])
    adapted = TransformedWeights(model).current()
    for given in (weights, adapted):
        with patched("forward", cheaper_forwards(model, given)):
            assert relative(model(image), truth + 1) < 1e-5
    model[0] = conv
    with patched("forward", cheaper_forwards(model, adapted)):
        assert torch.equal(model(image), truth)
    convolved.clear()
    for change in (
        lambda: conv.register_forward_pre_hook(lambda *_: None),
        lambda: setattr(conv, "_conv_forward", nn.Conv2d._conv_forward.__get__(conv)),
        lambda: setattr(conv, "padding_mode", "circular"),
    ):
        change()
        with patched("forward", cheaper_forwards(model, weights)):
            model(image)
        conv._forward_pre_hooks.clear()
        vars(conv).pop("_conv_forward", None)
    assert convolved == []


@torch.no_grad()
def test_any_layout_of_weights_is_compared():
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)).to(memory_format=torch.channels_last)
    weights = TransformedWeights(model)
    (first,) = weights.current().values()
    model[0].weight.data.mul_(2)
    (second,) = weights.current().values()
    assert relative(second, 2 * first) < 1e-6
    flat = torch.randn(32 * 32 * 9 + 1)
    model[0].weight.data = flat[1:].view(32, 3, 3, 32).permute(0, 3, 1, 2)
    assert not torch.equal(weights.current()["0"], second)
    version = weights.version()
    model[0].weight.mul_(2)
    assert weights.version() > version


def test_which_attention_is_in_cpp(monkeypatch):
    def used(dtype=torch.float32, **given):
        unet = make_unet().to(dtype)
        call = {
            name: x.to(dtype) if name in ("latents", "encoder_hidden_states") else x for name, x in inputs(unet).items()
        }
        with ran() as impls:
            OptimizedUNet(unet)(UNetCall(**call, unet_kwargs=given))
        return {impl for kernel, impl in impls if kernel == "attend"}

    monkeypatch.setattr(optimized_unet, "has_amx", lambda: False)
    assert used() == {"sdpa"}  # gradients are wanted
    with torch.no_grad():
        assert used() == used(torch.bfloat16) == {"cpp"}
        assert used(encoder_attention_mask=torch.ones(4, 77, dtype=torch.bool)) == {"cpp", "sdpa"}
        monkeypatch.setattr(optimized_unet, "has_amx", lambda: True)
        assert used(torch.bfloat16) == {"sdpa"} and used() == {"cpp"}


def test_forwards_are_back_after_an_exception():
    layer = nn.Linear(2, 2)
    own = layer.forward
    with pytest.raises(ZeroDivisionError), patched("forward", {layer: lambda x: 1 / 0}):
        layer(torch.ones(2))
    assert "forward" not in vars(layer) and layer.forward == own


def test_text_is_left_to_layers_with_a_processor_of_their_own():
    unet = make_unet()
    optimized, states = OptimizedUNet(unet), torch.randn(2, 77, unet.config.cross_attention_dim)
    assert optimized.text(states)[0][0].shape[1] == 77
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    assert optimized.text(states) is None


def uncompiled(monkeypatch):
    """Return the engine's denoiser and torch's, the engine's decoder and torch's; they run what would be compiled."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    unet, decoder = make_unet(), make_vae(32).decoder.eval()
    found = CompiledDenoiser(unet)
    monkeypatch.setattr(found, "model", OptimizedUNet(unet))
    return found, UNetWithMaps(unet), CompiledDecoder(decoder, 8), decoder


@torch.no_grad()
def test_the_engine_uses_the_kernels_and_follows_the_weights(monkeypatch, convolved):
    found, truth, decoder, eager = uncompiled(monkeypatch)
    conv, last = found.model.unet.up_blocks[-1].resnets[0].conv1, eager.layers[-2].conv[0]
    for change in (lambda: None, lambda: None, conv.weight.data.zero_):
        change()
        call = inputs(found.model.unet)
        same(found(UNetCall(**call)), truth(UNetCall(**call)))
    conv.weight.normal_()  # noticed among the steps of a run too
    same(found(UNetCall(**call)), truth(UNetCall(**call)))
    assert len(convolved) >= 4 * 10
    convolved.clear()
    latents = torch.randn(2, 4, 8, 8)
    for change in (lambda: None, lambda: last.weight.data.mul_(2)):
        change()
        assert relative(decoder(latents), eager(latents)) < 1e-5
    assert len(convolved) == 2 * 15


def test_the_engine_has_gradients(monkeypatch):
    found, truth, decoder, eager = uncompiled(monkeypatch)
    call = inputs(found.model.unet)
    one, other = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    for forward, latents in ((decoder, one), (eager, other)):
        forward(latents).square().mean().backward()
    assert relative(one.grad, other.grad) < 1e-4
    grads = []
    for denoise in (found, truth):
        denoise(UNetCall(**call))[0].square().mean().backward()
        grads.append(truth.unet.conv_in.weight.grad.clone())
        truth.unet.zero_grad()
    assert relative(*grads) < 1e-4


@torch.no_grad()
def test_compiled_twins_and_text_are_found_by_looking(monkeypatch):
    unet = make_unet()
    found, truth, seen = CompiledDenoiser(unet), UNetWithMaps(unet), []
    monkeypatch.setattr(found, "model", OptimizedUNet(unet))  # what it asks for, not what a compiler makes of it
    monkeypatch.setattr(
        found.model, "text", lambda states: seen.append(states) or OptimizedUNet.text(found.model, states)
    )
    run = found.model.forward
    monkeypatch.setattr(
        found.model, "forward", lambda call, **kept: (asked.append(kept["twins"]), run(call, **kept))[1]
    )
    asked: list[bool] = []
    call = inputs(unet, images=3)
    for _ in range(2):
        same(found(UNetCall(**call)), truth(UNetCall(**call)))
    assert asked == [True, True] and len(seen) == 1
    call["encoder_hidden_states"].mul_(2)  # the same tensor, other values
    same(found(UNetCall(**call)), truth(UNetCall(**call)))
    assert len(seen) == 2
    call["latents"][0, 0, 0, 0] += 1
    same(found(UNetCall(**call)), truth(UNetCall(**call)))
    assert asked[-1] is False
    fewer = inputs(unet, images=2)
    same(found(UNetCall(**fewer)), truth(UNetCall(**fewer)))
    alone = {key: value[:3] for key, value in call.items() if key in ("latents", "encoder_hidden_states", "select")}
    alone = UNetCall(**alone, timestep=torch.tensor(3))
    same(found(alone)[:2], truth(alone)[:2])


def test_text_is_not_made_by_a_layer_with_an_adapter():
    unet = make_unet()
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2

    class Adapted(nn.Linear):
        pass

    attn.to_k.__class__ = Adapted
    assert OptimizedUNet(unet).text(torch.randn(2, 77, unet.config.cross_attention_dim)) is None
