"""The options of `convert` and of `import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffumask_fast.dataset.storage import Place, place
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import Options, ReadOptions, argument, number, one_of, option, required, whole
from diffumask_fast.prompts.public_ids import PUBLIC

FORMATS = (
    "voc", "mmseg", "coco", "coco-panoptic", "yolo", "webdataset", "imagefolder", "label-studio", "lance",
    "reference",
)  # fmt: skip
IMPORTED = ("voc", "coco", "reference")


@dataclass(frozen=True)
class ConvertOptions(Options):
    """What to convert, to which format, and where to.

    Args:
        source: a finished dataset.
        out: folder of the files.
        to: one of `FORMATS`; docs/formats.md describes them.
        like: one of `PUBLIC`: classes have the numbers and names of that public dataset's files, so that both can be
            mixed; None numbers them as docs/formats.md says.
        val: share of the images that are for validation. Images of one prompt are never on both sides.
        seed: of the split.
        image_format: of the images; masks are PNG always. A picture that is stored so already is copied byte by byte.
        workers: processes; None takes one for each CPU. It makes no difference to what is written.
        all: rejected rows too.
        reading: what is read.

    Raises:
        DiffuMaskError: a value is not one of those above.
    """

    source: Place = argument("Dataset to convert.", "IN", place)
    out: Path = argument("Folder of the files; run again to finish it.")
    to: str = required(f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.", one_of(*FORMATS))
    like: str | None = option(
        None, f"Numbers and names of the classes as in {', '.join(PUBLIC[:-1])} or {PUBLIC[-1]}.", one_of(*PUBLIC)
    )
    val: float = option(0.0, "Share of the images for validation; split by prompt.", number(0, 0.9))
    seed: int = option(0, "Of the split.", whole(0, 2**63 - 1))
    image_format: Literal["jpg", "png", "webp"] = option(
        "jpg", "Of the images: jpg, or png or webp without loss.", one_of("jpg", "png", "webp")
    )
    workers: int | None = option(None, "Processes; one for each CPU when left out.", whole(1, 256))
    all: bool = option(False, "Rejected rows too.")
    reading: ReadOptions = ReadOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to == "reference" and (self.val or self.image_format != "jpg"):
            raise DiffuMaskError("`to=reference` has JPEG images and no splits: leave out `image_format` and `val`")
        if self.to == "reference" and self.like not in (None, "voc"):
            raise DiffuMaskError(f"`to=reference` has VOC's classes alone: leave out `like={self.like}`")


@dataclass(frozen=True)
class ImportOptions(Options):
    """What to import, of which format, and where to.

    Args:
        source: the folder.
        out: folder of the new dataset.
        layout: one of `IMPORTED`; docs/formats.md describes them.
        split: name of the list of images (VOC) or of the file of annotations (COCO); None where there is only one.
        shard_size: rows of a shard.
        reading: what is read.

    Raises:
        DiffuMaskError: a value is not one of those above.
    """

    source: Path = argument("Folder to import.", "IN")
    out: Place = argument("Folder or address of the new dataset; run again to finish it.", read=place)
    layout: str = required("voc, coco or reference.", one_of(*IMPORTED), also="--from")
    split: str | None = option(None, "List of VOC's or COCO's layout, where there are several.")
    shard_size: int = option(64, "Rows of a shard.", whole(1))
    reading: ReadOptions = ReadOptions()
