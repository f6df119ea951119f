"""What a run of the bench leaves: lines for people, one JSON object, a file of rows, plots."""

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from diffumask_fast.bench import SUITES
from diffumask_fast.bench.rows import append_rows, describe, environment, results_file
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.device import resolve_device

STOPPED = 130


def measure(
    suite: str,
    geometry: str,
    device: str,
    options: dict[str, Any],
    *,
    output: Path | None = None,
    plot: Path | None = None,
    as_json: bool = False,
) -> int:
    """Run a suite and hand out its rows one by one, so that Ctrl-C leaves those that are finished.

    Args:
        suite: one of SUITES.
        geometry, device: as the suite takes them.
        options: further arguments of the suite.
        output: file that the rows are appended to; None is the machine's own in a checkout.
        plot: folder for plots.
        as_json: print one JSON object at the end in place of lines.

    Returns:
        0, or 130 when it was stopped.

    Raises:
        DiffuMaskError: no such suite, an option that it does not take, matplotlib missing for plots, and the suite's.
    """
    if suite not in SUITES:
        raise DiffuMaskError(f"There is no suite {suite}: use {', '.join(SUITES)}.")
    run = importlib.import_module(f"diffumask_fast.bench.{suite}").run
    for name in options:
        if name not in inspect.signature(run).parameters:
            flag = {"names": "rows"}.get(name, name)
            raise DiffuMaskError(f"The suite {suite} has no --{flag}: leave it out.")
    if plot is not None:
        from diffumask_fast.bench.plots import needs_matplotlib

        needs_matplotlib()
    device = str(resolve_device(device))
    path = output or results_file(device)
    rows, code = [], 0
    try:
        for one in run(geometry, device=device, **options):
            rows.append(one)
            if path is not None:
                append_rows(path, [one])
            if not as_json:
                print(describe(one), flush=True)
    except KeyboardInterrupt:
        print(f"Stopped; {len(rows)} finished rows were kept.", file=sys.stderr)
        code = STOPPED
    if plot is not None and rows:
        from diffumask_fast.bench.plots import draw

        draw(rows, plot)
    if as_json:
        print(json.dumps({"environment": environment(device), "rows": rows}))
    elif path is not None and rows:
        print(f"Rows appended to {path}.", file=sys.stderr)
    return code
