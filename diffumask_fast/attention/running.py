"""Which call of a pipeline is running, read from the stack.

A pipeline's `__call__` is looked up on its class, which other pipelines share, so it cannot be borrowed as a method is.
The stack tells it as well, for each thread by itself, and nothing has to be put back.
"""

import inspect
import sys
import threading
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline

OURS = __name__.partition(".")[0]
BETWEEN = {OURS, "torch", "diffusers", "accelerate", "contextlib", "functools"}


def running_call(pipe: Any) -> FrameType | None:
    """Return the frame of a pipeline's `__call__` if it is the pipeline's own code that calls us, else None.

    Not so where a callback, another pipeline or a user's own loop does.
    """
    return _call_around(pipe, sys._getframe(1))


def is_called_back(pipe: Any, frame: FrameType, outer: FrameType) -> bool:
    """Tell whether a pipeline's call was made inside an outer one of it, and not by the pipeline's own code."""
    at = frame.f_back
    while at is not None and at is not outer:
        at = at.f_back
    return at is not None and _call_around(pipe, frame.f_back) is not outer


def is_in_another_thread(frame: FrameType) -> bool:
    """Tell whether a function is running now, in a thread that is not ours."""
    for thread, at in sys._current_frames().items():
        while thread != threading.get_ident() and at is not None:
            if at is frame:
                return True
            at = at.f_back  # type: ignore[assignment]
    return False


def _call_around(pipe: Any, frame: FrameType | None) -> FrameType | None:
    while frame is not None:
        owner = frame.f_locals.get("self") if _is_method(frame) else None
        if owner is pipe and _is_of(frame, type(pipe)):
            if frame.f_code.co_name == "__call__" or frame.f_code is _code_of_call(type(pipe)):
                return frame
        elif isinstance(owner, DiffusionPipeline) or not (_is_between(frame) or _is_of(frame, type(pipe))):
            return None
        frame = frame.f_back
    return None


def _is_method(frame: FrameType) -> bool:
    code = frame.f_code
    return bool(code.co_argcount) and code.co_varnames[0] == "self"


def _is_of(frame: FrameType, kind: type) -> bool:
    """Tell whether a function is a method of a class, or stands in one as a comprehension does."""
    code = frame.f_code
    return code is _code_of_call(kind) or any(
        code.co_qualname.startswith(f"{base.__qualname__}.") for base in kind.__mro__
    )


def _is_between(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN


def _code_of_call(kind: type) -> Any:
    return getattr(inspect.unwrap(kind.__call__), "__code__", None)
