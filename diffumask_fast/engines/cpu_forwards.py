"""Cheaper forwards for layers on the CPU, with the same results up to rounding."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from diffumask_fast.kernels import winograd

PIECE_BYTES = 2 << 20  # of a piece's widest tensor: fits into a CPU's caches
MIN_CHANNELS = 32  # with fewer, a direct convolution is faster
MAX_WEIGHTS = 640 * 640  # input times output channels; transformed, these take 59 MB

Forwards = dict[nn.Module, Callable[..., Any]]


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Tell whether the CPU has AMX, which multiplies bf16 matrices many times as fast as fp32 ones."""
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(capabilities().get("amx_tile"))


class _Kept(NamedTuple):
    weight: Tensor
    bits: Tensor  # a copy of the weight's, to see a change
    transformed: Tensor


class TransformedWeights:
    """The weights of a model's 3x3 convolutions, transformed for Winograd's algorithm, and again after a change.

    Only convolutions that this makes cheaper are included. Transformed weights take four times the memory of fp32
    weights; the copies that show a change take the memory of the weights once more.

    Args:
        model: a UNet or a VAE's decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: dict[str, _Kept] = {}

    def version(self) -> int:
        """Return a number that grows with each change in place; only `current` sees changes through .data."""
        return sum(kept.weight._version for kept in self._kept.values() if not kept.weight.is_inference())

    def current(self) -> dict[str, Tensor]:
        """Return module name -> transformed weights; empty for a model on a GPU."""
        before, self._kept = self._kept, {}
        for name, module in self.model.named_modules():
            if _is_plain(module) and _is_cheaper(module.weight):
                kept, bits = before.get(name), _bits(module.weight)
                # tensor versions do not count changes through .data, which is how adapters are fused
                if kept is not None and torch.equal(kept.bits, bits):
                    self._kept[name] = kept._replace(weight=module.weight)
                else:
                    self._kept[name] = _Kept(module.weight, bits.clone(), winograd.transform(module.weight))
        return {name: kept.transformed for name, kept in self._kept.items()}


def cheaper_forwards(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Forwards:
    """Return module -> cheaper forward, for the layers of a UNet or of a VAE's decoder that have one.

    A feed-forward runs on as many rows at a time as fit into a CPU's caches. 3x3 convolutions use Winograd's algorithm;
    those that follow a doubling of the image by nearest neighbours read the small image instead.

    Args:
        model: on the CPU.
        weights: from TransformedWeights. Convolutions that are not in it, and calls with gradients, keep their forward.
    """
    forwards: Forwards = {}
    modules = dict(model.named_modules())
    # checked again: a plain convolution may have got an adapter or a hook since its weights were transformed
    convs = {modules[name]: weight for name, weight in (weights or {}).items() if _is_plain(modules.get(name))}
    for module in modules.values():
        if isinstance(module, FeedForward):
            forwards[module] = _in_pieces(module)
        elif isinstance(module, nn.Conv2d) and module in convs:
            forwards[module] = _by_winograd(module, convs[module])
        elif type(module) is Upsample2D and _is_untouched(module):
            doubles = module.use_conv and module.interpolate and module.norm is None
            conv: Any = getattr(module, "conv", None)
            if doubles and conv in convs:
                forwards[module] = _doubled(module.forward, conv, convs[conv])
        elif type(module) is nn.Sequential and _is_untouched(module):
            if any(_doubles(one) and other in convs for one, other in pairwise(module)):
                forwards[module] = _without_doubling(module, convs)
    return forwards


def _is_untouched(module: nn.Module) -> bool:
    """Tell whether a module has no hooks and its class's forward."""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _is_plain(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Tell whether a module is a 3x3 convolution with padding 1, stride 1 and nothing added."""
    if type(conv) is not nn.Conv2d or not _is_untouched(conv) or "_conv_forward" in vars(conv):
        return False
    if conv.padding_mode != "zeros" or conv.groups != 1:
        return False
    return (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


def _doubles(module: nn.Module) -> bool:
    """Tell whether a module doubles an image by nearest neighbours, and nothing else."""
    nearest = type(module) is nn.Upsample and (module.mode, module.scale_factor) == ("nearest", 2)
    return nearest and module.size is None and _is_untouched(module)


def _is_cheaper(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in winograd.DTYPES:
        return False
    if weight.dtype == torch.bfloat16 and has_amx():
        return False
    out, channels = weight.shape[:2]
    fit = not (out % winograd.CHANNELS_MULTIPLE or channels % winograd.CHANNELS_MULTIPLE)
    return fit and min(out, channels) >= MIN_CHANNELS and out * channels <= MAX_WEIGHTS


def _bits(weight: Tensor) -> Tensor:
    """View a weight's bytes as int64, for a fast comparison."""
    numbers = weight.detach().permute(0, 2, 3, 1).contiguous()
    if numbers.storage_offset() * numbers.element_size() % 8:
        numbers = numbers.clone()
    return numbers.view(torch.int64)


def _fits(image: Tensor, conv: nn.Conv2d) -> bool:
    """Tell whether the C++ takes an image: it has no gradients, and under autocast dtypes may differ."""
    return image.ndim == 4 and image.dtype == conv.weight.dtype and not torch.is_grad_enabled()


def _by_winograd(conv: nn.Conv2d, weights: Tensor) -> Callable[..., Tensor]:
    forward = conv.forward

    def call(image: Tensor) -> Tensor:
        if not (_fits(image, conv) and winograd.pays(image.shape[0], *image.shape[2:])):
            return forward(image)
        return winograd.convolve(image, weights, conv.bias, conv.out_channels)

    return call


def _doubled(forward: Callable[..., Tensor], conv: nn.Conv2d, weights: Tensor) -> Callable[..., Tensor]:
    """Convolve an image as if it were doubled first; `forward` does it in two steps, for calls that need that."""

    def call(image: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None and tuple(output_size) != (2 * image.shape[2], 2 * image.shape[3]):
            return forward(image, output_size, *args, **kwargs)
        if not _fits(image, conv):
            return forward(image)
        return winograd.convolve(image, weights, conv.bias, conv.out_channels, True)

    return call


def _without_doubling(sequence: nn.Sequential, convs: Mapping[nn.Module, Tensor]) -> Callable[..., Tensor]:
    steps: list[Callable[..., Tensor]] = []
    before: nn.Module | None = None
    for module in sequence:
        if before is not None and _doubles(before) and isinstance(module, nn.Conv2d) and module in convs:
            steps[-1] = _doubled(_chain(before, module), module, convs[module])
        else:
            steps.append(module)
        before = module
    return _chain(*steps)


def _chain(*steps: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(image: Tensor) -> Tensor:
        for step in steps:
            image = step(image)
        return image

    return call


def _in_pieces(module: FeedForward) -> Callable[..., Tensor]:
    forward = module.forward

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first: Any = module.net[0]
        row_bytes = hidden_states[0, ..., 0].numel() * first.proj.out_features * hidden_states.element_size()
        if row_bytes * hidden_states.shape[0] <= PIECE_BYTES:
            return forward(hidden_states, *args, **kwargs)
        parts = hidden_states.split(max(1, PIECE_BYTES // row_bytes))
        return torch.cat([forward(part, *args, **kwargs) for part in parts])

    return call
