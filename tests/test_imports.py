"""Imports go one way, down the layers below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffumask_fast

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    ("errors",),
    ("own_files",),
    ("options", "borrow", "kernels", "flags", "console"),
    ("pictures",),
    ("masks", "attention", "prompts"),
    ("mini", "show"),
    ("results",),
    ("models",),
    ("engines", "export"),
    ("pipeline",),
    ("dataset",),
    ("generation", "report"),
    ("learning", "dropin", "doctor"),
    ("bench", "convert"),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
# Allowed inside a function only: what the importing module must not load before it is needed.
LATE = {("pipeline", "export"): "an engine's libraries are optional"}
LATE |= {
    ("cli", room): "`--help` is quick" for room in RANK if room not in ("cli", "errors", "options", "flags", "console")
}
LATE |= {("__main__", "cli"): "stopped while it loads, the program ends quietly"}
# The judge takes no part in making masks: only these may read it.
JUDGES = ("learning", "bench")
# Against the order, and inside a function only.
EXCEPTIONS = {("mini", "dataset"): "the world writes its scenes as an ordinary dataset"}
# The embedded model is trained without the product; of it, it shares the names of VOC's classes.
MINI_MAY_IMPORT = ("errors", "pictures", "prompts")


def sources() -> list[Path]:
    folders = ("diffumask_fast", "kernels", "export", "bench")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def room_of(module: str) -> str:
    """Return the room of a dotted module name, `diffumask_fast.masks.make` -> `masks`; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "diffumask_fast" else ("diffumask_fast", *parts)
    return ".".join(part for part in parts if part != "__init__")


def imported(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool, int]]:
    """Yield (module, whether inside a function, line) of every import of our own."""
    for node in ast.iter_child_nodes(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "diffumask_fast.relative", inside, node.lineno
            elif node.module == "diffumask_fast":
                names = [diffumask_fast._HOMES.get(alias.name, f"diffumask_fast.{alias.name}") for alias in node.names]
            else:
                names = [node.module]
        for name in names:
            if name.startswith("diffumask_fast.") and name != "diffumask_fast.__version__":
                yield name, inside, node.lineno
        yield from imported(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def violations(module: str, text: str) -> list[str]:
    room = room_of(module)
    found = []
    if "mini.oracle" in text and room not in JUDGES and module != "diffumask_fast.mini.oracle":
        found.append(f"{module} reads mini.oracle, which is for {' and '.join(JUDGES)} alone")
    for name, inside, line in imported(ast.parse(text)):
        target = room_of(name)
        if target == room or (inside and (room, target) in EXCEPTIONS):
            continue
        if target not in RANK:
            found.append(f"{module}:{line} imports {target}, which is no room")
        elif room not in RANK or RANK[target] >= RANK[room] or (room == "mini" and target not in MINI_MAY_IMPORT):
            found.append(f"{module}:{line} imports {target}, which is not for {room or 'the package itself'}")
        elif not inside and (room, target) in LATE and not name.endswith(".options"):
            found.append(f"{module}:{line} imports {target} at its top: {LATE[room, target]}")
    return found


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    assert violations(module_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("diffumask_fast.masks.make", "from diffumask_fast.attention.store import MapStore"),
        ("diffumask_fast.kernels.attend", "def f():\n    import diffumask_fast.masks.make"),
        ("diffumask_fast.attention.tap", "from diffumask_fast import MaskOptions"),
        ("diffumask_fast.attention.tap", "from .store import MapStore"),
        ("diffumask_fast.mini.world", "from diffumask_fast.dataset.writer import write_shard"),
        ("diffumask_fast.mini.train", "def f():\n    from diffumask_fast.masks.make import make_masks"),
        ("diffumask_fast.mini.train", "from diffumask_fast.kernels import attend"),
        ("diffumask_fast.pipeline", "from diffumask_fast.export import denoiser"),
        ("diffumask_fast.cli", "from diffumask_fast.pipeline import DiffuMaskPipeline"),
        ("diffumask_fast", "from diffumask_fast.errors import DiffuMaskError"),
        ("diffumask_fast.masks.make", "def f():\n    import_module('diffumask_fast.mini.oracle')"),
        ("diffumask_fast.bench.x", "from diffumask_fast.nowhere import y"),
    ],
)
def test_an_import_against_the_order_is_found(module: str, text: str) -> None:
    assert len(violations(module, text)) == 1


def test_every_source_is_in_a_room() -> None:
    assert {room_of(module_of(path)) for path in sources()} - {""} <= set(RANK)
