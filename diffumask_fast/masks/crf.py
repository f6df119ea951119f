"""Dense CRF with a window: the two settings of the paper's program, for all candidates of a batch at once."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffumask_fast.kernels.mean_field import bilateral_norm, mean_field

STEPS = 10
WINDOW = 31
REACH = 2.0  # half width of the window, in standard deviations of the bilateral kernel
LABELS = 21  # of VOC: the reference spreads the rest of the probability over all of them, even where it uses two
SIDE = 512  # pixels of the images that the reference's widths are for
MEMORY = 256 * 2**20  # bytes of the tensors of one pass


@dataclass(frozen=True)
class Preset:
    """How sure the hard labels are, and (compatibility, sxy[, srgb]) of both kernels at 512 pixels."""

    gt_prob: float
    bilateral: tuple[float, float, float]
    gaussian: tuple[float, float]


PRESETS = {
    "seeds": Preset(0.7, (9.0, 60.0, 10.0), (3.0, 3.0)),  # the reference's aff_prepare.py
    "threshold": Preset(0.5, (10.0, 80.0, 13.0), (3.0, 3.0)),  # its curve_threshold.py
}


def crf(labels: Tensor, num_labels: int, images: Tensor, preset: Preset, *, window: int = WINDOW) -> Tensor:
    """Refine hard labels by a windowed dense CRF, ten mean-field steps.

    Widths in pixels grow with the shorter side of the image, from 512. Candidates go through in chunks, so that the
    five tensors of a step stay below 256 MiB.

    Args:
        labels: [B, M, H, W] whole numbers 0..L-1, M candidates of each image.
        num_labels: L.
        images: [B, H, W, 3] uint8.
        preset: one of `PRESETS`.
        window: offsets along each side.

    Returns:
        [B, M, L, H, W] fp32 probabilities.

    Example:
        >>> labels = torch.zeros(1, 1, 16, 16, dtype=torch.long)
        >>> crf(labels, 2, torch.zeros(1, 16, 16, 3, dtype=torch.uint8), PRESETS["threshold"]).argmax(2).unique()
        tensor([0])
    """
    height, width = labels.shape[2:]
    scale = min(height, width) / SIDE
    compat, sxy, srgb = preset.bilateral
    bilateral, gaussian = (compat, sxy * scale, srgb), (preset.gaussian[0], preset.gaussian[1] * scale)
    dilation = max(1, round(REACH * sxy * scale / (window // 2)))
    guide = images.permute(0, 3, 1, 2).float()
    norm = bilateral_norm(guide, window=window, dilation=dilation, bilateral=bilateral)
    sure, other = preset.gt_prob, (1 - preset.gt_prob) / (LABELS - 1)
    one = labels.shape[0] * num_labels * height * width * 4 * 5
    done = []
    for part in labels.split(max(1, MEMORY // one), dim=1):
        hard = F.one_hot(part.long(), num_labels).movedim(-1, 2).float()
        unary = -torch.log(hard * (sure - other) + other)
        q = torch.softmax(-unary, dim=2)
        for _ in range(STEPS):
            q = mean_field(
                q, unary, guide, window=window, dilation=dilation, bilateral=bilateral, gaussian=gaussian, norm=norm
            )
        done.append(q)
    return torch.cat(done, 1)
