"""Templates of captions: where classes, a scene and a view go."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.english import article

OBJECTS, SCENE, VIEW = "{objects}", "{scene}", "{view}"
VIEWS = (
    "from the side", "from the front", "from behind", "from above", "from a low angle", "at a distance", "up close",
    "at an angle",
)  # fmt: skip
Frame = tuple[str, str]  # what stands before and after the classes


def check_template(template: str) -> None:
    """Raise a DiffuMaskError unless a template has a place for the classes."""
    if OBJECTS not in template:
        raise DiffuMaskError(f"template {template!r} must hold {OBJECTS}, where the classes go")


def make_frame(template: str, scene: str, view: str) -> Frame:
    """Fill in scene and view; nothing in them is read as a place to fill.

    Example:
        >>> make_frame("a photo of {objects} {scene}", "in a city", "from the side")
        ('a photo of ', ' in a city')
    """
    parts = {SCENE: scene, VIEW: view}
    places = "|".join(map(re.escape, parts))
    before, after = template.split(OBJECTS, 1)
    before, after = (re.sub(places, lambda found: parts[found[0]], part) for part in (before, after))
    return before, after


def filled(frame: Frame, names: Sequence[str]) -> str:
    """Fill in the classes, each with its article.

    Example:
        >>> filled(("a photo of ", " in a city"), ["dog", "old oak", "traffic lights"])
        'a photo of a dog, an old oak and traffic lights in a city'
    """
    nouns = [article(name) for name in names]
    objects = " and ".join(filter(None, [", ".join(nouns[:-1]), nouns[-1]]))
    return " ".join((frame[0] + objects + frame[1]).split())
