"""UNetWithMaps with fewer products: what the compiled engine compiles."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from diffumask_fast.attention.processor import MapProcessor, draws_like
from diffumask_fast.attention.tap import Levels, Tap
from diffumask_fast.attention.unet import UNetWithMaps

KeysValues = Sequence[tuple[Tensor, Tensor]]
KEYS_MULTIPLE = 16  # of a CPU's vectors: 80 keys take two thirds of the time of 77
FITS_BYTES, PIECE_BYTES = 4 << 20, 2 << 20  # of a feed-forward's widest tensor, which is to stay in a CPU's caches


class LeanUNet(UNetWithMaps):
    """The results of UNetWithMaps up to rounding, from fewer and on the CPU also cheaper products.

    - Keys and values of the prompts are the caller's to make once, by `text`, instead of at each step.
    - Under classifier-free guidance both halves of the latents are the same up to the first cross-attention: the layers
      before it work on one half.
    - On the CPU, a 3x3 convolution of an image doubled by nearest neighbours is four 2x2 convolutions of the image, a
      feed-forward works on as many rows as its caches take, and bf16 attends in fp32, the quicker of the two without AMX.
    """

    def __init__(self, unet: nn.Module, impl: str = "auto") -> None:
        super().__init__(unet, impl)
        self.processor = _LeanProcessor(impl)

    def text(self, encoder_hidden_states: Tensor) -> KeysValues | None:
        """Make keys and values of all cross-attention layers.

        Args:
            encoder_hidden_states: [B, T, E].

        Returns:
            k and v [B, T', H*D] for each layer, T' the T padded with zeros to KEYS_MULTIPLE on the CPU; None where the
            UNet makes something else of the states first (IP-Adapter), or a layer has a processor of its own.
        """
        layers = self._cross()
        if getattr(self.unet, "encoder_hid_proj", None) is not None or not all(map(draws_like, layers)):
            return None
        states, multiple = encoder_hidden_states, 1 if encoder_hidden_states.is_cuda else KEYS_MULTIPLE
        pad = (0, 0, 0, -states.shape[1] % multiple)
        return [(F.pad(attn.to_k(states), pad), F.pad(attn.to_v(states), pad)) for attn in layers]

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        select: Tensor,
        prior: Levels | None = None,
        added: dict[str, Any] | None = None,
        *,
        text: KeysValues | None = None,
        twins: bool = False,
        first_conditional: int | None = None,
        **unet_kwargs: Any,
    ) -> tuple[Tensor, Levels, Levels]:
        """Predict the noise with maps, as UNetWithMaps.forward.

        Args:
            latents, timestep, encoder_hidden_states, select, prior, added, first_conditional, unet_kwargs: as there.
            text: what `text` made of encoder_hidden_states; None: they are made here. Not with LoRA's scale or an
                attention mask among the keywords.
            twins: the conditional rows are the second half, and both halves of the latents, and all else that is not
                text, are the same.
        """
        if text is not None:
            select = F.pad(select, (0, 0, 0, text[0][0].shape[1] - select.shape[1]))
        first = latents.shape[0] - select.shape[0] if first_conditional is None else first_conditional
        tap = _LeanTap(self.places, select, prior or {}, first)
        if text is not None:
            tap.text = dict(zip(self._cross(), text, strict=True))
            if padding := select.shape[1] - encoder_hidden_states.shape[1]:
                zeros = latents.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
                tap.bias = F.pad(zeros, (0, padding), value=-torch.inf)
        with self._swapped_forwards(tap, twins, latents.device.type == "cpu"):
            return self.run(tap, latents, timestep, encoder_hidden_states, added, **unet_kwargs)

    def _cross(self) -> list[Attention]:
        return [attn for attn, place in self.places.items() if place.cross]

    @contextmanager
    def _swapped_forwards(self, tap: "_LeanTap", twins: bool, on_cpu: bool) -> Iterator[None]:
        forwards: dict[nn.Module, Callable] = {}
        for module in self.unet.modules() if on_cpu else ():
            if _doubles(module):
                forwards[module] = _in_phases(module)
            elif isinstance(module, FeedForward):
                forwards[module] = _in_pieces(module)
        if twins:
            forwards |= {module: _once(module, tap) for module in _before_text(self.unet)}
        kept = [(module, module.__dict__.get("forward")) for module in forwards]
        try:
            for module, forward in forwards.items():
                module.__dict__["forward"] = forward
            yield
        finally:
            for module, forward in kept:
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward


class _LeanTap(Tap):
    """A tap that brings keys and values, and a bias [1, 1, 1, T'] where some of them are padding."""

    text: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    bias: Tensor | None = None


class _LeanProcessor(MapProcessor):
    def __init__(self, impl: str = "auto") -> None:
        super().__init__(impl)
        self.widens = not getattr(torch.cpu, "get_capabilities", dict)().get("amx_tile")

    def project(self, attn, hidden_states, context, attention_mask, tap):
        if attn not in tap.text:
            q, k, v, mask = super().project(attn, hidden_states, context, attention_mask, tap)
        else:
            q, (k, v), mask = attn.to_q(hidden_states), tap.text[attn], tap.bias
        if self.widens and q.device.type == "cpu" and q.dtype == torch.bfloat16:
            q, k, v, mask = (x if x is None else x.float() for x in (q, k, v, mask))
        return q, k, v, mask


def _before_text(unet: nn.Module) -> list[nn.Module]:
    """Name the costly layers before the first cross-attention."""
    block = unet.down_blocks[0]
    blocks = [module for module in block.modules() if isinstance(module, BasicTransformerBlock)]
    firsts = [blocks[0].attn1] if blocks and not blocks[0].attn1.is_cross_attention else []
    return [unet.conv_in, block.resnets[0], *firsts]


def _once(module: nn.Module, tap: _LeanTap) -> Callable:
    """Run a module on the second half of its rows and give the result for both."""
    forward, first = module.forward, tap.first
    half = _LeanTap(tap.places, tap.select, tap.prior, 0)
    half.maps, half.propagated = tap.maps, tap.propagated

    def call(*args: Any, **kwargs: Any) -> Tensor:
        if "tap" in kwargs:
            kwargs["tap"] = half
        out = forward(*(arg[first:] if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
        return torch.cat([out, out])

    return call


def _doubles(module: nn.Module) -> bool:
    """Tell whether a module is nearest upsampling and a plain 3x3 convolution."""
    if not isinstance(module, Upsample2D) or not (module.use_conv and module.interpolate and module.norm is None):
        return False
    conv = getattr(module, "conv", None)
    return type(conv) is nn.Conv2d and conv.kernel_size == (3, 3) and conv.padding == (1, 1)


def _in_phases(module: Upsample2D) -> Callable:
    """Double and convolve: of the doubled image's rows and columns, each odd or even one sees 2x2 pixels.

    With weights w0, w1, w2 of three neighbours, an even one is w0 before + (w1 + w2) itself, an odd one (w0 + w1)
    itself + w2 after.
    """
    forward, conv = module.forward, module.conv

    def halves(weight: Tensor, axis: int) -> list[Tensor]:
        before, itself, after = weight.unbind(axis)
        return [torch.stack([before, itself + after], axis), torch.stack([before + itself, after], axis)]

    def call(hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        rows, channels, height, width = hidden_states.shape
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return forward(hidden_states, output_size, *args, **kwargs)
        phases = []
        for y, weights in enumerate(halves(conv.weight, 2)):
            for x, weight in enumerate(halves(weights, 3)):
                padded = F.pad(hidden_states, (1 - x, x, 1 - y, y)).contiguous(memory_format=torch.channels_last)
                weight = weight.contiguous(memory_format=torch.channels_last)
                phases.append(F.conv2d(padded, weight, conv.bias))
        phases = torch.stack(phases, 2).view(rows, -1, 2, 2, height, width)
        return phases.permute(0, 1, 4, 2, 5, 3).reshape(rows, -1, 2 * height, 2 * width)

    return call


def _in_pieces(module: FeedForward) -> Callable:
    """Run a feed-forward on a few rows at a time where its widest tensor is larger than the caches."""
    forward = module.forward

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        row = hidden_states[0].numel() // hidden_states.shape[-1] * module.net[0].proj.out_features
        row *= hidden_states.element_size()
        if row * hidden_states.shape[0] <= FITS_BYTES:
            return forward(hidden_states, *args, **kwargs)
        return torch.cat([forward(part, *args, **kwargs) for part in hidden_states.split(max(1, PIECE_BYTES // row))])

    return call
