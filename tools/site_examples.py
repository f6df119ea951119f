"""An extension of griffe in mkdocs.yml: the code after a docstring's `Example:` is shown as code."""

import re
from textwrap import dedent, indent
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)


class Examples(griffe.Extension):
    """Fences them: Google's style has no code in an `Example:`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(found: re.Match[str]) -> str:
    code = dedent(found[1]).strip()
    return "Example:\n" + indent(f"```{'pycon' if code.startswith('>>>') else 'python'}\n{code}\n```\n", "    ")
