"""Rounds: how many images of each class are drawn next, until each class has its number of accepted ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from diffumask_fast.dataset.reader import Row
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import advice, kind_of

PROBE = 40  # images of a class by which it is judged
HOPELESS = 10  # images of it, of which not one is accepted on average
GROWTH = 4  # times as many of a class as were drawn before, at most
MAX_TOLD = 5  # classes in one sentence


@dataclass
class Tally:
    """What was drawn of a class.

    Args:
        name: of the class.
        drawn: images of it.
        accepted: those that are kept.
        reasons: why the others are not.
    """

    name: str
    drawn: int = 0
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def is_hopeless(self) -> bool:
        """Whether it is drawn no more: of 40 images or more, fewer than one in ten was accepted."""
        return self.drawn >= PROBE and self.accepted * HOPELESS < self.drawn


def tally(rows: Iterable[Row], names: Sequence[str]) -> list[Tally]:
    """Count the rows of each class.

    Args:
        rows: of one class each, with the columns `classes` and `reason`.
        names: of the classes.
    """
    tallies = {name: Tally(name) for name in names}
    for row in rows:
        (name,) = row.classes
        tallies[name].drawn += 1
        tallies[name].accepted += row.accepted
        if row.reason:
            tallies[name].reasons[kind_of(row.reason)] += 1
    return list(tallies.values())


def first_round(num_classes: int, quota: int, shard_size: int) -> tuple[int, ...]:
    """Return how many images of each class are drawn first."""
    return _whole_shards([min(quota, PROBE)] * num_classes, shard_size)


def next_round(tallies: Sequence[Tally], quota: int, shard_size: int) -> tuple[int, ...]:
    """Return how many images of each class are drawn next, a function of what is drawn; () when no more is.

    A class that lacks images gets as many as its acceptance so far asks for, at most four times those that it has had.

    Args:
        tallies: of the classes, after whole rounds.
        quota: accepted images of each class.
        shard_size: the round is a whole number of shards; the classes that lack images fill the last one, in turn.
    """
    counts = [_lacking(one, quota) for one in tallies]
    return _whole_shards(counts, shard_size) if any(counts) else ()


def below(tallies: Sequence[Tally], quota: int) -> list[Tally]:
    """Return the classes that lack images."""
    return [one for one in tallies if one.accepted < quota]


def explain_below(tallies: Sequence[Tally], quota: int, options: MaskOptions) -> str:
    """Say in a sentence which classes lack images, why, and what to do.

    Args:
        tallies: of those classes.
        quota: accepted images of each class.
        options: by which images were rejected.
    """
    told = ", ".join(
        f"{one.name} ({one.accepted} of {one.drawn} accepted, most often: {one.reasons.most_common(1)[0][0]})"
        for one in tallies[:MAX_TOLD]
    )
    more = f" and {len(tallies) - MAX_TOLD} more classes" if len(tallies) > MAX_TOLD else ""
    reasons = [reason for one in tallies for reason in one.reasons.elements()]
    own = advice(reasons, options)
    return (
        f"below {quota} accepted images, and drawn no more, for fewer than one in {HOPELESS} is accepted: "
        f"{told}{more}; the dataset is finished without them: {f'{own}, ' if own else ''}leave them out, or give them "
        "other phrases, in another folder"
    )


def _lacking(one: Tally, quota: int) -> int:
    lacking = max(0, quota - one.accepted)
    if one.is_hopeless:
        return 0
    return min(-(-lacking * one.drawn // max(1, one.accepted)), GROWTH * one.drawn)


def _whole_shards(counts: Sequence[int], shard_size: int) -> tuple[int, ...]:
    """Return the counts with images added in turn, where there are some, until they fill their shards."""
    drawn = [turn for turn, count in enumerate(counts) if count]
    each, more = divmod(-sum(counts) % shard_size, len(drawn))
    added = {turn: each + (place < more) for place, turn in enumerate(drawn)}
    return tuple(count + added.get(turn, 0) for turn, count in enumerate(counts))
