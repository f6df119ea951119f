"""Rows of measurements: made, appended to a file, described in a line; and the environment that they depend on."""

import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffumask_fast.bench.harness import Ratio

# of config, printed behind a row
BESIDE = ("case", "batch", "engine", "dtype", "mask_iou", "crf_s", "peak_gib", "reference_peak_gib")


def row(
    suite: str,
    name: str,
    value: float | Ratio,
    *,
    unit: str = "ratio",
    low: float | None = None,
    high: float | None = None,
    n: int = 1,
    config: dict[str, Any] | None = None,
) -> dict:
    """Make one result row: `{"suite", "name", "value", "unit", "low", "high", "n", "config"}`.

    Args:
        value: a number, or a `Ratio`, which also fills low, high, n and, in config, how it was measured.
        low, high: bounds of the value; the value itself when None.
        config: what the number depends on beside `environment()`, which the caller adds.
    """
    config = dict(config or {})
    if isinstance(value, Ratio):
        ratio = value
        config |= {"raw": round(ratio.raw, 5), "control_deviation": round(ratio.deviation, 5)}
        config |= {"baseline_s": float(f"{ratio.baseline_s:.4g}"), "clock": ratio.clock}
        value, low, high, n = ratio.value, ratio.low, ratio.high, ratio.n
    low, high = value if low is None else low, value if high is None else high
    numbers = {key: round(float(number), 5) for key, number in (("value", value), ("low", low), ("high", high))}
    return {
        "suite": suite,
        "name": name,
        "value": numbers["value"],
        "unit": unit,
        "low": numbers["low"],
        "high": numbers["high"],
        "n": n,
        "config": config,
    }


def append_rows(path: str | os.PathLike, rows: Sequence[dict]) -> None:
    """Append rows to a JSON lines file, made with its folder when it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)


def results_file(device: str | torch.device = "cpu") -> Path | None:
    """Return where rows of this machine are kept in a checkout, `<processor or GPU>-<cores>.jsonl`; None elsewhere."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu_name()
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return checkout / "bench" / "results" / f"{slug}-{os.cpu_count()}.jsonl"


def describe(one: dict) -> str:
    """Return a row as one line of text, with its control where it has one."""
    text = f"{one['name']:<32} {one['value']:8.3f} {one['unit']} ({one['low']:.3f} to {one['high']:.3f}, n {one['n']}"
    deviation = one["config"].get("control_deviation")
    text += f"; control {1 + deviation:.3f}, subtracted)" if deviation is not None else ")"
    beside = {key: one["config"][key] for key in BESIDE if key in one["config"]}
    return text + "".join(f", {key} {value}" for key, value in beside.items())


def environment(device: str | torch.device = "cpu", threads: int = 1) -> dict[str, Any]:
    """Return what a timing depends on: versions, processor or GPU, threads and, in a checkout, the commit."""
    facts = {"device": torch.device(device).type, "threads": threads, "python": platform.python_version()}
    facts |= {name: _version(name) for name in ("torch", "diffusers", "diffumask-fast")}
    facts["cpu"] = _cpu_name()
    if facts["device"] == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "driver": _output(query)}
        facts["triton"] = _version("triton")
    facts["commit"] = _commit()
    return facts


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(itertools.chain(named, [platform.processor() or platform.machine()]))


def _commit() -> str | None:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    return _output(("git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"))


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
