"""What ran: the form of each kernel call, for whoever asks, and whether Triton interprets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LISTENERS: list[list[tuple[str, str]]] = []


@contextmanager
def ran() -> Iterator[list[tuple[str, str]]]:
    """Give a list that takes (kernel, form) of each call inside the context, in order.

    Calls inside a compiled graph leave no trace here: the graph's own nodes tell.

    Example:
        >>> from diffumask_fast.kernels import attend, ran
        >>> x = torch.zeros(1, 4, 16)
        >>> with ran() as forms:
        ...     _ = attend(x, x, x, heads=1)
        >>> forms
        [('attend', 'sdpa')]
    """
    forms: list[tuple[str, str]] = []
    _LISTENERS.append(forms)
    try:
        yield forms
    finally:
        _LISTENERS[:] = [listener for listener in _LISTENERS if listener is not forms]


def note(kernel: str, form: str) -> None:
    """Tell the listeners that a kernel runs in a form."""
    if not torch.compiler.is_compiling():
        for listener in _LISTENERS:
            listener.append((kernel, form))


def traced(tensor: torch.Tensor) -> bool:
    """Whether a compiler passes a stand-in for a tensor: it must see a launch, which takes it half a millisecond."""
    return type(tensor) is not torch.Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
