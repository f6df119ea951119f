"""Refinement on real photographs: coarse maps made of exact masks, brought back to the photograph's edges."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.bench.baselines import dense_crf, missing
from diffumask_fast.bench.rows import environment, row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.learning.metrics import binary_iou, boundary
from diffumask_fast.masks.crf import PRESETS, SIDE, crf
from diffumask_fast.masks.make import make_masks, refine_maps
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.pictures import decode_picture

CELLS = (16, 32, 64)
NOISE = 0.1
CUT = 0.5
SETTINGS = {
    "default": MaskOptions(threshold=CUT),
    "guided": MaskOptions(threshold=CUT, colour_steps=0),
    "crf": MaskOptions(threshold=CUT, refine="crf"),
}
BASELINE = MaskOptions(threshold=CUT, refine="none")


def run(photos: Path, every: int = 1, crf_every: int = 40) -> Iterator[dict]:
    """Measure the gain in boundary IoU over bicubic and threshold, beside cv2's guided filter and pydensecrf.

    Args:
        photos: folder of folders with `images/*.jpg` and `masks/*.png`, 255 ignored, any other class foreground.
        every: take each n-th photograph of a folder.
        crf_every: take each n-th of those for both CRFs, which are slow.

    Returns:
        Rows `<setting>_gain_<cells>` and `<setting>_gain_mean`, value the mean gain, config.share that of photographs
        that gain; `plain_<cells>`, the boundary IoU that they gain on; and, where those packages are installed,
        `cv2_difference`, the largest difference away from the border, and `pydensecrf_<preset>_<cells>`, the IoU of
        our CRF's mask with theirs.

    Raises:
        DiffuMaskError: there are no photographs.
    """
    folder = Path(photos)
    if not any(folder.glob("*/masks/*.png")):
        raise DiffuMaskError(f"{photos} holds no images/*.jpg with masks/*.png: name the folder of photographs")
    return _rows(folder, every, crf_every)


def _rows(photos: Path, every: int, crf_every: int) -> Iterator[dict]:
    values_of: dict[str, list[list[float]]] = defaultdict(list)  # each photograph's values at each of CELLS
    generator = torch.Generator().manual_seed(0)
    for number, (image, mask) in enumerate(_photographs(photos, every)):
        levels = [_level(cells, image, mask, generator, number % crf_every == 0) for cells in CELLS]
        for name in levels[0]:
            values_of[name].append([values[name] for values in levels])
    facts = environment("cpu")
    for name, values in values_of.items():
        table = np.array(values)
        if name == "cv2_difference":
            yield _row(name, table.max(1), "", facts)
            continue
        table = np.concatenate([table, table.mean(1, keepdims=True)], 1)
        for level, column in zip((*CELLS, "mean"), table.T, strict=True):
            share = {"share": round(float((column > 0).mean()), 4)} if name.endswith("_gain") else {}
            yield _row(f"{name}_{level}", column, "IoU", {**share, **facts})


def _level(cells: int, image: Tensor, mask: np.ndarray, generator: torch.Generator, with_crf: bool) -> dict[str, float]:
    """Return one photograph's figures at one size of its map."""
    maps = coarse_map(torch.from_numpy((mask > 0) & (mask < 255)), cells, generator)
    soft = refine_maps(maps, image, BASELINE)
    masks = {name: _made(maps, image, options) for name, options in SETTINGS.items() if name != "crf" or with_crf}
    figures = {}
    if (theirs := _cv2_guided(soft, image, cells)) is not None:
        ours = refine_maps(maps, image, SETTINGS["guided"])[0, 0].numpy()
        border = 2 * _radius(image, cells)
        inner = np.s_[border:-border, border:-border]
        figures["cv2_difference"] = float(abs(theirs.clip(0, 1) - ours)[inner].max())
        masks["cv2"] = theirs > CUT
    if with_crf and not missing("pydensecrf"):
        labels, scale = (soft[0, 0] > CUT).long(), min(image.shape[1:3]) / SIDE
        for name, preset in PRESETS.items():
            # "threshold" is the preset of `crf` above; it comes last, so its mask is the one that is compared
            ours = masks["crf"]
            if name != "threshold":
                ours = crf(labels[None, None], 2, image, preset)[0, 0, 1].numpy() > 0.5
            masks["pydensecrf"] = dense_crf(image[0].numpy(), labels.numpy(), 2, preset, scale).argmax(0) == 1
            figures[f"pydensecrf_{name}"] = binary_iou(ours, masks["pydensecrf"])
    true, known = boundary((mask > 0) & (mask < 255)), mask != 255
    plain = figures["plain"] = _boundary_iou(_made(maps, image, BASELINE), true, known)
    return figures | {f"{name}_gain": _boundary_iou(made, true, known) - plain for name, made in masks.items()}


def coarse_map(mask: Tensor, cells: int, generator: torch.Generator) -> Tensor:
    """Turn a bool mask [H, W] into what attention might see of it: [1, 1, cells, cells] in 0..1, blurred and noisy."""
    maps = F.adaptive_avg_pool2d(mask[None, None].float(), cells)
    line = torch.tensor([0.25, 0.5, 0.25])
    maps = F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), (line[:, None] * line)[None, None])
    maps = (maps + NOISE * torch.randn(maps.shape, generator=generator)).clamp(min=0)
    return maps / maps.amax()


def _photographs(photos: Path, every: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    for folder in sorted(path for path in Path(photos).iterdir() if path.is_dir()):
        for path in sorted(folder.glob("masks/*.png"))[::every]:
            mask = np.array(decode_picture(path))
            image = np.array(decode_picture(folder / "images" / f"{path.stem}.jpg").convert("RGB"))
            share = ((mask > 0) & (mask < 255)).mean()
            if 0.005 < share < 0.95:
                yield torch.from_numpy(image)[None], mask


def _made(maps: Tensor, image: Tensor, options: MaskOptions) -> np.ndarray:
    return make_masks(maps, image, options, torch.ones(1, 1, dtype=torch.long))[0][0].numpy() == 1


def _boundary_iou(made: np.ndarray, true: np.ndarray, known: np.ndarray) -> float:
    ours = boundary(made)
    return float((ours & true & known).sum() / max(1, ((ours | true) & known).sum()))


def _radius(image: Tensor, cells: int) -> int:
    return max(1, round(min(image.shape[1:3]) / cells))


def _cv2_guided(soft: Tensor, image: Tensor, cells: int) -> np.ndarray | None:
    """Filter with opencv-contrib as `refine_maps` does; None where it is not installed."""
    try:
        from cv2.ximgproc import guidedFilter
    except ImportError:
        return None
    # with colours in 0..1 cv2 takes small determinants for zero; with 0..255 it does not, and the filter is the same
    eps = SETTINGS["guided"].eps * 255**2
    return guidedFilter(image[0].numpy().astype(np.float32), soft[0, 0].numpy(), _radius(image, cells), eps)


def _row(name: str, values: np.ndarray, unit: str, config: dict[str, Any]) -> dict:
    return row(
        "quality", name, values.mean(), unit=unit, low=values.min(), high=values.max(), n=len(values), config=config
    )
