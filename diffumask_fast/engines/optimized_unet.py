"""UNetWithMaps with fewer products, for the compiled engine."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from torch import Tensor, nn

from diffumask_fast.attention.call import Results, UNetCall
from diffumask_fast.attention.processor import MapProcessor, draws_like
from diffumask_fast.attention.tap import Place, Tap
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.borrow import patched
from diffumask_fast.engines.cpu_forwards import cheaper_forwards, has_amx
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels.attend import cpp_takes

KeysValues = Sequence[tuple[Tensor, Tensor]]


class OptimizedUNet(UNetWithMaps):
    """The results of UNetWithMaps up to rounding, from fewer products, and on the CPU from cheaper ones.

    - The caller makes the prompts' keys and values once, by `text`, instead of at each step.
    - Under classifier-free guidance both halves of the batch are equal up to the first cross-attention: the layers
      before it run on one half.
    - On the CPU, layers run as `cheaper_forwards` says, and attention in C++. Attention stays torch's where scores are
      masked, with gradients, and in bf16 on a processor with AMX.
    """

    def processor(self, place: Place) -> MapProcessor:
        """Make the processor of the layers of a kind."""
        return _TextProcessor(place, self.impl)

    def text(self, encoder_hidden_states: Tensor) -> KeysValues | None:
        """Make keys and values of all cross-attention layers.

        Args:
            encoder_hidden_states: [B, T, E].

        Returns:
            k and v [B, T, H*D] for each layer; None where the UNet changes the states first, as for IP-Adapter, or a
            layer has a foreign processor or an adapter (LoRA), which may change from step to step.
        """
        layers = self._cross()
        plain = all(draws_like(attn) and type(attn.to_k) is type(attn.to_v) is nn.Linear for attn in layers)
        if getattr(self.unet, "encoder_hid_proj", None) is not None or not plain:
            return None
        return [(attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)) for attn in layers]

    def forward(
        self,
        call: UNetCall,
        *,
        text: KeysValues | None = None,
        twins: bool = False,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Results:
        """Predict the noise with maps, as UNetWithMaps.forward.

        Args:
            call: as there.
            text: what `text` gave for encoder_hidden_states; None makes keys and values in this call. Must be None if
                unet_kwargs hold LoRA's scale or an attention mask.
            twins: the conditional rows are the second half, and both halves are equal in all but the text.
            weights: of the UNet's convolutions, from TransformedWeights; on the CPU only.
        """
        rows, _, h, w = call.latents.shape  # numbers under the compiler too, which makes code for each set of shapes
        tap = _TextTap(call.select, call.prior, call.first, (rows, h, w))
        if text is not None:
            tap.text = dict(zip(self._cross(), text, strict=True))
        forwards = cheaper_forwards(self.unet, weights) if call.latents.device.type == "cpu" else {}
        if twins:
            forwards |= {module: _once(module, tap) for module in _before_text(self.unet)}
        with patched("forward", forwards):
            return self.run(call, tap)

    def check(self) -> None:
        """Check that a compiler can look into all attention layers.

        Raises:
            DiffuMaskError: a layer has a foreign processor.
        """
        for attn in cast(list[Attention], list(self.places)):
            if not draws_like(attn) and not draws_like(attn, XFormersAttnProcessor):
                raise DiffuMaskError(
                    f"`engine=compile` compiles diffusers' own attention alone, and a layer of this UNet has "
                    f"{type(attn.processor).__name__}: use `engine=torch`, or call unet.set_default_attn_processor()"
                )

    def _cross(self) -> list[Attention]:
        return [cast(Attention, attn) for attn, place in self.places.items() if place.cross]


class _TextTap(Tap):
    """A tap that also carries the keys and values of layers."""

    text: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def alone(self) -> "_TextTap":
        """Return the tap for a call of the conditional rows alone."""
        shape = None if self.shape is None else (self.shape[0] - self.first, *self.shape[1:])
        tap = _TextTap(self.select, self.prior, 0, shape)
        tap.maps, tap.propagated, tap.layers, tap.partial = self.maps, self.propagated, self.layers, self.partial
        return tap


class _TextProcessor(MapProcessor):
    def project(
        self, attn: Attention, hidden_states: Tensor, context: Tensor, attention_mask: Tensor | None, tap: Tap | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if not isinstance(tap, _TextTap) or attn not in tap.text:
            return super().project(attn, hidden_states, context, attention_mask, tap)
        return attn.to_q(hidden_states), *tap.text[attn], None

    def impl_for(self, q: Tensor, mask: Tensor | None) -> str:
        if self.impl != "auto" or not cpp_takes(q, mask) or torch.is_grad_enabled():
            return self.impl
        return "auto" if q.dtype == torch.bfloat16 and has_amx() else "cpp"


def _before_text(unet: Any) -> list[nn.Module]:
    """List the costly layers before the first cross-attention."""
    block = unet.down_blocks[0]
    blocks = [module for module in block.modules() if isinstance(module, BasicTransformerBlock)]
    first = [layer.attn1 for layer in blocks[:1] if not layer.attn1.is_cross_attention and draws_like(layer.attn1)]
    return [unet.conv_in, block.resnets[0], *first]


def _once(module: nn.Module, tap: _TextTap) -> Callable[..., Tensor]:
    """Return a forward that runs on the second half of the rows and repeats the result for both."""
    forward, first, alone = module.forward, tap.first, tap.alone()

    def call(*args: Any, **kwargs: Any) -> Tensor:
        if "tap" in kwargs:
            kwargs["tap"] = alone
        out = forward(*(arg[first:] if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
        return torch.cat([out, out])

    return call
