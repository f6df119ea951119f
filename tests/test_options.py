"""options.py, and the options of maps and masks: they check themselves and take the command line's words."""

import dataclasses
from dataclasses import fields, replace

import pytest

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.options import GenerateOptions
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.options import Options, checked, closed, left_open, number, option, pixel_size, whole


def test_takes_what_the_command_line_has():
    options = MaskOptions(threshold="0.45", refine="none", ignore_band="3")
    assert (options.threshold, options.ignore_band) == (0.45, 3)
    assert options == MaskOptions(0.45, "none", ignore_band=3)
    assert MaskOptions(**dataclasses.asdict(options)) == options
    assert MapOptions("paper", "2") == MapOptions(aggregation="paper", propagate=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.threshold = "otsu"


def test_takes_every_choice():
    options = MaskOptions(threshold="adaptive", refine="crf", radius="cell", colour_steps="0", min_component="0.01")
    assert (options.threshold, options.refine, options.radius) == ("adaptive", "crf", "cell")
    assert (options.colour_steps, options.min_component, options.fill_holes) == (0, 0.01, False)


def test_what_is_left_out_may_stay_none():
    @dataclasses.dataclass(frozen=True)
    class Some(Options):
        steps: int | None = option(None, "Steps.", whole(1))
        guidance: float | None = option(None, "Guidance.", number())

    assert Some() == Some(None, None) and Some("3", "7") == Some(3, 7.0)
    for wrong in ({"steps": 0}, {"steps": True}, {"guidance": "nan"}, {"guidance": "strong"}):
        with pytest.raises(DiffuMaskError, match=f"`{next(iter(wrong))}` must be a (whole )?number"):
            Some(**wrong)


def test_a_size_is_height_by_width():
    assert checked("size", "512X768", pixel_size()) == checked("size", [512, 768], pixel_size()) == (512, 768)
    for wrong in ("512", "x", "1x2x3", "-1x5", (1.5, 2), 7, (64,)):
        with pytest.raises(DiffuMaskError, match="`max_size` must be HxW, height and width in pixels") as caught:
            checked("max_size", wrong, pixel_size())
        assert repr(wrong) in str(caught.value)


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
        ("num", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("batch_size", "many"),
        ("guidance_scale", float("nan")),
    ],
)
def test_refuses(name, value):
    kind = next(kind for kind in (MapOptions, MaskOptions, GenerateOptions) if name in kind.__annotations__)
    whatever = {"out": "out"} if kind is GenerateOptions else {}
    with pytest.raises(DiffuMaskError, match=f"^`{name}` must be") as caught:
        kind(**{name: value}, **whatever)
    assert "\n" not in str(caught.value)


def test_options_that_are_left_open_are_somebody_elses():
    opened = left_open(MaskOptions, "the model's own")
    assert set(vars(opened).values()) == {None} and vars(opened).keys() == vars(MaskOptions()).keys()
    own = MaskOptions(threshold=0.3, fill_holes=True, eps=0.5)
    assert closed(opened, own) == own and type(closed(opened, own)) is MaskOptions
    given = replace(opened, threshold="0.4", fill_holes=False)
    assert closed(given, own) == replace(own, threshold=0.4, fill_holes=False)
    assert closed(MaskOptions(), own) == MaskOptions()  # nothing is left open
    with pytest.raises(DiffuMaskError, match="`threshold` must be"):
        replace(opened, threshold="high")
    assert fields(opened)[0].metadata["help"].endswith("0 and 1; the model's own when left out, else otsu.")


@pytest.mark.parametrize(
    "calls, asked, possible",
    [
        (1, 1, "none"),
        (1, 4, "none"),
        (2, 1, 1),
        (2, 2, 1),
        (4, 4, 3),
        (5, 4, 4),
        (1, "none", "none"),
        (9, "none", "none"),
    ],
)
def test_no_more_propagations_than_there_are_earlier_calls(calls, asked, possible):
    assert MapOptions("paper", asked).within(calls) == MapOptions("paper", possible)


@pytest.mark.parametrize("given, kept", [("1", "1"), ("2,0", "0,2"), (" 1, 1", "1"), (2, "2"), ("finest", "finest")])
def test_levels_are_kept_in_order(given, kept):
    assert MapOptions(given).aggregation == kept


@pytest.mark.parametrize("value", ["", "1,", "-1", "1.5", "99", "0;1", None])
def test_what_is_no_list_of_levels_is_refused(value):
    with pytest.raises(DiffuMaskError, match="one of auto, paper, reference, finest, or numbers of levels such as 1,2"):
        MapOptions(value)
