"""The command line: one function per command, heavy imports inside."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffumask_fast.bench.options import BenchOptions, CompareOptions, TuneOptions
from diffumask_fast.console import log_to, progress_bar, run_program, say, stoppable
from diffumask_fast.convert.options import ConvertOptions, ImportOptions
from diffumask_fast.errors import DiffuMaskError, as_flags
from diffumask_fast.export.options import ExportOptions
from diffumask_fast.flags import with_flags
from diffumask_fast.generation.options import GenerateOptions, RebuildOptions
from diffumask_fast.learning.options import (
    AffinityOptions,
    AugmentOptions,
    CalibrateOptions,
    EvaluateOptions,
    FilterOptions,
    TrainOptions,
)
from diffumask_fast.masks.options import RemaskOptions
from diffumask_fast.options import ReadOptions, closed
from diffumask_fast.report.options import ReportOptions

app = typer.Typer(
    name="diffumask-fast", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Draw images with pixel-accurate semantic masks from text.",
)  # fmt: skip

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
LogFlag = Annotated[Path | None, typer.Option(help="Append a log to this file, a JSON object a line.")]


@app.command()
@with_flags
def generate(
    options: GenerateOptions,
    log: LogFlag = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; tell time and disk from a probe.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Draw a dataset of images and masks."""
    if dry_run:
        _dry_run(options, log, as_json)
        return
    log_to(log)
    from diffumask_fast.generation.generate import run_generate

    with stoppable("Stopped; run the same command again to finish."):
        summary = run_generate(options, progress=progress_bar)
    if as_json:
        say(json.dumps(summary))
    else:
        rate = f"{summary['images_per_s']:.2f} images/s" if summary["drawn"] else "complete: nothing was left to draw"
        say(_closing(summary, f", {rate}"))
    if summary["below_quota"]:
        say(as_flags(summary["why_below_quota"]), sys.stderr)
        raise typer.Exit(3)


def _dry_run(options: GenerateOptions, log: Path | None, as_json: bool) -> None:
    if log is not None:
        raise DiffuMaskError("a dry run writes nothing: leave out `log`")
    from diffumask_fast.generation.probe import describe, run_probe

    with stoppable("Stopped; nothing was written."):
        estimate = run_probe(options)
    if as_json:
        say(json.dumps(estimate))
        return
    for line in describe(estimate):
        say(line)


@app.command()
@with_flags
def remask(
    source: Annotated[str, typer.Argument(metavar="IN", help="Dataset with stored maps.")],
    out: Annotated[str, typer.Argument(help="Folder or address of the new dataset; run again to finish it.")],
    options: RemaskOptions,
    reading: ReadOptions,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Make new masks of a dataset's stored maps, without drawing."""
    from diffumask_fast.dataset import remask as remasking
    from diffumask_fast.models.device import resolve_device

    with stoppable("Stopped; run the same command again to finish."):
        mask = closed(options.mask, remasking.recorded_options(source))
        summary = remasking.remask(
            source, out, mask, device=resolve_device(device), progress=progress_bar, max_pixels=reading.max_pixels
        )
    if as_json:
        say(json.dumps(summary))
    else:
        say(_closing(summary))


@app.command()
@with_flags
def augment(options: AugmentOptions, as_json: JsonFlag = False) -> None:
    """Make new images of a dataset's: splices, blur, occlusion, perspective; as a dataset, with its own images."""
    from diffumask_fast.learning import augment as augmenting

    with stoppable("Stopped; run the same command again to finish."):
        summary = augmenting.augment(options, progress=progress_bar)
    if as_json:
        say(json.dumps(summary))
    else:
        say(_closing(summary))


@app.command()
@with_flags
def train(options: TrainOptions, log: LogFlag = None, as_json: JsonFlag = False) -> None:
    """Train a segmenter on a dataset."""
    log_to(log)
    from diffumask_fast.learning.training import train as learn

    with stoppable("Stopped; run the same command again to finish."):
        summary = learn(options, progress=progress_bar)
    if as_json:
        say(json.dumps(summary))
    else:
        say(f"{summary['steps']} steps on {summary['images']} images; the loss is {summary['loss']:.3f}.")
        say(f"Judge it with diffumask-fast evaluate {shlex.quote(str(options.out))} DATA")


@app.command("filter")
@with_flags
def filter_command(options: FilterOptions, log: LogFlag = None, as_json: JsonFlag = False) -> None:
    """Reject what ranks lowest in its class, by cross-validation or by quality."""
    log_to(log)
    from diffumask_fast.learning import filtering

    with stoppable("Stopped; run the same command again to finish."):
        summary = filtering.filter_dataset(options, progress=progress_bar)
    if as_json:
        say(json.dumps(summary))
        return
    say(f"{'class':24} {'images':>7} {'pruned':>7} {'lowest kept':>12}")
    for name, row in summary["per_class"].items():
        lowest = "-" if row["lowest_kept"] is None else f"{row['lowest_kept']:.3f}"
        say(f"{name:24} {row['images']:7} {row['pruned']:7} {lowest:>12}")
    accepted = f"{summary['accepted']} of {summary['images']} images accepted"
    say(f"{accepted}. Look at {options.out / 'preview.png'}.")


@app.command()
@with_flags
def affinity(options: AffinityOptions, log: LogFlag = None, as_json: JsonFlag = False) -> None:
    """Make new masks of stored maps by AffinityNet, which learns from the dataset itself."""
    log_to(log)
    from diffumask_fast.learning.affinity import make_affinity_masks

    with stoppable("Stopped; run the same command again to finish."):
        summary = make_affinity_masks(options, progress=progress_bar)
    if as_json:
        say(json.dumps(summary))
    else:
        say(_closing(summary))


@app.command()
@with_flags
def convert(options: ConvertOptions, log: LogFlag = None, as_json: JsonFlag = False) -> None:
    """Write a dataset in the format of other programs."""
    log_to(log)
    from diffumask_fast.convert import convert as converting

    with stoppable("Stopped; run the same command again to finish."):
        summary = converting.convert(options, progress=progress_bar)
    if as_json:
        say(json.dumps(summary))
    else:
        rate = summary["images_per_s"]
        written = f"{rate} images/s" if rate else "complete: nothing was left to write"
        splits = f"{summary['train']} to train, {summary['val']} to validate"
        say(f"{summary['images']} images in {options.out}: {splits}; {written}.")


@app.command("import")
@with_flags
def import_(options: ImportOptions, log: LogFlag = None, as_json: JsonFlag = False) -> None:
    """Make a dataset of other programs' images and masks."""
    log_to(log)
    from diffumask_fast.convert import import_folder

    with stoppable("Stopped; run the same command again to finish."):
        summary = import_folder.import_folder(options, progress=progress_bar)
    if as_json:
        say(json.dumps(summary))
    else:
        left = f"; {summary['left_out']} without a class are left out" if summary["left_out"] else ""
        say(f"{summary['images']} images imported{left}. Look at {options.out / 'preview.png'}.")


@app.command()
@with_flags
def evaluate(options: EvaluateOptions, as_json: JsonFlag = False) -> None:
    """Judge the masks of a dataset, or a segmenter by data with masks."""
    from diffumask_fast.learning import evaluation
    from diffumask_fast.learning.figures import table

    with stoppable("Stopped; nothing was written."):
        figures = evaluation.evaluate(options, progress=progress_bar)
    if as_json:
        say(json.dumps(figures))
        return
    for line in table(figures, options):
        say(line)


@app.command()
@with_flags
def calibrate(options: CalibrateOptions, log: LogFlag = None, as_json: JsonFlag = False) -> None:
    """Find the options of maps and masks that suit a model best, by a judge; generate then takes them."""
    log_to(log)
    from diffumask_fast.learning import calibration

    with stoppable("Stopped; no options were written."):
        summary = calibration.calibrate(options, progress=progress_bar)
    for line in [json.dumps(summary)] if as_json else calibration.told(summary):
        say(as_flags(line))


@app.command()
@with_flags
def verify(
    source: Annotated[str, typer.Argument(metavar="IN", help="Dataset to check.")],
    options: RebuildOptions,
    reading: ReadOptions,
    rebuild: Annotated[str | None, typer.Option(help="Draw the batch of this key again and compare.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check every shard and row of a dataset, or draw a sample again; exit code 1 where something is wrong."""
    with stoppable("Stopped; nothing was written."):
        if rebuild is not None:
            from diffumask_fast.generation import rebuild as rebuilding

            summary = rebuilding.rebuild(source, rebuild, options, max_pixels=reading.max_pixels)
            lines, fault = rebuilding.told(summary), summary["fault"]
        else:
            from diffumask_fast.dataset import verify as verifying

            summary = verifying.verify(source, max_pixels=reading.max_pixels, progress=progress_bar)
            lines, fault = verifying.told(summary), verifying.sentence(summary)
    for line in [json.dumps(summary)] if as_json else lines:
        say(line)
    if fault:
        raise DiffuMaskError(fault)


@app.command()
@with_flags
def report(options: ReportOptions, as_json: JsonFlag = False) -> None:
    """Write one HTML file that shows a dataset: figures, pictures, best and worst; it asks nothing of the network."""
    from diffumask_fast.report.page import write_report

    with stoppable("Stopped; nothing was written."):
        summary = write_report(options, progress=progress_bar)
    if as_json:
        say(json.dumps(summary))
    else:
        say(f"{summary['accepted']} of {summary['images']} images accepted. Open {summary['page']} in a browser.")


@app.command()
@with_flags
def export(options: ExportOptions, as_json: JsonFlag = False) -> None:
    """Write a model for an engine other than torch, and check it against torch."""
    from diffumask_fast.export.export_model import export_model

    with stoppable("Stopped; nothing was written."):
        manifest = export_model(options, progress=lambda sentence: say(sentence, sys.stderr))
    if as_json:
        say(json.dumps({"folder": str(options.out), "sha256": manifest.sha256, **manifest.as_json()}))
        return
    for part, errors in manifest.checked.items():
        figures = errors if isinstance(errors, str) else ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
        say(f"{part:16} {figures}")
    if manifest.passed:
        say("Largest errors against torch in fp32, relative to the largest value.")
    say(f"Draw with --engine {manifest.engine.removesuffix('-rtx')} --engine-path {shlex.quote(str(options.out))}")


bench_app = typer.Typer(help="Measure, side by side, and compare what was measured.", pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
@with_flags
def bench(context: typer.Context, options: BenchOptions, as_json: JsonFlag = False) -> None:
    """Measure: a table for people, one JSON object with --json; in a checkout the rows are kept in bench/results."""
    if context.invoked_subcommand is not None:
        return
    from diffumask_fast.bench.report import measure

    with stoppable("Stopped; the rows that were finished are kept."):
        code = measure(options, as_json=as_json)
    if code:
        raise typer.Exit(code)


@bench_app.command("compare")
@with_flags
def bench_compare(options: CompareOptions, as_json: JsonFlag = False) -> None:
    """Compare two files of rows; exit code 1 when a row became worse by more than the threshold."""
    from diffumask_fast.bench.regressions import compare_rows, read_rows

    threshold = options.threshold
    rows = compare_rows(read_rows(options.before), read_rows(options.after), threshold)
    worse = [row["name"] for row in rows if row["regression"]]
    if as_json:
        say(json.dumps({"threshold": threshold, "rows": rows}))
    else:
        for row in rows:
            name = row["name"] + (f" {row['case']}" if row["case"] else "")
            mark = "  worse" if row["regression"] else ""
            say(f"{name:36} {row['before']:10.4f} {row['after']:10.4f} {row['change']:+8.1%}{mark}")
    if worse:
        raise DiffuMaskError(f"Worse by more than {threshold:.0%}: {', '.join(worse)}; measure again or look for why.")


@app.command()
@with_flags
def tune(options: TuneOptions, as_json: JsonFlag = False) -> None:
    """Time the kernels' launch configurations on this GPU, and keep the best; what is finished is kept at once."""
    from diffumask_fast.kernels.tune import tune as measure

    with stoppable("Stopped; what is finished is kept."):
        entries = measure(
            options.out,
            lambda sentence: say(sentence, sys.stderr),
            quick=options.quick,
            only_this_device=options.only_this_device,
        )
    if as_json:
        say(json.dumps(entries))


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Report versions, devices, and what works here."""
    from diffumask_fast.doctor import examine

    report = examine()
    if as_json:
        say(json.dumps(report))
        return
    for section, entries in report.items():
        say(section)
        for name, value in entries.items():
            say(f"  {name:18} {value}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from diffumask_fast import __version__

        say(__version__)
        raise typer.Exit()


def _closing(summary: dict[str, Any], rate: str = "") -> str:
    """Say what a dataset holds, where to look, and what to change where that is nothing."""
    advice = f"To accept more, {as_flags(summary['advice'])}. " if summary.get("advice") else ""
    of = f" of part {summary['part']}" if summary.get("part") else ""
    accepted = f"{summary['accepted']} of {summary['images']} images{of} accepted{rate}. {advice}"
    if summary.get("missing_shards"):
        return f"{accepted}{summary['missing_shards']} shards of the run are still missing."
    return f"{accepted}Look at {summary['folder'].rstrip('/')}/preview.png."


def main() -> None:
    """Run the command line; errors become one sentence on stderr and an exit code."""
    run_program(app)
