"""masks/options.py: options check themselves and take the command line's words."""

import dataclasses

import pytest

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.options import MaskOptions


def test_takes_what_the_command_line_has():
    options = MaskOptions(threshold="0.45", propagate="2", refine="none", aggregation="paper", ignore_band="3")
    assert (options.threshold, options.propagate, options.ignore_band) == (0.45, 2, 3)
    assert options == MaskOptions("paper", 2, 0.45, "none", ignore_band=3)
    assert MaskOptions(**dataclasses.asdict(options)) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.threshold = "otsu"


def test_takes_every_choice():
    options = MaskOptions(threshold="adaptive", refine="crf", radius="cell", colour_steps="0", min_component="0.01")
    assert (options.threshold, options.refine, options.radius) == ("adaptive", "crf", "cell")
    assert (options.colour_steps, options.min_component, options.fill_holes) == (0, 0.01, False)


@pytest.mark.parametrize(
    "name, value",
    [
        ("threshold", "high"),
        ("threshold", "nan"),
        ("threshold", 0),
        ("threshold", "1"),
        ("threshold", -0.3),
        ("threshold", None),
        ("propagate", "5"),
        ("propagate", 0),
        ("propagate", 1.5),
        ("propagate", "often"),
        ("aggregation", "mean"),
        ("refine", ""),
        ("radius", 0),
        ("colour_steps", -1),
        ("min_component", 2),
        ("min_quality", "good"),
        ("eps", 0.0),
        ("ignore_band", -1),
        ("ignore_band", "wide"),
        ("min_area", 1.5),
        ("max_area", -0.1),
    ],
)
def test_refuses(name, value):
    with pytest.raises(DiffuMaskError, match=f"^{name} must be") as caught:
        MaskOptions(**{name: value})
    assert "\n" not in str(caught.value)
