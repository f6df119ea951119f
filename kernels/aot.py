"""Compile kernels for GPUs that are not here, and read what they need: shared memory, registers, spills."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may have, bytes, by compute capability (CUDA programming guide, table of limits).
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Needs:
    """What one compiled kernel needs: bytes of shared memory, registers of a thread, spilled bytes; its assembly."""

    shared: int
    registers: int
    spills: int
    ptx: str


def compile_for(
    capability: int, kernel: Any, types: dict[str, str], fixed: dict[str, Any], num_warps: int, num_stages: int
) -> Needs:
    """Compile a kernel as it is launched on tensors whose addresses and strides are multiples of 16.

    Args:
        capability: 80, 86, 89, 90 or 100.
        kernel: a `triton.jit` function, imported without TRITON_INTERPRET.
        types: run-time argument -> Triton type, such as "*fp16", "i32", "fp32".
        fixed: compile-time argument -> value.
        num_warps: of the launch.
        num_stages: of the launch.

    Raises:
        RuntimeError: the assembler refuses it; its message.
    """
    place = {name: index for index, name in enumerate(kernel.arg_names)}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name.startswith("stride")]
    source = ASTSource(
        kernel, signature, {(place[name],): value for name, value in fixed.items()},
        {(place[name],): [["tt.divisibility", 16]] for name in aligned},
    )  # fmt: skip
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _assemble(compiled.asm["ptx"], capability)
    return Needs(compiled.metadata.shared, registers, spills, compiled.asm["ptx"])


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Return registers and spilled bytes as ptxas tells them; without a driver Triton does not."""
    tool = _TOOLS / ("ptxas" if capability < 100 else "ptxas-blackwell")
    target = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, "utf-8")
        command = [tool, "-v", f"-arch={target}", file, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    numbers = (re.search(pattern, done.stderr) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    return tuple(int(found.group(1)) for found in numbers)
