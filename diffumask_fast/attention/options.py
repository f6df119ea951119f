"""How maps are made."""

from dataclasses import dataclass
from typing import Literal

from diffumask_fast.options import Options, one_of, option, whole

Aggregation = Literal["auto", "paper", "reference", "finest"]
Propagate = Literal["auto", "none"] | int


@dataclass(frozen=True)
class MapOptions(Options):
    """Options of the maps; values may be given as the command line has them (`"2"`).

    Args:
        aggregation: how levels and steps become one map per class. "paper": all levels, each step's map over its own
            maximum; "reference": all levels but the coarsest, mean over steps first; "finest": the finest level alone;
            "auto": what was measured best for the model, "paper" where nothing was.
        propagate: how often maps are spread along self-attention: "none", 1 to 4, or "auto" for the model's best, once
            where nothing was measured.

    Raises:
        DiffuMaskError: a value is not one of those above.

    Example:
        >>> MapOptions(propagate="2")
        MapOptions(aggregation='auto', propagate=2)
    """

    aggregation: Aggregation = option(
        "auto", "auto, paper, reference or finest.", one_of("auto", "paper", "reference", "finest")
    )
    propagate: Propagate = option("auto", "auto, none, or 1 to 4 times.", whole(1, 4, "auto", "none"))
