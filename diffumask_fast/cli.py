"""The command line: one function per command, heavy imports inside."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from diffumask_fast.bench.options import BenchOptions, CompareOptions, TuneOptions
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.flags import with_flags
from diffumask_fast.generation.options import GenerateOptions
from diffumask_fast.masks.options import MaskOptions

logger = logging.getLogger("diffumask_fast")
app = typer.Typer(
    name="diffumask-fast", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Draw images with pixel-accurate semantic masks from text.",
)  # fmt: skip

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
LogFlag = Annotated[Path | None, typer.Option(help="Append a log to this file.")]


@app.command()
@with_flags
def generate(options: GenerateOptions, log: LogFlag = None, as_json: JsonFlag = False) -> None:
    """Draw a dataset of images and masks."""
    _log_to(log)
    from diffumask_fast.generation.generate import run_generate

    try:
        summary = run_generate(options, progress=_progress)
    except KeyboardInterrupt:
        print("Stopped; run the same command again to finish.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(summary))
    else:
        accepted = f"{summary['accepted']} of {summary['images']} images accepted"
        print(f"{accepted}, {summary['images_per_s']:.2f} images/s. Look at {options.out / 'preview.png'}.")


@app.command()
@with_flags
def remask(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Dataset with stored maps.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new dataset; run again to finish it.")],
    options: MaskOptions,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Make new masks of a dataset's stored maps, without drawing."""
    from diffumask_fast.dataset import remask as remasking
    from diffumask_fast.models.device import resolve_device

    summary = remasking.remask(source, out, options, device=resolve_device(device), progress=_progress)
    if as_json:
        print(json.dumps(summary))
    else:
        print(f"{summary['accepted']} of {summary['images']} images accepted. Look at {out / 'preview.png'}.")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="mini-oracle: the judge of mini's world.")],
    data: Annotated[Path, typer.Argument(help="Dataset whose masks are judged.")],
    accepted: Annotated[bool, typer.Option("--accepted", help="Leave out rejected rows.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Write the twenty worst images into this PNG file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Judge the masks of a dataset."""
    from diffumask_fast.learning import evaluation

    figures = evaluation.evaluate(model, data, accepted_only=accepted, sheet_file=sheet, progress=_progress)
    if as_json:
        print(json.dumps(figures))
        return
    agreement = figures.pop("per_class_agreement")
    ious = figures.pop("per_class_iou")
    for name, value in figures.items():
        print(f"{name:18} {value if isinstance(value, int) else _number(value)}")
    print(f"\n{'class':18} {'IoU':>5} {'agreement':>10}")
    for name, iou in ious.items():
        print(f"{name:18} {_number(iou)} {_number(agreement.get(name)):>10}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="mini, a diffusers folder, or a hub id; with --refit, an engine.")],
    out: Annotated[Path, typer.Argument(help="Folder of the engine; must not be there yet.")],
    to: Annotated[str, typer.Option(help="onnx, tensorrt or tensorrt-rtx.")] = "onnx",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16; auto: fp32 for onnx, else fp16.")] = "auto",
    compute_capability: Annotated[
        str | None, typer.Option(help="Of the GPU, such as 8.9, for TensorRT; that of the one here when left out.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="The most images of a batch.")] = 16,
    min_size: Annotated[str | None, typer.Option(help="HxW in pixels; the model's own when left out.")] = None,
    max_size: Annotated[str | None, typer.Option(help="HxW in pixels; twice the least when left out.")] = None,
    static: Annotated[bool, typer.Option("--static", help="Only --max-batch images of --min-size.")] = False,
    columns: Annotated[int, typer.Option(help="The most phrases times propagations.")] = 8,
    propagate: Annotated[bool, typer.Option(help="Let the graph propagate maps.")] = True,
    refittable: Annotated[bool, typer.Option("--refittable", help="Of TensorRT: allow --refit later.")] = False,
    refit: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Write the engine given with the weights of this fine-tune.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a model for an engine other than torch, and check it against torch."""
    from diffumask_fast import export as exports
    from diffumask_fast.options import split_size

    if to not in ("onnx", "tensorrt", "tensorrt-rtx"):
        raise DiffuMaskError(f"There is no export to {to}: use onnx, tensorrt or tensorrt-rtx.")
    if to == "onnx" and not refit and (refittable or compute_capability):
        raise DiffuMaskError("--refittable and --compute-capability are TensorRT's: say --to tensorrt or tensorrt-rtx.")
    dtype = {"onnx": "fp32"}.get(to, "fp16") if dtype == "auto" else dtype
    settings = dict(
        max_batch=max_batch, static=static, columns=columns, propagate=propagate,
        min_size=split_size(min_size, "min_size") if min_size else None,
        max_size=split_size(max_size, "max_size") if max_size else None,
    )  # fmt: skip
    told = dict(revision=revision, progress=lambda sentence: print(sentence, file=sys.stderr))
    try:
        if refit:
            manifest = exports.refit_engine(model, refit, out, **told)
        elif to == "onnx":
            manifest = exports.export_onnx(model, out, dtype, **settings, **told)
        else:
            settings |= dict(flavour=to, compute_capability=compute_capability, refittable=refittable)
            manifest = exports.export_tensorrt(model, out, dtype, **settings, **told)
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"folder": str(out), "sha256": manifest.sha256, **manifest.as_json()}))
        return
    for part, errors in manifest.checked.items():
        figures = errors if isinstance(errors, str) else ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
        print(f"{part:16} {figures}")
    if manifest.passed:
        print("Largest errors against torch in fp32, relative to the largest value.")
    print(f"Draw with --engine {manifest.engine.removesuffix('-rtx')} --engine-path {shlex.quote(str(out))}")


bench_app = typer.Typer(help="Measure, side by side, and compare what was measured.", pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
@with_flags
def bench(context: typer.Context, options: BenchOptions, as_json: JsonFlag = False) -> None:
    """Measure: a table for people, one JSON object with --json; in a checkout the rows are kept in bench/results."""
    if context.invoked_subcommand is not None:
        return
    from diffumask_fast.bench.report import measure

    if code := measure(options, as_json=as_json):
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
        print(json.dumps({"threshold": threshold, "rows": rows}))
    else:
        for row in rows:
            name = row["name"] + (f" {row['case']}" if row["case"] else "")
            mark = "  worse" if row["regression"] else ""
            print(f"{name:36} {row['before']:10.4f} {row['after']:10.4f} {row['change']:+8.1%}{mark}")
    if worse:
        raise DiffuMaskError(f"Worse by more than {threshold:.0%}: {', '.join(worse)}; measure again or look for why.")


@app.command()
@with_flags
def tune(options: TuneOptions, as_json: JsonFlag = False) -> None:
    """Time the kernels' launch configurations on this GPU, and keep the best; what is finished is kept at once."""
    from diffumask_fast.kernels.tune import tune as measure

    entries = measure(
        options.out,
        lambda sentence: print(sentence, file=sys.stderr),
        quick=options.quick,
        only_this_device=options.only_this_device,
    )
    if as_json:
        print(json.dumps(entries))


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Tell versions, devices, and what works here."""
    from diffumask_fast.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(report))
        return
    for section, entries in report.items():
        print(section)
        for name, value in entries.items():
            print(f"  {name:18} {value}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from diffumask_fast import __version__

        print(__version__)
        raise typer.Exit()


def _progress(total: int) -> Any:
    """Return a rich progress bar on stderr, hidden when that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "    -" if value is None else f"{value:5.3f}"


def _log_to(path: Path | None) -> None:
    if path is None:
        return
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise DiffuMaskError(f"Cannot write the log {path} ({error.strerror}): choose another file.") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def main() -> None:
    """Run the command line; errors become one sentence on stderr and an exit code."""
    logger.addHandler(logging.NullHandler())
    try:
        app()
    except DiffuMaskError as error:
        _fail(error.as_flags())
    except Exception as error:  # noqa: BLE001 - no traceback reaches a user; the log has it
        logger.error("%s", traceback.format_exc())
        detail = " ".join(str(error).split())[:300]
        _fail(f"Unexpected {type(error).__name__}: {detail}. Run again with --log FILE to keep the details.")


def _fail(sentence: str) -> None:
    logger.error("%s", sentence)
    print(sentence, file=sys.stderr)
    sys.exit(1)
