"""What our command lines share: where text goes out, errors as one sentence, exit codes, a progress bar, the log."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer

from diffumask_fast.errors import DiffuMaskError, is_out_of_memory
from diffumask_fast.own_files import check_no_link, is_address

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger("diffumask_fast")

LOG_LINE = re.compile(rb'\{"time": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}')
# C0 and C1 controls and DEL, marks that turn or part lines, and halves of letters, of which paths may be made
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Return text in which everything that a terminal would act on is written out: \\x1b, \\u202e, \\n."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(line: object = "", file: TextIO | None = None) -> None:
    """Print a line of text; all text that may come from data goes out here, or through the logger.

    Args:
        line: what to print.
        file: stdout when None.
    """
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    print(printable(line).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def run_program(program: typer.Typer, arguments: Sequence[str] | None = None, *, dash: str = "-") -> None:
    """Run a command line, and end the process with its exit code; an error becomes one sentence on stderr.

    The exit code is 0 when done, 1 after a failure or a bad value, 2 for wrong usage, 130 when stopped.

    Args:
        program: what to run.
        arguments: those of the process when None.
        dash: what joins the words of a flag.
    """
    terminal = _Terminal(logging.WARNING)
    logger.addHandler(terminal)
    warnings.filterwarnings("ignore", "Image size .* decompression bomb")
    command, name = _command_of(program, sys.argv[1:] if arguments is None else arguments)
    flags = {flag for parameter in command.params for flag in parameter.opts}
    try:
        code = program(arguments, standalone_mode=False)
        sys.stdout.flush()
    except DiffuMaskError as error:
        _fail(error.as_flags(dash))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - no traceback reaches a user; the log has it
        if isinstance(error, OSError) and error.errno == errno.EPIPE:  # who reads our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if hasattr(error, "format_message"):  # typer's: the command line was not understood
            # a flag or an argument with a wrong value is a failure, as where our own options refuse it
            is_value = hasattr(error, "param_hint") and not hasattr(error, "param_type")
            _fail(_usage(error, command, name), code=1 if is_value else 2)
        _fail(_sentence(error, flags, dash))
    finally:
        logger.removeHandler(terminal)
    sys.exit(code if isinstance(code, int) else 0)


def _command_of(program: typer.Typer, arguments: Sequence[str]) -> tuple[Any, str]:
    """Return the command that is called, and the words that call it ("bench compare")."""
    command: Any = typer.main.get_command(program)
    names = []
    for word in arguments:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
            names.append(word)
    return command, " ".join(names)


def _usage(error: Any, command: Any, name: str) -> str:
    """Say what of a command line was not understood.

    Args:
        error: typer's.
        command: that was called.
        name: the words that call it.
    """
    help_ = f"{name} --help".strip()
    if flag := getattr(error, "option_name", None):
        if hasattr(error, "possibilities"):
            near = " or ".join(sorted(error.possibilities or []))
            return f"There is no flag {flag}{f' (is it {near}?)' if near else ''}: {help_} lists all flags."
        if any(flag in parameter.opts and parameter.is_flag for parameter in command.params):
            return f"{flag} takes no value: write it alone."
        return f"{flag} needs a value: {help_} tells which."
    if getattr(error, "param", None) is not None:
        parameter = error.param
        is_flag = parameter.param_type_name == "option"
        shown = parameter.opts[0] if is_flag else parameter.metavar or parameter.name.upper()
        if hasattr(error, "param_type"):
            return f"{shown} is missing: {help_} tells what it is."
        return f"The value of {shown} is wrong ({error.message.rstrip('.')}): {help_} tells what it may be."
    if found := re.search(r"extra argument.*? \((.*)\)$", error.message):
        return f"There is an argument too many ({found[1]}): {help_} tells which {name or 'it'} takes."
    if found := re.search("No such command '(.*)'", error.message):
        return f"There is no command {found[1]}: {help_} lists all."
    return f"No command is named: {help_} lists all."


def _sentence(error: Exception, flags: set[str], dash: str) -> str:
    """Say what an error means that is none of our own."""
    logger.info("what happened", exc_info=error)
    if is_out_of_memory(error):
        batch = f"--batch{dash}size"
        advice = f"give a smaller {batch} or --size" if batch in flags else "free some, or work on smaller images"
        return f"There is not enough memory: {advice}."
    detail = " ".join(str(error).split())[:300]
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename}" if error.filename else ""
        return f"Cannot read or write{place}: {error.strerror}."
    advice = "Run again with --log FILE to keep the details." if "--log" in flags else ""
    return f"Unexpected {type(error).__name__}: {detail}. {advice}".strip()


@contextmanager
def stoppable(sentence: str) -> Iterator[None]:
    """End the command with exit code 130 and a sentence on stderr when the user stops it.

    Until then the program may have left Ctrl-C to the system, which ends it at once.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        say(sentence, sys.stderr)
        raise typer.Exit(130) from None


def progress_bar(total: int | None) -> Progress:
    """Return a rich progress bar on stderr, hidden when that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    console.quiet = not console.is_terminal  # before rich 15, a disabled bar ends with an empty line
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def log_to(path: Path | None) -> None:
    """Append what the logger says to a file, if there is a path: a JSON object a line, each written at once.

    `time`, `level` and `message` are in each; what a record has as its `figures` follows, and a `traceback`.

    Raises:
        DiffuMaskError: it cannot be written, or is a file that is no log of ours.
    """
    if path is not None:
        logger.addHandler(_LogFile(path))
        logger.setLevel(logging.INFO)


class _OneLine(logging.Formatter):
    """Each record is one printable line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time, "level": record.levelname, "message": printable(record.getMessage()),
            **getattr(record, "figures", {}),
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = [printable(part) for part in self.formatException(record.exc_info).splitlines()]
        return json.dumps(line, ensure_ascii=False)


class _Terminal(logging.Handler):
    """Warnings and errors go to stderr, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), sys.stderr)


class _LogFile(logging.Handler):
    """A log whose failing fails the command: nobody finds out otherwise what is missing in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.setFormatter(_OneLine())
        check_no_link(path)
        if is_address(path):
            raise DiffuMaskError(f"The log must be a local file, not an address as {path}.")
        try:
            if path.is_file() and (head := path.open("rb").read(64)) and not LOG_LINE.match(head):
                raise DiffuMaskError(f"{path} is there and no log of ours: choose another file.")
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # a line that was cut off stays by itself
                os.write(self._descriptor, b"\n")
        except (OSError, ValueError) as error:
            raise DiffuMaskError(f"Cannot write the log {path} ({_why(error)}): choose another file.") from error

    def emit(self, record: logging.LogRecord) -> None:
        data = f"{self.format(record)}\n".encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            logger.removeHandler(self)
            raise DiffuMaskError(f"Cannot write the log {self.path} ({_why(error)}): choose another file.") from error


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _fail(sentence: str, code: int = 1) -> NoReturn:
    try:
        logger.error("%s", sentence)
    except DiffuMaskError as error:  # the log cannot be written either
        say(error, sys.stderr)
    sys.exit(code)
