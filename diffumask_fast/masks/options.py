"""How masks are made of maps: one frozen set of options, the same for Python and the command line."""

from dataclasses import dataclass
from typing import Literal

from diffumask_fast.errors import DiffuMaskError

_CHOICES = {
    "aggregation": ("auto", "paper", "reference", "finest"),
    "refine": ("guided", "crf", "none"),
}


@dataclass(frozen=True)
class MaskOptions:
    """Options of the mask stage; values may be given as the command line has them (`"0.45"`, `"2"`).

    Args:
        aggregation: how levels and steps become one map per class. "paper": all levels, each step's map over its own
            maximum; "reference": all levels but the coarsest, mean over steps first; "finest": the finest level alone;
            "auto": what was measured best for the model.
        propagate: how often maps are spread along self-attention: "none", 1 to 4, or "auto" for the model's best.
        threshold: "otsu", one per image and class; "adaptive", the one of several that agrees best with the map after
            a CRF; or a fixed number between 0 and 1 of the map's maximum.
        refine: "guided" sharpens maps with a guided filter along the edges of the image; "crf" hands the mask of the
            soft maps to a windowed dense CRF; "none" leaves maps soft.
        radius: half width of the filter's window in pixels at 128; it grows with the shorter side of the image.
            "cell" is one cell of the map.
        eps: variance of the image's colours (0..1) below which the filter sees no edge.
        colour_steps: after the guided filter, how often the mask is moved to where the colours inside and outside part.
        ignore_band: pixels on either side of a boundary that become 255 in the mask.
        min_component: connected parts of a class below this share of the image become background.
        fill_holes: whether holes in a class are filled.
        min_area: an image is rejected when a class has a smaller share of its pixels than this.
        max_area: an image is rejected when its classes together have a larger share of its pixels than this.
        min_quality: an image is rejected when the quality of a class is below this.

    Raises:
        DiffuMaskError: a value is not one of those above.

    Example:
        >>> MaskOptions(threshold="0.45", propagate="2")  # doctest: +ELLIPSIS
        MaskOptions(aggregation='auto', propagate=2, threshold=0.45, refine='guided', ...)
    """

    aggregation: Literal["auto", "paper", "reference", "finest"] = "auto"
    propagate: Literal["auto", "none"] | int = "auto"
    threshold: Literal["otsu", "adaptive"] | float = "otsu"
    refine: Literal["guided", "crf", "none"] = "guided"
    radius: Literal["cell"] | int = "cell"
    eps: float = 1e-4
    colour_steps: int = 2
    ignore_band: int = 0
    min_component: float = 0.0
    fill_holes: bool = False
    min_area: float = 0.005
    max_area: float = 0.95
    min_quality: float = 0.0

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise DiffuMaskError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        self._set("propagate", _whole(self.propagate, 1, 4, "propagate", ("auto", "none")))
        self._set("threshold", _number(self.threshold, "threshold", "between 0 and 1", ("otsu", "adaptive")))
        self._set("radius", _whole(self.radius, 1, 1024, "radius", ("cell",)))
        self._set("eps", _number(self.eps, "eps", "between 0 and 1"))
        self._set("colour_steps", _whole(self.colour_steps, 0, 16, "colour_steps"))
        self._set("ignore_band", _whole(self.ignore_band, 0, 64, "ignore_band"))
        for name in ("min_component", "min_area", "max_area", "min_quality"):
            self._set(name, _number(getattr(self, name), name, "from 0 to 1"))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _whole(value: object, low: int, high: int, name: str, words: tuple[str, ...] = ()) -> int | str:
    if value in words:
        return value
    allowed = ", ".join((*words, f"a whole number from {low} to {high}"))
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise DiffuMaskError(f"{name} must be {allowed}, not {value!r}") from error
    if not low <= number <= high or (not isinstance(value, str) and number != value):
        raise DiffuMaskError(f"{name} must be {allowed}, not {value!r}")
    return number


def _number(value: object, name: str, span: str, words: tuple[str, ...] = ()) -> float | str:
    if value in words:
        return value
    allowed = " or ".join((*words, f"a number {span}"))
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DiffuMaskError(f"{name} must be {allowed}, not {value!r}") from error
    if not (0 <= number <= 1) or (span.startswith("between") and number in (0, 1)):
        raise DiffuMaskError(f"{name} must be {allowed}, not {value!r}")
    return number
