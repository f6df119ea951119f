"""What the attention layers of one UNet call read and write."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

Levels = dict[str, Tensor]


class Place(NamedTuple):
    """Where an attention layer stands: its level, whether it is a cross-attention, and how many like it are there."""

    level: str
    cross: bool
    num_layers: int


class Tap:
    """Carry columns to the layers of one UNet call and their maps back; born and dies inside that call.

    Neither a dict nor a tuple, so that offload hooks pass it on uncopied.
    """

    def __init__(self, places: Mapping[nn.Module, Place], select: Tensor | None, prior: Levels, first: int) -> None:
        self.places = places
        self.select = select
        self.prior = prior
        self.first = first
        self.maps: Levels = {}
        self.propagated: Levels = {}

    def columns(self, attn: nn.Module) -> Tensor | None:
        """Return the columns [Bc, T, K] that the layer appends to its values, None where it has nothing to do."""
        place = self.places.get(attn)
        if place is None:
            return None
        if place.cross:
            return self.select
        prior = self.prior.get(place.level)
        return None if prior is None else prior.transpose(1, 2)

    def target(self, attn: nn.Module) -> tuple[Tensor | None, float]:
        """Return the maps that the layer adds to (None: it makes them), and its weight among those of its level."""
        place = self.places[attn]
        return self._kind(place).get(place.level), 1 / place.num_layers

    def put(self, attn: nn.Module, maps: Tensor) -> None:
        """Keep the maps [Bc, K, N] that now hold this layer's part."""
        place = self.places[attn]
        self._kind(place)[place.level] = maps

    def _kind(self, place: Place) -> Levels:
        return self.maps if place.cross else self.propagated
