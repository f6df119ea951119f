"""One UNet call that also gives maps: its arguments, written and padded once for whatever runs it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from diffumask_fast.attention.tap import Levels

Results = tuple[Tensor, Levels, Levels]


@dataclass(frozen=True, eq=False)
class UNetCall:
    """What a denoiser is called with.

    Args:
        latents: [B, C, h, w].
        timestep: of the step, the same for all rows.
        encoder_hidden_states: [B, T, E].
        select: [Bc, T, K] fp32, the weight of each token in each phrase; None makes no maps.
        prior: level -> [Bc, M, N] fp32, what to propagate; a level that is absent is not propagated.
        added: the UNet's added_cond_kwargs (SDXL).
        first_conditional: the rows first_conditional : first_conditional + Bc are the conditional ones; None: the last
            ones, or all of them where nothing is selected.
        unet_kwargs: what else the UNet is to get, by name.
        map_size: height and width of the maps in tokens, for a transformer with joint attention.
    """

    latents: Tensor
    timestep: Tensor | float
    encoder_hidden_states: Tensor
    select: Tensor | None = None
    prior: Levels = field(default_factory=dict)
    added: Mapping[str, Any] | None = None
    first_conditional: int | None = None
    unet_kwargs: Mapping[str, Any] = field(default_factory=dict)
    map_size: tuple[int, int] | None = None

    @property
    def first(self) -> int:
        """The first conditional row."""
        if self.first_conditional is not None:
            return self.first_conditional
        return 0 if self.select is None else self.latents.shape[0] - self.select.shape[0]

    @property
    def num_conditional(self) -> int:
        """Bc."""
        return self.latents.shape[0] - self.first if self.select is None else self.select.shape[0]

    @property
    def is_guided(self) -> bool:
        """Whether the first half of the rows are unconditional, one for each conditional row."""
        return self.first == self.num_conditional and self.latents.shape[0] == 2 * self.first

    def padded(self, rows: int, columns: int | None = None, *, by_halves: bool = False) -> "UNetCall":
        """Pad with zeros to more rows, and maps to more columns.

        Args:
            rows: B of the result.
            columns: K and M of the result; None leaves them.
            by_halves: for a call that `is_guided`: pad each half by itself, and the second half is conditional. Else
                all rows of the result count as conditional, so that its shapes do not depend on which ones are.

        Returns:
            a call whose results `cut` brings back to this one's.
        """
        halves, own_rows = 1 + by_halves, self.latents.shape[0]
        first = rows // 2 if by_halves else 0
        before = 0 if by_halves else self.first
        after = rows - first - before - self.num_conditional

        def in_rows(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != own_rows:
                return leaf
            sides = [0, 0] * (leaf.ndim - 1) + [0, (rows - own_rows) // halves]
            return F.pad(leaf.unflatten(0, (halves, -1)), sides).flatten(0, 1)

        def conditional(tensor: Tensor, axis: int) -> Tensor:
            sides = [0, 0, 0, 0, before, after]
            if columns is not None:
                sides[2 * (2 - axis) + 1] = columns - tensor.shape[axis]
            return F.pad(tensor, sides)

        return replace(
            self,
            latents=in_rows(self.latents),
            encoder_hidden_states=in_rows(self.encoder_hidden_states),
            select=None if self.select is None else conditional(self.select, 2),
            prior={key: conditional(value, 1) for key, value in self.prior.items()},
            added=None if self.added is None else tree_map(in_rows, dict(self.added)),
            first_conditional=first,
            unet_kwargs=tree_map(in_rows, dict(self.unet_kwargs)),
        )

    def cut(self, results: Results, *, by_halves: bool = False) -> Results:
        """Cut this call's own results out of those of its padded form.

        Args:
            results: noise_pred, maps and propagated of what `padded` gave.
            by_halves: as it was there.
        """
        noise_pred, maps, propagated = results
        halves, before = 1 + by_halves, 0 if by_halves else self.first
        rows = slice(before, before + self.num_conditional)
        noise_pred = noise_pred.unflatten(0, (halves, -1))[:, : self.latents.shape[0] // halves].flatten(0, 1)
        if self.select is not None:
            maps = {key: value[rows, : self.select.shape[2]] for key, value in maps.items()}
        own = {key: value.shape[1] for key, value in self.prior.items()}
        return noise_pred, maps, {k: v[rows, : own[k]] for k, v in propagated.items() if k in own}


class Denoiser(Protocol):
    """What runs a UNet call with maps: UNetWithMaps, or an engine in its place."""

    def __call__(self, call: UNetCall) -> Results:
        """Predict the noise, this call's maps, and the earlier maps seen through this call's self-attention.

        Returns:
            noise_pred [B, C, h, w]; maps, level -> [Bc, K, N] fp32, mean over heads and layers; propagated, level ->
            [Bc, M, N] fp32 with the keys of prior, mean over heads and layers of self-attention @ prior.
        """
