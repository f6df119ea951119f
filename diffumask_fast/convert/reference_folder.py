"""Folders of the paper's program on their way in: `train_image/image_<class>_<n>.jpg` and `npy/` of the same names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from diffumask_fast.convert.pickled_maps import read_maps
from diffumask_fast.convert.sources import Head, Pixels, decode_image
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.masks.make import make_masks, quantise_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.masks.rejection import rejections
from diffumask_fast.prompts.vocabulary import Vocabulary

SIDE = 64  # of the maps that are kept: that program enlarges its maps from 64 pixels at most


class ReferenceFolder:
    """See `sources.Source`; the folder of one class, or one with several of them.

    Number n of that program's maps is VOC's class n + 1. The maps are kept, made smaller to 64 pixels, and masks are
    made of them as `remask` does by default. Where the drop-in wrote prompts.jsonl, prompts and seeds come from it.

    Raises:
        DiffuMaskError: there is no image, or one without its maps.
    """

    def __init__(self, root: Path, split: str | None, max_pixels: int) -> None:
        if split is not None:
            raise DiffuMaskError(f"{root} is of a program that knows no splits: leave out `split`")
        self._max_pixels = max_pixels
        self.classes = {0: "background"} | {entry.id: entry.name for entry in Vocabulary.voc().entries}
        own = (root / "train_image").is_dir()
        folders = [root] if own else sorted(path.parent for path in root.glob("*/train_image"))
        self._images = [path for folder in folders for path in sorted((folder / "train_image").glob("*.jpg"))]
        self._facts = {folder: _facts(folder / "prompts.jsonl") for folder in folders}
        if not self._images:
            raise DiffuMaskError(f"{root} holds no train_image/*.jpg: name a folder that the paper's program wrote")
        for path in (*folders, *(path.parent for path in self._images), *self._images):
            if path.is_symlink():
                raise DiffuMaskError(f"{path} is a link, and links in data are not followed: put the files there")

    def __len__(self) -> int:
        return len(self._images)

    def head(self, index: int) -> Head:
        """Return name, classes, and what is known of the prompt."""
        path = self._images[index]
        facts = self._facts[path.parent.parent].get(path.stem, {})
        prompt, seed = facts.get("prompt", ""), facts.get("seed")
        if not isinstance(prompt, str) or not (seed is None or type(seed) is int):
            raise DiffuMaskError(f"prompts.jsonl beside {path} holds a prompt or a seed that is none: take it away")
        return Head(path.stem, tuple(self._maps(index)), prompt, seed)

    @torch.inference_mode()
    def pixels(self, index: int) -> Pixels:
        """Return image, maps and the mask that is made of them."""
        image, maps = decode_image(self._images[index], self._max_pixels), self._maps(index)
        ids = torch.tensor([list(maps)])
        stacked = torch.from_numpy(np.stack(list(maps.values())))[None]
        small = F.interpolate(stacked, [min(SIDE, side) for side in stacked.shape[2:]], mode="area")
        kept, pictures, options = quantise_maps(small), torch.from_numpy(image)[None], MaskOptions()
        mask, quality = make_masks(kept, pictures, options, ids)
        names = [[self.classes[class_id] for class_id in maps]]
        (reason,) = rejections(pictures, mask, ids, names, options, quality)
        return Pixels(image, mask[0].numpy(), quality[0].tolist(), kept[0].numpy(), reason, drawn=True)

    def _maps(self, index: int) -> dict[int, np.ndarray]:
        """Return class id -> map of those that are not empty."""
        image = self._images[index]
        maps = read_maps(image.parent.parent / "npy" / f"{image.stem}.npy")
        if strange := set(maps) - set(range(len(self.classes) - 1)):
            raise DiffuMaskError(f"the maps of {image} have the number {min(strange)}: VOC has 20 classes, from 0 on")
        return {number + 1: values for number, values in sorted(maps.items()) if np.nan_to_num(values).max() > 0}


def _facts(path: Path) -> dict[str, dict[str, Any]]:
    """Return name of an image -> its line in prompts.jsonl, where there is one."""
    if not path.is_file():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {line["image"]: line for line in lines}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DiffuMaskError(f"{path} holds no line for each image: take it away, or bring it back") from error
