"""The options of `diffumask-fast generate`."""

from dataclasses import dataclass, fields
from pathlib import Path

from diffumask_fast.attention.options import MapOptions
from diffumask_fast.dataset.parts import Part, part_of
from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.models.lora import lora_texts
from diffumask_fast.options import Options, argument, left_open, number, one_of, option, pixel_size, whole
from diffumask_fast.prompts.retrieval import FILTERS
from diffumask_fast.prompts.vocabulary import SHIPPED

NUM = 24


@dataclass(frozen=True)
class PromptOptions(Options):
    """What prompts say of the classes: kinds of them, and captions of a file in place of templates.

    Raises:
        DiffuMaskError: a value is not one that the help allows, or there are no captions that it could be of.
    """

    sub_classes: str | int = option(
        "auto",
        "Such as Labrador dog, in turn: at most N for a class, none, or auto: all, if the model knows any word.",
        whole(1, None, "auto", "none"),
    )
    captions: Path | None = option(None, "File of captions to draw in place of templates: .txt, .jsonl or .parquet.")
    retrieval: str = option(
        "auto", "What tells the best captions: auto, embedding or words.", one_of("auto", "embedding", "words")
    )
    captions_per_class: int = option(3000, "The best captions of each class, at most.", whole(1, 10**6))
    caption_filter: str = option("reference", "Which captions may be taken: reference or none.", one_of(*FILTERS))

    def __post_init__(self) -> None:
        super().__post_init__()
        of_captions = [one for one in fields(self) if one.name not in ("captions", "sub_classes")]
        given = [one.name for one in of_captions if getattr(self, one.name) != one.default]
        if given and self.captions is None:
            raise DiffuMaskError(f"`{given[0]}` is of no use without a file of captions: give `captions` as well")


@dataclass(frozen=True)
class GenerateOptions(Options):
    """What to draw, with what, and where to; None is the model's own.

    Raises:
        DiffuMaskError: a value is not one that the help allows.
    """

    out: Place = argument("Folder or address (s3://bucket/name) of the dataset; run again to finish it.", read=place)
    model: str = option("mini", "mini, a diffusers folder, or a hub id.")
    revision: str | None = option(None, "Revision of a hub id.")
    model_options: Path | None = option(None, "File that calibrate wrote, whose options are the model's own.")
    lora: tuple[str, ...] = option(
        (),
        "Safetensors file, folder or hub id PATH_OR_HUB[:SCALE] to fuse into the weights; may be repeated.",
        lora_texts,
    )
    classes: str | None = option(None, f"dog,cat | {' | '.join(SHIPPED)} | FILE; all that the model lists, else voc.")
    classes_per_image: int = option(1, "Distinct classes joined in one prompt.", whole(1))
    prompts: PromptOptions = PromptOptions()
    num: int | None = option(None, f"Images drawn in all, classes taken in turn; {NUM} when left out.", whole(1, 10**8))
    accept_per_class: int | None = option(
        None, "In place of --num: accepted images of each class, at least.", whole(1, 10**7)
    )
    seed: int = option(0, "Of the run.", whole(0, 2**63 - 1))
    batch_size: str | int = option("auto", "Images per batch, or auto.", whole(1, None, "auto"))
    shard_size: int = option(64, "Images per shard: what a kill can lose.", whole(1))
    steps: int | None = option(None, "Denoising steps; the model's best when left out.", whole(1, 1000))
    guidance_scale: float | None = option(None, "Guidance; the model's best when left out.", number())
    scheduler: str | None = option(None, "Such as ddim, lcm or euler-trailing; the model's own when left out.")
    size: tuple[int, int] | None = option(None, "HxW in pixels; the model's own when left out.", pixel_size())
    dtype: str = option("auto", "auto, fp32, fp16 or bf16.")
    maps: MapOptions = MapOptions()
    mask: MaskOptions = left_open(MaskOptions, "the model's own")
    engine: str = option("torch", "torch, compile, onnx or tensorrt.")
    engine_path: Path | None = option(None, "Folder that export wrote.")
    attention: str = option("sdpa", "Where no maps are wanted: sdpa, or on CUDA xformers.")
    device: str = option("auto", "auto, cpu or cuda.")
    ray: str | None = option(None, "Draw on workers of Ray: local, auto, or a cluster's address.")
    workers: int | None = option(None, "Of Ray; one for each GPU, else for each CPU, when left out.", whole(1, 10**4))
    part: Part | None = option(
        None, "i/n: draw every n-th shard from shard i on, i from 0; n processes draw all.", part_of()
    )
    allow_drift: bool = option(False, "Go on in a changed environment.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accept_per_class is not None and self.num is not None:
            raise DiffuMaskError("`num` counts drawn images and `accept_per_class` accepted ones: give one of the two")
        if self.accept_per_class is not None and self.classes_per_image > 1:
            raise DiffuMaskError(
                "`accept_per_class` counts images of one class each: leave out `classes_per_image`, or give `num`"
            )
        if self.accept_per_class is not None and self.part is not None:
            raise DiffuMaskError(
                "one process decides the rounds of `accept_per_class`: leave out `part`, say `ray`, or give `num`"
            )


@dataclass(frozen=True)
class RebuildOptions(Options):
    """Where a dataset's model is, and where to draw a sample of it again."""

    model: str | None = option(None, "Where the model that drew is now, for rebuild.")
    engine_path: Path | None = option(None, "Where the engine that drew is now, for rebuild.")
    lora: tuple[str, ...] = option(
        (), "Where a LoRA that drew is now, for rebuild; may be repeated, in their order.", lora_texts
    )
    device: str = option("auto", "auto, cpu or cuda, for rebuild.")
