"""The type of a diffusers pipeline; diffusers' base class does not declare the components that all of them have."""

from __future__ import annotations

from typing import Any, Protocol


class DiffusersPipeline(Protocol):
    """A diffusers pipeline whose denoiser is a UNet2DConditionModel."""

    unet: Any
    vae: Any
    scheduler: Any
    tokenizer: Any
    text_encoder: Any
    image_processor: Any
    config: Any
    vae_scale_factor: int
    components: dict[str, Any]
    _execution_device: Any  # also where a model is moved there for its own call alone

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw images."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the components."""

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Configure the progress bar."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the components as a folder."""
