"""The steps of tools/gpu_run.sh that are Python: python tools/gpu_steps.py STEP ARGUMENTS"""

import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch

from diffumask_fast.bench import goals, sdpa
from diffumask_fast.bench.geometries import open_geometry
from diffumask_fast.bench.rows import append_rows, describe
from diffumask_fast.bench.rows import environment as facts
from diffumask_fast.bench.sides import Sides
from diffumask_fast.compiled import compile_pipe
from diffumask_fast.doctor import examine
from diffumask_fast.kernels import tune as tuning
from diffumask_fast.kernels import tuned

DRY = os.environ.get("DRY") == "1"
SD15, SD21, SDXL = ("mini",) * 3 if DRY else ("sd15", "sd21", "sdxl")
BATCH, STEPS = (1, 3) if DRY else (8, 20)


def smallest() -> dict:
    """Return the arguments of the suite for a dry run, and make everything else as small as it can be."""
    goals.GRAPH_CALLS = goals.REFINEMENT_CALLS = sdpa.GRAPH_CALLS = 1
    goals.cross_layers = sdpa.cross_layers = lambda geometry: Counter({(16, 2, 16): 1})
    goals.unet_config = lambda geometry: {"sample_size": 2}
    tuning.LAYERS, tuning.IMAGES, tuning.SIDE, tuning.RADII = [(16, 2, 16)], 1, 16, {2: [1, 16]}
    tuning.CALLS = tuning.REPLAYS = 1
    return {"batch": 2, "batches": (1,), "steps": STEPS, "pairs": 1}


SIZES = smallest() if DRY else {}


def environment(out: str) -> None:
    """Write what this machine is to env.json."""
    done = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True)
    found = {"bench": facts("cuda"), "doctor": examine(), "nvidia-smi": done.stdout.splitlines()}
    Path(out, "env.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def tables(folder: str) -> None:
    """Write tables that say of this architecture, unmeasured, that one form is the fastest: FOLDER/triton.json, ..."""
    _, architecture = tuned.names(torch.device("cuda"))
    for form in ("triton", "sdpa"):
        impl = {"impl": "triton" if form == "triton" else "torch"}
        entries = {kernel: [entry | impl for entry in found] for kernel, found in tuned.table()["*"].items()}
        text = tuning.as_text(tuned.table() | {architecture: entries})
        Path(folder, f"{form}.json").write_text(text, encoding="utf-8")


def compile_ahead() -> None:
    """Fill the compiler's cache with what part b runs: UNet with and without propagation, and the decoder."""
    pipe, ours = open_geometry(SD15, "cuda"), open_geometry(SD15, "cuda")
    compile_pipe(ours.pipe)
    Sides(pipe, BATCH, 3).ours(ours, BATCH, like_reference=False)()


def tune(out: str) -> None:
    """Tune what Stable Diffusion launches most, into tuned.json."""
    tuning.tune(Path(out, "tuned.json"), print, quick=True)


def rows(out: str, kind: str, case: str = "") -> None:
    """Append rows to rows.jsonl as they are measured; one part that fails does not stop the next."""
    parts = {
        "sdpa": [(SD15, ("sdpa",)), (SDXL, ("sdpa",))],
        "kernels": [(SD15, ("attention",)), (SDXL, ("attention",)), (SD15, ("refinement",)), (SD21, ("attention",))],
        "stock": [(SD15, ("stock",))],
        "graphs": [(SD15, ("graphs",))],
        "maps": [(SD15, ("denoising",))],
    }
    done = [keep(Path(out, "rows.jsonl"), geometry, names, case) for geometry, names in dict.fromkeys(parts[kind])]
    if not all(done):
        sys.exit(1)


def keep(file: Path, geometry: str, names: tuple[str, ...], case: str) -> bool:
    """Measure parts of the suite and append each row with the version that it is of; tell whether all came."""
    extra = {"commit": os.environ.get("COMMIT") or None} | ({"case": case} if case else {})
    torch.cuda.reset_peak_memory_stats()
    try:
        for row in goals.run(geometry, "cuda", names=names, **SIZES):
            row["config"] |= {**extra, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
            append_rows(file, [row])
            print(describe(row))
    except Exception:  # what comes next is measured all the same
        traceback.print_exc()
        return False
    return True


STEPS_BY_NAME = {
    "environment": environment,
    "tables": tables,
    "compile": compile_ahead,
    "warm": lambda part, parts: tuning.warm(int(part), int(parts)),
    "tune": tune,
    "rows": rows,
}

if __name__ == "__main__":
    STEPS_BY_NAME[sys.argv[1]](*sys.argv[2:])
