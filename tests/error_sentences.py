"""The sentences of the source's errors, read and not run: what is computed stands as a hole in them."""

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOLE = "\0"
WORD = re.compile("[a-z]")


class Source:
    """A source file: its calls, its functions, and what the constants of all files are."""

    constants: dict[str, list[str]] = {}

    def __init__(self, path: Path) -> None:
        self.path, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))
        self.nodes = list(ast.walk(tree))
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        self.functions = defaultdict(list)
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name].append(node)
        self.choices = {  # asked = "..." if split is None else "..."
            node.targets[0].id: node.value
            for node in self.nodes
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and is_choice(node.value)
        }
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
                self.constants[node.targets[0].id] = self.texts(node.value)

    def texts(self, node: ast.expr) -> list[str]:
        """Return the texts that an expression may be, as far as they are written there."""
        match node:
            case ast.Constant(value=str(text)):
                return [re.sub("%[sd]", HOLE, text)]
            case ast.JoinedStr(values=parts):
                return ["".join(found) for found in itertools.product(*map(self.texts, parts))]
            case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in self.constants:
                return self.constants[name]
            case ast.FormattedValue(value=ast.Name(id=name)) if name in self.choices:
                return self.texts(self.choices[name])
            case ast.BinOp(left=left, right=right):
                return [first + second for first in self.texts(left) for second in self.texts(right)]
            case ast.IfExp(body=body, orelse=orelse):
                return self.texts(body) + self.texts(orelse)
            case ast.Call() if name_of(node) in self.functions:
                inner = [part for one in self.functions[name_of(node)] for part in ast.walk(one)]
                returned = [part.value for part in inner if isinstance(part, ast.Return) and part.value]
                return [text for value in returned for text in self.texts(value)] or [HOLE]
        return [HOLE]

    def errors(self, makers: set[str]) -> Iterator[tuple[ast.Call, str]]:
        """Yield the calls that make an error of a sentence, with the sentence.

        Args:
            makers: names of what is called so.
        """
        handed_on = set()  # functions whose caller has the words: error(key, line, what)
        for name, functions in self.functions.items():
            for call in (part for one in functions for part in ast.walk(one) if isinstance(part, ast.Call)):
                if name_of(call) in makers and call.args and not any(map(WORD.search, self.texts(call.args[0]))):
                    handed_on.add(name)
        for node in self.nodes:
            if isinstance(node, ast.ClassDef) and node.name in makers:  # a kind of error that words itself
                makers = makers | {"__init__"}
        for call in self.calls:
            if call.args and name_of(call) in makers | handed_on:
                for text in self.texts(call.args[0 if name_of(call) in makers else -1]):
                    if WORD.search(text):
                        yield call, text


def is_choice(node: ast.expr) -> bool:
    words = ast.Constant | ast.JoinedStr
    return isinstance(node, ast.IfExp) and isinstance(node.body, words) and isinstance(node.orelse, words)


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


@cache
def sources() -> list[Source]:
    rooms = (ROOT / room for room in ("diffumask_fast", "kernels", "export", "bench"))
    return [Source(path) for room in rooms for path in sorted(room.rglob("*.py"))]


@cache
def sentences() -> dict[str, str]:
    """Return each sentence of an error: `file:line` -> the sentence; several of one place have numbers."""
    classes = [node for source in sources() for node in source.nodes if isinstance(node, ast.ClassDef)]
    kinds = {node.name for node in classes if any(getattr(base, "id", "") == "DiffuMaskError" for base in node.bases)}
    found = [
        (f"{source.path}:{call.lineno}", text)
        for source in sources()
        for call, text in source.errors(kinds | {"DiffuMaskError", "_fail"})
    ]
    return {f"{place} ({number})": text for number, (place, text) in enumerate(found)}


@cache
def all_texts() -> set[str]:
    """Return every text of the source that has a space: what the program may say."""
    kinds = ast.JoinedStr | ast.Constant | ast.BinOp
    found = (source.texts(node) for source in sources() for node in source.nodes if isinstance(node, kinds))
    return {text for texts in found for text in texts if " " in text and WORD.search(text)}
