"""The options of what datasets are for."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from diffumask_fast.options import Options, Reader, ReadOptions, argument, number, one_of, option, whole

MOST_COPIES = 100  # new images of one kind for each image


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """Whose masks to judge, and by which segmenter."""

    model: str = argument("mini-oracle: the judge of mini's world.")
    data: Path = argument("Dataset whose masks are judged.")
    accepted: bool = option(False, "Leave out rejected rows.")
    ignored_is_background: bool = option(False, "Count 255 in masks as background, in place of leaving it out.")
    sheet: Path | None = option(None, "Write the twenty worst images into this PNG file.")
    reading: ReadOptions = ReadOptions()


def splice_shares(text: str) -> dict[tuple[int, int], Fraction]:
    """Read `2x2=1/20,3x3=0.1`: (rows, columns) -> new images for each image.

    Raises:
        ValueError: it is something else.
    """
    shares = {}
    for part in text.replace(" ", "").split(",") if text.strip() not in ("", "0", "none") else ():
        grid, _, share = part.partition("=")
        rows, _, columns = grid.partition("x")
        numbers = int(rows), int(columns)
        if min(numbers) < 1 or max(numbers) > 64 or numbers == (1, 1) or numbers in shares:
            raise ValueError(grid)
        shares[numbers] = Fraction(share)
        if not 0 <= shares[numbers] <= MOST_COPIES:
            raise ValueError(share)
    return shares


def _splices() -> Reader:
    def read(value: Any) -> str:
        try:
            shares = splice_shares(value)
        except (ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError("none, or grids (rows x columns) with their shares, such as 2x2=1/20,3x3=0.1") from error
        return ",".join(f"{rows}x{columns}={share}" for (rows, columns), share in shares.items()) or "none"

    return read


def span(text: str) -> tuple[float, float]:
    """Read `6-22`: two numbers."""
    low, high = map(float, text.split("-"))
    return low, high


def _span(low: float, high: float, example: str) -> Reader:
    """Allow two numbers in a range, the smaller one first, as "LOW-HIGH" or as a pair."""

    def read(value: Any) -> str:
        try:
            text = value if isinstance(value, str) else "-".join(f"{number:g}" for number in value)
            first, last = span(text)
            if low <= first <= last <= high:
                return f"{first:g}-{last:g}"
        except (TypeError, ValueError):
            pass
        raise ValueError(f"two numbers LOW-HIGH between {low} and {high}, such as {example}")

    return read


@dataclass(frozen=True)
class AugmentationOptions(Options):
    """How often and how strongly images are augmented.

    Shares are new images for each image that is there; in training they are probabilities, at most 1.

    Args:
        splice: how often images are tiled into one, by grid, rows x columns. The default is what the paper's program
            makes of its 60,000 images: 1,500 of 1x2 and 2x1 each, 3,000, 4,000, 3,000 and 1,000 of the others.
        splice_size: "same" makes the tiles smaller, so that the result has the size of its first tile; "full" leaves
            them as they are, as the paper's program does.
        blur: how often images are blurred by a Gaussian.
        blur_lengths: of the Gaussian's kernel in pixels, the shortest and the longest, at a shorter side of 512;
            elsewhere in proportion. Lengths are odd, and at least 3.
        occlude: how often a patch of another image covers a part, with its labels.
        occlude_area: the smallest and the largest share of the image that a patch covers.
        perspective: how often images are seen from another side.
        perspective_shift: how far each corner moves at most, as a share of the side.

    Raises:
        DiffuMaskError: a value is not one of those above.

    Example:
        >>> AugmentationOptions(splice="2x2=0.1", blur=0).splice
        '2x2=1/10'
    """

    splice: str = option(
        "1x2=1/40,2x1=1/40,2x2=1/20,3x3=1/15,5x5=1/20,8x8=1/60", "Share of splices by grid, or none.", _splices()
    )
    splice_size: Literal["same", "full"] = option(
        "same", "same: tiles shrink; full: the picture grows.", one_of("same", "full")
    )
    blur: float = option(0.25, "Share of blurred images.", number(0, MOST_COPIES))
    blur_lengths: str = option("6-22", "Kernel lengths in pixels at 512, LOW-HIGH.", _span(1, 128, "6-22"))
    occlude: float = option(0.25, "Share of images with a patch of another one.", number(0, MOST_COPIES))
    occlude_area: str = option("0.05-0.3", "Share of the image under a patch, LOW-HIGH.", _span(0, 1, "0.05-0.3"))
    perspective: float = option(0.25, "Share of images seen from another side.", number(0, MOST_COPIES))
    perspective_shift: float = option(0.15, "Largest shift of a corner, as a share of the side.", number(0, 0.24))


@dataclass(frozen=True)
class AugmentOptions(Options):
    """What to augment, and where to; shares are new images for each image that is there."""

    source: Path = argument("Dataset to augment.", "IN")
    out: Path = argument("Folder of the new dataset; run again to finish it.")
    augmentations: AugmentationOptions = AugmentationOptions()
    seed: int = option(0, "Of all that is drawn at random.", whole(0, 2**63 - 1))
    originals: bool = option(True, "Keep the images of IN beside the new ones.")
    all: bool = option(False, "Rejected rows too.")
    reading: ReadOptions = ReadOptions()
