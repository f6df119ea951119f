"""Where the maps of all UNet calls accumulate, and how they become one map for each phrase."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffumask_fast.attention.options import Aggregation, MapOptions, Propagate
from diffumask_fast.attention.overlay import overlay
from diffumask_fast.attention.tap import Levels
from diffumask_fast.errors import DiffuMaskError

MAX_PROPAGATED_PIXELS = 1024


class Mean:
    """Keep a weighted mean of tensors, and of each tensor over its own maximum, in fixed memory.

    Args:
        over_maximum: whether the second mean is kept.
    """

    def __init__(self, over_maximum: bool = True) -> None:
        self.weight = 0.0
        self.over_maximum = over_maximum
        self._sum: Tensor | None = None
        self._peak_sum: Tensor | None = None

    def add(self, maps: Tensor, weight: float) -> None:
        """Add maps [Bc, K, N]."""
        self._sum = _added(self._sum, maps, weight)
        if self.over_maximum:
            self._peak_sum = _added(self._peak_sum, over_maximum(maps), weight)
        self.weight += weight

    def mean(self, each_over_maximum: bool = False) -> Tensor:
        """Return the mean [Bc, K, N], or the mean of each over its own maximum (the paper's equation 2)."""
        total = self._peak_sum if each_over_maximum else self._sum
        assert total is not None
        return total / self.weight

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(kept.nbytes for kept in (self._sum, self._peak_sum) if kept is not None)


class MapStore:
    """Add up the maps of each UNet call outside of whatever runs it.

    Propagation: the prior of a call holds, for each level that it propagates, the mean of the earlier maps and the
    means so far of the 1 to n-1 times propagated ones, side by side on the K axis. The call applies its self-attention
    once to all of them, so maps propagated k times are the self-attention of later calls on the mean of those
    propagated k-1 times. It happens at levels of at most so many query pixels, 1024 where nothing is said, in the last
    third of the calls (in all but the first when their number is not known).
    """

    def __init__(
        self,
        phrases: Sequence[Sequence[str]],
        latent_size: tuple[int, int],
        *,
        propagate: Propagate = "auto",
        aggregation: Aggregation = "auto",
        num_calls: int | None = None,
        max_propagated_pixels: float = MAX_PROPAGATED_PIXELS,
    ) -> None:
        """Begin with nothing.

        Args:
            phrases: the phrases of each of the Bc conditional rows.
            latent_size: h, w of the latents, or of the tokens of an image that is packed.
            propagate: "auto" (once), "none", or 1 to 4 times.
            aggregation: the one that `class_maps` will be asked for, which decides what is kept and propagated; "auto"
                allows all of them.
            num_calls: how many UNet calls there will be, None if that is not known.
            max_propagated_pixels: of the levels that are propagated.
        """
        self.phrases = [list(row) for row in phrases]
        self.latent_size = latent_size
        self.times = propagation_times(propagate)
        self.aggregation = MapOptions(aggregation=aggregation).aggregation
        self.num_calls = num_calls
        self.max_propagated_pixels = max_propagated_pixels
        self.calls = 0
        self._maps: dict[str, Mean] = {}
        self._propagated: dict[str, list[Mean]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all UNet calls that were planned have given their maps."""
        return self.num_calls is None or self.calls >= self.num_calls

    def propagated_levels(self) -> set[str]:
        """Return the levels that calls propagate."""
        if not self.times:
            return set()
        keys = self._read(self.aggregation)
        return {key for key in keys if self._maps[key].mean().shape[-1] <= self.max_propagated_pixels}

    def prior(self) -> Levels:
        """Return what the next UNet call propagates: level -> [Bc, n*K, N], empty when it propagates nothing."""
        if not self.calls or not self.times or self.calls < self._first_propagated():
            return {}
        prior = {}
        for key in sorted(self.propagated_levels(), key=int):
            mean = self._maps[key].mean()
            earlier = [m.mean() if m.weight else torch.zeros_like(mean) for m in self._orders(key)[:-1]]
            prior[key] = torch.cat([mean, *earlier], dim=1) if earlier else mean
        return prior

    def add(self, maps: Levels, propagated: Levels | None = None, weight: float = 1.0) -> None:
        """Add what one UNet call gave.

        Args:
            maps: level -> [Bc, K, N] fp32.
            propagated: level -> [Bc, n*K, N] fp32, the answer to this call's prior.
            weight: of this call in all means.
        """
        for key, value in (propagated or {}).items():
            orders = self._orders(key)
            answers = value.chunk(self.times, dim=1)
            ready = 1 + sum(bool(mean.weight) for mean in orders[:-1])
            for mean, answer in zip(orders[:ready], answers[:ready], strict=True):
                mean.add(answer, weight)
        for key, value in maps.items():
            self._maps.setdefault(key, self._mean()).add(value, weight)
        self.calls += 1

    @property
    def levels(self) -> Levels:
        """Mean over heads, layers and calls: level -> [Bc, K, N] fp32."""
        return {key: kept.mean() for key, kept in self._maps.items()}

    @property
    def propagated(self) -> Levels:
        """Mean of the maps that were propagated most often: level -> [Bc, K, N] fp32, without levels that were not."""
        ready = {key: _ready(orders) for key, orders in self._propagated.items()}
        return {key: means[-1].mean() for key, means in ready.items() if means}

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width of each level's maps."""
        return {key: level_size(self.latent_size, kept.mean().shape[-1]) for key, kept in self._maps.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept."""
        means = [*self._maps.values(), *(m for orders in self._propagated.values() for m in orders)]
        return sum(mean.num_bytes for mean in means)

    def class_maps(self, options: MapOptions | None = None) -> Tensor:
        """Combine the levels into one map for each phrase, at the size of the finest level.

        Args:
            options: how; "auto" is the aggregation that the store is for, else "paper", and the maps propagated most
                often where there are any. A number takes the maps propagated that often, or as often as the number of
                calls allowed.

        Returns:
            [Bc, K, h, w] fp32 in 0..1; zeros for padded phrases.

        Raises:
            DiffuMaskError: nothing was added, or the maps were not propagated as often, or not kept for the
                aggregation, as asked.
        """
        if not self.calls:
            raise DiffuMaskError("no UNet call gave maps yet: run the pipeline first")
        options = options or MapOptions()
        aggregation = self._resolved(options.aggregation)
        keys = self._read(aggregation)
        size = self.sizes[keys[0]]
        maps = (self._level_maps(key, aggregation, options.propagate, size) for key in keys)
        return sum(maps, start=torch.zeros(())) / len(keys)

    def __getitem__(self, phrase: str) -> "PhraseMaps":
        """Return the maps of one phrase, for all images that have it."""
        at = [(b, row.index(phrase)) for b, row in enumerate(self.phrases) if phrase in row]
        if not at:
            known = sorted({p for row in self.phrases for p in row})
            raise DiffuMaskError(f"no maps of {phrase!r} were asked for, there are: {', '.join(known)}")
        rows, columns = (list(x) for x in zip(*at, strict=True))
        return PhraseMaps(phrase, self.class_maps()[rows, columns], rows)

    def _level_maps(self, key: str, aggregation: str, propagate: Propagate, size: tuple[int, int]) -> Tensor:
        """Return one level's maps [Bc, K, h, w] in 0..1, at the size of the finest one."""
        paper = aggregation == "paper"
        maps = self._kept(key, propagate).mean(each_over_maximum=paper).unflatten(-1, self.sizes[key])
        if maps.shape[-2:] != size:
            maps = F.interpolate(maps, size, mode="bicubic", align_corners=False).clamp_min(0)
        return maps.clamp(max=1) if paper else _over_maximum_2d(maps)

    def _resolved(self, aggregation: str) -> str:
        kept = self.aggregation
        if aggregation == "auto":
            return "paper" if kept == "auto" else kept
        if kept not in ("auto", aggregation):
            raise DiffuMaskError(
                f"the maps were kept for `aggregation={kept}`: draw with `aggregation={aggregation}`, or with auto"
            )
        return aggregation

    def _read(self, aggregation: str) -> list[str]:
        """Return the levels that an aggregation reads, the finest first."""
        keys = sorted(self._maps, key=int)
        if aggregation[0].isdecimal():
            wanted = aggregation.split(",")
            if missing := [key for key in wanted if key not in keys]:
                raise DiffuMaskError(
                    f"there is no level {missing[0]} for `aggregation={aggregation}`: the UNet has {', '.join(keys)}"
                )
            return wanted
        return {"reference": keys[:-1] or keys, "finest": keys[:1]}.get(aggregation, keys)

    def _mean(self) -> Mean:
        return Mean(over_maximum=self.aggregation in ("auto", "paper"))

    def _orders(self, key: str) -> list[Mean]:
        return self._propagated.setdefault(key, [self._mean() for _ in range(self.times)])

    def _first_propagated(self) -> int:
        if self.num_calls is None:
            return 1
        return self.num_calls - max(self.times, math.ceil(self.num_calls / 3))

    def _kept(self, key: str, propagate: Propagate) -> Mean:
        """Choose a level's plain maps or the propagated ones."""
        times = propagation_times(propagate)
        ready = _ready(self._propagated.get(key, []))
        if propagate == "auto":
            return ready[-1] if ready else self._maps[key]
        if times > self.times:
            raise DiffuMaskError(
                f"the maps were propagated {self.times} times, not {times}: draw with propagate={times}"
            )
        return ready[min(times, len(ready)) - 1] if times and ready else self._maps[key]


class PhraseMaps:
    """The maps of one phrase: `maps` [n, h, w] in 0..1, and `rows`, the images that they belong to."""

    def __init__(self, phrase: str, maps: Tensor, rows: list[int]) -> None:
        self.phrase = phrase
        self.maps = maps
        self.rows = rows

    def overlay(self, image: Image.Image, index: int = 0) -> Image.Image:
        """Lay the map of one of the images over it.

        Args:
            image: the image that was drawn.
            index: which of `maps` belongs to it.

        Returns:
            the image, warm where the word looked.
        """
        return overlay(image, self.maps[index])


def propagation_times(propagate: Propagate) -> int:
    """Return how often maps are propagated: "auto" once, "none" never, 1 to 4 as often as it says."""
    times = MapOptions(propagate=propagate).propagate
    return times if isinstance(times, int) else int(times == "auto")


def over_maximum(maps: Tensor) -> Tensor:
    """Divide maps [..., N] by their maxima; zeros stay zeros."""
    return maps / maps.amax(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def level_size(latent_size: tuple[int, int], num_pixels: int) -> tuple[int, int]:
    """Find the height and width of a level from its number of pixels: latents halved, rounding up, until they match."""
    h, w = latent_size
    while h * w > num_pixels:
        h, w = -(-h // 2), -(-w // 2)
    if h * w != num_pixels:
        raise DiffuMaskError(f"{num_pixels} query pixels are no level of latents of {latent_size[0]}x{latent_size[1]}")
    return h, w


def _over_maximum_2d(maps: Tensor) -> Tensor:
    return over_maximum(maps.flatten(2)).view_as(maps)


def _added(total: Tensor | None, maps: Tensor, weight: float) -> Tensor:
    return (torch.zeros_like(maps) if total is None else total).add_(maps, alpha=weight)


def _ready(orders: list[Mean]) -> list[Mean]:
    return [mean for mean in orders if mean.weight]
