"""The options of `diffumask-fast export`."""

from dataclasses import dataclass
from pathlib import Path

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import Options, argument, one_of, option, pixel_size, whole


@dataclass(frozen=True)
class ShapeOptions(Options):
    """The shapes that an engine is exported for.

    Args:
        max_batch: the most images of a call.
        min_size: the least height and width, pixels; None is the model's own.
        max_size: the most; None is twice the least.
        static: exactly max_batch images (fewer are padded) of min_size.
        max_phrases: the most phrases of an image, and the most maps propagated at a level, phrases times propagations;
            up to 8 cost nothing where the size of the heads is a multiple of 8.
        propagate: apply self-attention to earlier maps, at the levels that are small enough at min_size.

    Raises:
        DiffuMaskError: a value is out of range.

    Example:
        >>> ShapeOptions(max_batch=4, min_size="64x96").min_size
        (64, 96)
    """

    max_batch: int = option(16, "The most images of a batch.", whole(1))
    min_size: tuple[int, int] | None = option(None, "HxW in pixels; the model's own when left out.", pixel_size())
    max_size: tuple[int, int] | None = option(None, "HxW in pixels; twice the least when left out.", pixel_size())
    static: bool = option(False, "One shape alone: the most images, of the least size.")
    max_phrases: int = option(8, "The most phrases of an image times propagations.", whole(1))
    propagate: bool = option(True, "Let the graph propagate maps.")


@dataclass(frozen=True)
class ExportOptions(Options):
    """What to export, for what, and where to.

    Raises:
        DiffuMaskError: a value is not one that the help allows, or an option of TensorRT is given for ONNX Runtime.
    """

    model: str = argument("mini, a diffusers folder, or a hub id; to refit, the folder of an engine.")
    out: Path = argument("Folder of the engine; must not be there yet.")
    to: str = option("onnx", "onnx, tensorrt or tensorrt-rtx.", one_of("onnx", "tensorrt", "tensorrt-rtx"))
    revision: str | None = option(None, "Revision of a hub id.")
    dtype: str = option(
        "auto", "fp32, fp16 or bf16; auto: fp32 for onnx, else fp16.", one_of("auto", "fp32", "fp16", "bf16")
    )
    compute_capability: str | None = option(
        None, "Of the GPU, such as 8.9, for TensorRT; that of the one here when left out."
    )
    shapes: ShapeOptions = ShapeOptions()
    refittable: bool = option(False, "Of TensorRT: let the weights be replaced later.")
    refit: str | None = option(None, "Write the engine given with the weights of this fine-tune.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to == "onnx" and not self.refit and (self.refittable or self.compute_capability):
            raise DiffuMaskError(
                "`refittable` and `compute_capability` are TensorRT's: use `to=tensorrt` or `to=tensorrt-rtx`."
            )
