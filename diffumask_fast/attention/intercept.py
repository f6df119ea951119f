"""Stand between a pipeline and its parts while its maps are collected, and leave no trace."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffumask_fast.attention.encoded import Encoded, TextCall
from diffumask_fast.attention.families import Family
from diffumask_fast.borrow import MODULE_CALL, patched, patched_but_in_copies
from diffumask_fast.errors import DiffuMaskError

TEXT_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}


class Listener(Protocol):
    """Who learns what a pipeline does."""

    def take_prompts(self, encoded: Encoded) -> None:
        """Learn what was encoded, and to what."""

    def belongs(self, arguments: dict[str, Any]) -> bool:
        """Tell whether a call of the denoiser draws what was encoded."""

    def denoise(self, arguments: dict[str, Any]) -> Tensor:
        """Predict the noise of such a call, and keep the maps."""


@contextmanager
def intercepted(pipe: Any, family: Family, model: nn.Module, listener: Listener) -> Iterator[None]:
    """Let a listener learn what a pipeline encodes, and answer the calls of its denoiser that belong to it.

    Args:
        pipe: the pipeline.
        family: that the denoiser is of.
        model: the denoiser.
        listener: who learns and answers.

    Raises:
        DiffuMaskError: the pipeline has no encode_prompt, or somebody listens to this model already.
    """
    if isinstance(vars(model).get(MODULE_CALL), _ModelCalls):
        raise DiffuMaskError(
            f"the maps of this {family.word} are being collected already: leave the other collect_maps first, or give "
            f"the second pipeline a {family.word} of its own"
        )
    name = encoding_method(pipe)
    with (
        patched_but_in_copies(name, pipe, _Telling(pipe, name, listener)),
        patched(MODULE_CALL, {model: _ModelCalls(family, model, listener)}),
    ):
        yield


def encoding_method(pipe: Any) -> str:
    """Name the method by which a pipeline encodes its prompts; the oldest pipelines have only `_encode_prompt`.

    Raises:
        DiffuMaskError: it has none, or one that takes no prompt.
    """
    for name in ("encode_prompt", "_encode_prompt"):
        if hasattr(pipe, name):
            if "prompt" in _signature(pipe, name).parameters:
                return name
            raise DiffuMaskError(
                f"{type(pipe).__name__} draws no prompt (its {name} takes none), so there are no words to make maps of"
            )
    raise DiffuMaskError(f"{type(pipe).__name__} has no encode_prompt, so its prompts cannot be learnt")


def _signature(pipe: Any, name: str) -> inspect.Signature:
    """Return the signature of a method; where it hands on what it is given, of the one that it stands for."""
    found = [inspect.signature(getattr(pipe, name))]
    for kind in type(pipe).__mro__:
        if name in vars(kind):
            found.append(inspect.signature(vars(kind)[name].__get__(pipe)))
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    whole = (one for one in found if not any(p.kind in variadic for p in one.parameters.values()))
    return next(whole, found[0])


class _Telling:
    """Stands as a pipeline's encode_prompt, and tells the listener what was encoded."""

    def __init__(self, pipe: Any, name: str, listener: Listener) -> None:
        self.pipe = pipe
        self.name = name
        self.listener = listener
        self.encode: Callable[..., Any] = getattr(pipe, name)
        self.signature = _signature(pipe, name)
        functools.update_wrapper(self, self.encode, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if vars(self.pipe).get(self.name) is not self:
            raise DiffuMaskError(
                f"this {self.name} is that of a {type(self.pipe).__name__} that was copied while its maps were "
                "collected, by a way of copying of its own: copy it outside of collect_maps"
            )
        with _observed(self.pipe) as calls:
            result = self.encode(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()

        def encode(changed: dict[str, Any]) -> Any:
            again = inspect.BoundArguments(self.signature, {**bound.arguments, **changed})
            return self.encode(*again.args, **again.kwargs)

        self.listener.take_prompts(Encoded(dict(bound.arguments), result, calls, encode))
        return result


@contextmanager
def _observed(pipe: Any) -> Iterator[dict[str, list[TextCall]]]:
    """Note what a pipeline's text encoders are given, and what they give."""
    seen_by: dict[str, list[TextCall]] = {}
    calls: dict[Any, Any] = {}

    def noting(encoder: nn.Module, seen: list[TextCall]) -> Callable[..., Any]:
        plain = vars(encoder).get(MODULE_CALL) or encoder._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs.get("input_ids")
            output = plain(*args, **kwargs)
            if isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point():
                leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                states = [x for x in leaves if x.ndim == 3 and x.shape[:2] == given.shape]
                # copies, for compiled code may write its next results over them
                seen.append(TextCall(given, [x.detach().clone() for x in states]))
            return output

        return call

    for name, tokenizer in TEXT_ENCODERS.items():
        encoder = getattr(pipe, name, None)
        if isinstance(encoder, nn.Module) and getattr(pipe, tokenizer, None) is not None:
            seen_by[tokenizer] = []
            calls[encoder] = noting(encoder, seen_by[tokenizer])
    with patched(MODULE_CALL, calls):
        yield seen_by


class _ModelCalls:
    """Stands as a denoiser's call; what is not the listener's, or comes from what gives the maps, passes through."""

    def __init__(self, family: Family, model: nn.Module, listener: Listener) -> None:
        self.plain: Callable[..., Any] = vars(model).get(MODULE_CALL) or model._call_impl
        self.family = family
        self.listener = listener
        self.inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self.family.arguments, args, strict=False)), **kwargs}
        if self.inside or not self.listener.belongs(arguments):
            return self.plain(*args, **kwargs)
        return_dict = arguments.pop("return_dict", True)
        self.inside = True
        try:
            noise_pred = self.listener.denoise(arguments)
        finally:
            self.inside = False
        return self.family.output(sample=noise_pred) if return_dict else (noise_pred,)
