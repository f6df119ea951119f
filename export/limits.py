"""What an exported engine can be asked for, and one sentence for what it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffumask_fast.attention.options import Propagate
from diffumask_fast.attention.store import MAX_PROPAGATED_PIXELS, propagation_times
from diffumask_fast.errors import DiffuMaskError


@dataclass(frozen=True)
class Limits:
    """The shapes that an engine takes.

    Args:
        rows: least and most rows of a UNet call, two per image; fewer than the least are padded.
        height: least and most, pixels.
        width: least and most, pixels.
        multiple: height and width are multiples of it, pixels.
        vae_factor: pixels of an image per cell of its latents.
        channels: C of noise_pred.
        tokens: T.
        max_phrases: the most phrases, and the most maps that are propagated at a level (phrases times propagations).
        divisors: level -> by how much its maps are smaller than the latents, in height and in width.
        propagated: the levels whose self-attention the graph applies to earlier maps.
    """

    rows: tuple[int, int]
    height: tuple[int, int]
    width: tuple[int, int]
    multiple: int
    vae_factor: int
    channels: int
    tokens: int
    max_phrases: int
    divisors: Mapping[str, int]
    propagated: tuple[str, ...]

    @property
    def batch(self) -> int:
        """The most images of a call, with guidance or without."""
        return max(1, self.rows[1] // 2)

    def level_pixels(self, latent_size: Sequence[int]) -> dict[str, int]:
        """Return level -> N, its query pixels, for latents of h, w."""
        h, w = latent_size
        return {key: (h // divisor) * (w // divisor) for key, divisor in self.divisors.items()}

    def check(self, batch: int, height: int, width: int, phrases: int = 1, propagate: Propagate = "auto") -> None:
        """Refuse what the engine cannot draw, before it begins.

        Args:
            batch: images of a call.
            height: of the images, pixels.
            width: of the images, pixels.
            phrases: K, the most of an image.
            propagate: as MapStore takes it.

        Raises:
            DiffuMaskError: naming the limit and what to do.
        """
        if batch > self.batch:
            raise DiffuMaskError(
                f"The engine draws at most {self.batch} images at once, not {batch}: use a smaller `batch_size`, or "
                f"export again with `max_batch={batch}`."
            )
        for name, value, (least, most) in (("height", height, self.height), ("width", width, self.width)):
            if not least <= value <= most or value % self.multiple:
                raise DiffuMaskError(
                    f"The engine draws a {name} from {least} to {most} in multiples of {self.multiple}, not {value}: "
                    "use such a `size`, or export again with another `min_size` and `max_size`."
                )
        times = propagation_times(propagate)
        needed = phrases * max(1, times)
        if needed > self.max_phrases:
            raise DiffuMaskError(
                f"The engine makes maps of at most {self.max_phrases} phrases, and {phrases} phrases propagated "
                f"{times} times count as {needed}: use fewer, or export again with `max_phrases={needed}`."
            )
        pixels = self.level_pixels((height // self.vae_factor, width // self.vae_factor))
        asked = [key for key, num in pixels.items() if times and num <= MAX_PROPAGATED_PIXELS]
        if missing := [key for key in asked if key not in self.propagated]:
            raise DiffuMaskError(
                f"The engine cannot propagate maps at level {missing[0]} ({pixels[missing[0]]} pixels): use "
                f"`propagate=none`, or export again with propagation and `min_size={height}x{width}` or smaller."
            )

    def as_json(self) -> dict[str, Any]:
        """Return the limits as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Limits:
        """Read what as_json gave; raises KeyError, TypeError or ValueError where it is something else."""

        def pair(name: str) -> tuple[int, int]:
            least, most = data[name]
            return int(least), int(most)

        return cls(
            rows=pair("rows"), height=pair("height"), width=pair("width"), multiple=int(data["multiple"]),
            vae_factor=int(data["vae_factor"]), channels=int(data["channels"]), tokens=int(data["tokens"]),
            max_phrases=int(data["max_phrases"]), propagated=tuple(map(str, data["propagated"])),
            divisors={str(key): int(value) for key, value in data["divisors"].items()},
        )  # fmt: skip
