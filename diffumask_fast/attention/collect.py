"""Collect maps from any diffusers pipeline with a UNet2DConditionModel while it runs its own loop."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from diffumask_fast.attention.intercept import OldPromptLayer, PromptLayer, UNetLayer
from diffumask_fast.attention.options import MapOptions
from diffumask_fast.attention.phrases import per_prompt, phrase_columns, token_columns
from diffumask_fast.attention.store import MapStore, PhraseMaps, propagation_times
from diffumask_fast.attention.tap import Levels
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.errors import DiffuMaskError

Phrases = str | Sequence[str] | Sequence[Sequence[str]]
TokenIndices = Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]


class Denoiser(Protocol):
    """A UNet call that also gives maps, whatever runs it: the signature of UNetWithMaps.forward.

    `first_conditional` and further keywords of the UNet are passed only where the pipeline's call needs them.
    """

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        select: Tensor,
        prior: Levels,
        added: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Levels, Levels]: ...


def collect_maps(
    pipe: Any,
    phrases: Phrases,
    *,
    denoiser: Denoiser | None = None,
    token_indices: TokenIndices | None = None,
    propagate: str | int = "auto",
    pad_to: int | None = None,
) -> "Collector":
    """Collect the maps of phrases while a diffusers pipeline draws; its images stay the same.

    Args:
        pipe: a pipeline whose denoiser is a UNet2DConditionModel; unchanged after the context, also after an exception.
        phrases: one list for all prompts, or one list for each prompt.
        denoiser: what stands for the UNet's call; None is the UNet's own (an exported one has it), or UNetWithMaps.
        token_indices: token positions of each phrase, in the form of phrases; needed where prompt_embeds are given
            instead of prompts. The start token is 0.
        propagate: "auto" (once, at coarse levels, in the last third of the calls), "none", or 1 to 4 times.
        pad_to: K of the maps, for a run whose batches differ in their number of phrases; None is the most of this call.

    Returns:
        a context manager that gives the Collector; its maps are those of the last call of the pipeline.

    Raises:
        DiffuMaskError: on leaving the context, if no UNet call was captured.

    Example:
        with collect_maps(pipe, phrases=["dog"]) as maps:
            image = pipe("a dog on a sofa").images[0]
        maps.levels["0"]; maps["dog"].overlay(image)
    """
    return Collector(pipe, phrases, denoiser=denoiser, token_indices=token_indices, propagate=propagate, pad_to=pad_to)


class Collector:
    """The context of collect_maps, and after a call of the pipeline its maps."""

    def __init__(
        self,
        pipe: Any,
        phrases: Phrases,
        *,
        denoiser: Denoiser | None = None,
        token_indices: TokenIndices | None = None,
        propagate: str | int = "auto",
        pad_to: int | None = None,
    ) -> None:
        unet = getattr(pipe, "unet", None)
        if unet is None:
            raise DiffuMaskError(
                f"{type(pipe).__name__} has no UNet: maps come from pipelines with a UNet2DConditionModel"
            )
        self._prompt_layer = PromptLayer if hasattr(pipe, "encode_prompt") else OldPromptLayer
        if not hasattr(pipe, self._prompt_layer.attribute):
            raise DiffuMaskError(f"{type(pipe).__name__} has no encode_prompt, so its prompts cannot be learnt")
        propagation_times(propagate)
        self.pipe = pipe
        self.phrases = phrases
        self.propagate = propagate
        self.pad_to = pad_to
        # compared with None, for a compiled module has no truth value
        denoiser = denoiser if denoiser is not None else getattr(unet, "denoiser", None)
        self.denoiser = denoiser if denoiser is not None else UNetWithMaps(unet)
        self.token_indices = token_indices
        self._unet = unet
        self._thread = threading.get_ident()
        self._store: MapStore | None = None
        self._rows: list[list[str]] = []
        self._embeds: Tensor | None = None
        self._select: Tensor | None = None
        self._last: tuple[Tensor | None, int | None] = (None, None)
        self._seen = "the pipeline was not called in the context"

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._prompt_layer.join(self.pipe, self)
        UNetLayer.join(self._unet, self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        UNetLayer.leave(self._unet, self)
        self._prompt_layer.leave(self.pipe, self)
        self._embeds, self._select, self._last = None, None, (None, None)
        if kind is None:
            self.store  # noqa: B018, raises when nothing was captured

    @property
    def store(self) -> MapStore:
        """The store of the pipeline's last call."""
        if self._store is None or not self._store.calls:
            raise DiffuMaskError(f"no maps were captured: {self._seen}")
        return self._store

    @property
    def levels(self) -> Levels:
        """Mean over heads, layers and calls: level -> [Bc, K, N] fp32, "0" the finest."""
        return self.store.levels

    def class_maps(self, options: MapOptions | None = None) -> Tensor:
        """Combine the levels into one map for each phrase [Bc, K, h, w] in 0..1; see MapStore.class_maps."""
        return self.store.class_maps(options)

    def __getitem__(self, phrase: str) -> PhraseMaps:
        """Return the maps of one phrase."""
        return self.store[phrase]

    def take_prompts(self, arguments: dict[str, Any], result: Any) -> None:
        """Learn what the pipeline encoded: a call of the pipeline begins.

        Args:
            arguments: those of encode_prompt.
            result: what it returned; the first item, or the first rows, are the embeddings of the prompts.
        """
        if threading.get_ident() != self._thread:
            return
        embeds = result if isinstance(result, Tensor) else result[0]
        prompt, copies = arguments.get("prompt"), arguments.get("num_images_per_prompt") or 1
        given = arguments.get("prompt_embeds")
        if given is not None and self.token_indices is None:
            raise DiffuMaskError(
                "with prompt_embeds the words are unknown: give token_indices=, the token positions of each phrase"
            )
        num = len(given) if given is not None else 1 if isinstance(prompt, str) else len(prompt)
        rows = per_prompt(self.phrases, num)
        if self.token_indices is not None:
            indices = _indices_per_prompt(self.token_indices, rows)
            select = token_columns(indices, length=embeds.shape[1], pad_to=self.pad_to)
        else:
            select = self._columns([prompt] if isinstance(prompt, str) else list(prompt), rows, embeds.shape[1])
        self._select = select.repeat_interleave(copies, 0).to(embeds.device)
        self._embeds = embeds[: num * copies]
        self._rows = [row for row in rows for _ in range(copies)]
        self._last, self._store = (None, None), None
        self._seen = f"prompts were encoded to {tuple(self._embeds.shape)}, but the UNet was not called"

    def _columns(self, prompts: list[str], rows: list[list[str]], length: int) -> Tensor:
        """Find the phrases as the pipeline's own tokenizer sees them, textual inversion included."""
        tokenizer = self.pipe.tokenizer or self.pipe.tokenizer_2
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        if convert is not None:
            prompts = convert(prompts, tokenizer)
            rows = [convert(row, tokenizer) for row in rows]
        return phrase_columns(tokenizer, prompts, rows, length=length, pad_to=self.pad_to)

    def matches(self, encoder_hidden_states: Tensor) -> bool:
        """Tell whether a block of rows of this UNet call is what the prompts were encoded to."""
        if self._embeds is None or threading.get_ident() != self._thread:
            return False
        if self._last[0] is not encoder_hidden_states:
            self._last = (encoder_hidden_states, self._find(encoder_hidden_states))
        return self._last[1] is not None

    def _find(self, states: Tensor) -> int | None:
        embeds = self._embeds
        if states.shape[1:] == embeds.shape[1:]:
            embeds = embeds.to(states)
            for first in range(0, states.shape[0] - embeds.shape[0] + 1, embeds.shape[0]):
                if torch.equal(states[first : first + embeds.shape[0]], embeds):
                    return first
        self._seen = (
            f"prompts were encoded to {tuple(embeds.shape)}, and the UNet was called with encoder_hidden_states of "
            f"{tuple(states.shape)} that do not contain them"
        )
        return None

    def denoise(self, arguments: dict[str, Any]) -> Tensor:
        """Run one UNet call with maps, and add them to the store.

        Args:
            arguments: the UNet's, by name.

        Returns:
            noise_pred.
        """
        rest = {key: value for key, value in arguments.items() if value is not None}
        latents, timestep = rest.pop("sample"), rest.pop("timestep")
        states, added = rest.pop("encoder_hidden_states"), rest.pop("added_cond_kwargs", None)
        first, select = self._last[1], self._select
        if first != latents.shape[0] - select.shape[0]:
            rest["first_conditional"] = first
        if self._store is None:
            calls = _num_calls(self.pipe, timestep)
            self._store = MapStore(self._rows, tuple(latents.shape[-2:]), propagate=self.propagate, num_calls=calls)
        noise_pred, maps, propagated = self.denoiser(
            latents, timestep, states, select, self._store.prior(), added, **rest
        )
        self._store.add(maps, propagated)
        return noise_pred


def _indices_per_prompt(indices: TokenIndices, rows: list[list[str]]) -> list[list[list[int]]]:
    """Bring token_indices to one list for each prompt, and check that they fit the phrases."""
    flat = all(isinstance(i, int) for phrase in indices for i in phrase)
    out = [[list(phrase) for phrase in indices]] * len(rows) if flat else [[list(p) for p in row] for row in indices]
    if [len(row) for row in out] != [len(row) for row in rows]:
        raise DiffuMaskError(
            f"token_indices are for {[len(row) for row in out]} phrases, there are {[len(row) for row in rows]}"
        )
    return out


def _num_calls(pipe: Any, timestep: Tensor | float) -> int | None:
    """Count the UNet calls from this one to the last: the timesteps of the scheduler from this one on."""
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    if timesteps is None or not len(timesteps):
        return None
    here = (timesteps.to("cpu") == torch.as_tensor(timestep).flatten()[0].to("cpu")).nonzero()
    left = len(timesteps) - int(here[0]) if len(here) else len(timesteps)
    planned = getattr(pipe, "_num_timesteps", None)
    return min(left, planned) if planned else left
