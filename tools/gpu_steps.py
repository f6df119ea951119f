"""The steps of tools/gpu_run.sh that are Python: python tools/gpu_steps.py STEP ARGUMENTS"""

import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

DRY = os.environ.get("DRY") == "1"
SD15, SD21, SDXL = ("mini",) * 3 if DRY else ("sd15", "sd21", "sdxl")
BATCH = 1 if DRY else 8


def tables(table: str, folder: str, architecture: str) -> None:
    """Write FOLDER/triton.json and sdpa.json, tables that name one implementation as the fastest. Needs no torch."""
    entries = json.loads(Path(table).read_text(encoding="utf-8"))
    for impl in ("triton", "sdpa"):
        own = {
            kernel: [_naming(kernel, entry, impl) for entry in defaults] for kernel, defaults in entries["*"].items()
        }
        text = json.dumps(entries | {architecture: own}, indent=1)
        Path(folder, f"{impl}.json").write_text(text, encoding="utf-8")


def _naming(kernel: str, entry: dict[str, Any], impl: str) -> dict[str, Any]:
    # fp32 is not drawn in on a GPU, and its kernels compile slowest
    triton = impl == "triton" and entry["when"].get("dtype") != "fp32"
    if DRY and kernel == "attend":  # an interpreter takes minutes for fine levels, and for masks of whole images
        entry = entry | {"when": {**entry["when"], "pixels": [1, 64]}}
    return entry | {"impl": "triton" if triton and not (DRY and kernel != "attend") else "torch"}


def environment(out: str) -> None:
    """Write a description of this machine to env.json: the bench's, then doctor's."""
    from diffumask_fast.bench.rows import environment as facts

    file, done = Path(out, "env.json"), subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True)
    machine: dict[str, Any] = {"bench": facts("cuda"), "nvidia-smi": done.stdout.splitlines()}
    file.write_text(json.dumps(machine, indent=1), encoding="utf-8")
    from diffumask_fast.doctor import examine

    file.write_text(json.dumps(machine | {"doctor": examine()}, indent=1), encoding="utf-8")


def warm(part: str, parts: str) -> None:
    """Compile a share of the launches that `tune` times."""
    from diffumask_fast.kernels import tune

    smallest()
    tune.warm(int(part), int(parts))


def tune(out: str) -> None:
    """Tune what Stable Diffusion launches most, into tuned.json."""
    from diffumask_fast.kernels import tune

    smallest()
    tune.tune(Path(out, "tuned.json"), print, quick=True, only_this_device=False)


def rows(out: str, kind: str) -> None:
    """Append rows to rows.jsonl as they are measured; a part that fails does not stop the next."""
    parts = {
        "sdpa": [(SD15, "sdpa"), (SDXL, "sdpa")],
        "kernels": [(SD15, "attention"), (SDXL, "attention"), (SD15, "refinement"), (SD21, "attention")],
    }
    settings = smallest() or ({"pairs": 5} if kind == "sdpa" else {})
    if not all([keep(out, geometry, (name,), **settings) for geometry, name in dict.fromkeys(parts[kind])]):
        sys.exit(1)


def whole_runs(folder: str) -> None:
    """Compile Stable Diffusion 1.5, wait for FOLDER/go, which names the folder of the rows, and measure it."""
    import torch

    from diffumask_fast.bench import gpu_targets

    settings = smallest() or {"pairs": 3}
    opened = gpu_targets.Opened(SD15, torch.device("cuda"), "compile")
    opened.warm(BATCH)
    print("compiled", {name: dict(counts) for name, counts in torch._dynamo.utils.counters.items()})
    go = Path(folder, "go")
    while not go.exists():
        time.sleep(0.2)
    if not all(
        [keep(go.read_text().strip(), SD15, (name,), opened=opened, **settings) for name in ("stock", "graphs")]
    ):
        sys.exit(1)


def maps(out: str, folder: str, table: str) -> None:
    """Compare eager denoising with maps on and off, by the tables triton.json and sdpa.json; the large batch last."""
    import torch

    from diffumask_fast.bench import gpu_targets
    from diffumask_fast.kernels import tuned

    settings = smallest() or {"pairs": 3}
    opened = gpu_targets.Opened(SD15, torch.device("cuda"), "torch")
    done = []
    for batch in (1,) if DRY else gpu_targets.BATCHES:
        for impl in ("triton", "sdpa"):
            Path(table).write_text(Path(folder, f"{impl}.json").read_text(encoding="utf-8"), encoding="utf-8")
            tuned.forget()
            shape = settings | {"batches": (batch,), "opened": opened, "engines": ("torch",)}
            done.append(keep(out, SD15, ("denoising",), case=impl, **shape))
    if not all(done):
        sys.exit(1)


def keep(out: str, geometry: str, names: tuple[str, ...], case: str = "", **settings: Any) -> bool:
    """Measure parts of the suite, and append each row with the version that it is of; return whether all succeeded."""
    import torch

    from diffumask_fast.bench import gpu_targets
    from diffumask_fast.bench.rows import append_rows, describe

    torch.cuda.reset_peak_memory_stats()
    extra = {"commit": os.environ.get("COMMIT") or None} | ({"case": case} if case else {})
    try:
        for row in gpu_targets.run(geometry, "cuda", names=names, **settings):
            row["config"] |= {**extra, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
            append_rows(Path(out, "rows.jsonl"), [row])
            print(describe(row))
    except Exception:  # the next part is measured all the same
        traceback.print_exc()
        return False
    return True


def smallest() -> dict[str, Any]:
    """Return the smallest arguments of the suite in a dry run, else none; make all other sizes tiny then."""
    if not DRY:
        return {}
    from diffumask_fast.bench import gpu_targets, sdpa
    from diffumask_fast.kernels import tune

    gpu_targets.GRAPH_CALLS = gpu_targets.REFINEMENT_CALLS = gpu_targets.UNET_CALLS = 1
    sdpa.GRAPH_CALLS = tune.CALLS = tune.REPLAYS = 1
    gpu_targets.cross_layers = sdpa.cross_layers = lambda geometry: Counter({(16, 2, 16): 1})
    gpu_targets.unet_config = lambda geometry: {"sample_size": 2}
    tune.LAYERS, tune.IMAGES, tune.SIDE, tune.RADII = [(16, 2, 16)], 1, 16, {2: [1, 16]}
    return {"batch": 2, "batches": (1,), "steps": 3, "pairs": 1}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    steps = {step.__name__: step for step in (tables, environment, warm, tune, rows, whole_runs, maps)}
    steps[sys.argv[1]](*sys.argv[2:])
