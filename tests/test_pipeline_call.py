import pytest
import torch

from diffumask_fast.attention.pipeline_call import PipelineCall, Steps


@pytest.mark.parametrize(
    ("timesteps", "timestep", "left"),
    [
        (None, 5, None),
        ([], 5, None),
        ([9, 7, 7, 5, 3], 7, 4),
        ([9, 7, 7, 5, 3], torch.tensor([5, 5]), 2),
        ([9, 7, 7, 5, 3], 8, 5),
    ],
)
def test_the_calls_that_are_left_are_counted(timesteps, timestep, left):
    assert Steps(timesteps if timesteps is None else torch.tensor(timesteps)).left(timestep) == left


@pytest.mark.parametrize("copied", [False, True])
def test_each_step_of_a_schedule_is_made_once(copied):
    timesteps = torch.tensor([9, 7, 7, 5, 3])
    given = [int(t) for t in timesteps] if copied else list(timesteps)
    steps = Steps(timesteps)
    assert all(steps.advance(t) for t in given)
    for again in range(5):
        steps = Steps(timesteps)
        assert all(steps.advance(t) for t in given[: again + 1])
        repeated = again if not copied or again != 1 else 0  # of two equal timesteps the second is still to come
        assert not steps.advance(given[repeated])
    assert Steps(timesteps).advance(4) and Steps(None).advance(4)


def call(embeds, negative=None):
    return PipelineCall(None, [["dog"]] * len(embeds), torch.zeros(len(embeds), 7, 1), embeds, negative)


def test_the_rows_of_the_prompts_are_found_where_they_stand():
    embeds, other = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    made = call(embeds, other)
    for blocks, first in (([other, embeds], 2), ([embeds, other, other], 0), ([embeds], 0), ([other], None)):
        assert made.first_row(torch.cat(blocks)) == first
    assert made.first_row(torch.randn(2, 9, 16)) is None
    assert made.seen.endswith("called with encoder_hidden_states of (2, 9, 16) that do not contain them")


def test_where_negative_prompts_are_the_prompts_the_first_rows_are_theirs():
    embeds = torch.randn(2, 7, 16)
    assert call(embeds, embeds.clone()).first_row(torch.cat([embeds] * 3)) == 2
    assert call(embeds).first_row(torch.cat([embeds] * 2)) == 0


def test_rows_that_were_changed_in_place_are_looked_at_again():
    embeds = torch.randn(1, 7, 16)
    made, states = call(embeds), embeds.clone()
    assert made.first_row(states) == 0
    states.mul_(2)
    assert made.first_row(states) is None


def test_rows_in_another_dtype_are_the_same():
    embeds = torch.randn(1, 7, 16)
    assert call(embeds).first_row(torch.cat([torch.zeros_like(embeds), embeds]).half()) == 1
