"""Compile kernels for GPUs that need not be here; read their resources and instructions from the machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may have, bytes, by compute capability (CUDA programming guide, table of limits).
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
# What runs on tensor cores, in machine code: Ampere's and Ada's (everywhere in small tiles), Hopper's, Blackwell's.
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
_WORDS = {".128": 4, ".64": 2, ".WIDE": 2}  # uniform registers that an instruction of such a name writes
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Needs:
    """What one compiled kernel needs: bytes of shared memory, registers of a thread, spilled bytes.

    `matrix` counts the tensor-core instructions of its machine code by name, as in {"HGMMA": 13}. `instructions` are
    those that a warp issues for one turn of its main loop, or all of them if there is no loop. `unset` are those that
    read a uniform register which none before them has written: the assembler is at fault, and results are wrong.
    """

    shared: int
    registers: int
    spills: int
    matrix: dict[str, int]
    instructions: int
    unset: list[str]


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
    return Needs(compiled.metadata.shared, *_assemble(compiled.asm["ptx"], capability))


def _assemble(ptx: str, capability: int) -> tuple[int, int, dict[str, int], int, list[str]]:
    """Return registers and spilled bytes as ptxas reports them (Triton asks a driver), and facts of the code."""
    tool = _TOOLS / ("ptxas" if capability < 100 else "ptxas-blackwell")
    target = _first(r"\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        file, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        file.write_text(ptx, "utf-8")
        report = _run(tool, "-v", f"-arch={target}", file, "-o", binary).stderr
        code = _run(_TOOLS / "nvdisasm", "-c", binary).stdout
    registers, spills = (
        int(_first(pattern, report)) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    counts = Counter(re.findall(rf"\b({'|'.join(MATRIX)})\b", code))
    return registers, spills, dict(counts), turn(code), unset(code)


def _first(pattern: str, text: str) -> str:
    """Return the group of a pattern's first match.

    Raises:
        RuntimeError: there is none, so a tool's output has changed.
    """
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"nothing matches {pattern} in: {text[:200]}")
    return match.group(1)


def turn(code: str) -> int:
    """Count the instructions of the first loop of more than 100, or of all the code.

    Waits for barriers are no loops: they are short, or they stand behind the kernel's end and jump back into it.

    Args:
        code: what nvdisasm prints.

    Example:
        >>> turn("        /*0000*/ MOV R1, R2 ;\\n        /*0010*/ EXIT ;")
        2
    """
    labels: dict[str, int] = {}
    count = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            count += 1
            if re.search(r"\*/\s+EXIT", line):
                labels.clear()
            target = re.search(r"\bBRA\b.*?(\.L\w+)", line)
            if target and count - labels.get(target.group(1), count) > 100:
                return count - labels[target.group(1)]
    return count


def unset(code: str) -> list[str]:
    """List the instructions that read a uniform register which no instruction above them writes.

    Args:
        code: what nvdisasm prints.

    Example:
        >>> unset("        /*0000*/ UIADD3 UR6, UP0, UR14, 0x20, URZ ;\\n        /*0010*/ EXIT ;")
        ['UIADD3 UR6, UP0, UR14, 0x20, URZ']
    """
    written: set[int] = set()
    found = []
    for name, operands in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*([^;]*?)\s*;", code, re.M):
        target = re.match(r"(?:U?P\w+, )?UR(\d+)(?!\w|\.?\])", operands)
        sources = {int(number) for number in re.findall(r"\bUR(\d+)\b", operands[target.end() if target else 0 :])}
        if descriptors := re.search(r"gdesc\[UR(\d+)\]", operands) if name.startswith("HGMMA") else None:
            # of both tiles; of the second alone where the first is in the threads' registers
            first, alone = int(descriptors.group(1)), re.match(r"R\d+, R\d+", operands)
            sources = sources - {first} | set(range(first + 2 if alone else first, first + 4))
        if not sources <= written:
            found.append(f"{name} {operands}")
        if target:
            words = next((words for mark, words in _WORDS.items() if mark in name), 1)
            written |= set(range(int(target.group(1)), int(target.group(1)) + words))
    return found


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done
