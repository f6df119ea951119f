"""docs/architecture.md names files and what is in them: all of it exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def names_in(path):
    """Return what a source file defines: functions, classes, and methods as `Class.method`."""
    found = set()
    for node in ast.parse((ROOT / path).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_each_file_and_name_exists():
    files = re.findall(r"`((?:diffumask_fast|kernels|export|bench|docs)/[\w/.]*)`", PAGE)
    assert len(files) > 20
    assert [path for path in files if not (ROOT / path).exists()] == []
    named = re.findall(r"`((?:diffumask_fast|kernels|export|bench)/[\w/]+\.py)`:? `([\w.]+)`", PAGE)
    assert len(named) > 20
    assert [(path, name) for path, name in named if name not in names_in(path)] == []


def test_each_use_of_the_borrowing_helpers_is_listed():
    uses = {
        str(path.relative_to(ROOT))
        for room in ("diffumask_fast", "kernels", "export", "bench")
        for path in (ROOT / room).rglob("*.py")
        if re.search(r"\bpatched(_but_in_copies|_environment|_threads)?\(", path.read_text("utf-8"))
        and path.name != "borrow.py"
    }
    section = PAGE[PAGE.index("## Borrowing") :].split("\n## ")[0]
    assert {path for path in uses if f"`{path}`" not in section} == set()


def test_walks_have_at_most_ten_stations():
    walks = re.findall(r"^## A (?:phrase|map).*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert len(walks) == 2
    assert all(0 < len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) <= 10 for walk in walks)
