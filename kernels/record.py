"""Which implementation each kernel call ran, for whoever asks, and whether Triton interprets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LISTENERS: list[list[tuple[str, str]]] = []


@contextmanager
def ran() -> Iterator[list[tuple[str, str]]]:
    """Yield a list to which each call inside the context appends (kernel, impl).

    Calls inside a compiled graph are not noted: look at the graph's nodes.

    Example:
        >>> from diffumask_fast.kernels import attend, ran
        >>> x = torch.zeros(1, 4, 16)
        >>> with ran() as impls:
        ...     _ = attend(x, x, x, heads=1)
        >>> impls
        [('attend', 'sdpa')]
    """
    impls: list[tuple[str, str]] = []
    _LISTENERS.append(impls)
    try:
        yield impls
    finally:
        _LISTENERS[:] = [listener for listener in _LISTENERS if listener is not impls]


def note(kernel: str, impl: str) -> None:
    """Append a call to every list that `ran` has open."""
    if not torch.compiler.is_compiling():
        for listener in _LISTENERS:
            listener.append((kernel, impl))


def traced(tensor: torch.Tensor) -> bool:
    """Return whether a compiler traces this tensor; only then is a launch wrapped, which takes half a millisecond."""
    return type(tensor) is not torch.Tensor


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
