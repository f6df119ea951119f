"""Run the paper's protocol on mini's world: `python -m diffumask_fast.bench.reproduce OUT`, what `make reproduce` does.

Each segmenter is trained, judged by composed scenes with exact masks, and becomes a row of a file. Run again, the
command goes on where it was stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer

from diffumask_fast.bench.options import ReproduceOptions
from diffumask_fast.bench.protocol import (
    CELLS,
    DEFAULT,
    SCALES,
    SUITE,
    TESTS,
    UNSEEN,
    Cell,
    ProgressBar,
    Scale,
    TrainingData,
    in_order,
)
from diffumask_fast.bench.protocol_tables import ABLATIONS, all_tables
from diffumask_fast.bench.regressions import read_rows
from diffumask_fast.bench.rows import append_rows, environment, row
from diffumask_fast.console import progress_bar, run_program, say, stoppable
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.flags import with_flags
from diffumask_fast.learning.evaluation import evaluate
from diffumask_fast.learning.options import EvaluateOptions, LearnOptions, TrainOptions
from diffumask_fast.learning.segmenters import read_record
from diffumask_fast.learning.training import RATES, train
from diffumask_fast.mini.world import write_world
from diffumask_fast.models.device import resolve_device


class Protocol:
    """The segmenters of all repetitions, their data and their rows.

    Args:
        out: folder of the data and the segmenters.
        scale: how much is drawn and learnt.
        rows: file to which rows are appended.
        engine: that draws.
        dtype: in which segmenters are trained.
        progress: makes progress bars.

    Raises:
        DiffuMaskError: the file holds rows of another scale.
    """

    def __init__(
        self, out: Path, scale: Scale, rows: Path, *, engine: str = "torch", dtype: str = "auto",
        progress: ProgressBar = progress_bar,
    ) -> None:  # fmt: skip
        self.out, self.scale, self.file = out.absolute(), scale, rows
        self.engine, self.dtype, self.progress = engine, dtype, progress
        self._environment = environment(resolve_device("auto"), torch.get_num_threads())
        self._data: dict[int, TrainingData] = {}
        self._tests: dict[str, Path] = {}
        self.rows = read_rows(rows) if rows.exists() else []
        if any(one["config"].get("scale") != asdict(scale) for one in self.rows):
            raise DiffuMaskError(f"{rows} holds rows of another scale: name another file by `rows`")

    def missing(self, cells: Sequence[Cell], seeds: int) -> list[tuple[Cell, int]]:
        """Return what has no row yet, in its order."""
        there = {(one["name"], one["config"]["seed"]) for one in self.rows}
        return [(cell, seed) for cell, seed in in_order(cells, seeds) if (cell.name, seed) not in there]

    def measure(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Train and judge one segmenter, and append its row."""
        data = self._data_of(seed)
        folder = data.path(cell.data)
        trained = train(self._training(cell, seed, folder), progress=self.progress)
        figures = {objects: self._judged(cell, seed, objects) for objects in TESTS}
        config = {
            "seed": seed, "scale": asdict(self.scale), "images": trained["images"], "steps": trained["steps"],
            "dtype": read_record(trained["folder"])["plan"]["dtype"], "masks_iou": data.masks_iou(cell.data),
            "tests": figures, **self._environment,
        }  # fmt: skip
        made = row(SUITE, cell.name, figures["kept"]["miou"], unit="mIoU", config=config)
        append_rows(self.file, [made])
        self.rows.append(made)
        return made

    def _data_of(self, seed: int) -> TrainingData:
        if seed not in self._data:
            folds = LearnOptions(steps=self.scale.fold_steps, seed=seed, dtype=self.dtype)
            folder = self.out / f"seed-{seed}"
            self._data[seed] = TrainingData(folder, self.scale, seed, folds, self.engine, self.progress)
        return self._data[seed]

    def _model(self, name: str, seed: int) -> Path:
        return self.out / f"seed-{seed}" / "models" / name

    def _training(self, cell: Cell, seed: int, data: Path) -> TrainOptions:
        learning = LearnOptions(
            segmenter=str(self._model(cell.start, seed)) if cell.start else "tiny",
            steps=getattr(self.scale, cell.steps),
            lr=RATES["tiny"] / 5 if cell.start else None,  # as `--finetune-on` goes on
            augment=cell.augment,
            seed=seed,
            dtype=self.dtype,
        )
        return TrainOptions(data, self._model(cell.name, seed), learning=learning)

    def _judged(self, cell: Cell, seed: int, objects: str) -> dict[str, Any]:
        if objects not in self._tests:
            write_world(test := self.out / "tests" / objects, self.scale.tests, TESTS[objects], objects=objects)
            self._tests[objects] = test
        model = str(self._model(cell.name, seed))
        options = EvaluateOptions(model, self._tests[objects], unseen=",".join(UNSEEN))
        figures = evaluate(options, progress=self.progress)
        return {name: figure for name, figure in figures.items() if name != "confusion"}


def reproduce(options: ReproduceOptions) -> None:
    """Run the paper's protocol on mini's world, and print its tables; run again to finish it.

    docs/reproduce.md tells what is compared.
    """
    rows = options.rows or options.out / "rows.jsonl"
    protocol = Protocol(options.out, SCALES[options.scale], rows, engine=options.engine, dtype=options.dtype)
    cells = chosen(options.only)
    with stoppable("Stopped; run the same command again to finish."):
        todo, start, learnt = protocol.missing(cells, options.seeds), time.monotonic(), 0
        steps = [getattr(protocol.scale, cell.steps) for cell, _ in todo]
        for number, (cell, seed) in enumerate(todo):
            made = protocol.measure(cell, seed)
            learnt += steps[number]
            minutes = (time.monotonic() - start) / learnt * (sum(steps) - learnt) / 60
            say(
                f"{number + 1} of {len(todo)}: {cell.name}, seed {seed}: mIoU {made['value']:.3f}; "
                f"about {minutes:.0f} minutes left",
                sys.stderr,
            )
    for line in all_tables(protocol.rows).splitlines():
        say(line)


def chosen(only: str) -> list[Cell]:
    """Return the cells of some tables, "" for all; with those that they start from or are compared with.

    Raises:
        DiffuMaskError: there is no such table.
    """
    tables = {cell.name: cell.name.split("/")[0] for cell in CELLS if cell.name != DEFAULT}
    wanted = {name.strip() for name in only.split(",") if name.strip()} or set(tables.values())
    if unknown := wanted - set(tables.values()):
        raise DiffuMaskError(f"`only` must be some of {', '.join(dict.fromkeys(tables.values()))}, not {min(unknown)}")
    names = {cell.name for cell in CELLS if tables.get(cell.name) in wanted}
    names |= {cell.start for cell in CELLS if cell.name in names}
    names |= {DEFAULT} if wanted & set(ABLATIONS) else set()
    return [cell for cell in CELLS if cell.name in names]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process; exit codes as of `diffumask-fast`."""
    program = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    program.command()(with_flags(reproduce))
    run_program(program, arguments)


if __name__ == "__main__":
    main()
