"""The options of what datasets are for."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.generation.options import PromptOptions
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.options import (
    Options,
    Reader,
    ReadOptions,
    argument,
    number,
    one_of,
    option,
    pixel_size,
    required,
    whole,
)

MOST_COPIES = 100  # new images of one kind for each image


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """Whose masks to judge by mini's oracle, or which segmenter to judge by whose masks."""

    model: str = argument("mini-oracle, the judge of mini's world; or a folder that train wrote.")
    data: Place = argument(
        "Whose masks mini-oracle judges; or what a segmenter is judged by: also VOC's or Cityscapes' layout.",
        read=place,
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


def splice_shares(text: str) -> dict[tuple[int, int], Fraction]:
    """Read `2x2=1/20,3x3=0.1`: (rows, columns) -> new images for each image.

    Raises:
        ValueError: it is something else.
    """
    shares = {}
    for part in text.replace(" ", "").split(",") if text.strip() not in ("", "0", "none") else ():
        grid, _, share = part.partition("=")
        rows, _, columns = grid.partition("x")
        numbers = int(rows), int(columns)
        if min(numbers) < 1 or max(numbers) > 64 or numbers == (1, 1) or numbers in shares:
            raise ValueError(grid)
        shares[numbers] = Fraction(share)
        if not 0 <= shares[numbers] <= MOST_COPIES:
            raise ValueError(share)
    return shares


def _splices() -> Reader:
    def read(value: Any) -> str:
        try:
            shares = splice_shares(value)
        except (ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError("none, or grids (rows x columns) with their shares, such as 2x2=1/20,3x3=0.1") from error
        return ",".join(f"{rows}x{columns}={share}" for (rows, columns), share in shares.items()) or "none"

    return read


def span(text: str) -> tuple[float, float]:
    """Read `6-22`: two numbers."""
    low, high = map(float, text.split("-"))
    return low, high


def _span(low: float, high: float, example: str) -> Reader:
    """Allow two numbers in a range, the smaller one first, as "LOW-HIGH" or as a pair."""

    def read(value: Any) -> str:
        try:
            text = value if isinstance(value, str) else "-".join(f"{number:g}" for number in value)
            first, last = span(text)
            if low <= first <= last <= high:
                return f"{first:g}-{last:g}"
        except (TypeError, ValueError):
            pass
        raise ValueError(f"two numbers LOW-HIGH between {low} and {high}, such as {example}")

    return read


@dataclass(frozen=True)
class AugmentationOptions(Options):
    """How often and how strongly images are augmented.

    Shares are new images for each image that is there; in training they are probabilities, at most 1.

    Args:
        splice: how often images are tiled into one, by grid, rows x columns. The default is what the paper's program
            makes of its 60,000 images: 1,500 of 1x2 and 2x1 each, 3,000, 4,000, 3,000 and 1,000 of the others.
        splice_size: "same" makes the tiles smaller, so that the result has the size of its first tile; "full" leaves
            them as they are, as the paper's program does.
        blur: how often images are blurred by a Gaussian.
        blur_lengths: of the Gaussian's kernel in pixels, the shortest and the longest, at a shorter side of 512;
            elsewhere in proportion. Lengths are odd, and at least 3.
        occlude: how often a patch of another image covers a part, with its labels.
        occlude_area: the smallest and the largest share of the image that a patch covers.
        perspective: how often images are seen from another side.
        perspective_shift: how far each corner moves at most, as a share of the side.

    Raises:
        DiffuMaskError: a value is not one of those above.

    Example:
        >>> AugmentationOptions(splice="2x2=0.1", blur=0).splice
        '2x2=1/10'
    """

    splice: str = option(
        "1x2=1/40,2x1=1/40,2x2=1/20,3x3=1/15,5x5=1/20,8x8=1/60", "Share of splices by grid, or none.", _splices()
    )
    splice_size: Literal["same", "full"] = option(
        "same", "same: tiles shrink; full: the picture grows.", one_of("same", "full")
    )
    blur: float = option(0.25, "Share of blurred images.", number(0, MOST_COPIES))
    blur_lengths: str = option("6-22", "Kernel lengths in pixels at 512, LOW-HIGH.", _span(1, 128, "6-22"))
    occlude: float = option(0.25, "Share of images with a patch of another one.", number(0, MOST_COPIES))
    occlude_area: str = option("0.05-0.3", "Share of the image under a patch, LOW-HIGH.", _span(0, 1, "0.05-0.3"))
    perspective: float = option(0.25, "Share of images seen from another side.", number(0, MOST_COPIES))
    perspective_shift: float = option(0.15, "Largest shift of a corner, as a share of the side.", number(0, 0.24))


@dataclass(frozen=True)
class AugmentOptions(Options):
    """What to augment, and where to; shares are new images for each image that is there."""

    source: Place = argument("Dataset to augment.", "IN", place)
    out: Place = argument("Folder or address of the new dataset; run again to finish it.", read=place)
    augmentations: AugmentationOptions = AugmentationOptions()
    seed: int = option(0, "Of all that is drawn at random.", whole(0, 2**63 - 1))
    originals: bool = option(True, "Keep the images of IN beside the new ones.")
    all: bool = option(False, "Rejected rows too.")
    reading: ReadOptions = ReadOptions()


ON_THE_FLY: dict[str, Any] = {  # name -> probability in training
    "splice": "1x2=1/10,2x1=1/10,2x2=3/10", "blur": 0.1, "occlude": 0.5, "perspective": 0.25,
}  # fmt: skip


def _augmentations() -> Reader:
    """Allow none, all, or some of their names with commas; they are kept in one order."""

    def read(value: Any) -> str:
        given = [name.strip() for name in str(value).split(",")]
        names = {"none": [], "all": list(ON_THE_FLY)}.get(str(value).strip(), given)
        if set(names) - set(ON_THE_FLY):
            raise ValueError(f"none, all, or some of {', '.join(ON_THE_FLY)}")
        return ",".join(name for name in ON_THE_FLY if name in names) or "none"

    return read


def chosen_augmentations(names: str, images: int) -> AugmentationOptions | None:
    """Return how training augments on the fly: the probabilities of what is named, 0 for the others; None for "none".

    Half of the examples are spliced, in few and large tiles, and half are occluded: more objects in a picture, and no
    picture twice the same.

    Args:
        names: as `LearnOptions` takes them.
        images: in the data; one alone cannot be occluded by another.
    """
    chosen = [name for name in names.split(",") if name in ON_THE_FLY and (images > 1 or name != "occlude")]
    off: dict[str, Any] = {"splice": "none", "blur": 0.0, "occlude": 0.0, "perspective": 0.0}
    return AugmentationOptions(**(off | {name: ON_THE_FLY[name] for name in chosen})) if chosen else None


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
    augment: str = option(
        "all", "On the fly: all, none, or with commas splice, blur, occlude, perspective.", _augmentations()
    )
    seed: int = option(0, "Of all that is random.", whole(0))
    dtype: str = option("auto", "auto, fp32 or bf16; auto is bf16 on CUDA alone.", one_of("auto", "fp32", "bf16"))


@dataclass(frozen=True)
class TrainOptions(Options):
    """What to train on, and where the segmenter goes."""

    data: Place = argument("A dataset, or a folder in VOC's or Cityscapes' layout.", "IN", place)
    out: Path = required("Folder of the segmenter; run again to finish it.")
    split: str | None = option(None, "Of a layout: the part to train on, such as train.")
    finetune_on: Place | None = option(None, "Then go on with these data, such as real ones.", place)
    finetune_split: str | None = option(None, "Of their layout: the part to train on.")
    finetune_steps: int = option(600, "Number of batches of them.", whole(1))
    finetune_lr: float | None = option(
        None, "Highest learning rate there; a fifth of the first.", number(0, 1, ends=False)
    )
    learning: LearnOptions = LearnOptions()
    device: str = option("auto", "auto, cpu or cuda.")
    save_every: int = option(200, "Steps after which the state is saved.", whole(1))
    reading: ReadOptions = ReadOptions()


@dataclass(frozen=True)
class PruneOptions(Options):
    """Which samples are pruned; recorded in the new dataset."""

    alpha: float = option(0.7, "Share of each class that is pruned: the lowest in rank.", number(0, 1, ends=False))
    rank: str = option(
        "cross-validation", "cross-validation: agreement with a segmenter that has not seen it; or quality.",
        one_of("cross-validation", "quality"),
    )  # fmt: skip
    folds: int = option(3, "Parts of the cross-validation: as many segmenters are trained.", whole(2))
    rounds: int = option(
        2,
        "Times that they are trained, each without what ranked lowest before; all but the last for half the steps.",
        whole(1, 9),
    )
    learning: LearnOptions = LearnOptions()


@dataclass(frozen=True)
class FilterOptions(Options):
    """What to filter, how, and where to."""

    source: Place = argument("Dataset to filter.", "IN", place)
    out: Place = argument("Folder or address of the new dataset; run again to finish it.", read=place)
    pruning: PruneOptions = PruneOptions()
    export_cleanlab: Path | None = option(
        None, "Write labels and pred_probs as cleanlab.segmentation takes them: FILE.npz."
    )
    device: str = option("auto", "auto, cpu or cuda.")
    reading: ReadOptions = ReadOptions()


@dataclass(frozen=True)
class AffinityLearning(Options):
    """How AffinityNet learns, and what becomes of its maps; recorded in the new dataset.

    Args:
        mask: "attention", the paper's masks: attention maps, cut where they agree best with the affinity map;
            "affinity", the affinity map in the attention map's place.
        affinity_threshold: where the affinity map is cut: "otsu", or a number between 0 and 1 of its maximum.
        backbone: "tiny", from scratch, or a folder or hub id of a backbone that transformers loads.
        per_class: whether each class has a net of its own, as in the paper's program, or all classes share one.
        reference_labels: whether the net learns from the labels that a fault in the paper's program makes.
        steps: batches that a net learns from.
        batch_size: images in a batch.
        lr: the highest learning rate; 2e-3 for tiny and 1e-4 for others.
        size: of the crops; the first image's, 512 at most.
        seed: of all that is random.
        dtype: "auto", bf16 on CUDA alone; "fp32" or "bf16".
        beta: the power that affinities are raised to before the random walk.
        walk: steps of the random walk.

    Raises:
        DiffuMaskError: a value is not one of those above.

    Example:
        >>> AffinityLearning(affinity_threshold="0.45").affinity_threshold
        0.45
    """

    mask: str = option(
        "attention", "attention, cut where it agrees best with the affinity map; or affinity, that map itself.",
        one_of("attention", "affinity"),
    )  # fmt: skip
    affinity_threshold: Literal["otsu"] | float = option(
        "otsu", "Where the affinity map is cut: otsu, or a number between 0 and 1.", number(0, 1, "otsu", ends=False)
    )
    backbone: str = option("tiny", "tiny, from scratch; a folder or hub id of a backbone of transformers.")
    per_class: bool = option(False, "A net for each class, as in the paper's program.")
    reference_labels: bool = option(False, "Learn from the labels that a fault in the paper's program makes.")
    steps: int = option(300, "Number of batches that a net learns from.", whole(1))
    batch_size: int = option(8, "Images in a batch.", whole(1))
    lr: float | None = option(None, "Highest learning rate; 2e-3 for tiny, 1e-4 for others.", number(0, 1, ends=False))
    size: tuple[int, int] | None = option(
        None, "HxW of the crops, multiples of 32; the first image's, 512 at most.", pixel_size()
    )
    seed: int = option(0, "Of all that is random.", whole(0))
    dtype: str = option("auto", "auto, fp32 or bf16; auto is bf16 on CUDA alone.", one_of("auto", "fp32", "bf16"))
    beta: float = option(16.0, "Power of the affinities before the random walk.", number(1, 256))
    walk: int = option(256, "Steps of the random walk.", whole(1, 65536))


@dataclass(frozen=True)
class AffinityMaskOptions(MaskOptions):
    """How masks are made with AffinityNet; recorded in the new dataset."""

    threshold: Literal["adaptive"] = option(
        "adaptive", "adaptive: by agreement with the affinity map; remask has the others.", one_of("adaptive")
    )
    affinity: AffinityLearning = AffinityLearning()


@dataclass(frozen=True)
class AffinityOptions(Options):
    """Of what to make new masks with AffinityNet, and where to."""

    source: Place = argument("Dataset with stored maps.", "IN", place)
    out: Place = argument("Folder of the new dataset; run again to finish it.", read=place)
    masks: AffinityMaskOptions = AffinityMaskOptions()
    device: str = option("auto", "auto, cpu or cuda.")
    save_every: int = option(200, "Steps after which the state is saved.", whole(1))
    reading: ReadOptions = ReadOptions()


@dataclass(frozen=True)
class CalibrateOptions(Options):
    """Whose options of maps and masks to find, by whose judgement, and on which images."""

    model: str = argument("mini, a diffusers folder, or a hub id.")
    judge: str = required("mini-oracle; a segmenter's folder; or data with right masks of images of --run.")
    run: Place | None = option(None, "The dataset whose images the judge's masks are of, by key.", place)
    split: str | None = option(None, "Of the judge's data in a layout: the part to judge by.")
    redraw: bool = option(True, "Draw the images of --run again, so that options of maps are tried too.")
    out: Path | None = option(None, "File of the options; diffumask.json beside the model when left out.")
    work: Path | None = option(None, "Folder that keeps what is drawn, so that a killed calibration goes on.")
    revision: str | None = option(None, "Revision of a hub id.")
    classes: str | None = option(None, "dog,cat | voc | FILE; all that the model lists, else VOC.")
    classes_per_image: int = option(1, "Distinct classes joined in one prompt.", whole(1))
    prompts: PromptOptions = PromptOptions()
    num: int = option(48, "Images drawn, classes taken in turn.", whole(16, 10**5))
    seed: int = option(52000, "Of these images; not one that datasets are drawn with.", whole(0, 2**63 - 1))
    batch_size: str | int = option("auto", "Images per batch, or auto.", whole(1, None, "auto"))
    steps: int | None = option(None, "Denoising steps; the model's best when left out.", whole(1, 1000))
    guidance_scale: float | None = option(None, "Guidance; the model's best when left out.", number())
    scheduler: str | None = option(None, "Such as ddim, lcm or euler-trailing; the model's own when left out.")
    size: tuple[int, int] | None = option(None, "HxW in pixels; the model's own when left out.", pixel_size())
    dtype: str = option("auto", "auto, fp32, fp16 or bf16.")
    device: str = option("auto", "auto, cpu or cuda.")
    reading: ReadOptions = ReadOptions()
