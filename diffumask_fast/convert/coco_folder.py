"""COCO's layout on its way in: `annotations/instances_<split>.json`, images in `images/<split>` or `<split>`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from diffumask_fast.convert import rle
from diffumask_fast.convert.item import IGNORE
from diffumask_fast.convert.names import inside
from diffumask_fast.convert.polygons import fill
from diffumask_fast.convert.sources import Head, Pixels, decode_image
from diffumask_fast.dataset.origin import is_drawn
from diffumask_fast.errors import DiffuMaskError

PREFIX = "instances_"


class CocoFolder:
    """See `sources.Source`; of several files of annotations, `split` names one.

    Category ids stay what they are, where all are from 1 to 254, and become 1, 2, ... in their order elsewhere. A pixel
    that two classes claim is ignored (255), and so is what an annotation with `"ignore": 1` covers. The annotations are
    in memory as a whole.

    Raises:
        DiffuMaskError: a file is missing, or the annotations are not what COCO's are.
    """

    def __init__(self, root: Path, split: str | None, max_pixels: int) -> None:
        there = sorted(path.stem.removeprefix(PREFIX) for path in root.glob(f"annotations/{PREFIX}*.json"))
        split = there[0] if split is None and len(there) == 1 else split
        if split not in there:
            known = f"it has {', '.join(there[:20])}" if there else f"it has no annotations/{PREFIX}*.json"
            raise DiffuMaskError(f"{root}: name a `split`; {known}")
        self._file = inside(root, f"annotations/{PREFIX}{split}.json")
        places = (root / "images" / split, root / split, root / "images")
        self._folder = next((place for place in places if place.is_dir()), root)
        self._max_pixels = max_pixels
        content = _read(self._file)
        try:
            self._load(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DiffuMaskError(
                f"{self._file} does not hold images, annotations and categories as COCO's files do"
            ) from error

    def _load(self, content: dict[str, Any]) -> None:
        """Raise a KeyError, TypeError or ValueError where something is missing or of another kind."""
        names = {_whole(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        keeps = all(1 <= number <= 254 for number in names)
        self._ids = {number: number if keeps else place for place, number in enumerate(sorted(names), 1)}
        self.classes = {0: "background"} | {self._ids[number]: names[number] for number in sorted(names)}
        self._images: list[dict[str, Any]] = content["images"]
        for image in self._images:
            if min(_whole(image[name]) for name in ("height", "width")) < 1 or _whole(image["id"]) < 0:
                raise ValueError("numbers that are none")
            inside(self._folder, image["file_name"])
        known = {image["id"] for image in self._images}
        self._annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            if annotation["image_id"] not in known or annotation["category_id"] not in names:
                raise ValueError("an annotation of nothing")
            self._annotations[annotation["image_id"]].append(annotation)
        if len(known) < len(self._images):
            raise ValueError("an id twice")

    def __len__(self) -> int:
        return len(self._images)

    def head(self, index: int) -> Head:
        """Return name and classes of an image."""
        present = np.unique(self._labels(index)).tolist()
        image = self._images[index]
        prompt, seed = image.get("prompt", ""), image.get("seed")  # as `convert` notes them
        return Head(
            name=Path(image["file_name"]).stem,
            class_ids=tuple(number for number in present if number not in (0, IGNORE)),
            prompt=prompt if isinstance(prompt, str) else "",
            seed=seed if type(seed) is int and 0 <= seed < 2**63 else None,
        )

    def pixels(self, index: int) -> Pixels:
        """Return image and mask."""
        path = inside(self._folder, self._images[index]["file_name"])
        image, labels = decode_image(path, self._max_pixels), self._labels(index)
        if image.shape[:2] != labels.shape:
            there, listed = ("x".join(map(str, part.shape[:2])) for part in (image, labels))
            raise DiffuMaskError(f"{path} has {there} pixels, and {self._file} says {listed}: bring both to one size")
        return Pixels(image, labels, drawn=is_drawn(path.read_bytes()))

    def _labels(self, index: int) -> np.ndarray:
        image = self._images[index]
        height, width = image["height"], image["width"]
        if height * width > self._max_pixels:
            raise DiffuMaskError(
                f"{image['file_name']} has {height}x{width}, more than {self._max_pixels} pixels: leave it out, or "
                "raise `max_pixels`"
            )
        labels, ignored = np.zeros((height, width), np.uint8), np.zeros((height, width), bool)
        for annotation in self._annotations[image["id"]]:
            try:
                pixels = _pixels(annotation.get("segmentation"), height, width)
            except DiffuMaskError as error:
                raise DiffuMaskError(f"{self._file}, image {image['file_name'][:200]!r}: {error}") from error
            if annotation.get("ignore"):
                ignored |= pixels
                continue
            number = self._ids[annotation["category_id"]]
            taken = pixels & (labels != 0) & (labels != number)
            labels[pixels] = number
            labels[taken] = IGNORE
        labels[ignored & (labels == 0)] = IGNORE
        return labels


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DiffuMaskError(f"{path} cannot be read as JSON: bring the file back as it was") from error
    if not isinstance(content, dict):
        raise DiffuMaskError(f"{path} holds no object with images, annotations and categories")
    return content


def _pixels(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the pixels [H, W] bool of an annotation's segmentation: a run-length code, or polygons."""
    if isinstance(segmentation, list) and segmentation:
        return fill(segmentation, height, width)
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), str | list):
        raise DiffuMaskError("an annotation has no segmentation: import needs masks, not boxes")
    if segmentation.get("size") != [height, width]:
        size = str(segmentation.get("size"))[:40]
        raise DiffuMaskError(f"a run-length code has the size {size} and its image {[height, width]}: write it anew")
    return rle.decode(segmentation["counts"], height, width)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("no whole number")
    return value
