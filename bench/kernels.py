"""Every kernel by pytest-benchmark: time, bytes and FLOPs, and the share of what the machine itself reaches."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from diffumask_fast.bench.geometries import check_geometry
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.device import resolve_device

SUITE = "kernels"
CASES = Path(__file__).with_name("kernel_cases.py")


def run(geometry: str = "mini", device: str | torch.device = "auto", *, seconds: float = 0.3) -> Iterator[dict]:
    """Measure the kernels at every shape of a geometry, in each dtype that the device computes in.

    The ceilings are a large matrix product and a large copy on the same machine, in the same run; a kernel's share is
    that of the time which the slower of its bytes and its FLOPs would take at those ceilings.

    Args:
        geometry: one of `bench.GEOMETRIES`.
        device: "auto", "cpu" or "cuda".
        seconds: the least time for a case.

    Returns:
        One row for each case, milliseconds; bytes, flops and `fraction` of the ceiling are in config.

    Raises:
        DiffuMaskError: an unknown geometry, pytest-benchmark missing, a case that failed.
    """
    check_geometry(geometry)
    if find_spec("pytest_benchmark") is None:
        raise DiffuMaskError("The suite kernels needs pytest-benchmark: pip install pytest pytest-benchmark.")
    return _rows(geometry, resolve_device(device), seconds)


def _rows(geometry: str, device: torch.device, seconds: float) -> Iterator[dict]:
    benchmarks = _benchmarks(geometry, device, seconds)
    by_name = {one["name"]: one for one in benchmarks}
    copied = by_name["test_ceiling_copy"]
    bandwidth = copied["extra_info"]["bytes"] / copied["stats"]["median"]
    rates = {
        one["extra_info"]["dtype"]: one["extra_info"]["flops"] / one["stats"]["median"]
        for name, one in by_name.items()
        if name.startswith("test_ceiling_matmul")
    }
    for one in benchmarks:
        extra, stats = one["extra_info"], one["stats"]
        name, _, case = one["name"].removeprefix("test_").partition("[")
        floor = max(extra["bytes"] / bandwidth, extra["flops"] / rates[extra["dtype"]])
        config = {"geometry": geometry, "case": case.removesuffix("]"), **extra}
        config |= {"fraction": round(floor / stats["median"], 4), "gb_per_s": round(bandwidth / 1e9, 2)}
        config |= {"gflop_per_s": round(rates[extra["dtype"]] / 1e9, 1), **environment(device)}
        spread = {"low": 1e3 * stats["q1"], "high": 1e3 * stats["q3"], "n": stats["rounds"]}
        yield row(SUITE, name, 1e3 * stats["median"], unit="ms", config=config, **spread)


def _benchmarks(geometry: str, device: torch.device, seconds: float) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-P", "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider", "-c", os.devnull]
        command += ["--rootdir", folder, f"--benchmark-json={report}", f"--benchmark-max-time={seconds}"]
        command += ["--benchmark-disable-gc", "--benchmark-warmup=on", "--benchmark-warmup-iterations=2"]
        command += ["--benchmark-timer=time.process_time"] if device.type == "cpu" else []
        outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        settings = {"DIFFUMASK_FAST_KERNELS": json.dumps({"geometry": geometry, "device": str(device)})}
        done = subprocess.run(command, capture_output=True, text=True, env=outer | settings, cwd=folder)
        if done.returncode or not report.exists():
            raise DiffuMaskError(f"The kernel cases failed: {(done.stdout + done.stderr).strip()[-300:]}")
        return json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
