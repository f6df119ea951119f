"""borrow.py: what is put into other people's objects is taken out again."""

import copy

import pytest
import torch

from diffumask_fast.borrow import patched, patched_but_in_copies, without_traces


class Plain:
    def __init__(self):
        self.other = [1]


class WithState(Plain):
    def __getstate__(self):
        return {**vars(self), "kept": True}


@pytest.mark.parametrize("kind", [Plain, WithState])
@pytest.mark.parametrize("own", [{}, {"method": "own"}])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_have_their_own(kind, own, copied):
    owner = kind()
    vars(owner).update(own)
    before = dict(vars(owner))
    with patched_but_in_copies("method", owner, "ours"):
        twin = copied(owner)
        assert owner.method == "ours"
    assert vars(owner) == before
    assert vars(twin) == before | ({"kept": True} if kind is WithState else {})


def test_it_is_taken_out_after_an_exception():
    owner = Plain()
    with pytest.raises(KeyError), patched_but_in_copies("method", owner, "ours"):
        raise KeyError
    assert vars(owner) == {"other": [1]}


def test_compiled_code_leaves_nothing_behind():
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(x):
        with patched("forward", {layer: lambda x: 2 * x}):
            return layer(x)

    for _ in range(2):
        with without_traces("forward", [layer]):
            assert torch.equal(doubled(x), 2 * x)
        assert "forward" not in vars(layer)
