"""Folders in the layouts of PASCAL VOC and of Cityscapes, as `SegmentationData`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.data import Example, checked_example
from diffumask_fast.masks.make import IGNORE
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.own_files import unlinked
from diffumask_fast.pictures import decode_picture
from diffumask_fast.prompts.public_ids import CITYSCAPES_LABELS
from diffumask_fast.prompts.vocabulary import Vocabulary, voc_palette

IMAGE_MODES = ("RGB", "L", "P", "CMYK", "YCbCr", "RGBA", "LA")  # 8 bits a channel; all become RGB
SUFFIXES = (".jpg", ".jpeg", ".png")
BORDER = (224, 224, 192)  # VOC's colour of what is ignored, number 255 of its palette
IGNORED = ["ignored", "224,224,192"]  # what stands for it in a labelmap.txt, for programs that read colours
ORIENTATION = 0x0112  # in EXIF; 1 is upright
PNG_BIT_DEPTH = 24  # place of that byte in a PNG

LAST_LABEL_ID = 33


class Files(NamedTuple):
    """Where an example lies."""

    name: str
    image: Path
    mask: Path


class Voc:
    """VOC's layout; see `open_data`.

    Args:
        path: the folder that holds `JPEGImages`.
        split: name of a list in `ImageSets/Segmentation`; None where there is only one.
        max_pixels: of a picture, when it is decoded.

    Raises:
        DiffuMaskError: files are missing or links, or the split must be named.
    """

    @staticmethod
    def fits(path: Path) -> bool:
        """Tell whether a folder has this layout."""
        return (path / "JPEGImages").is_dir() and (path / "SegmentationClass").is_dir()

    def __init__(self, path: Path, split: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self._root, self._max_pixels = path, max_pixels
        self.classes, colours = _voc_classes(unlinked(path, "labelmap.txt"))
        self._ids = {_code(colour): number for number, colour in colours.items()}
        lists = unlinked(path, "ImageSets", "Segmentation")
        split = _only_split(split, [file.stem for file in sorted(lists.glob("*.txt"))], lists)
        self._files = [self._place(name) for name in _lines(unlinked(lists, f"{split}.txt"))]
        if not self._files:
            raise DiffuMaskError(f"{lists / split}.txt names no image: give another `split`")
        self.names = [files.name for files in self._files]
        self.origin = [[path.stat().st_size for path in (files.image, files.mask)] for files in self._files]

    def _place(self, name: str) -> Files:
        if name in (".", "..") or any(letter in name for letter in "/\\\0"):
            raise DiffuMaskError(f"{name!r} in a list of images is no name of a file: list names without their folder")
        folder = self._root / "JPEGImages"
        found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").exists()]
        image = found[0].name if found else f"{name}.jpg"
        return _files(name, self._root, ("JPEGImages", image), ("SegmentationClass", f"{name}.png"))

    def __len__(self) -> int:
        return len(self._files)

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        return self._files[index].image

    def __getitem__(self, index: int) -> Example:
        name, image, mask = self._files[index]
        picture = _decode_mask(mask, self._max_pixels, ("P", "L", "RGB"))
        labels = np.array(picture)
        if picture.mode == "RGB":
            labels = self._ids_of_colours(labels, mask)
        elif picture.mode == "P":
            self._check_palette(picture.getpalette("RGB") or [], labels, mask)
        return checked_example(Example(name, decode_image(image, self._max_pixels), labels), self.classes)

    def _check_palette(self, palette: Sequence[int], labels: np.ndarray, path: Path) -> None:
        """Raise where a palette has been sorted anew, so that its numbers are no class ids."""
        for number in np.unique(labels).tolist():
            colour = tuple(palette[3 * number : 3 * number + 3])
            shown = self._ids.get(_code(colour), number) if len(colour) == 3 else number
            if shown != number:
                raise DiffuMaskError(f"{path} has the colour of class {shown} as number {number}: write it as VOC does")

    def _ids_of_colours(self, colours: np.ndarray, path: Path) -> np.ndarray:
        """Return the class ids [H, W] of a mask [H, W, 3] that shows colours."""
        codes, places = np.unique(_code(np.moveaxis(colours.astype(np.int64), -1, 0)), return_inverse=True)
        if unknown := set(codes.tolist()) - set(self._ids):
            colour = ",".join(str(min(unknown) >> shift & 255) for shift in (16, 8, 0))
            raise DiffuMaskError(f"{path} holds the colour {colour}, which is no class: add it to labelmap.txt")
        return np.array([self._ids[code] for code in codes.tolist()], np.uint8)[places].reshape(colours.shape[:2])


class Cityscapes:
    """Cityscapes' layout; see `open_data` and `Voc`."""

    @staticmethod
    def fits(path: Path) -> bool:
        """Tell whether a folder has this layout."""
        return (path / "leftImg8bit").is_dir() and (path / "gtFine").is_dir()

    def __init__(self, path: Path, split: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        self.classes = {0: "background"} | dict(enumerate(Vocabulary.shipped("cityscapes").names, 1))
        images = unlinked(path, "leftImg8bit")
        split = _only_split(split, [folder.name for folder in sorted(images.iterdir()) if folder.is_dir()], images)
        self._files = list(self._found(path, split))
        if not self._files:
            raise DiffuMaskError(f"{images / split} holds no *_leftImg8bit.png: give another `split`")
        self.names = [files.name for files in self._files]
        self.origin = [[path.stat().st_size for path in (files.image, files.mask)] for files in self._files]
        self._from_label_ids, self._from_train_ids = _cityscapes_tables()

    @staticmethod
    def _found(path: Path, split: str) -> Iterator[Files]:
        for image in sorted(unlinked(path, "leftImg8bit", split).glob("*/*_leftImg8bit.png")):
            name, city = image.name.removesuffix("_leftImg8bit.png"), image.parent.name
            masks = [f"{name}_gtFine_{kind}.png" for kind in ("labelTrainIds", "labelIds")]
            mask = next((mask for mask in masks if (path / "gtFine" / split / city / mask).exists()), masks[1])
            yield _files(name, path, ("leftImg8bit", split, city, image.name), ("gtFine", split, city, mask))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        name, image, mask = self._files[index]
        numbers = np.array(_decode_mask(mask, self._max_pixels, ("L", "P")))
        table = self._from_train_ids if mask.name.endswith("_labelTrainIds.png") else self._from_label_ids
        if unknown := set(np.unique(numbers).tolist()) - set(table):
            ids = ", ".join(map(str, sorted(unknown)))
            raise DiffuMaskError(f"{mask} holds {ids}, which Cityscapes does not have: write it as its scripts do")
        lookup = np.full(256, IGNORE, np.uint8)
        lookup[list(table)] = list(table.values())
        return checked_example(Example(name, decode_image(image, self._max_pixels), lookup[numbers]), self.classes)


def _cityscapes_tables() -> tuple[dict[int, int], dict[int, int]]:
    """Return label id -> class id and train id -> class id; all that is not among the 19 classes is ignored."""
    labels = dict.fromkeys((*range(LAST_LABEL_ID + 1), IGNORE), IGNORE)
    labels |= {label: number for number, label in enumerate(CITYSCAPES_LABELS, 1)}
    return labels, {number: number + 1 for number in range(len(CITYSCAPES_LABELS))} | {IGNORE: IGNORE}


def _voc_classes(path: Path) -> tuple[dict[int, str], dict[int, tuple[int, ...]]]:
    """Return names and colours by class id: VOC's, or those of a `labelmap.txt` (`name:r,g,b:parts:actions`)."""
    palette = voc_palette()
    colours = {number: tuple(palette[3 * number : 3 * number + 3]) for number in range(256)}
    if not path.exists():
        names = {0: "background"} | {entry.id: entry.name for entry in Vocabulary.voc().entries}
        return names, {number: colours[number] for number in names} | {IGNORE: BORDER}
    lines = [line.split(":") for line in _lines(path) if not line.startswith("#")]
    lines = [line for line in lines if line[:2] != IGNORED]
    try:
        names = {number: line[0] for number, line in enumerate(lines)}
        own = {number: tuple(map(int, line[1].split(","))) for number, line in enumerate(lines) if line[1]}
    except (IndexError, ValueError):
        names, own = {}, {}
    if names.get(0) != "background" or not 2 <= len(names) <= IGNORE or len(set(names.values())) < len(names):
        raise DiffuMaskError(f"{path} must hold one line name:r,g,b:: for each class, background first")
    if any(len(colour) != 3 or not all(0 <= part <= 255 for part in colour) for colour in own.values()):
        raise DiffuMaskError(f"{path} must give each colour as three numbers r,g,b from 0 to 255")
    shown: dict[tuple[int, ...], str] = {BORDER: "what is ignored"}
    for number, name in names.items():
        colour = own.get(number, colours[number])
        if colour in shown:
            text = ",".join(map(str, colour))
            raise DiffuMaskError(f"{path} gives {name} the colour {text}, which {shown[colour]} has: give another")
        shown[colour] = name
    return names, {IGNORE: BORDER} | {number: own.get(number, colours[number]) for number in names}


def _code(colour: Any) -> Any:
    """Return a colour as one number, or those of an array [3, ...]."""
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def _only_split(split: str | None, there: list[str], folder: Path) -> str:
    if split is None and len(there) == 1:
        return there[0]
    if split not in there:
        known = f"it has {', '.join(there[:20])}" if there else "it has none"
        asked = "a `split` must be named" if split is None else f"there is no split {split}"
        raise DiffuMaskError(f"{asked} of {folder}: {known}")
    return split


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DiffuMaskError(f"{path} cannot be read: bring the file back as it was") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _files(name: str, root: Path, image: tuple[str, ...], mask: tuple[str, ...]) -> Files:
    paths = unlinked(root, *image), unlinked(root, *mask)
    for path in paths:
        if not path.is_file():
            raise DiffuMaskError(f"{path} is missing: bring it back, or take {name} out of the split")
    return Files(name, *paths)


def decode_image(path: Path, max_pixels: int) -> np.ndarray:
    """Return the pixels [H, W, 3] uint8 of an image with 8 bits a channel.

    Raises:
        DiffuMaskError: it is damaged, too large, of another kind, or to be turned when it is shown.
    """
    picture = decode_picture(path, max_pixels=max_pixels)
    if picture.getexif().get(ORIENTATION, 1) != 1:
        raise DiffuMaskError(
            f"{path} is to be turned when it is shown (EXIF), and whether its mask is turned nobody says: save it as "
            "it is to be seen, without that note"
        )
    if picture.mode not in IMAGE_MODES:
        raise DiffuMaskError(f"{path} has mode {picture.mode}: images have 8 bits a channel")
    return np.array(picture.convert("RGB"))


def _decode_mask(path: Path, max_pixels: int, modes: tuple[str, ...]) -> Image.Image:
    picture = decode_picture(path, max_pixels=max_pixels)
    if picture.format != "PNG" or picture.mode not in modes:
        raise DiffuMaskError(f"{path} is {picture.format} of mode {picture.mode}: masks are PNG of class ids")
    if picture.mode == "L" and _bit_depth(path) != 8:  # such grey values are scaled when they are decoded
        raise DiffuMaskError(f"{path} has {_bit_depth(path)} bits a pixel: masks have 8, or a palette")
    return picture


def _bit_depth(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(PNG_BIT_DEPTH + 1)[PNG_BIT_DEPTH]
