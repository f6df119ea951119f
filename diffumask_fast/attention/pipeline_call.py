"""One call of a diffusers pipeline: what it encoded, which UNet calls are its own, and its maps."""

from typing import Any

import torch
from torch import Tensor

from diffumask_fast.attention.store import MapStore


class PipelineCall:
    """A call of a pipeline from its prompts on.

    Args:
        phrases: of each of the Bc images.
        select: [Bc, T, K], their columns.
        embeds: [Bc, T, E], what the prompts were encoded to.
    """

    def __init__(self, phrases: list[list[str]], select: Tensor, embeds: Tensor) -> None:
        self.phrases = phrases
        self.select = select
        self.embeds = embeds
        self.store: MapStore | None = None
        self.seen = f"prompts were encoded to {tuple(embeds.shape)}, but the UNet was not called"
        self._last: tuple[Tensor | None, int | None] = (None, None)

    def first_row(self, encoder_hidden_states: Tensor) -> int | None:
        """Return the first row of a UNet call that is of these prompts; None where there is none.

        They are found by their content: pipelines join them with the unconditional rows in different orders, and one
        may turn guidance off on its way.
        """
        if self._last[0] is not encoder_hidden_states:
            self._last = (encoder_hidden_states, self._find(encoder_hidden_states))
        return self._last[1]

    def _find(self, states: Tensor) -> int | None:
        num = self.embeds.shape[0]
        if states.shape[1:] == self.embeds.shape[1:]:
            embeds = self.embeds.to(states)
            for first in range(0, states.shape[0] - num + 1, num):
                if torch.equal(states[first : first + num], embeds):
                    return first
        self.seen = (
            f"prompts were encoded to {tuple(self.embeds.shape)}, and the UNet was called with encoder_hidden_states "
            f"of {tuple(states.shape)} that do not contain them"
        )
        return None


def calls_left(pipe: Any, timestep: Tensor | float) -> int | None:
    """Count the UNet calls from this one to the last: the timesteps of the scheduler from this one on."""
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    if timesteps is None or not len(timesteps):
        return None
    here = (timesteps.to("cpu") == torch.as_tensor(timestep).flatten()[0].to("cpu")).nonzero()
    left = len(timesteps) - int(here[0]) if len(here) else len(timesteps)
    planned = getattr(pipe, "_num_timesteps", None)
    return min(left, planned) if planned else left
