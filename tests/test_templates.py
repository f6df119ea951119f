"""prompts/templates.py: nothing that is filled in is read as a place to fill."""

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.prompts.templates import check_template, filled, make_frame


def test_scene_and_view_are_filled_in_once():
    frame = make_frame("{view}: {objects} {scene}, {scene} {objects}", "at {view}", "from {scene} {objects}")
    assert frame == ("from {scene} {objects}: ", " at {view}, at {view} {objects}")
    assert (
        filled(frame, ["dog", "{scene}"])
        == "from {scene} {objects}: a dog and a {scene} at {view}, at {view} {objects}"
    )


def test_a_template_has_a_place_for_classes():
    check_template("{objects}")
    with pytest.raises(DiffuMaskError, match="must hold {objects}, where the classes go"):
        check_template("a photo {scene}")
