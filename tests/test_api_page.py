"""docs/api.md: what it names is there, with a docstring, and all public names are on it."""

import importlib
import re

import pytest
from pages import ROOT

import diffumask_fast

NAMES = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there_and_described(name):
    module, _, attribute = name.rpartition(".")
    module = module if module.startswith("diffumask_fast.") else f"diffumask_fast.{module}"
    assert getattr(importlib.import_module(module), attribute).__doc__


def test_all_public_names_are_on_the_page():
    assert set(diffumask_fast.__all__) - {name.rpartition(".")[2] for name in NAMES} == {"__version__"}
