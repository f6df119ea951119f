"""The examples in the docstrings run. (pytest's own collector would import the mapped folders under wrong names.)"""

import doctest
import importlib
from pathlib import Path

import pytest
from test_imports import module_of, sources


def with_examples() -> list[str]:
    return [module_of(path) for path in sources() if ">>> " in Path(path).read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", with_examples())
def test_examples_run(name: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert results.attempted > 0
    assert results.failed == 0
