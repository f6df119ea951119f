"""What our command lines share: a progress bar, errors as one sentence, exit codes."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer

from diffumask_fast.errors import DiffuMaskError

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger("diffumask_fast")


def run_program(
    program: typer.Typer, arguments: Sequence[str] | None = None, *, dash: str = "-", advice: str = ""
) -> None:
    """Run a command line, and end the process with its exit code; an error becomes one sentence on stderr.

    Args:
        program: what to run.
        arguments: those of the process when None.
        dash: what joins the words of a flag.
        advice: follows the sentence of an error that nobody expected.
    """
    logger.addHandler(logging.NullHandler())
    try:
        program(arguments)
    except DiffuMaskError as error:
        _fail(error.as_flags(dash))
    except Exception as error:  # noqa: BLE001 - no traceback reaches a user; the log has it
        logger.error("%s", traceback.format_exc())
        detail = " ".join(str(error).split())[:300]
        _fail(f"Unexpected {type(error).__name__}: {detail}. {advice}".strip())


@contextmanager
def stoppable(sentence: str) -> Iterator[None]:
    """End the command with exit code 130 and a sentence on stderr when the user stops it."""
    try:
        yield
    except KeyboardInterrupt:
        print(sentence, file=sys.stderr)
        raise typer.Exit(130) from None


def progress_bar(total: int | None) -> Progress:
    """Return a rich progress bar on stderr, hidden when that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def _fail(sentence: str) -> NoReturn:
    logger.error("%s", sentence)
    print(sentence, file=sys.stderr)
    sys.exit(1)
