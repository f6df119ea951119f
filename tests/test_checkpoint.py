"""learning/checkpoint.py: a state comes back as it was, or not at all."""

import pytest
import torch
from torch import nn

from diffumask_fast.dataset.writer import temporary_path
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.checkpoint import CHECKPOINT, State, clear, read_checkpoint, write_checkpoint

PLAN = {"seed": 0, "lr": [0.1]}


def state(seed=0, steps=0):
    torch.manual_seed(seed)
    model, average = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(2))
    adam = torch.optim.AdamW(model.parameters(), 0.1)
    made = State(model, average, adam)
    for _ in range(steps):
        take_step(made)
    return made


def take_step(made):
    made.adam.zero_grad()
    made.model(torch.arange(12.0).view(4, 3)).square().mean().backward()
    made.adam.step()
    made.step += 1


def same(first, second):
    parts = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in parts)


def test_a_state_comes_back_and_goes_on_bit_for_bit(tmp_path):
    first, other = state(0, steps=3), state(1)
    first.stage, first.loss = 1, 0.1 + 0.2
    write_checkpoint(tmp_path, first, PLAN)
    read_checkpoint(tmp_path, other, PLAN)
    assert (other.stage, other.step, other.loss) == (1, 3, 0.1 + 0.2) and same(first, other)
    assert torch.equal(first.average[0].weight, other.average[0].weight)
    for made in (first, other):
        take_step(made)
    assert same(first, other)


def test_without_a_checkpoint_nothing_changes(tmp_path):
    made, expected = state(), state()
    temporary_path(tmp_path / CHECKPOINT).write_bytes(b"what a killed training left half-written")
    read_checkpoint(tmp_path, made, PLAN)
    assert made.step == 0 and same(made, expected) and not list(tmp_path.iterdir())
    write_checkpoint(tmp_path, state(1, steps=1), PLAN)
    clear(tmp_path)
    read_checkpoint(tmp_path, made, PLAN)
    assert same(made, expected) and not list(tmp_path.iterdir())


def test_what_does_not_fit_is_one_sentence(tmp_path):
    write_checkpoint(tmp_path, state(steps=1), PLAN)
    with pytest.raises(DiffuMaskError, match="other options: `lr` was .0.1. and is .0.2. now"):
        read_checkpoint(tmp_path, state(), PLAN | {"lr": [0.2]})
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DiffuMaskError, match="is damaged: remove it"):
        read_checkpoint(tmp_path, state(), PLAN)
