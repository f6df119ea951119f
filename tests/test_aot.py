"""kernels/aot.py and variants.py: every kernel compiles for GPUs that are not here, and fits them.

In a process of its own, for a kernel imported under the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from diffumask_fast.kernels.aot import SHARED
from diffumask_fast.kernels.variants import CAPABILITIES, Variant, variants

# What a variant may spill, in bytes; all others nothing. fp32 products are unrolled: `auto` leaves them to torch.
SPILLS = {("fp16", 160, 77): 64, ("bf16", 160, 77): 64, ("fp32", 160, 77): 600, ("fp32", 160, 128): 5200}
WORST = [Variant("attend", "fp16", 64, 77), Variant("attend", "fp16", 160, 128), Variant("step", "fp32")]
WORST += [Variant("products", "fp32"), Variant("lines", "fp32")]
SCRIPT = """
import json, sys
from diffumask_fast.kernels.variants import Variant
for line in sys.stdin:
    capability, variant = json.loads(line)
    needs = Variant(**variant).needs(capability)
    print(json.dumps([needs.shared, needs.registers, needs.spills, needs.matrix]))
"""


def expected_matrix(capability, variant):
    """Return the tensor-core instruction of a variant: tiles of 64 pixels take Hopper's and Blackwell's own."""
    if variant.dtype == "fp32":
        return set()
    large = variant.head_dim <= 128 and variant.keys <= 96
    return {{90: "HGMMA", 100: "UTCHMMA"}.get(capability, "HMMA") if large else "HMMA"}


def check(cases):
    """Compile (capability, variant) pairs in one process, and hold each to its bounds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = "\n".join(json.dumps([capability, asdict(variant)]) for capability, variant in cases)
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=lines, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (capability, variant), (shared, registers, spills, matrix) in zip(cases, found, strict=True):
        assert 0 <= shared <= SHARED[capability] and 0 < registers <= 255, (capability, variant, shared, registers)
        allowed = SPILLS.get((variant.dtype, variant.head_dim, variant.keys), 0)
        assert spills <= allowed, (capability, variant, spills)
        assert set(matrix) == expected_matrix(capability, variant), (capability, variant, matrix)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_worst_cases_fit(capability):
    assert set(WORST) <= set(variants())
    check([(capability, variant) for variant in WORST])


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_the_whole_grid_fits(variant):
    check([(capability, variant) for capability in CAPABILITIES])
