"""Which call of a pipeline is running, read from the stack.

A pipeline's `__call__` is looked up on its class, which other pipelines share, so it cannot be borrowed as a method is.
The stack tells it as well, for each thread by itself, and nothing has to be put back.
"""

import inspect
import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline

OURS = __name__.partition(".")[0]
BETWEEN = {OURS, "torch", "diffusers", "accelerate", "contextlib", "functools"}


def running_call(pipe: Any) -> FrameType | None:
    """Return the frame of a pipeline's `__call__` if it is the pipeline's own code that calls us, else None.

    Not so where a callback, another pipeline or a user's own loop does.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if _is_method(frame) else None
        if owner is pipe and _is_of(frame, type(pipe)):
            if frame.f_code.co_name == "__call__" or frame.f_code is _code_of_call(type(pipe)):
                return frame
        elif isinstance(owner, DiffusionPipeline) or not _is_between(frame):
            return None
        frame = frame.f_back
    return None


def _is_method(frame: FrameType) -> bool:
    code = frame.f_code
    return bool(code.co_argcount) and code.co_varnames[0] == "self"


def _is_of(frame: FrameType, kind: type) -> bool:
    """Tell whether a function is a method of a class, not only one whose first argument is called self."""
    code = frame.f_code
    return code is _code_of_call(kind) or any(
        code.co_qualname == f"{base.__qualname__}.{code.co_name}" for base in kind.__mro__
    )


def _is_between(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN


def _code_of_call(kind: type) -> Any:
    return getattr(inspect.unwrap(kind.__call__), "__code__", None)
