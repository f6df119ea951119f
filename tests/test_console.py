"""console.py: what goes out to a terminal does nothing there, and every failure is one sentence and an exit code."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import typer

from diffumask_fast.cli import app
from diffumask_fast.console import log_to, printable, run_program, say
from diffumask_fast.errors import DiffuMaskError

PROGRAM = str(Path(sys.executable).with_name("diffumask-fast"))
HOSTILE = "\x1b]0;pwned\x07dog\n\r\x9b31m\u202egod\u2066\u2028\udcff\x7f"


def test_nothing_that_a_terminal_acts_on_is_left():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {letter for letter in printable(every) if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")}
    assert left == set()
    turning = {letter for letter in every if unicodedata.bidirectional(letter) in BIDI}
    assert len(turning) == 9 and not turning & set(printable(every))
    assert printable(HOSTILE).startswith("\\x1b]0;pwned\\x07dog\\n\\r\\x9b31m\\u202egod\\u2066\\u2028\\udcff")
    assert printable("犬 naïve 🐕 עברית") == "犬 naïve 🐕 עברית"


BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def called(action, *arguments):
    program = typer.Typer(add_completion=False)
    program.command()(action)
    with pytest.raises(SystemExit) as caught:
        run_program(program, list(arguments))
    return caught.value.code


@pytest.mark.parametrize(
    "error, words",
    [
        (DiffuMaskError(f"no class {HOSTILE}: name another"), r"no class \\x1b]0;pwned"),
        (ValueError(f"first {HOSTILE}\nsecond"), r"Unexpected ValueError: first \\x1b"),
        (MemoryError(), "There is not enough memory: free some"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b\x1b"), r"Cannot read or write /a/b\\x1b: No space"),
    ],
)
def test_an_error_is_one_printable_line(capsys, error, words):
    def fail() -> None:
        raise error

    assert called(fail) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and printable(text[:-1]) == text[:-1]
    assert re.search(words, text) and "--log" not in text


def test_memory_names_the_batch_size_and_the_log_where_there_are_such_flags(capsys):
    def fail(batch_size: str = "auto", log: str = "") -> None:
        raise MemoryError if batch_size == "auto" else ValueError("x")

    assert called(fail) == 1 and "give a smaller --batch-size" in capsys.readouterr().err
    assert called(fail, "--batch-size", "2") == 1 and "--log FILE" in capsys.readouterr().err


def command(name: str, size: float = 1.0, wide: bool = False) -> None:
    """Nothing."""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--no\x1b[31m"], "There is no flag --no\\x1b[31m: "),
        (["a", "--siz", "2"], "There is no flag --siz (is it --size?): --help lists all flags."),
        (["a", "b"], "There is an argument too many (b): --help tells which it takes."),
        ([], "NAME is missing: --help tells what it is."),
        (["a", "--size"], "--size needs a value: --help tells which."),
        (["a", "--wide=2"], "--wide takes no value: write it alone."),
    ],
)
def test_wrong_usage_is_two(capsys, arguments, words):
    assert called(command, *arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith(words) and text.count("\n") == 1 and "\x1b" not in text


def test_a_wrong_value_is_one_where_typer_reads_it_too(capsys):
    assert called(command, "a", "--size", "wide") == 1
    text = capsys.readouterr().err
    assert text.startswith("The value of --size is wrong (") and text.endswith("): --help tells what it may be.\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nope"], "There is no command nope: --help lists all."),
        (["bench", "nope"], "There is no command nope: bench --help lists all."),
        (["bench", "compare", "a"], "AFTER is missing: bench compare --help tells what it is."),
        (["bench", "compare", "a", "b", "c"], "There is an argument too many (c): bench compare --help tells which "),
        (["generate", "x", "--num"], "--num needs a value: generate --help tells which."),
        ([], "No command is named: --help lists all."),
    ],
)
def test_the_command_that_was_meant_is_named(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        run_program(app, arguments)
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.startswith(words) and text.count("\n") == 1


def test_a_stopped_command_is_130():
    def stop() -> None:
        raise KeyboardInterrupt

    assert called(stop) == 130


def test_a_letter_that_the_terminal_lacks(capsys):
    class Ascii:
        encoding = "ascii"

        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text.encode("ascii").decode()

        def flush(self):
            """Nothing is held back."""

    out = Ascii()
    say("犬 dog", out)
    assert out.text == "\\u72ac dog\n"


@pytest.fixture
def no_handlers():
    logger = logging.getLogger("diffumask_fast")
    before, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:] = before
    logger.setLevel(level)


def test_a_log_is_appended_to_our_own_alone(tmp_path, no_handlers):
    path = tmp_path / "run.log"
    for _ in range(2):
        log_to(path)
        no_handlers.info("shard of %s", HOSTILE)
        no_handlers.handlers.pop()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 and all(line.keys() == {"time", "level", "message"} for line in lines)
    assert all(line["level"] == "INFO" and line["message"].startswith("shard of \\x1b") for line in lines)
    (tmp_path / "notes").write_text('{"time": "mine"}')
    with pytest.raises(DiffuMaskError, match="notes is there and no log of ours"):
        log_to(tmp_path / "notes")
    (tmp_path / "link.log").symlink_to("elsewhere")
    with pytest.raises(DiffuMaskError, match="link.log is a link, and writing does not follow links"):
        log_to(tmp_path / "link.log")
    assert not (tmp_path / "elsewhere").exists()


def test_a_traceback_in_the_log_cannot_forge_lines(tmp_path, no_handlers):
    log_to(tmp_path / "log")
    try:
        raise ValueError('x\n{"time": "2026-01-01T00:00:00.000", "message": "forged\x1b"}')
    except ValueError as error:
        no_handlers.info("what happened", exc_info=error)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["traceback"][-2] == "ValueError: x" and "\x1b" not in line


def test_a_line_that_was_cut_off_stays_by_itself(tmp_path, no_handlers):
    path = tmp_path / "run.log"
    log_to(path)
    no_handlers.info("first", extra={"figures": {"shard": 1}})
    path.write_bytes(path.read_bytes() * 2)
    os.truncate(path, path.stat().st_size - 9)
    log_to(path)
    no_handlers.info("second")
    first, cut, second, *_ = path.read_text().splitlines()
    assert json.loads(first)["shard"] == 1 and first.startswith(cut) and json.loads(second)["message"] == "second"


def test_a_full_disk_fails_the_command_and_not_the_terminal(capsys, no_handlers):
    def work() -> None:
        log_to(Path("/dev/full"))
        no_handlers.info("shard written")

    assert called(work) == 1
    text = capsys.readouterr().err
    assert text == "Cannot write the log /dev/full (No space left on device): choose another file.\n"


@pytest.mark.parametrize("seconds", [0.15, 0.6, 1.5, 4.0])
def test_stopped_while_loading(tmp_path, seconds):
    command = [PROGRAM, "generate", str(tmp_path / "out"), "--num", "4000", "--steps", "20"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT) and (seconds < 0.5 or "Traceback" not in error), error


def test_no_library_swallows_ctrl_c_while_it_is_loaded():
    code = """
import builtins, time
from diffumask_fast.__main__ import main
import_as_before = builtins.__import__
def slowly(name, *rest):
    if name == "diffumask_fast.cli":
        try:
            print("loading", flush=True)
            time.sleep(60)
        except BaseException:
            pass
    return import_as_before(name, *rest)
builtins.__import__ = slowly
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT


def test_who_closes_the_pipe_hears_nothing():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([PROGRAM, "doctor", "--json"], stdout=write, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == ""
    with open("/dev/full", "w") as full:
        done = subprocess.run([PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
