"""The options of `diffumask-fast evaluate` and `train`."""

from dataclasses import dataclass
from pathlib import Path

from diffumask_fast.options import Options, ReadOptions, argument, number, one_of, option, pixel_size, required, whole


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """Whose masks to judge by mini's oracle, or which segmenter to judge by whose masks."""

    model: str = argument("mini-oracle, the judge of mini's world; or a folder that train wrote.")
    data: Path = argument(
        "Whose masks mini-oracle judges; or what a segmenter is judged by: also VOC's or Cityscapes' layout."
    )
    accepted: bool = option(False, "mini-oracle: leave out rejected rows. By others only accepted ones are looked at.")
    ignored_is_background: bool = option(False, "mini-oracle: count 255 as background, in place of leaving it out.")
    split: str | None = option(None, "Of a layout: the part to judge by, such as val.")
    merge: str = option("", "Count several classes as one: human=person,rider;vehicle=car,bus.")
    unseen: str = option("", "Classes that were learnt without masks, with commas: gives seen, unseen, harmonic mean.")
    others: str = option(
        "refuse", "Classes of the data that the model lacks: refuse, background or ignored.",
        one_of("refuse", "background", "ignored"),
    )  # fmt: skip
    device: str = option("auto", "auto, cpu or cuda.")
    sheet: Path | None = option(None, "Write the twenty worst images into this PNG file.")
    reading: ReadOptions = ReadOptions()


@dataclass(frozen=True)
class LearnOptions(Options):
    """How a segmenter is trained; all of it is recorded with the segmenter."""

    segmenter: str = option("tiny", "tiny; segformer, upernet, mask2former or eomt from scratch; a folder; a hub id.")
    steps: int | None = option(None, "Number of batches; 2400 unless epochs are given.", whole(1))
    epochs: int | None = option(None, "Times that each image is seen, in place of steps.", whole(1))
    batch_size: int = option(16, "Images in a batch.", whole(1))
    lr: float | None = option(None, "Highest learning rate; 2e-3 for tiny, 1e-4 for others.", number(0, 1, ends=False))
    schedule: str = option("cosine", "How the learning rate falls: cosine or poly.", one_of("cosine", "poly"))
    size: tuple[int, int] | None = option(
        None, "HxW of the crops, multiples of 32; the first image's, 512 at most.", pixel_size()
    )
    seed: int = option(0, "Of all that is random.", whole(0))
    dtype: str = option("auto", "auto, fp32 or bf16; auto is bf16 on CUDA alone.", one_of("auto", "fp32", "bf16"))


@dataclass(frozen=True)
class TrainOptions(Options):
    """What to train on, and where the segmenter goes."""

    data: Path = argument("A dataset, or a folder in VOC's or Cityscapes' layout.", "IN")
    out: Path = required("Folder of the segmenter; run again to finish it.")
    split: str | None = option(None, "Of a layout: the part to train on, such as train.")
    finetune_on: Path | None = option(None, "Then go on with these data, such as real ones.")
    finetune_split: str | None = option(None, "Of their layout: the part to train on.")
    finetune_steps: int = option(600, "Number of batches of them.", whole(1))
    finetune_lr: float | None = option(
        None, "Highest learning rate there; a fifth of the first.", number(0, 1, ends=False)
    )
    learning: LearnOptions = LearnOptions()
    device: str = option("auto", "auto, cpu or cuda.")
    save_every: int = option(200, "Steps after which the state is saved.", whole(1))
    reading: ReadOptions = ReadOptions()
