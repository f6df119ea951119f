"""Refinement on real photographs: coarse maps made of exact masks, brought back to the photograph's edges."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.bench.harness import row
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.kernels import guided_filter
from diffumask_fast.learning.evaluation import boundary
from diffumask_fast.masks.crf import LABELS, PRESETS, SIDE, STEPS, crf
from diffumask_fast.masks.make import make_masks, refine_maps
from diffumask_fast.masks.options import MaskOptions

CELLS = (16, 32, 64)
NOISE = 0.1
CUT = 0.5
SETTINGS = {
    "default": MaskOptions(threshold=CUT),
    "guided": MaskOptions(threshold=CUT, colour_steps=0),
    "crf": MaskOptions(threshold=CUT, refine="crf"),
}
BASELINE = MaskOptions(threshold=CUT, refine="none")


def run(photos: Path, every: int = 1, crf_every: int = 20) -> list[dict]:
    """Measure the gain in boundary IoU over bicubic and threshold, and agreement with cv2 and pydensecrf.

    Args:
        photos: folder of folders with `images/*.jpg` and `masks/*.png`, 255 ignored, any other class foreground.
        every: take each n-th photograph of a folder.
        crf_every: take each n-th of those for the CRF, which is slow.

    Returns:
        Rows `<setting>_gain_<cells>` and `<setting>_gain_mean`, value the mean gain, config.share that of photographs
        that gain; `cv2_difference` and `pydensecrf_<preset>`, where those packages are installed.

    Raises:
        DiffuMaskError: there are no photographs.
    """
    gains: dict[str, list[list[float]]] = defaultdict(list)
    agreement: dict[str, list[float]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    for number, (image, mask) in enumerate(_photographs(photos, every)):
        names = [name for name in SETTINGS if name != "crf" or number % crf_every == 0]
        found = {name: [] for name in names}
        for cells in CELLS:
            maps = coarse_map(torch.from_numpy((mask > 0) & (mask < 255)), cells, generator)
            before = _boundary_iou(maps, image, mask, BASELINE)
            for name in names:
                found[name].append(_boundary_iou(maps, image, mask, SETTINGS[name]) - before)
        for name, values in found.items():
            gains[name].append(values)
        if number % crf_every == 0:
            _compare(agreement, maps, image)
    if not gains:
        raise DiffuMaskError(f"{photos} holds no images/*.jpg with masks/*.png: name the folder of photographs")
    rows = []
    for name, values in gains.items():
        table = np.array(values)
        table = np.concatenate([table, table.mean(1, keepdims=True)], 1)
        for level, column in zip((*CELLS, "mean"), table.T, strict=True):
            config = {"share": round(float((column > 0).mean()), 4)}
            rows.append(_row(f"{name}_gain_{level}", column, "boundary IoU", config))
    return rows + [_row(name, np.array(values), "", {}) for name, values in agreement.items()]


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
            mask = np.array(Image.open(path))
            image = np.array(Image.open(folder / "images" / f"{path.stem}.jpg").convert("RGB"))
            share = ((mask > 0) & (mask < 255)).mean()
            if 0.005 < share < 0.95:
                yield torch.from_numpy(image)[None], mask


def _boundary_iou(maps: Tensor, image: Tensor, mask: np.ndarray, options: MaskOptions) -> float:
    found = make_masks(maps, image, options, torch.ones(1, 1, dtype=torch.long))[0][0].numpy() == 1
    ours, true, known = boundary(found), boundary((mask > 0) & (mask < 255)), mask != 255
    return float((ours & true & known).sum() / max(1, ((ours | true) & known).sum()))


def _compare(agreement: dict[str, list[float]], maps: Tensor, image: Tensor) -> None:
    """Add one photograph's difference from cv2's guided filter and agreement with pydensecrf."""
    soft = refine_maps(maps, image, BASELINE)
    guide, radius = image.permute(0, 3, 1, 2).float() / 255, max(1, min(image.shape[1:3]) // CELLS[-1])
    try:
        from cv2.ximgproc import guidedFilter

        # on colours in 0..1, cv2 takes a small determinant for none: 0..255 is the same filter and stays clear of that
        colours = image[0].numpy().astype(np.float32)
        theirs = guidedFilter(colours, soft[0, 0].numpy(), radius, 1e-4 * 255**2)
        ours = guided_filter(guide, soft, radius, 1e-4)[0, 0].numpy()
        inner = np.s_[2 * radius : -2 * radius, 2 * radius : -2 * radius]
        agreement["cv2_difference"].append(float(abs(theirs - ours)[inner].max()))
    except ImportError:
        pass
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        return
    labels = (soft[0, 0] > CUT).long()
    for name, preset in PRESETS.items():
        ours = crf(labels[None, None], 2, image, preset)[0, 0, 1].numpy() > 0.5
        theirs = dense_crf(image[0].numpy(), labels.numpy(), 2, preset).argmax(0) == 1
        agreement[f"pydensecrf_{name}"].append(float((ours & theirs).sum() / max(1, (ours | theirs).sum())))


def dense_crf(image: np.ndarray, labels: np.ndarray, num_labels: int, preset) -> np.ndarray:
    """Run pydensecrf as the reference does on hard labels [H, W]: [L, H, W]; test extra only."""
    from pydensecrf.densecrf import DenseCRF2D

    height, width = labels.shape
    scale = min(height, width) / SIDE
    model = DenseCRF2D(width, height, num_labels)
    other = (1 - preset.gt_prob) / (LABELS - 1)
    energy = np.where(np.arange(num_labels)[:, None] == labels.reshape(-1), -np.log(preset.gt_prob), -np.log(other))
    model.setUnaryEnergy(np.ascontiguousarray(energy, dtype=np.float32))
    compat, sxy = preset.gaussian
    model.addPairwiseGaussian(sxy=sxy * scale, compat=compat)
    compat, sxy, srgb = preset.bilateral
    model.addPairwiseBilateral(sxy=sxy * scale, srgb=srgb, rgbim=np.ascontiguousarray(image), compat=compat)
    return np.array(model.inference(STEPS)).reshape(num_labels, height, width)


def _row(name: str, values: np.ndarray, unit: str, config: dict) -> dict:
    return row(
        "quality", name, values.mean(), unit=unit, low=values.min(), high=values.max(), n=len(values), config=config
    )
