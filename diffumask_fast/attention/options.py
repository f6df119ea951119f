"""How maps are made."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from diffumask_fast.options import Options, Reader, option, whole

Aggregation = str  # one of AGGREGATIONS, or numbers of levels with commas
AGGREGATIONS = ("auto", "paper", "reference", "finest")
MOST_LEVELS = 10
Propagate = Literal["auto", "none"] | int


def _aggregation() -> Reader:
    """Allow the words, or numbers of levels, which are kept in rising order."""

    def read(value: Any) -> str:
        if value in AGGREGATIONS:
            return str(value)
        numbers = str(value).replace(" ", "").split(",")
        if not all(n.isdecimal() and n.isascii() and int(n) < MOST_LEVELS for n in numbers):
            raise ValueError(f"one of {', '.join(AGGREGATIONS)}, or numbers of levels such as 1,2 (0 is the finest)")
        return ",".join(str(number) for number in sorted(set(map(int, numbers))))

    return read


@dataclass(frozen=True)
class MapOptions(Options):
    """Options of the maps; values may be given as the command line has them (`"2"`).

    Args:
        aggregation: how levels and steps become one map per class. "paper": all levels, each step's map over its own
            maximum; "reference": all levels but the coarsest, mean over steps first; "finest": the finest level alone;
            numbers such as "1,2": these levels, 0 the finest, mean over steps first; "auto": what was measured best
            for the model, "paper" where nothing was.
        propagate: how often maps are spread along self-attention: "none", 1 to 4, or "auto" for the model's best, once
            where nothing was measured.

    Raises:
        DiffuMaskError: a value is not one of those above.

    Example:
        >>> MapOptions(propagate="2")
        MapOptions(aggregation='auto', propagate=2)
    """

    aggregation: Aggregation = option(
        "auto", "auto, paper, reference, finest, or numbers of levels such as 1,2.", _aggregation()
    )
    propagate: Propagate = option("auto", "auto, none, or 1 to 4 times.", whole(1, 4, "auto", "none"))

    def within(self, calls: int) -> "MapOptions":
        """Return the options with no more propagations than so many calls of the denoiser can make.

        A call propagates the maps of those before it, so the first one propagates nothing.
        """
        if not isinstance(self.propagate, int) or self.propagate < calls:
            return self
        return replace(self, propagate=calls - 1 or "none")
