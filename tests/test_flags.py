"""flags.py: an option is written once, in its dataclass; its flag says the same."""

from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Literal, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.bench.options import BenchOptions, CompareOptions, TuneOptions
from diffumask_fast.cli import app
from diffumask_fast.export.options import ExportOptions
from diffumask_fast.flags import with_flags
from diffumask_fast.generation.options import GenerateOptions, RebuildOptions
from diffumask_fast.learning.options import AugmentOptions, CalibrateOptions, EvaluateOptions, TrainOptions
from diffumask_fast.masks.options import RemaskOptions
from diffumask_fast.options import Options, argument, one_of, option, whole

COMMANDS = typer.main.get_command(app).commands
COMMANDS = {**COMMANDS, **COMMANDS["bench"].commands}


def flat(kind):
    for one in fields(kind):
        inner = type(one.default) if is_dataclass(one.default) else get_type_hints(kind)[one.name]
        yield from flat(inner) if is_dataclass(inner) else [one]


KINDS = {
    "generate": GenerateOptions, "remask": RemaskOptions, "evaluate": EvaluateOptions, "export": ExportOptions,
    "augment": AugmentOptions, "train": TrainOptions, "bench": BenchOptions, "compare": CompareOptions,
    "tune": TuneOptions, "verify": RebuildOptions, "calibrate": CalibrateOptions,
}  # fmt: skip
OTHERS = {"generate": {"log", "dry_run", "as_json"}, "train": {"log", "as_json"}, "calibrate": {"log", "as_json"}}
OTHERS |= {
    "remask": {"source", "out", "device", "max_pixels", "as_json"},
    "verify": {"source", "rebuild", "max_pixels", "as_json"},
}


@pytest.mark.parametrize("command, kind", KINDS.items())
def test_every_field_is_a_flag_with_its_default_and_help(command, kind):
    flags = {flag.name: flag for flag in COMMANDS[command].params}
    for one in flat(kind):
        flag = flags.pop(one.name)
        assert one.metadata["help"] and flag.help == one.metadata["help"], one.name
        assert flag.required == (one.default is MISSING)
        assert flag.required or flag.default == one.default
        names = [f"--{one.name.replace('_', '-')}", *filter(None, [one.metadata.get("also")])]
        assert flag.param_type_name == "argument" or flag.opts == names
        is_open = one.default is None and flag.is_flag  # such a flag can turn off what the model turns on
        assert bool(flag.secondary_opts) == (one.default is True or is_open)  # what is on by default has a --no-form
    assert flags.keys() - {"help"} == OTHERS.get(command, {"as_json"})


def test_the_options_of_maps_are_flags_of_generate_alone():
    names = {one.name for one in fields(MapOptions)}
    assert names == {"aggregation", "propagate"}
    assert not names & {flag.name for flag in COMMANDS["remask"].params}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_value_is_read_by_our_own_options(name):
    """No value of a flag is wrong usage: what is not allowed is refused in our words, as in Python."""
    command = COMMANDS[name]
    flags = [flag for flag in command.params if flag.param_type_name == "option" and not flag.is_flag]
    given = [part for flag in flags for part in (flag.opts[0], "abc")]
    places = ["abc"] * sum(flag.param_type_name == "argument" for flag in command.params)
    context = command.make_context(name, [*given, *places])
    values = [context.params[flag.name] for flag in flags]
    assert {str(one) for value in values for one in (value if isinstance(value, list | tuple) else [value])} <= {"abc"}


@dataclass(frozen=True)
class Inner(Options):
    colour: Literal["red", "blue"] = option("red", "red or blue.", one_of("red", "blue"))
    size: Literal["all"] | int = option("all", "all, or a number.", whole(1, 9, "all"))


@dataclass(frozen=True)
class Outer(Options):
    place: str = argument("Where to.")
    num_parts: int | None = option(None, "How many.", whole(1))
    inner: Inner = Inner()
    is_dry: bool = option(False, "Do nothing.")
    wide: bool = option(True, "Both sides.")


def test_a_command_gets_its_dataclasses():
    got, program = [], typer.Typer()

    @program.command()
    @with_flags
    def command(options: Outer, share: float = 0.5) -> None:
        """Say what was given."""
        got.append((options, share))

    run = CliRunner().invoke
    assert run(program, ["here"]).exit_code == 0
    assert (
        run(program, ["--num-parts", "3", "there", "--size", "4", "--is-dry", "--no-wide", "--share", "1"]).exit_code
        == 0
    )
    assert got == [(Outer("here"), 0.5), (Outer("there", 3, Inner("red", 4), True, False), 1.0)]
    assert "Say what was given." in run(program, ["--help"]).stdout
    assert run(program, []).exit_code == 2 and run(program, ["here", "--nothing"]).exit_code == 2
    bad = run(program, ["here", "--num-parts", "x"])
    assert bad.exit_code == 1 and str(bad.exception) == "`num_parts` must be a whole number from 1 on, not 'x'"
