"""Forwards that give the same as a layer's own, up to rounding, and cost a CPU less."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from diffumask_fast.kernels import winograd

PIECE_BYTES = 2 << 20  # of a piece's widest tensor, which is to stay in a CPU's caches
FEWEST = 32  # channels, below which a direct convolution is faster
MOST = 640 * 640  # channels by channels, whose transformed weights take 59 MB

Forwards = dict[nn.Module, Callable]


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Tell whether the CPU multiplies matrices in bf16 by itself, many times as fast as in fp32."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_tile"))


class TransformedWeights:
    """The weights of a model's 3x3 convolutions as the C++ takes them, made anew where the model's own have changed.

    Those are taken that are cheaper so on the model's CPU. They need four times the memory of the weights in fp32, and
    the copies by which a change is seen once more that of the weights.

    Args:
        model: a UNet or a VAE's decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def version(self) -> int:
        """Return a number that grows with each change in place; those through .data only `now` sees."""
        return sum(weight._version for weight, _, _ in self._kept.values() if not weight.is_inference())

    def now(self) -> dict[str, Tensor]:
        """Return them by the names of their modules; none for a model on a GPU."""
        kept, self._kept = self._kept, {}
        for name, module in self.model.named_modules():
            if _is_plain(module) and _is_cheaper(module.weight):
                _, seen, transformed = kept.get(name, (None, None, None))
                bits = _bits(module.weight)
                # a count of changes would miss those through .data, which is how adapters are fused
                if seen is None or not torch.equal(seen, bits):
                    seen, transformed = bits.clone(), winograd.transform(module.weight)
                self._kept[name] = module.weight, seen, transformed
        return {name: transformed for name, (_, _, transformed) in self._kept.items()}


def cheaper_forwards(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Forwards:
    """Find what costs less in other ways, in a UNet or in a VAE's decoder.

    A feed-forward works on as many rows at a time as a CPU's caches take. 3x3 convolutions are made in Winograd's way,
    also those of an image doubled by nearest neighbours, which then need not be made.

    Args:
        model: on the CPU.
        weights: what TransformedWeights has of it; what is not there, and all where gradients are wanted, keeps its
            forward.
    """
    found: Forwards = {}
    modules = dict(model.named_modules())
    # what was a plain convolution when the weights were made may have got an adapter or a hook since
    convs = {modules[name]: weight for name, weight in (weights or {}).items() if _is_plain(modules.get(name))}
    for module in modules.values():
        if isinstance(module, FeedForward):
            found[module] = _in_pieces(module)
        elif module in convs:
            found[module] = _by_winograd(module, convs[module])
        elif type(module) is Upsample2D and _is_untouched(module):
            own = module.use_conv and module.interpolate and module.norm is None
            if own and getattr(module, "conv", None) in convs:
                found[module] = _doubled(module.forward, module.conv, convs[module.conv])
        elif type(module) is nn.Sequential and _is_untouched(module):
            if any(_doubles(one) and other in convs for one, other in pairwise(module)):
                found[module] = _without_doubling(module, convs)
    return found


def _is_untouched(module: nn.Module) -> bool:
    """Tell whether nothing is hooked into a module or put over its forward."""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _is_plain(conv: nn.Module | None) -> bool:
    """Tell whether a module is a 3x3 convolution and nothing else."""
    if type(conv) is not nn.Conv2d or not _is_untouched(conv) or "_conv_forward" in vars(conv):
        return False
    if conv.padding_mode != "zeros" or conv.groups != 1:
        return False
    return (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


def _doubles(module: nn.Module) -> bool:
    """Tell whether a module repeats each pixel in both directions, and nothing else."""
    nearest = type(module) is nn.Upsample and (module.mode, module.scale_factor) == ("nearest", 2)
    return nearest and module.size is None and _is_untouched(module)


def _is_cheaper(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in winograd.DTYPES:
        return False
    if weight.dtype == torch.bfloat16 and has_amx():
        return False
    out, channels = weight.shape[:2]
    fit = not (out % winograd.CHANNELS_MULTIPLE or channels % winograd.CHANNELS_MULTIPLE)
    return fit and min(out, channels) >= FEWEST and out * channels <= MOST


def _bits(weight: Tensor) -> Tensor:
    """Return what is compared to see a change: the same bytes, eight at a time."""
    numbers = weight.detach().permute(0, 2, 3, 1).contiguous()
    if numbers.storage_offset() * numbers.element_size() % 8:
        numbers = numbers.clone()
    return numbers.view(torch.int64)


def _fits(image: Tensor, conv: nn.Conv2d) -> bool:
    """Tell whether the C++, which has no gradient, takes an image; autocast may have it in another dtype."""
    return image.ndim == 4 and image.dtype == conv.weight.dtype and not torch.is_grad_enabled()


def _by_winograd(conv: nn.Conv2d, weights: Tensor) -> Callable:
    forward = conv.forward

    def call(image: Tensor) -> Tensor:
        if not (_fits(image, conv) and winograd.pays(image.shape[0], *image.shape[2:])):
            return forward(image)
        return winograd.convolve(image, weights, conv.bias, conv.out_channels)

    return call


def _doubled(own: Callable, conv: nn.Conv2d, weights: Tensor) -> Callable:
    """Convolve an image as if it were doubled; `own` is what doubles it, where that will not do."""

    def call(image: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        other = output_size is not None and tuple(output_size) != (2 * image.shape[2], 2 * image.shape[3])
        if other:
            return own(image, output_size, *args, **kwargs)
        if not _fits(image, conv):
            return own(image)
        return winograd.convolve(image, weights, conv.bias, conv.out_channels, True)

    return call


def _without_doubling(sequence: nn.Sequential, convs: Mapping[nn.Module, Tensor]) -> Callable:
    steps: list[Callable] = []
    before = None
    for module in sequence:
        if before is not None and _doubles(before) and module in convs:
            steps[-1] = _doubled(_chain(before, module), module, convs[module])
        else:
            steps.append(module)
        before = module
    return _chain(*steps)


def _chain(*steps: Callable) -> Callable:
    def call(image: Tensor) -> Tensor:
        for step in steps:
            image = step(image)
        return image

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
