import copy

import pytest
import torch
from conftest import make_unet, relative, sharpen
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.unet import UNetWithMaps, attention_places
from diffumask_fast.errors import DiffuMaskError

KINDS = ["sd", "sdxl"]


@pytest.fixture
def unets(sd_parts, sdxl_parts):
    return {"sd": sd_parts["unet"], "sdxl": sdxl_parts["unet"]}


def inputs(unet, rows=4, conditional=2, size=(8, 8), num=2):
    width = unet.config.cross_attention_dim
    latents, states = torch.randn(rows, 4, *size), torch.randn(rows, 77, width)
    select = torch.rand(conditional, 77, num)
    added = None
    if unet.config.addition_embed_type:
        added = {"text_embeds": torch.randn(rows, 32), "time_ids": torch.full((rows, 6), 64.0)}
    return dict(latents=latents, timestep=torch.tensor(500), encoder_hidden_states=states, select=select, added=added)


def plain(unet, call):
    rest = dict(encoder_hidden_states=call["encoder_hidden_states"], added_cond_kwargs=call["added"])
    return unet(call["latents"], call["timestep"], **rest, return_dict=False)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (13, 9)])
@torch.no_grad()
def test_one_call_gives_noise_maps_and_propagated_maps(unets, recording, kind, size):
    unet = unets[kind]
    denoiser, call = UNetWithMaps(unet), inputs(unet, size=size)
    with recording(unet) as recorder:
        expected = plain(unet, call)
    noise_pred, maps, nothing = denoiser(UNetCall(**call))
    assert torch.equal(noise_pred, expected) and nothing == {}
    truth = recorder.maps(call["select"], slice(2, 4))
    assert list(maps) == list(denoiser.keys) == [str(i) for i in range(len(truth))]
    assert all(relative(a, b) < 1e-6 for a, b in zip(maps.values(), truth, strict=True))

    prior = {key: torch.rand(2, 3, value.shape[-1]) for key, value in list(maps.items())[1:]}
    noise_pred, again, propagated = denoiser(UNetCall(**call, prior=prior))
    assert torch.equal(noise_pred, expected) and list(propagated) == list(prior)
    assert all(torch.equal(again[key], maps[key]) for key in maps)
    for key, value in prior.items():
        assert relative(propagated[key], recorder.propagate(value, slice(2, 4))) < 1e-6
        assert relative(value, propagated[key]) > 0.1


@torch.no_grad()
def test_conditional_rows_may_stand_anywhere(unets, recording):
    unet, denoiser = unets["sd"], UNetWithMaps(unets["sd"])
    call = inputs(unet, rows=6)
    with recording(unet) as recorder:
        plain(unet, call)
    for first in (0, 2, 4):
        maps = denoiser(UNetCall(**call, first_conditional=first))[1]
        truth = recorder.maps(call["select"], slice(first, first + 2))
        assert all(relative(a, b) < 1e-6 for a, b in zip(maps.values(), truth, strict=True))


def test_levels_come_from_the_place_in_the_unet(unets):
    places = attention_places(unets["sd"])
    kinds = [(p.level, p.cross, p.num_layers) for p in places.values()]
    assert sorted(set(kinds)) == [
        ("0", False, 3),
        ("0", True, 3),
        ("1", False, 3),
        ("1", True, 3),
        ("2", False, 4),
        ("2", True, 4),
    ]
    assert {p.level for p in attention_places(unets["sdxl"]).values()} == {"0", "1"}


def test_levels_of_stable_diffusion():
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    unet = make_unet(
        layers_per_block=2,
        block_out_channels=(32,) * 4,
        down_block_types=down,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    counts = {(p.level, p.num_layers) for p in attention_places(unet).values() if p.cross}
    assert counts == {("0", 5), ("1", 5), ("2", 5), ("3", 1)}


@torch.no_grad()
def test_processors_are_back_after_a_call_and_after_a_failure(unets):
    unet = copy.deepcopy(unets["sd"])
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
    before = {name: id(p) for name, p in unet.attn_processors.items()}
    keys = [list(attn.__dict__) for attn in attention_places(unet)]
    denoiser, call = UNetWithMaps(unet), inputs(unet)

    def check():
        assert {name: id(p) for name, p in unet.attn_processors.items()} == before
        assert [list(attn.__dict__) for attn in attention_places(unet)] == keys

    denoiser(UNetCall(**call))
    check()
    hook = unet.mid_block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        denoiser(UNetCall(**call))
    hook.remove()
    check()


class Doubling(torch.nn.Module):
    """A user's processor that is a module, takes a keyword of its own and does not draw as the plain one."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(2.0))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, shift=0.0):
        return self.gain * AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask) + shift


@torch.no_grad()
def test_a_foreign_processor_draws_and_maps_come_beside_it(unets):
    unet = copy.deepcopy(unets["sd"])
    call = inputs(unet)
    truth = UNetWithMaps(unet)(UNetCall(**call))
    for module in unet.modules():
        if hasattr(module, "set_processor") and not module.is_cross_attention:
            module.set_processor(Doubling())
    names = [name for name, _ in unet.named_modules()]
    expected = unet(
        call["latents"],
        call["timestep"],
        encoder_hidden_states=call["encoder_hidden_states"],
        cross_attention_kwargs={"shift": 0.5},
    ).sample
    prior = {"0": torch.rand(2, 2, 64)}
    noise_pred, maps, propagated = UNetWithMaps(unet)(
        UNetCall(**call, prior=prior, unet_kwargs={"cross_attention_kwargs": {"shift": 0.5}})
    )
    assert torch.equal(noise_pred, expected) and not torch.equal(noise_pred, truth[0])
    assert not torch.equal(UNetWithMaps(unet)(UNetCall(**call))[0], expected)
    assert [name for name, _ in unet.named_modules()] == names and propagated["0"].shape == (2, 2, 64)
    assert not torch.allclose(maps["0"], truth[1]["0"])


@torch.no_grad()
def test_maps_beside_a_foreign_processor_are_those_of_the_plain_one(unets, recording):
    class Mine(AttnProcessor2_0):
        pass

    unet = copy.deepcopy(unets["sd"])
    call, prior = inputs(unet), {"1": torch.rand(2, 2, 16)}
    truth = UNetWithMaps(unet)(UNetCall(**call, prior=prior))
    unet.set_attn_processor(Mine())
    got = UNetWithMaps(unet)(UNetCall(**call, prior=prior))
    assert torch.equal(got[0], truth[0])
    assert all(relative(got[1][key], truth[1][key]) < 1e-6 for key in truth[1])
    assert relative(got[2]["1"], truth[2]["1"]) < 1e-6


@torch.no_grad()
def test_a_mask_on_the_tokens_is_obeyed(unets):
    unet, call = unets["sd"], inputs(unets["sd"])
    mask = torch.ones(4, 77)
    mask[:, 50:] = 0
    rest = dict(encoder_hidden_states=call["encoder_hidden_states"], encoder_attention_mask=mask)
    expected = unet(call["latents"], call["timestep"], **rest).sample
    call["select"][:, :50] = 0
    noise_pred, maps, _ = UNetWithMaps(unet)(UNetCall(**call, unet_kwargs={"encoder_attention_mask": mask}))
    assert torch.equal(noise_pred, expected)
    assert all(value.abs().max() < 1e-6 for value in maps.values())


@torch.no_grad()
def test_the_call_is_pure(unets):
    denoiser, call = UNetWithMaps(unets["sd"]), inputs(unets["sd"])
    prior = {"0": torch.rand(2, 2, 64)}
    kept = [call["select"].clone(), prior["0"].clone()]
    first, second = denoiser(UNetCall(**call, prior=prior)), denoiser(UNetCall(**call, prior=prior))
    assert torch.equal(call["select"], kept[0]) and torch.equal(prior["0"], kept[1])
    for a, b in zip(torch.utils._pytree.tree_leaves(first), torch.utils._pytree.tree_leaves(second), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_the_call_is_one_graph(unets):
    torch._dynamo.reset()
    denoiser, call = UNetWithMaps(unets["sd"]), inputs(unets["sd"])
    call["prior"] = {"0": torch.rand(2, 2, 64)}
    got = torch.compile(denoiser, fullgraph=True, backend="eager")(UNetCall(**call))
    for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (got, denoiser(UNetCall(**call)))), strict=True):
        assert torch.equal(a, b)


def test_a_unet_without_cross_attention_is_refused():
    unet = make_unet(
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        mid_block_type=None,
    )
    with pytest.raises(DiffuMaskError, match="no cross-attention layers"):
        UNetWithMaps(sharpen(unet))
