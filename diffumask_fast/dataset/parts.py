"""Part i of n of a run: every n-th shard, so that several processes write into one folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from diffumask_fast.options import Reader


@dataclass(frozen=True)
class Part:
    """The shards index, index + count, index + 2 count ... of a run.

    Args:
        index: of the part, from 0 on.
        count: of all parts.
    """

    index: int
    count: int

    def shards(self, num_shards: int) -> range:
        """Return the part's shards, of so many."""
        return range(self.index, num_shards, self.count)

    @property
    def tag(self) -> str:
        """What the names of the part's own files bear."""
        return f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def part_of() -> Reader:
    """Allow i/n as text, i from 0 to n - 1."""

    def read(value: Any) -> Part:
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value))
        part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
        if part.index >= part.count:
            raise ValueError("i/n with i from 0 to n - 1: the first of four parts is 0/4, the last 3/4")
        return part

    return read
