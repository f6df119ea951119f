"""kernels/aot.py: every kernel compiles for GPUs that are not here, and fits them.

In a process of its own, for a kernel imported under the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys

import pytest

# (D, T, dtype) -> spilled bytes allowed; H 8, N 4096, K 4
CASES = {(40, 77, "fp16"): 0, (64, 77, "fp16"): 0, (64, 77, "bf16"): 0, (80, 77, "fp16"): 0, (160, 77, "fp16"): 128}
WORST = [(64, 77, "fp16"), (160, 77, "fp16")]
SCRIPT = """
import json, sys, torch
from diffumask_fast.kernels import tuned
from diffumask_fast.kernels import attend_triton as a
from diffumask_fast.kernels.aot import SHARED, compile_for
capability, head_dim, keys, dtype = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = tuned.launch("attend", torch.device("cpu"), dtype=dtype, heads=8, head_dim=head_dim, pixels=4096, keys=keys)
fixed = {**a.constants(4096, keys, 8, head_dim, 4, config.pop("block")), "UP": False}
needs = compile_for(capability, a.attend_kernel, a.types(dtype), fixed, **config)
products = sum(word in needs.ptx for word in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))
print(json.dumps([needs.shared, SHARED[capability], needs.registers, needs.spills, products]))
"""


def needs(capability, case):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str(capability), *map(str, case)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(capability, case):
    shared, limit, registers, spills, products = needs(capability, case)
    assert 0 < shared <= limit and registers <= 255
    assert spills <= CASES[case], (capability, case, spills)
    assert products > 0  # tensor cores


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("case", WORST, ids=str)
def test_the_worst_cases_fit(capability, case):
    check(capability, case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("case", [case for case in CASES if case not in WORST], ids=str)
def test_the_others_fit(capability, case):
    check(capability, case)
