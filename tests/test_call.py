import pytest
import torch
from conftest import make_unet, relative

from diffumask_fast.attention.call import UNetCall
from diffumask_fast.attention.unet import UNetWithMaps


def make(rows, conditional, first=None, num=2):
    return UNetCall(
        torch.randn(rows, 4, 8, 8), 500, torch.randn(rows, 77, 32), torch.rand(conditional, 77, num),
        {"1": torch.rand(conditional, 3, 16)}, first_conditional=first,
        unet_kwargs={"encoder_attention_mask": torch.ones(rows, 77)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "conditional", "first", "found", "guided"),
    [(4, 2, None, 2, True), (4, 4, None, 0, False), (4, 2, 0, 0, False), (6, 2, 2, 2, False), (2, 2, 0, 0, False)],
)
def test_conditional_rows(rows, conditional, first, found, guided):
    call = make(rows, conditional, first)
    assert (call.first, call.num_conditional, call.is_guided) == (found, conditional, guided)


def test_without_phrases_all_rows_from_the_first_one_are_conditional():
    latents, states = torch.zeros(4, 4, 8, 8), torch.zeros(4, 77, 32)
    call = UNetCall(latents, 1, states)
    assert (call.first, call.num_conditional, call.is_guided) == (0, 4, False)
    call = UNetCall(latents, 1, states, first_conditional=2)
    assert (call.first, call.num_conditional, call.is_guided) == (2, 2, True)


@pytest.mark.parametrize(
    ("rows", "conditional", "first", "by_halves"),
    [(4, 2, None, True), (4, 2, None, False), (3, 3, None, False), (6, 2, 2, False), (4, 2, 0, False)],
)
@torch.no_grad()
def test_what_is_cut_from_the_results_of_a_padded_call_is_its_own(rows, conditional, first, by_halves):
    model, call = UNetWithMaps(make_unet()), make(rows, conditional, first)
    padded = call.padded(8, 5, by_halves=by_halves)
    assert padded.latents.shape[0] == padded.unet_kwargs["encoder_attention_mask"].shape[0] == 8
    num = 4 if by_halves else 8
    assert padded.select.shape == (num, 77, 5) and padded.prior["1"].shape == (num, 5, 16) and padded.first == 8 - num
    truth, found = model(call), call.cut(model(padded), by_halves=by_halves)
    assert relative(found[0], truth[0]) < 1e-5
    for levels, wanted in zip(found[1:], truth[1:], strict=True):
        assert list(levels) == list(wanted) and wanted
        for key in wanted:
            assert levels[key].shape == wanted[key].shape and relative(levels[key], wanted[key]) < 1e-5


def test_padding_to_the_same_size_changes_nothing():
    call = make(4, 2)
    padded = call.padded(4, by_halves=True)
    assert torch.equal(padded.latents, call.latents) and torch.equal(padded.select, call.select)
    assert padded.timestep == 500 and padded.added is None and padded.first == 2
