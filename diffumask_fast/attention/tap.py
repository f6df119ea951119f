"""What the attention layers of one UNet call read and write."""

from collections import Counter
from typing import NamedTuple

from torch import Tensor

Levels = dict[str, Tensor]


class Place(NamedTuple):
    """Where an attention layer stands: its level, whether it is a cross-attention, how many like it are there, and how
    often the latents are halved before it."""

    level: str
    cross: bool
    num_layers: int
    depth: int

    @property
    def kind(self) -> tuple[str, bool]:
        """What it shares with the layers whose maps are added to its own."""
        return self.level, self.cross


class Tap:
    """Carry columns to the layers of one UNet call and their maps back; born and dies inside that call.

    Neither a dict nor a tuple, so that offload hooks pass it on uncopied.

    Args:
        select: [Bc, T, K], or None.
        prior: level -> [Bc, M, N].
        first: the first conditional row.
        shape: B, h and w of the latents, which tell a layer on all pixels from one on merged tokens; None where a graph
            is made whose layers take what they are given.

    Attributes:
        layers: how many layers of a kind have put maps.
        partial: the kinds of layers that ran on other tokens than one for each pixel.
    """

    def __init__(
        self, select: Tensor | None, prior: Levels, first: int, shape: tuple[int, int, int] | None = None
    ) -> None:
        self.select = select
        self.prior = prior
        self.first = first
        self.shape = shape
        self.maps: Levels = {}
        self.propagated: Levels = {}
        self.layers: Counter[tuple[str, bool]] = Counter()
        self.partial: set[tuple[str, bool]] = set()

    def columns(self, place: Place, hidden_states: Tensor) -> Tensor | None:
        """Return the columns [Bc, T, K] that a layer appends to its values, None where it has nothing to do."""
        if not self._is_whole(place, hidden_states):
            self.partial.add(place.kind)
            return None
        if place.cross:
            return self.select
        prior = self.prior.get(place.level)
        return None if prior is None else prior.transpose(1, 2)

    def target(self, place: Place) -> tuple[Tensor | None, float]:
        """Return the maps that the layer adds to (None: it makes them), and its weight among those of its level."""
        return self._maps(place.cross).get(place.level), 1 / place.num_layers

    def put(self, place: Place, maps: Tensor) -> None:
        """Keep the maps [Bc, K, N] that now hold this layer's part."""
        self._maps(place.cross)[place.level] = maps
        self.layers[place.kind] += 1

    def empty(self) -> "Tap":
        """Return a tap with the same columns for a part of the call; `take` brings back what was put into it."""
        return Tap(self.select, self.prior, self.first, self.shape)

    def take(self, part: "Tap") -> None:
        """Add what was put into the tap of a part."""
        for cross in (True, False):
            whole = self._maps(cross)
            for level, maps in part._maps(cross).items():
                whole[level] = whole[level].add_(maps) if level in whole else maps
        self.layers.update(part.layers)
        self.partial |= part.partial

    def _maps(self, cross: bool) -> Levels:
        return self.maps if cross else self.propagated

    def _is_whole(self, place: Place, hidden_states: Tensor) -> bool:
        if self.shape is None:
            return True
        rows, h, w = self.shape
        for _ in range(place.depth):
            h, w = -(-h // 2), -(-w // 2)
        return hidden_states.shape[0] == rows and hidden_states.shape[1] == h * w
