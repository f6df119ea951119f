"""One call of a diffusers pipeline: what it encoded, which UNet calls are its own, and its maps."""

from types import FrameType
from typing import Any

import torch
from torch import Tensor

from diffumask_fast.attention.store import MapStore
from diffumask_fast.errors import DiffuMaskError


class PipelineCall:
    """A call of a pipeline from its prompts on.

    Args:
        frame: in which it runs.
        phrases: of each of the Bc images.
        select: [Bc, T, K], their columns.
        embeds: [Bc, T, E], what the prompts were encoded to.
        is_doubled: other rows were encoded to the same.
        word: for what denoises.
    """

    def __init__(
        self,
        frame: FrameType | None,
        phrases: list[list[str]],
        select: Tensor,
        embeds: Tensor,
        is_doubled: bool = False,
        word: str = "UNet",
    ) -> None:
        self.frame = frame
        self.phrases = phrases
        self.select = select
        self.embeds = embeds
        self.is_doubled = is_doubled
        self.word = word
        self.store: MapStore | None = None
        self.steps = Steps(None)
        self.seen = f"prompts were encoded to {tuple(embeds.shape)}, but the {word} was not called"
        self._extent: tuple[int, ...] = ()
        self._last: tuple[Tensor | None, int | None, list[int]] = (None, None, [])

    def first_row(self, encoder_hidden_states: Tensor) -> int | None:
        """Return the first row of a UNet call that is of these prompts; None where there is none."""
        blocks = self.blocks(encoder_hidden_states)
        # where prompts and negative prompts are the same, the unconditional rows are the first ones, as they always are
        return blocks[len(blocks) > 1 and self.is_doubled] if blocks else None

    def blocks(self, encoder_hidden_states: Tensor) -> list[int]:
        """Return the first rows of all blocks of a UNet call that are of these prompts.

        They are found by their content: pipelines join them with the unconditional rows in different orders, and one
        may turn guidance off on its way.
        """
        states, version, found = self._last
        now = None if encoder_hidden_states.is_inference() else encoder_hidden_states._version
        if states is not encoder_hidden_states or version != now:
            found = self._find(encoder_hidden_states)
            self._last = (encoder_hidden_states, now, found)
        return found

    def begin(
        self,
        pipe: Any,
        latents: Tensor,
        states: Tensor,
        timestep: Tensor | float,
        size: tuple[int, int],
        **options: Any,
    ) -> MapStore:
        """Begin to collect with the first UNet call.

        Args:
            pipe: that calls it.
            latents: of all rows.
            states: encoder_hidden_states.
            timestep: of the step.
            size: h, w of the finest maps.
            options: of MapStore.

        Raises:
            DiffuMaskError: it draws a part of the image, or several images in the place of one.
        """
        whole = None if self.frame is None else self.frame.f_locals.get("latents")
        if isinstance(whole, Tensor) and whole.ndim == latents.ndim and _extent(whole) != self._drawn(latents, size):
            raise DiffuMaskError(
                f"{type(pipe).__name__} draws latents of {_by(_extent(whole))} in windows of "
                f"{_by(self._drawn(latents, size))}, and maps of "
                "windows are no maps of the image: ask for an image of one window"
            )
        num = self.embeds.shape[0]
        first, *others = (latents[row : row + num] for row in self.blocks(states))
        if not all(torch.equal(first, other) for other in others):
            raise DiffuMaskError(
                f"{type(pipe).__name__} draws several parts or frames of each prompt in one UNet call, which have no "
                "maps of their own: draw one at a time"
            )
        self.steps = Steps(getattr(getattr(pipe, "scheduler", None), "timesteps", None))
        left = self.steps.left(timestep)
        planned = getattr(pipe, "_num_timesteps", None)
        num_calls = min(left, planned) if left and planned else left
        self.store = MapStore(self.phrases, size, num_calls=num_calls, **options)
        self._extent = _extent(latents)
        return self.store

    def step(self, latents: Tensor, timestep: Tensor | float) -> None:
        """Note that a UNet call makes a step of the image.

        Raises:
            DiffuMaskError: its latents are of another size, or that step was made already.
        """
        if _extent(latents) != self._extent:
            raise DiffuMaskError(
                f"the {self.word} was called for one image with latents of {_by(self._extent)} and of "
                f"{_by(_extent(latents))}: maps are of one size"
            )
        if not self.steps.advance(timestep):
            raise DiffuMaskError(
                f"the pipeline calls the {self.word} more than once for these prompts in one step (windows of a larger "
                "image, a reference image, a second guidance), and which call draws the image is not known: use a "
                "pipeline with one call for each step"
            )

    def _drawn(self, latents: Tensor, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the extent of what a call draws: of packed latents the tokens of the first image alone."""
        return _extent(latents) if latents.ndim == 4 else (size[0] * size[1],)

    def _find(self, states: Tensor) -> list[int]:
        num = self.embeds.shape[0]
        found = []
        if states.shape[1:] == self.embeds.shape[1:]:
            embeds = self.embeds.to(states)
            starts = range(0, states.shape[0] - num + 1, num)
            found = [first for first in starts if torch.equal(states[first : first + num], embeds)]
        if not found:
            self.seen = (
                f"prompts were encoded to {tuple(self.embeds.shape)}, and the {self.word} was called with "
                f"encoder_hidden_states of {tuple(states.shape)} that do not contain them"
            )
        return found


class Steps:
    """Follow a schedule: which of its timesteps have had their UNet call.

    Args:
        timesteps: of the scheduler; None where it has none.
    """

    def __init__(self, timesteps: Tensor | None) -> None:
        self.timesteps = timesteps
        self.values = [] if timesteps is None else timesteps.tolist()
        self.last = -1

    def left(self, timestep: Tensor | float) -> int | None:
        """Count the UNet calls from this one to the last; None where there is no schedule."""
        return len(self.values) - (self._find(timestep) or 0) if self.values else None

    def advance(self, timestep: Tensor | float) -> bool:
        """Go on to the step of a timestep, and tell whether it was still to come; so is a timestep of no schedule."""
        at = self._find(timestep)
        if at is None:
            return True
        if at <= self.last:
            return False
        self.last = at
        return True

    def _find(self, timestep: Tensor | float) -> int | None:
        """Return which timestep of the schedule a call has, the next of that value; None where that is not known."""
        if isinstance(timestep, Tensor) and self.timesteps is not None:
            if timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
            if timestep.device.type != "cpu":
                return None  # to read it would wait for the device
            timestep = timestep.flatten()[0].item()
        at = [step for step, value in enumerate(self.values) if value == timestep]
        return next((step for step in at if step > self.last), at[-1] if at else None)


def _extent(latents: Tensor) -> tuple[int, ...]:
    """Return height and width of latents, of packed ones the number of tokens."""
    return tuple(latents.shape[-2:]) if latents.ndim == 4 else (latents.shape[1],)


def _by(extent: tuple[int, ...]) -> str:
    return "x".join(map(str, extent)) if len(extent) > 1 else f"{extent[0]} tokens"
