"""Run a suite: lines for people or one JSON object, a file of rows, plots."""

import importlib
import inspect
import json
import sys
from typing import Any

from diffumask_fast.bench.options import BenchOptions
from diffumask_fast.bench.regressions import read_rows
from diffumask_fast.bench.rows import append_rows, describe, environment, results_file
from diffumask_fast.console import say
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.models.device import resolve_device
from diffumask_fast.own_files import check_no_link

STOPPED = 130


def measure(options: BenchOptions, *, as_json: bool = False) -> int:
    """Run a suite and append its rows one by one, so that Ctrl-C leaves those that are finished.

    Args:
        options: the suite, its arguments, and where the rows and plots go; without an output, the machine's own file in
            a checkout.
        as_json: print one JSON object at the end in place of lines.

    Returns:
        0, or 130 when it was stopped.

    Raises:
        DiffuMaskError: an option that the suite does not take, matplotlib missing for plots, and the suite's.
    """
    run = importlib.import_module(f"diffumask_fast.bench.{options.suite}").run
    own: dict[str, Any] = {
        "model": options.model,
        "steps": options.steps,
        "pairs": options.pairs,
        "photos": options.photos,
    }
    own["names"] = options.rows.split(",") if options.rows else None
    own = {name: value for name, value in own.items() if value is not None}
    for name in own:
        if name not in inspect.signature(run).parameters:
            raise DiffuMaskError(
                f"The suite {options.suite} has no `{'rows' if name == 'names' else name}`: leave it out."
            )
    if options.plot is not None:
        from diffumask_fast.bench.plots import check_places, needs_matplotlib

        needs_matplotlib()
        check_places(options.plot)
    if options.output is not None:
        check_no_link(options.output)
        if options.output.is_file() or options.output.is_dir():
            read_rows(options.output)  # what is no file of rows is not appended to
    device = resolve_device(options.device)
    path = options.output or results_file(device)
    rows, code = [], 0
    try:
        for one in run(options.geometry, device=device, **own):
            rows.append(one)
            if path is not None:
                append_rows(path, [one])
            if not as_json:
                say(describe(one))
    except KeyboardInterrupt:
        say(f"Stopped; {len(rows)} finished rows were kept.", sys.stderr)
        code = STOPPED
    if options.plot is not None and rows:
        from diffumask_fast.bench.plots import draw

        draw(rows, options.plot)
    if as_json:
        say(json.dumps({"environment": environment(device), "rows": rows}))
    elif path is not None and rows:
        say(f"Rows appended to {path}.", sys.stderr)
    return code
