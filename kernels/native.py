"""The kernels in C++, for the compiled engine on the CPU; compiled for this processor when first needed."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from diffumask_fast.errors import DiffuMaskError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attend.cpp", "winograd.cpp"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


def compiler() -> list[str]:
    """Return the command of the C++ compiler: CXX, g++ or clang++.

    Raises:
        DiffuMaskError: there is none.
    """
    commands = (shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"])
    for command in commands:
        if command and shutil.which(command[0]):
            return command
    raise DiffuMaskError("`engine=compile` needs a C++ compiler on the CPU: install g++, or use `engine=torch`.")


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load the kernels, in a second or two, once per process.

    Raises:
        DiffuMaskError: there is no compiler, it fails, or what it makes cannot be loaded.
    """
    command = [*compiler(), *FLAGS, *map(str, SOURCES)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "kernels.so"
            done = subprocess.run(
                [*command, "-o", built], capture_output=True, text=True, errors="replace", check=False
            )
            if done.returncode:
                errors = (line for line in done.stderr.splitlines() if "error" in line)
                raise OSError(next(errors, f"exit code {done.returncode}"))
            loaded = ctypes.CDLL(str(built))
    except OSError as error:  # of the compiler, the loader, or a temporary folder without space or without execution
        raise DiffuMaskError(
            f"{command[0]} gives no kernels that can be used ({error}): see to the compiler (CXX) and the folder for "
            "temporary files (TMPDIR), or use `engine=torch`."
        ) from error
    for name, pointers in (("convolve", 5), ("attend", 7)):
        rest = [ctypes.c_int] if name == "convolve" else [ctypes.c_float, ctypes.c_int]
        for dtype in ("fp32", "bf16"):
            getattr(loaded, f"{name}_{dtype}").argtypes = [ctypes.c_void_p] * pointers + rest
    return loaded
