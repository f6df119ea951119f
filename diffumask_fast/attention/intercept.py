"""Stand between a pipeline and two of its parts, for all collectors at once, and leave no trace."""

import inspect
import threading
from collections.abc import Callable
from typing import Any, Protocol

from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

UNET_ARGUMENTS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]


class Listener(Protocol):
    """What a collector offers to the layers."""

    def take_prompts(self, arguments: dict[str, Any], result: Any) -> None:
        """Learn what was encoded, and to what."""

    def matches(self, encoder_hidden_states: Tensor) -> bool:
        """Tell whether this UNet call is one of the collector's."""

    def denoise(self, arguments: dict[str, Any]) -> Tensor:
        """Predict the noise and keep the maps."""


class Layer:
    """An attribute of one object in whose place it stands, with the collectors that listen."""

    attribute: str
    guard = threading.Lock()

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.listeners: list[Listener] = []
        self.shadowed = owner.__dict__.get(self.attribute)
        self.had_own = self.attribute in owner.__dict__

    @classmethod
    def join(cls, owner: Any, listener: Listener) -> None:
        """Install the layer where there is none, and listen."""
        with cls.guard:
            layer = owner.__dict__.get(cls.attribute)
            if not isinstance(layer, cls):
                layer = owner.__dict__[cls.attribute] = cls(owner)
            layer.listeners.append(listener)

    @classmethod
    def leave(cls, owner: Any, listener: Listener) -> None:
        """Stop listening, and take the layer out after the last listener."""
        with cls.guard:
            layer = owner.__dict__.get(cls.attribute)
            if not isinstance(layer, cls):
                return
            layer.listeners = [other for other in layer.listeners if other is not listener]
            if layer.listeners:
                return
            if layer.had_own:
                owner.__dict__[cls.attribute] = layer.shadowed
            else:
                del owner.__dict__[cls.attribute]


class PromptLayer(Layer):
    """Stands as `encode_prompt` of one pipeline object, and tells the collectors what was encoded."""

    attribute = "encode_prompt"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = self.shadowed or getattr(type(self.owner), self.attribute).__get__(self.owner)
        result = plain(*args, **kwargs)
        bound = inspect.signature(plain).bind(*args, **kwargs)
        bound.apply_defaults()
        for listener in tuple(self.listeners):
            listener.take_prompts(bound.arguments, result)
        return result


class OldPromptLayer(PromptLayer):
    """The same for pipelines that have only `_encode_prompt`."""

    attribute = "_encode_prompt"


class UNetLayer(Layer):
    """Stands as `_compiled_call_impl` of one UNet, which nn.Module's __call__ consults first.

    A lock makes calls with maps on one UNet take turns; a call that comes from inside one of them, from another thread
    or from another prompt passes through.
    """

    attribute = "_compiled_call_impl"

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        self.lock = threading.RLock()
        self.inside = threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain: Callable[..., Any] = self.shadowed or self.owner._call_impl
        arguments = {**dict(zip(UNET_ARGUMENTS, args, strict=False)), **kwargs}
        if getattr(self.inside, "now", False) or "encoder_hidden_states" not in arguments:
            return plain(*args, **kwargs)
        takers = [x for x in tuple(self.listeners) if x.matches(arguments["encoder_hidden_states"])]
        if not takers:
            return plain(*args, **kwargs)
        return_dict = arguments.pop("return_dict", True)
        with self.lock:
            self.inside.now = True
            try:
                for taker in takers:
                    noise_pred = taker.denoise(_own_lists(arguments))
            finally:
                self.inside.now = False
        return UNet2DConditionOutput(sample=noise_pred) if return_dict else (noise_pred,)


def _own_lists(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copy the lists, for the UNet empties those of adapters."""
    return {key: list(value) if isinstance(value, list) else value for key, value in arguments.items()}
