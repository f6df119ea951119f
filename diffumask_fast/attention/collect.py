"""Collect maps from any diffusers pipeline whose denoiser has them while it runs its own loop."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from numbers import Integral
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from diffumask_fast.attention.call import Denoiser, UNetCall
from diffumask_fast.attention.encoded import Encoded, as_list, encoded_positions
from diffumask_fast.attention.families import family_of
from diffumask_fast.attention.intercept import encoding_method, intercepted
from diffumask_fast.attention.options import Aggregation, MapOptions, Propagate
from diffumask_fast.attention.phrases import per_prompt, token_columns
from diffumask_fast.attention.pipeline_call import PipelineCall
from diffumask_fast.attention.prompt_rows import prompt_rows
from diffumask_fast.attention.running import is_called_back, is_in_another_thread, running_call
from diffumask_fast.attention.store import MapStore, PhraseMaps
from diffumask_fast.attention.tap import Levels
from diffumask_fast.errors import DiffuMaskError

Phrases = str | Sequence[str] | Sequence[Sequence[str]]
TokenIndices = Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]
logger = logging.getLogger("diffumask_fast")
NOT_CALLED = "the pipeline was not called in the context"


def collect_maps(
    pipe: Any,
    phrases: Phrases,
    *,
    denoiser: Denoiser | None = None,
    token_indices: TokenIndices | None = None,
    propagate: Propagate = "auto",
    aggregation: Aggregation = "auto",
    pad_to: int | None = None,
) -> "Collector":
    """Collect the maps of phrases while a diffusers pipeline draws; its images stay the same.

    Args:
        pipe: a pipeline whose denoiser is a UNet2DConditionModel, an SD3Transformer2DModel or a FluxTransformer2DModel;
            unchanged after the context, also after an exception.
        phrases: one list for all prompts, or one list for each prompt.
        denoiser: what runs the calls of the UNet or transformer; None is that itself.
        token_indices: token positions of each phrase, in the form of phrases; needed where prompt_embeds are given
            instead of prompts. The start token is 0; SD3 has T5's tokens after CLIP's.
        propagate: "auto" (once, at coarse levels, in the last third of the calls), "none", or 1 to 4 times.
        aggregation: what `class_maps` is to be able to make, see MapOptions; "auto" is all of it.
        pad_to: K of the maps, for a run whose batches differ in their number of phrases; None is the most of this call.

    Returns:
        a context manager that gives the Collector; its maps are those of the last call of the pipeline.

    Raises:
        DiffuMaskError: on entering the context, if this model's maps are being collected already; on leaving it, if no
            call of it was captured.

    Example:
        with collect_maps(pipe, phrases=["dog"]) as maps:
            image = pipe("a dog on a sofa").images[0]
        maps.levels["0"]; maps["dog"].overlay(image)
    """
    options = MapOptions(aggregation=aggregation, propagate=propagate)
    return Collector(pipe, phrases, options, denoiser, token_indices, pad_to)


class Collector:
    """The context of collect_maps, and after a call of the pipeline its maps."""

    def __init__(
        self,
        pipe: Any,
        phrases: Phrases,
        options: MapOptions,
        denoiser: Denoiser | None,
        token_indices: TokenIndices | None,
        pad_to: int | None,
    ) -> None:
        self._family = family_of(pipe)
        self._model = getattr(pipe, self._family.component)
        encoding_method(pipe)
        self.pipe = pipe
        self.phrases = phrases
        self.options = options
        self.pad_to = pad_to
        # compared with None, for a compiled module has no truth value
        self.denoiser = denoiser if denoiser is not None else self._family.with_maps(self._model)
        self.token_indices = token_indices
        self._borrowed = ExitStack()
        self._call: PipelineCall | None = None
        self._prompts: list[str] = []
        self._store: MapStore | None = None
        self._seen = NOT_CALLED

    def __enter__(self) -> Self:
        self._borrowed.enter_context(intercepted(self.pipe, self._family, self._model, self))
        self._store, self._seen = None, NOT_CALLED
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._borrowed.close()
        self._end_call(told=kind is None)
        if kind is None:
            self.store  # noqa: B018, raises when nothing was captured

    @property
    def store(self) -> MapStore:
        """The store of the pipeline's last call."""
        call = self._call
        store, seen = (self._store, self._seen) if call is None else (call.store, call.seen)
        if store is None or not store.calls:
            raise DiffuMaskError(f"no maps were captured: {seen}")
        return store

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

    def take_prompts(self, encoded: Encoded) -> None:
        """Learn what the pipeline encoded: a call of the pipeline begins.

        What is encoded outside of one, later in the same one, or in one that a callback makes, is not what it draws.
        """
        frame = running_call(self.pipe)
        if frame is None:
            self._seen = "prompts were encoded, but not by a call of the pipeline"
            return
        outer = None if self._call is None else self._call.frame
        if outer is not None and is_in_another_thread(outer):
            logger.warning("the pipeline draws in two threads at once, and the maps are of the call that began first")
            return
        prompts, asked = as_list(encoded.arguments.get("prompt")), frame.f_locals.get("prompt")
        if frame is outer and asked is None and prompts != self._prompts:
            raise DiffuMaskError(
                f"{type(self.pipe).__name__} encodes several texts one after the other, and which of them it draws is "
                "not known: let its call take the one to draw by the name prompt"
            )
        if outer is not None and (frame is outer or is_called_back(self.pipe, frame, outer)):
            return
        if asked is not None and as_list(asked) != prompts:
            if self._call is None:
                self._seen = "the pipeline's call encoded other texts than its prompt"
            return
        self._end_call()
        self._prompts = prompts
        self._store, self._seen = None, "the pipeline's last call failed before it drew"
        if frame.f_locals.get("padding_mask_crop") is not None:
            raise DiffuMaskError(
                "with padding_mask_crop only a crop of the image is drawn, and maps of it would not fit the image: "
                "leave it out"
            )
        self._call = self._begin(frame, encoded)

    def _begin(self, frame: FrameType, encoded: Encoded) -> PipelineCall:
        if encoded.given is not None and self.token_indices is None:
            raise DiffuMaskError(
                "with prompt_embeds the words are unknown: give token_indices=, the token positions of each phrase"
            )
        rows = prompt_rows(self.pipe, encoded, partial(self._family.segments, encoded))
        phrases, length = per_prompt(self.phrases, encoded.num), rows.embeds.shape[1]
        if self.token_indices is not None:
            indices = _indices_per_prompt(self.token_indices, phrases)
        else:
            indices = encoded_positions(self.pipe, encoded, phrases, self._family.segments(encoded, length))
        select = token_columns(indices, length=length, pad_to=self.pad_to)
        select = select.repeat_interleave(encoded.copies, 0).to(rows.embeds.device)
        phrases = [row for row in phrases for _ in range(encoded.copies)]
        return PipelineCall(frame, phrases, select, rows.embeds, rows.is_doubled, self._family.word)

    def belongs(self, arguments: dict[str, Any]) -> bool:
        """Tell whether a call of the denoiser makes a step of the prompts that the pipeline's call encoded.

        Args:
            arguments: the denoiser's, by name.
        """
        call, states = self._call, arguments.get("encoder_hidden_states")
        if call is None or states is None or running_call(self.pipe) is not call.frame:
            return False
        if torch.is_grad_enabled():
            call.seen = f"the {call.word} was called with gradients on: draw under torch.no_grad()"
            return False
        return self._family.draws(arguments, call.frame) and bool(call.blocks(states))

    def denoise(self, arguments: dict[str, Any]) -> Tensor:
        """Run one call of the denoiser with maps, and add them to the store.

        Args:
            arguments: the denoiser's, by name.

        Returns:
            noise_pred.
        """
        rest = {key: value for key, value in arguments.items() if value is not None}
        latents, states = rest.pop(self._family.latents), rest.pop("encoder_hidden_states")
        timestep, added = rest.pop("timestep"), rest.pop("added_cond_kwargs", None)
        call = self._call
        assert call is not None
        at = self._family.timestep(arguments, call.frame)
        store = call.store or call.begin(
            self.pipe, latents, states, at, self._family.map_size(self._model, arguments),
            propagate=self.options.propagate, aggregation=self.options.aggregation,
            max_propagated_pixels=self._family.max_propagated_pixels,
        )  # fmt: skip
        call.step(latents, at)
        prior, first = store.prior(), call.first_row(states)
        noise_pred, maps, propagated = self.denoiser(
            UNetCall(latents, timestep, states, call.select, prior, added, first, rest, store.latent_size)
        )
        store.add(maps, propagated)
        if store.calls == 1 and (missing := store.propagated_levels() & getattr(self.denoiser, "unpropagated", set())):
            raise DiffuMaskError(
                f"the self-attention of level {', '.join(sorted(missing))} does not run on all of its pixels (token "
                "merging), so maps cannot be propagated there: use `propagate=none`"
            )
        return noise_pred

    def _end_call(self, told: bool = True) -> None:
        """Keep the maps of the pipeline's last call, and let its tensors go; a user is told when there are too few."""
        if self._call is None:
            return
        self._store, self._seen, self._call = self._call.store, self._call.seen, None
        if told and self._store is not None and self._store.calls and not self._store.is_complete:
            logger.warning(
                "the maps are of %d of %d %s calls: the pipeline was stopped, or drew other prompts in the rest",
                self._store.calls, self._store.num_calls, self._family.word,
            )  # fmt: skip


def _indices_per_prompt(indices: TokenIndices, rows: list[list[str]]) -> list[list[list[int]]]:
    """Bring token_indices to one list for each prompt, and check that they fit the phrases."""
    given: Any = indices  # for all prompts, or for each
    flat = _is_list(given) and all(map(_are_positions, given))
    if not flat and not (_is_list(given) and all(_is_list(row) and all(map(_are_positions, row)) for row in given)):
        raise DiffuMaskError(
            f"token_indices are {given!r}: give a list of token positions for each phrase, such as [[5], [8, 9]], or "
            "a list of such lists, one for each prompt"
        )
    out = [[[int(i) for i in phrase] for phrase in row] for row in ([given] * len(rows) if flat else given)]
    if [len(row) for row in out] != [len(row) for row in rows]:
        raise DiffuMaskError(
            f"token_indices are for {[len(row) for row in out]} phrases, there are {[len(row) for row in rows]}"
        )
    return out


def _are_positions(given: Any) -> bool:
    return _is_list(given) and all(isinstance(one, Integral) and not isinstance(one, bool) for one in given)


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str | bytes)
