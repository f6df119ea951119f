"""An extension of griffe in mkdocs.yml: how the source is shown as the API's page."""

import re
from textwrap import dedent, indent
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)


class Shown(griffe.Extension):
    """The code after a docstring's `Example:` is code, and an option's default is its value."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence the examples of an object."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Show `option("auto", ...)` of a dataclass as `"auto"`."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
            attr.value = value.arguments[0]


def _fenced(found: re.Match[str]) -> str:
    code = dedent(found[1]).strip()
    return "Example:\n" + indent(f"```{'pycon' if code.startswith('>>>') else 'python'}\n{code}\n```\n", "    ")
