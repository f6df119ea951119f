"""Forwards that give the same as a layer's own, up to rounding, and cost a CPU less."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

PIECE_BYTES = 2 << 20  # of a piece's widest tensor, which is to stay in a CPU's caches

Forwards = dict[nn.Module, Callable]


@contextmanager
def swapped(name: str, values: dict[nn.Module, Any]) -> Iterator[None]:
    """Let an attribute of modules be other values, and put their own back, whatever happens.

    Works on `__dict__`, which shadows a method of the class and a registered module alike.
    """
    kept = [(module, module.__dict__.get(name)) for module in values]
    try:
        for module, value in values.items():
            module.__dict__[name] = value
        yield
    finally:
        for module, value in kept:
            if value is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


def cheaper_forwards(model: nn.Module) -> Forwards:
    """Find what costs less in other ways, in a UNet or in a VAE's decoder.

    A 3x3 convolution of an image doubled by nearest neighbours becomes four 2x2 convolutions of the image, and a
    feed-forward works on as many rows at a time as a CPU's caches take.
    """
    found: Forwards = {}
    for module in model.modules():
        if isinstance(module, FeedForward):
            found[module] = _in_pieces(module)
        elif isinstance(module, Upsample2D):
            own = module.use_conv and module.interpolate and module.norm is None
            if own and _is_plain(conv := getattr(module, "conv", None)):
                found[module] = _in_phases(module, conv)
        elif isinstance(module, nn.Sequential):
            for doubling, conv in pairwise(module):
                nearest = type(doubling) is nn.Upsample and (doubling.mode, doubling.scale_factor) == ("nearest", 2)
                if nearest and _is_plain(conv):
                    found |= {doubling: lambda image: image, conv: _in_phases(conv, conv)}
    return found


def double_and_convolve(image: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve an image doubled by nearest neighbours, from the image itself.

    Of the doubled image, a 3x3 window sees 2x2 pixels of the image: along one axis, with weights w0, w1, w2, an even
    pixel is w0 of the one before + (w1 + w2) of its own, an odd one is (w0 + w1) of its own + w2 of the one after.

    Args:
        image: [B, C, H, W].
        weight: [O, C, 3, 3].
        bias: [O].

    Returns:
        [B, O, 2H, 2W], channels_last: conv2d(interpolate(image, scale_factor=2), weight, bias, padding=1).
    """
    rows, _, height, width = image.shape
    out = image.new_empty(rows, weight.shape[0], 2 * height, 2 * width).contiguous(memory_format=torch.channels_last)
    for y, weights in enumerate(_halves(weight, 2)):
        for x, phase in enumerate(_halves(weights, 3)):
            padded = F.pad(image, (1 - x, x, 1 - y, y)).contiguous(memory_format=torch.channels_last)
            phase = phase.contiguous(memory_format=torch.channels_last)
            out[:, :, y::2, x::2] = F.conv2d(padded, phase, bias)
    return out


def _halves(weight: Tensor, axis: int) -> list[Tensor]:
    before, own, after = weight.unbind(axis)
    return [torch.stack([before, own + after], axis), torch.stack([before + own, after], axis)]


def _is_plain(conv: nn.Module | None) -> bool:
    """Tell whether a module is what double_and_convolve computes, with nothing hooked into it or put over it."""
    if type(conv) is not nn.Conv2d or {"forward", "_conv_forward"} & vars(conv).keys():
        return False
    if conv._forward_hooks or conv._forward_pre_hooks or conv.padding_mode != "zeros" or conv.groups != 1:
        return False
    return (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


def _in_phases(module: nn.Module, conv: nn.Conv2d) -> Callable:
    forward = module.forward

    def call(image: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None and tuple(output_size) != (2 * image.shape[2], 2 * image.shape[3]):
            return forward(image, output_size, *args, **kwargs)
        return double_and_convolve(image, conv.weight, conv.bias)

    return call


def _in_pieces(module: FeedForward) -> Callable:
    forward = module.forward

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens, item = hidden_states[0, ..., 0].numel(), hidden_states.element_size()
        row = tokens * module.net[0].proj.out_features * item
        if row * hidden_states.shape[0] <= PIECE_BYTES:
            return forward(hidden_states, *args, **kwargs)
        return torch.cat([forward(part, *args, **kwargs) for part in hidden_states.split(max(1, PIECE_BYTES // row))])

    return call
