"""errors.py: a sentence names parameters, the command line writes them as flags."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffumask_fast.errors import DiffuMaskError, first_line, in_one_line

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("diffumask_fast", "kernels", "export", "bench")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.name != "cli.py")
FLAG = re.compile(r"(?<![\w-])--[a-z]")


def test_parameters_become_flags():
    error = DiffuMaskError("`shard_size` is 0; `engine=onnx` needs `engine_path`, a folder of `Other` or `a b`")
    assert error.as_flags() == "--shard-size is 0; --engine onnx needs --engine-path, a folder of `Other` or `a b`"
    assert error.as_flags("_").startswith("--shard_size is 0; --engine onnx needs --engine_path")


def test_the_first_line_of_an_error_without_text_is_its_name():
    assert [first_line(ValueError(text)) for text in ("", " \n ", "\none\ntwo")] == ["ValueError", "ValueError", "one"]


def test_the_first_line_of_an_error_has_what_its_colon_promises_and_no_parameter():
    assert first_line(ValueError("Error(s):\n\tsize mismatch for to_q\nmore")) == "Error(s): size mismatch for to_q"
    told = DiffuMaskError(f"it does not fit ({first_line(ValueError('You set `ignore_sizes` to `False`'))})")
    assert told.as_flags() == "it does not fit (You set 'ignore_sizes' to 'False')"
    assert in_one_line(ValueError("a\n  `b` c"), 5) == "a 'b'" and in_one_line(OSError()) == "OSError"


def messages_with_flags(text: str) -> Iterator[str]:
    """Yield what names a flag in a source's errors and in its constants, which errors are made of."""
    tree = ast.parse(text)
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")]
    constants = [node for node in tree.body if isinstance(node, ast.Assign)]
    strings = [part for node in [*made, *constants] for part in ast.walk(node) if isinstance(part, ast.Constant)]
    for value in (part.value for part in strings):
        if isinstance(value, str) and FLAG.search(value) and not value.startswith("pip install"):
            yield value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_message_of_the_library_names_a_flag(path):
    assert list(messages_with_flags(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        'raise DiffuMaskError(f"There is no {x}: use --engine torch.") from error',
        'def f():\n    raise ValueError("a" "use --to onnx")',
        'INSTEAD = "use --attention sdpa"',
    ],
)
def test_a_flag_in_a_message_is_found(text):
    assert len(list(messages_with_flags(text))) == 1
    assert not list(messages_with_flags(text.replace("--", "a--")))
