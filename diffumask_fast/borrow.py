"""Put something in the place of what is not ours, and always put the own one back.

Nothing else in this package changes an object or a setting that somebody else made; `docs/architecture.md` lists all
uses.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

# what nn.Module's __call__ consults first, so that the module's hooks and its compiled form stay behind it
MODULE_CALL = "_compiled_call_impl"
VARIANTS = 128  # of one compiled function


@contextmanager
def patched(name: str, values: Mapping[Any, Any]) -> Iterator[None]:
    """Let an attribute of objects be other values inside the context; afterwards, also after an exception, their own.

    Works on `__dict__`, which shadows a method of the class and a registered module alike. torch 2.11 compiles no
    removal from there: compiled code leaves in an object that had no attribute of its own the class's one, and its
    caller takes that away by `without_traces`.

    Args:
        name: of the attribute.
        values: object -> what stands in the attribute's place.
    """
    compiling = torch.compiler.is_dynamo_compiling()
    kept = [
        (owner, compiling or name in vars(owner), getattr(owner, name) if compiling else vars(owner).get(name))
        for owner in values
    ]
    try:
        for owner, value in values.items():
            vars(owner)[name] = value
        yield
    finally:
        for owner, had, value in kept:
            if had:
                vars(owner)[name] = value
            else:
                vars(owner).pop(name, None)


@contextmanager
def without_traces(name: str, owners: Iterable[Any]) -> Iterator[None]:
    """Take away, on leaving the context, an attribute that compiled code has put into objects, see `patched`.

    Args:
        name: of the attribute.
        owners: the objects; those that had it before keep it.
    """
    without = [owner for owner in owners if name not in vars(owner)]
    try:
        yield
    finally:
        for owner in without:
            vars(owner).pop(name, None)


@contextmanager
def patched_but_in_copies(name: str, owner: Any, value: Any) -> Iterator[None]:
    """Let an attribute of an object be another value inside the context, and its own in copies that are made there.

    Args:
        name: of the attribute.
        owner: whose it is; of a class that is copied by its `__getstate__`, as classes without one of their own are.
        value: what stands in the attribute's place.
    """
    had, kept = name in vars(owner), vars(owner).get(name)
    kind: Any = type(owner)

    def __getstate__() -> Any:
        state = kind.__getstate__(owner)
        if isinstance(state, dict):
            state = {key: kept if key == name else one for key, one in state.items() if key != "__getstate__"}
            if not had:
                del state[name]
        return state

    with patched(name, {owner: value}), patched("__getstate__", {owner: __getstate__}):
        yield


@contextmanager
def patched_environment(name: str, value: str) -> Iterator[None]:
    """Let a variable of the process's environment be another one inside the context.

    Args:
        name: of the variable.
        value: inside the context.
    """
    kept = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if kept is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = kept


@contextmanager
def patched_threads(number: int) -> Iterator[None]:
    """Let torch use another number of threads for an operation, here and in threads that begin inside the context.

    torch's number is of the whole process, whichever thread sets it: left changed, later threads draw images whose
    last bits differ.

    Args:
        number: of threads, inside the context.
    """
    kept = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def many_shapes() -> AbstractContextManager[None]:
    """Let compiled code have more variants: each set of shapes is one, and past torch's limit a call would fail."""
    return torch._dynamo.config.patch(recompile_limit=max(torch._dynamo.config.recompile_limit, VARIANTS))
