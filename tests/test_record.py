"""kernels/record.py: a list says which implementations ran."""

import pytest
import torch

from diffumask_fast.kernels import attend, ran

X = torch.zeros(1, 4, 16)


@pytest.mark.parametrize(
    ("impl", "noted"),
    [("auto", "sdpa"), ("sdpa", "sdpa"), ("triton", "triton"), ("sdpa+maps", "sdpa+maps"), ("reference", "reference")],
)
def test_each_implementation_is_noted_by_its_name(impl, noted):
    with ran() as impls:
        attend(X, X, X, torch.zeros(1, 4, 1), heads=1, impl=impl)
    assert impls == [("attend", noted)]


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
    with ran() as impls:
        compiled(X)
    assert impls == []
