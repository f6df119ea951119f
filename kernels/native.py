"""The kernels in C++, for the compiled engine on the CPU: compiled for this processor when they are first needed."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from diffumask_fast.errors import DiffuMaskError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attend.cpp", "winograd.cpp"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


def compiler() -> str:
    """Return the C++ compiler: CXX, g++ or clang++.

    Raises:
        DiffuMaskError: there is none.
    """
    names = (os.environ.get("CXX"), "g++", "clang++")
    if found := next((name for name in names if name and shutil.which(name)), None):
        return found
    raise DiffuMaskError("--engine compile needs a C++ compiler on the CPU: install g++, or use --engine torch.")


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load the kernels, in a second or two, once in a process.

    Raises:
        DiffuMaskError: there is no compiler, or it refuses the code.
    """
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernels.so"
        command = [compiler(), *FLAGS, *map(str, SOURCES), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = (line for line in done.stderr.splitlines() if "error" in line)
            said = next(errors, f"exit code {done.returncode}")
            raise DiffuMaskError(f"{command[0]} cannot compile the kernels ({said}): use --engine torch.")
        try:
            loaded = ctypes.CDLL(str(built))
        except OSError as error:  # such as a folder on a file system from which nothing may be executed
            raise DiffuMaskError(
                f"The kernels cannot be loaded ({error}): set TMPDIR, or use --engine torch."
            ) from error
    for name, pointers in (("convolve", 5), ("attend", 7)):
        rest = [ctypes.c_int] if name == "convolve" else [ctypes.c_float, ctypes.c_int]
        for dtype in ("fp32", "bf16"):
            getattr(loaded, f"{name}_{dtype}").argtypes = [ctypes.c_void_p] * pointers + rest
    return loaded
