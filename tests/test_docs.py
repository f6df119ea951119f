"""README.md and docs/: the commands that they show are commands, with flags that there are."""

import re

import pytest
import typer
from pages import PAGES, ROOT, blocks, commands, words

from diffumask_fast.cli import app

ABSENT = "Missing "  # argument or option: a sentence may name a command without all that it needs
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]*[a-z]")
OF_OTHERS = {  # flags of other programs that the pages name
    "pip": {"--no-deps"},
    "hf": {"--local-dir", "--include", "--repo-type"},
    "ray": {"--head", "--address"},
    "sbatch": {"--signal", "--array", "--gpus", "--cpus-per-task", "--requeue"},
    "the paper's program": {"--select"},
}


def fault(arguments: list[str]) -> str:
    """Return what the command line says against a command, which is read and not run."""
    command, rest = typer.main.get_command(app), list(arguments)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if command.name == "diffumask-fast":
        return f"no command {rest}"
    try:
        command.make_context(command.name, rest)
    except Exception as error:  # noqa: BLE001 - typer's own classes are private
        return "" if type(error).__name__ == "Exit" else str(getattr(error, "message", error))  # Exit: --help
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_commands(page):
    said = {" ".join(found): fault(found) for found in commands(page.read_text(encoding="utf-8"))}
    assert not {command: text for command, text in said.items() if text and not text.startswith(ABSENT)}


def flags(command) -> set[str]:
    """Return the flags of a command and of its own commands."""
    inner = [flags(one) for one in getattr(command, "commands", {}).values()]
    return {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}.union({"--help"}, *inner)


def named_in_modules() -> set[str]:
    """Return the flags that modules with a command line of their own write out: argparse's, or a field of options."""
    files = (path for room in ("diffumask_fast", "bench") for path in (ROOT / room).rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    fields = [
        f"--{name}"
        for text in texts
        for name in re.findall(r"^    (\w+): .* = (?:option|required)\(", text, re.MULTILINE)
    ]
    return {flag for text in texts for flag in re.findall(r'"(--[a-z-]+)"', text)} | set(fields)


def test_each_flag_that_a_page_names_is_one():
    known = flags(typer.main.get_command(app)) | named_in_modules() | set().union(*OF_OTHERS.values())
    found = {flag: page.name for page in PAGES for flag in FLAG.findall(page.read_text(encoding="utf-8"))}
    assert {flag: page for flag, page in found.items() if flag not in known} == {}
    assert set().union(*OF_OTHERS.values()) <= found.keys() and len(found) > 100


def test_commands_are_found_and_faults_are_seen():
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 100
    assert words("diffumask-fast generate out --part '0/4' & # more") == ["generate", "out", "--part", "0/4"]
    page = "text `diffumask-fast\ntune` and\n\n    diffumask-fast report \\\n        out\n\nmore"
    assert commands(page) == [["report", "out"], ["tune"]]
    assert blocks("a\n\n    b\n\n      c\n\nd\n\n```python\ne\n```\n") == ["b\n\n  c", "e"]
    assert "No such option: --nun" in fault(["generate", "out", "--nun", "4"])
    assert "no command" in fault(["generat", "out"]) and "no command" in fault([])
    assert fault(["bench", "compare", "a", "b", "--threshold", "0.05"]) == "" == fault(["generate", "--help"])
    assert "requires an argument" in fault(["train", "in", "--out", "model", "--split"])
