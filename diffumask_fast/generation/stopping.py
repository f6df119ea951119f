"""Ending a run in good order when the system asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether the run is to end after the shard at hand."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Note a SIGTERM, as Slurm and Kubernetes send it before they kill; a second one ends the process at once.

    Outside of the main thread, where Python allows no handler, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
