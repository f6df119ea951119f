"""The paper's program's flags, and ours."""

from dataclasses import dataclass
from pathlib import Path

from diffumask_fast.options import Options, number, option, required, whole


@dataclass(frozen=True, kw_only=True)
class DropinOptions(Options):
    """What to draw in the layout of the paper's program, and where to.

    Raises:
        DiffuMaskError: a value is not one that the help allows.
    """

    classes: str = required("One VOC class; also several joined by commas, or voc for all 20.")
    thread_num: int = option(1, "Workers of the original: decides seeds and numbers, no more.", whole(1))
    output: Path = required("Folder of the class folders.")
    image_number: int = required("Images of each class.", whole(1))
    MY_TOKEN: str | None = option(None, "Taken and not used: log in to the hub with `hf auth login`.")
    model: str = option("mini", "mini, a diffusers folder, or a hub id.")
    record: bool = option(False, "Also write prompts.jsonl: prompt and seed of each image.")
    batch_size: str | int = option("auto", "Images per batch, or auto.", whole(1, None, "auto"))
    steps: int | None = option(None, "The model's best when left out, 50 where it names none.", whole(1))
    guidance_scale: float | None = option(None, "The model's best when left out, 7 where it names none.", number())
    dtype: str = option("auto", "auto, fp32, fp16 or bf16.")
    device: str = option("auto", "auto, cpu or cuda.")
