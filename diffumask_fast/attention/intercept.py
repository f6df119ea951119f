"""Stand between a pipeline and two of its parts while its maps are collected, and leave no trace."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from diffumask_fast.borrow import MODULE_CALL, patched
from diffumask_fast.errors import DiffuMaskError

UNET_ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]


class Listener(Protocol):
    """Who learns what a pipeline does."""

    def take_prompts(self, arguments: dict[str, Any], result: Any) -> None:
        """Learn what was encoded, and to what: a call of the pipeline begins."""

    def belongs(self, arguments: dict[str, Any]) -> bool:
        """Tell whether a UNet call draws what was encoded."""

    def denoise(self, arguments: dict[str, Any]) -> Tensor:
        """Predict the noise of such a call, and keep the maps."""


@contextmanager
def intercepted(pipe: Any, unet: nn.Module, listener: Listener) -> Iterator[None]:
    """Let a listener learn what a pipeline encodes, and answer the UNet's calls that belong to it.

    Raises:
        DiffuMaskError: the pipeline has no encode_prompt, or somebody listens to this UNet already.
    """
    if isinstance(vars(unet).get(MODULE_CALL), _UNetCalls):
        raise DiffuMaskError(
            "the maps of this UNet are being collected already: leave the other collect_maps first, or give the second "
            "pipeline a UNet of its own"
        )
    name = encoding_method(pipe)
    with (
        patched(name, {pipe: _telling(getattr(pipe, name), listener)}),
        patched(MODULE_CALL, {unet: _UNetCalls(unet, listener)}),
    ):
        yield


def encoding_method(pipe: Any) -> str:
    """Name the method by which a pipeline encodes its prompts; the oldest pipelines have only `_encode_prompt`.

    Raises:
        DiffuMaskError: it has none.
    """
    for name in ("encode_prompt", "_encode_prompt"):
        if hasattr(pipe, name):
            return name
    raise DiffuMaskError(f"{type(pipe).__name__} has no encode_prompt, so its prompts cannot be learnt")


def _telling(encode: Callable[..., Any], listener: Listener) -> Callable[..., Any]:
    """Return an encode_prompt that tells the listener its arguments and its result."""
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        result = encode(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        listener.take_prompts(bound.arguments, result)
        return result

    return encode_prompt


class _UNetCalls:
    """Stands as a UNet's call; what is not the listener's, or comes from its denoiser, passes through."""

    def __init__(self, unet: nn.Module, listener: Listener) -> None:
        self.plain: Callable[..., Any] = vars(unet).get(MODULE_CALL) or unet._call_impl
        self.listener = listener
        self.inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(UNET_ARGUMENTS, args, strict=False)), **kwargs}
        if self.inside or not self.listener.belongs(arguments):
            return self.plain(*args, **kwargs)
        return_dict = arguments.pop("return_dict", True)
        self.inside = True
        try:
            noise_pred = self.listener.denoise(arguments)
        finally:
            self.inside = False
        return UNet2DConditionOutput(sample=noise_pred) if return_dict else (noise_pred,)
