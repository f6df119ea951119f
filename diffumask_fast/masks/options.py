"""How masks are made of maps."""

from dataclasses import dataclass
from typing import Literal

from diffumask_fast.options import Options, left_open, number, one_of, option, whole


@dataclass(frozen=True)
class MaskOptions(Options):
    """Options of the mask stage; values may be given as the command line has them (`"0.45"`).

    Args:
        threshold: "otsu", one per image and class; "adaptive", the one of several that agrees best with the map after
            a CRF; or a fixed number between 0 and 1 of the map's maximum.
        refine: "guided" sharpens maps with a guided filter along the edges of the image; "crf" hands the mask of the
            soft maps to a windowed dense CRF; "none" leaves maps soft.
        radius: half width of the filter's window in pixels at 128; it grows with the shorter side of the image.
            "cell" is one cell of the map.
        eps: variance of the image's colours (0..1) below which the filter sees no edge.
        colour_steps: after the guided filter, how often the mask is moved to where the colours inside and outside
            differ.
        ignore_band: pixels on either side of a boundary that become 255 in the mask.
        min_component: connected parts of a class below this share of the image become background.
        fill_holes: whether holes in a class are filled.
        min_area: an image is rejected when a class has a smaller share of its pixels than this.
        max_area: an image is rejected when its classes together have a larger share of its pixels than this.
        min_quality: an image is rejected when the quality of a class is below this.

    Raises:
        DiffuMaskError: a value is not one of those above.

    Example:
        >>> MaskOptions(threshold="0.45")  # doctest: +ELLIPSIS
        MaskOptions(threshold=0.45, refine='guided', ...)
    """

    threshold: Literal["otsu", "adaptive"] | float = option(
        "otsu", "otsu, adaptive, or a number between 0 and 1.", number(0, 1, "otsu", "adaptive", ends=False)
    )
    refine: Literal["guided", "crf", "none"] = option("guided", "guided, crf or none.", one_of("guided", "crf", "none"))
    radius: Literal["cell"] | int = option(
        "cell", "Half width of guided's window in pixels at 128, or cell.", whole(1, 1024, "cell")
    )
    eps: float = option(1e-4, "Variance of colours below which guided sees no edge.", number(0, 1, ends=False))
    colour_steps: int = option(2, "Rounds of sharpening by colour, after guided.", whole(0, 16))
    ignore_band: int = option(0, "Pixels beside boundaries that become 255.", whole(0, 64))
    min_component: float = option(0.0, "Parts of a class below this share of the image go.", number(0, 1))
    fill_holes: bool = option(False, "Fill holes in a class.")
    min_area: float = option(0.005, "Reject images with a class on a smaller share of the pixels.", number(0, 1))
    max_area: float = option(0.95, "Reject images whose classes cover a larger share of the pixels.", number(0, 1))
    min_quality: float = option(0.0, "Reject images with a class of lower quality.", number(0, 1))


@dataclass(frozen=True)
class RemaskOptions(Options):
    """How masks are made anew; None is as the dataset records."""

    mask: MaskOptions = left_open(MaskOptions, "as IN records")
