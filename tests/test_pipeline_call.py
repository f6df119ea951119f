from types import SimpleNamespace

import pytest
import torch

from diffumask_fast.attention.pipeline_call import PipelineCall, calls_left


@pytest.mark.parametrize(
    ("pipe", "timestep", "left"),
    [
        (SimpleNamespace(), 5, None),
        (SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([]))), 5, None),
        (SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([9, 7, 7, 5, 3]))), 7, 4),
        (SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([9, 7, 7, 5, 3]))), torch.tensor([5, 5]), 2),
        (SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([9, 7, 7, 5, 3]))), 8, 5),
        (SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([9, 7, 5])), _num_timesteps=2), 9, 2),
    ],
)
def test_the_calls_that_are_left_are_counted(pipe, timestep, left):
    assert calls_left(pipe, timestep) == left


def test_the_rows_of_the_prompts_are_found_where_they_stand():
    embeds, other = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    call = PipelineCall([["dog"], ["cat"]], torch.zeros(2, 7, 1), embeds)
    for blocks, first in (([other, embeds], 2), ([embeds, other, other], 0), ([embeds], 0), ([other], None)):
        assert call.first_row(torch.cat(blocks)) == first
    assert call.first_row(torch.randn(2, 9, 16)) is None
    assert call.seen.endswith("called with encoder_hidden_states of (2, 9, 16) that do not contain them")


def test_rows_in_another_dtype_are_the_same():
    embeds = torch.randn(1, 7, 16)
    call = PipelineCall([["dog"]], torch.zeros(1, 7, 1), embeds)
    assert call.first_row(torch.cat([torch.zeros_like(embeds), embeds]).half()) == 1
