"""bench/aot.py and bench/launch_specs.py: every kernel compiles for GPUs that need not be here, and fits them.

In a process of its own: a kernel that was imported under the interpreter cannot be compiled.
"""

import json
import os
import subprocess
import sys
from dataclasses import astuple

import pytest

from diffumask_fast.bench.aot import SHARED, turn, unset
from diffumask_fast.bench.launch_specs import CAPABILITIES, LAYERS, PHRASES, LaunchSpec, launch_specs
from diffumask_fast.bench.roofline import COLUMN, ISSUED, WARP_PIXELS, grid
from diffumask_fast.kernels.shapes import KEYS, STABLE_DIFFUSION, Layer

# Shared memory of a multiprocessor, bytes; the driver keeps 1024 of each program's.
MULTIPROCESSOR = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472}

# What `attend` may spill, in bytes, by capability; all others nothing. Heads of 160 take 64 pixels on Ampere
# and Ada all the same: then two programs fit a multiprocessor. fp32 products are unrolled: `auto` leaves them to torch.
SPILLS = {(dtype, 160, 77): {80: 64, 86: 80, 89: 80} for dtype in ("fp16", "bf16")}
SPILLS |= {("fp32", 64, 77): {86: 8, 89: 8}}
SPILLS |= {("fp32", 160, keys): dict.fromkeys(CAPABILITIES, most) for keys, most in ((77, 300), (128, 750))}
NARROW, WIDE = LAYERS[0], LAYERS[-1]  # heads of 40 and of 160 channels
WORST = [LaunchSpec("attend", "fp16", layer, KEYS) for layer in LAYERS] + [LaunchSpec("attend", "fp16", WIDE, 128)]
WORST += [LaunchSpec("attend_maps", "fp16", layer, KEYS) for layer in (NARROW, WIDE)]
WORST += [LaunchSpec(name, "fp32") for name in ("step", "products", "lines")]
SCRIPT = """
import json, sys
from diffumask_fast.bench.launch_specs import LaunchSpec
for line in sys.stdin:
    capability, (kernel, dtype, layer, keys), numbers = json.loads(line)
    needs = LaunchSpec(kernel, dtype, tuple(layer), keys).needs(capability, numbers)
    print(json.dumps([needs.shared, needs.registers, needs.spills, needs.matrix, needs.instructions, needs.unset]))
"""


def expected_matrix(capability, spec):
    """Return the tensor-core instruction of a spec: tiles of 64 pixels take Hopper's and Blackwell's own."""
    if spec.dtype == "fp32":
        return set()
    return {{90: "HGMMA", 100: "UTCHMMA"}.get(capability, "HMMA") if spec.keys <= 96 else "HMMA"}


def compiled(cases, numbers="fp32"):
    """Compile (capability, spec) pairs in one process, numbers passed as such."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = "\n".join(json.dumps([capability, astuple(spec), numbers]) for capability, spec in cases)
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=lines, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


def check(results):
    """Hold what was compiled to its bounds."""
    for (capability, spec), (shared, registers, spills, matrix, _, wrong) in results.items():
        assert not wrong, (capability, spec, wrong)
        assert 0 <= shared <= SHARED[capability] and 0 < registers <= 255, (capability, spec, shared, registers)
        shape = (spec.dtype, spec.layer[2], spec.keys) if spec.kernel == "attend" else None
        assert spills <= SPILLS.get(shape, {}).get(capability, 0), (capability, spec, spills)
        assert set(matrix) == expected_matrix(capability, spec), (capability, spec, matrix)


@pytest.fixture(scope="session")
def worst():
    return compiled([(capability, spec) for capability in CAPABILITIES for spec in WORST])


def test_the_worst_cases_fit(worst):
    assert set(WORST) <= set(launch_specs())
    check(worst)


def test_numbers_that_torch_compiles_as_fp64_change_nothing():
    cases = [(90, spec) for spec in (WORST[0], LaunchSpec("attend_maps", "fp16", NARROW, KEYS), *WORST[-3:])]
    cases += [(90, LaunchSpec("norm", "fp32"))]
    for case, needs in compiled(cases, "fp64").items():
        check({case: needs})


def test_two_programs_fit_a_multiprocessor(worst):
    for (capability, spec), (shared, registers, *_) in worst.items():
        if spec.kernel == "attend" and spec.keys == KEYS:
            assert 2 * 4 * 32 * -(-registers // 8) * 8 <= 65536 and 2 * (shared + 1024) <= MULTIPROCESSOR[capability]


def test_the_account_counts_the_instructions_of_the_machine_code(worst):
    for (capability, spec), (*_, instructions, _) in worst.items():
        if capability != 90 or spec.kernel not in ISSUED or spec.keys != KEYS:
            continue
        pixels, heads, head_dim = spec.layer
        groups = grid(Layer(1, *spec.layer), PHRASES, spec.kernel)[1]
        sums = 80 * WARP_PIXELS // 32  # multiplied and added, for each head
        counted = ISSUED[spec.kernel][head_dim] + sums + (PHRASES * COLUMN if groups == heads else 0)
        assert abs(counted - instructions) <= 0.03 * instructions, (spec, counted, instructions)


def test_every_head_size_is_compiled():
    assert {layer[2] for layer in LAYERS} == {layer.head_dim for model in STABLE_DIFFUSION for layer in model.layers}


@pytest.mark.slow
@pytest.mark.parametrize("spec", launch_specs(), ids=str)
def test_the_whole_grid_fits(spec):
    check(compiled([(capability, spec) for capability in CAPABILITIES]))


def test_a_turn_is_the_first_long_loop_and_not_a_wait():
    def code(body):
        return "\n".join(
            f"        /*{16 * at:04x}*/ {line} ;" if line[0] != "." else line for at, line in enumerate(body)
        )

    wait = [".L_x_0:", "SYNCS", "@!P0 BRA `(.L_x_0)"]
    head = [".L_x_1:", *["FFMA R1, R2, R3, R4"] * 150, "@P0 BRA `(.L_x_1)"]
    assert turn(code([*wait, *head, "EXIT"])) == 151 and turn(code([*wait, "EXIT"])) == 3
    assert turn(code([*head[:-1], "@P1 EXIT", head[-1]])) == 152
    # a wait behind the end
    assert turn(code([*head[:-1], "EXIT", "SYNCS", head[-1]])) == 153


def test_a_register_that_nothing_has_set_is_seen():
    def code(*body):
        return "\n".join(f"        /*{16 * at:04x}*/ {line} ;" for at, line in enumerate(body))

    wide, both, second = "ULDC.64 UR4, c[0x0][0x210]", "HGMMA R8, gdesc[UR4], RZ", "HGMMA R8, R24, gdesc[UR4].tnspB, RZ"
    assert unset(code(wide, "UMOV UR6, UR4", "UMOV UR7, UR5", both, second)) == []
    assert unset(code("UMOV UR6, URZ", "UMOV UR7, URZ", both, second)) == [both]
    assert unset(code(wide, "UIADD3 UR6, UP0, UR14, 0x20, URZ")) == ["UIADD3 UR6, UP0, UR14, 0x20, URZ"]
