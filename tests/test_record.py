"""kernels/record.py: what ran can be asked."""

import pytest
import torch

from diffumask_fast.kernels import attend, ran

X = torch.zeros(1, 4, 16)


@pytest.mark.parametrize(
    ("impl", "form"),
    [("auto", "sdpa"), ("sdpa", "sdpa"), ("triton", "triton"), ("sdpa+maps", "sdpa+maps"), ("reference", "reference")],
)
def test_each_form_says_its_name(impl, form):
    with ran() as forms:
        attend(X, X, X, torch.zeros(1, 4, 1), heads=1, impl=impl)
    assert forms == [("attend", form)]


def test_listeners_nest_and_leave_when_the_context_fails():
    with ran() as outer:
        attend(X, X, X, heads=1)
        with pytest.raises(KeyError), ran() as inner:
            attend(X, X, X, heads=1, impl="reference")
            raise KeyError
        attend(X, X, X, heads=1)
    attend(X, X, X, heads=1)
    assert outer == [("attend", "sdpa"), ("attend", "reference"), ("attend", "sdpa")]
    assert inner == [("attend", "reference")]


def test_a_listener_does_not_break_a_compiled_graph():
    compiled = torch.compile(lambda x: attend(x, x, x, heads=1)[0], fullgraph=True, backend="eager")
    with ran() as forms:
        compiled(X)
    assert forms == []
