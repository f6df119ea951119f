"""What kinds of models differ in: where the denoiser is, how it is called, what its text and its maps are made of."""

import inspect
import math
from collections.abc import Mapping
from functools import cached_property
from types import FrameType
from typing import Any, ClassVar

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from diffumask_fast.attention.call import Denoiser
from diffumask_fast.attention.encoded import Encoded, Segment
from diffumask_fast.attention.store import MAX_PROPAGATED_PIXELS
from diffumask_fast.attention.transformer import TransformerWithMaps, packed_size
from diffumask_fast.attention.unet import UNetWithMaps
from diffumask_fast.errors import DiffuMaskError


class Family:
    """Stable Diffusion 1.x, 2.x and XL: a UNet2DConditionModel, whose cross-attention sees one sequence of tokens.

    Attributes:
        component: the name of the denoiser among the pipeline's parts.
        word: for it, in sentences.
        kind: its class.
        output: what it returns.
        latents: the name of its argument for them.
        max_propagated_pixels: the largest level at which maps are propagated.
        tokenizer: the one in whose text a phrase must be.
    """

    component: ClassVar[str] = "unet"
    word: ClassVar[str] = "UNet"
    kind: ClassVar[type[Any]] = UNet2DConditionModel
    output: ClassVar[type[Any]] = UNet2DConditionOutput
    latents: ClassVar[str] = "sample"
    max_propagated_pixels: ClassVar[float] = MAX_PROPAGATED_PIXELS
    tokenizer: ClassVar[str] = "tokenizer"

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of the denoiser's arguments, in their order."""
        return tuple(inspect.signature(self.kind.forward).parameters)[1:]

    def with_maps(self, model: nn.Module) -> Denoiser:
        """Return what runs the model's calls with maps."""
        return UNetWithMaps(model)

    def segments(self, encoded: Encoded, length: int) -> list[Segment]:
        """Tell which tokenizers' tokens stand where in a sequence of so many."""
        return [Segment(0, length, tuple(encoded.calls))]

    def draws(self, arguments: Mapping[str, Any], frame: FrameType | None) -> bool:
        """Tell whether a call may draw the prompts: not so a second guidance by the same words."""
        return True

    def timestep(self, arguments: Mapping[str, Any], frame: FrameType | None) -> Any:
        """Return the timestep of a call as the scheduler has it."""
        return arguments["timestep"]

    def map_size(self, model: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return height and width of the finest maps that a call could give."""
        h, w = arguments[self.latents].shape[-2:]
        return h, w

    def pixels_per_token(self, pipe: Any) -> int:
        """Return the number that height and width of an image must be multiples of."""
        return pipe.vae_scale_factor

    def default_size(self, pipe: Any) -> tuple[int, int]:
        """Return height and width of an image where nothing is said."""
        own = pipe.unet.config.sample_size
        h, w = own if isinstance(own, (list, tuple)) else (own, own)
        return h * pipe.vae_scale_factor, w * pipe.vae_scale_factor


class StableDiffusion3(Family):
    """SD3 and 3.5: joint attention over the image and its text, CLIP's two encoders side by side and T5 after them."""

    component = "transformer"
    word = "transformer"
    kind: ClassVar[type[Any]] = SD3Transformer2DModel
    output = Transformer2DModelOutput
    latents = "hidden_states"
    max_propagated_pixels = math.inf  # the product that gives the maps propagates them as well

    def with_maps(self, model: nn.Module) -> Denoiser:
        """Return what runs the model's calls with maps."""
        return TransformerWithMaps(model)

    def segments(self, encoded: Encoded, length: int) -> list[Segment]:
        """Tell which tokenizers' tokens stand where: without T5 zeros stand in its place."""
        t5 = encoded.calls.get("tokenizer_3")
        of_t5 = t5[0].ids.shape[1] if t5 else encoded.arguments.get("max_sequence_length") or 0
        clip = tuple(name for name in encoded.calls if name != "tokenizer_3")
        parts = [Segment(0, length - of_t5, clip), Segment(length - of_t5, of_t5, ("tokenizer_3",) if t5 else ())]
        return [part for part in parts if part.tokenizers]

    def draws(self, arguments: Mapping[str, Any], frame: FrameType | None) -> bool:
        """Tell whether a call may draw the prompts: one that skips layers is for guidance."""
        return arguments.get("skip_layers") is None

    def map_size(self, model: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return height and width of the image in tokens."""
        h, w = super().map_size(model, arguments)
        patch = model.config.patch_size
        return h // patch, w // patch

    def pixels_per_token(self, pipe: Any) -> int:
        """Return the number that height and width of an image must be multiples of."""
        return pipe.vae_scale_factor * pipe.transformer.config.patch_size

    def default_size(self, pipe: Any) -> tuple[int, int]:
        """Return height and width of an image where nothing is said."""
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return side, side


class Flux(StableDiffusion3):
    """FLUX.1: joint attention over T5's text and the image's latents packed two by two, one call for each guidance."""

    kind = FluxTransformer2DModel
    tokenizer = "tokenizer_2"

    def segments(self, encoded: Encoded, length: int) -> list[Segment]:
        """Tell which tokenizers' tokens stand where: of CLIP there is only one vector, which is no token."""
        return [Segment(0, length, tuple(name for name in encoded.calls if name == self.tokenizer))]

    def draws(self, arguments: Mapping[str, Any], frame: FrameType | None) -> bool:
        """Tell whether a call may draw the prompts: not so the one of the negative prompts, be they the same."""
        negative = None if frame is None else frame.f_locals.get("negative_prompt_embeds")
        return negative is None or arguments["encoder_hidden_states"] is not negative

    def timestep(self, arguments: Mapping[str, Any], frame: FrameType | None) -> Any:
        """Return the timestep of a call as the scheduler has it: the model is given a thousandth of it."""
        own = None if frame is None else frame.f_locals.get("t")
        return arguments["timestep"] if own is None else own

    def map_size(self, model: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return height and width of the image in tokens."""
        return packed_size(arguments["img_ids"])

    def pixels_per_token(self, pipe: Any) -> int:
        """Return the number that height and width of an image must be multiples of."""
        return pipe.vae_scale_factor * 2


FAMILIES = (Family(), StableDiffusion3(), Flux())


def family_of(pipe: Any) -> Family:
    """Return the family that a pipeline's model is of.

    Raises:
        DiffuMaskError: the pipeline has no denoiser, or one of another kind.
    """
    for family in FAMILIES:
        model = getattr(pipe, family.component, None)
        if isinstance(getattr(model, "_orig_mod", model), family.kind):
            return family
    kinds = "a UNet2DConditionModel, an SD3Transformer2DModel or a FluxTransformer2DModel"
    for component, word in {family.component: family.word for family in FAMILIES}.items():
        model = getattr(pipe, component, None)
        if model is not None:
            raise DiffuMaskError(
                f"the {word} of {type(pipe).__name__} is a {type(model).__name__}: maps come from {kinds}, which draws "
                "one image for each prompt, and not from a wrapper around one"
            )
    raise DiffuMaskError(f"{type(pipe).__name__} has no UNet and no transformer: maps come from pipelines with {kinds}")


def has_unet(pipe: Any) -> bool:
    """Tell whether what denoises in a pipeline is a UNet."""
    return family_of(pipe).component == "unet"


def check_runs(pipe: Any, engine: str, attention: str = "sdpa") -> None:
    """Refuse what runs UNets alone.

    Args:
        pipe: a pipeline.
        engine: that is to run it.
        attention: that is to draw where no maps are wanted.

    Raises:
        DiffuMaskError: the pipeline has a transformer, and torch by itself does not run it.
    """
    if not has_unet(pipe) and (engine != "torch" or attention != "sdpa"):
        asked = f"`engine={engine}`" if engine != "torch" else f"`attention={attention}`"
        raise DiffuMaskError(
            f"{asked} is for models with a UNet, and {type(pipe).__name__} has a transformer: use `engine=torch` "
            "with `attention=sdpa`"
        )


def denoising_model(pipe: Any) -> Any:
    """Return the UNet or the transformer of a pipeline.

    Raises:
        DiffuMaskError: it has none, or one of another kind.
    """
    return getattr(pipe, family_of(pipe).component)
