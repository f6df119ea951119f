"""A process that is killed while it writes files."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PROGRAM = """
import importlib, os, signal, sys
from pathlib import Path
tests, module, name, call, *paths = sys.argv[1:]
sys.path.insert(0, tests)
function = getattr(importlib.import_module(module), name)
calls = 0
def die(*paths, real=os.replace):
    global calls
    calls += 1
    if calls == int(call):
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)
os.replace = die
function(*map(Path, paths))
"""


def kill_at(call: int, function: Callable, *paths: Path) -> None:
    """Call a test file's function in a process that is killed before its n-th os.replace gives a file its name."""
    command = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__), function.__module__, function.__name__]
    assert subprocess.run([*command, str(call), *paths]).returncode == -signal.SIGKILL
