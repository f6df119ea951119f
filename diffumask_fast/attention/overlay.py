"""Show a map on its image."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

WARM = ((0.0, 0.0, 0.3), (0.1, 0.3, 0.8), (0.9, 0.8, 0.2), (1.0, 0.1, 0.0))


def overlay(image: Image.Image, heat: Tensor, opacity: float = 0.6) -> Image.Image:
    """Lay a map over an image, blue where it is lowest, red where it is highest.

    Args:
        image: any PIL image.
        heat: [h, w], any range.
        opacity: of the colours.

    Returns:
        an RGB image of the same size.
    """
    rgb = image.convert("RGB")
    big = F.interpolate(heat.detach().float().cpu()[None, None], (rgb.height, rgb.width), mode="bilinear")[0, 0]
    big = (big - big.min()) / (big.max() - big.min()).clamp_min(torch.finfo(big.dtype).tiny)
    stops = torch.tensor(WARM)
    place = big * (len(WARM) - 1)
    low = place.long().clamp(max=len(WARM) - 2)
    colours = torch.lerp(stops[low], stops[low + 1], (place - low)[..., None])
    shown = Image.fromarray((colours * 255).round().byte().numpy())
    return Image.blend(rgb, shown, opacity)
