"""Show samples: masks in colour, over their images, as pictures and as HTML for notebooks."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from diffumask_fast.prompts.vocabulary import voc_palette

SIDE = 256  # longest side of a picture in HTML
_GAP = 4


def colour(mask: np.ndarray, palette: Sequence[int] | None = None) -> np.ndarray:
    """Give a mask [H, W] its colours in a palette of 768 numbers, VOC's where none is given: [H, W, 3] uint8."""
    return np.array(palette or voc_palette(), np.uint8).reshape(256, 3)[mask]


def overlay(
    image: np.ndarray, mask: np.ndarray, opacity: float = 0.5, palette: Sequence[int] | None = None
) -> np.ndarray:
    """Lay a mask's colours over an image [H, W, 3] uint8; background stays as it is."""
    mixed = image + opacity * (colour(mask, palette).astype(np.float32) - image)
    return np.where((mask > 0)[..., None], mixed.round(), image).astype(np.uint8)


def webp(pixels: np.ndarray, side: int = SIDE) -> bytes:
    """Encode an image [H, W, 3] uint8 as WebP, made smaller where its longest side is longer than `side`."""
    picture, stream = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    picture.save(stream, "WEBP", quality=78, method=4)
    return stream.getvalue()


def caption_of(
    key: str, prompt: str, classes: Sequence[str], quality: Sequence[float], reason: str | None = None
) -> str:
    """Return what is said of a sample in a line."""
    rated = dict(zip(classes, quality, strict=False))
    named = ", ".join(f"{name} {rated[name]:.2f}" if name in rated else name for name in classes)
    return "; ".join(filter(None, [key, prompt, named, f"rejected: {reason}" if reason else ""]))


def sample_html(image: np.ndarray, mask: np.ndarray, caption: str) -> str:
    """Return a sample as HTML that needs nothing else: image, mask over it, mask, and a line of text.

    Args:
        image: [H, W, 3] uint8; one of another size than the mask is left out.
        mask: [H, W] uint8.
        caption: any text; it stays text.
    """
    parts = [colour(mask)]
    if image.shape[:2] == mask.shape:
        parts = [image, overlay(image, mask), *parts]
    gap = np.full((mask.shape[0], _GAP, 3), 255, np.uint8)
    wide = np.concatenate([piece for part in parts for piece in (gap, part)][1:], 1)
    data = b64encode(webp(wide, len(parts) * SIDE)).decode()
    words = escape(caption)
    return (
        '<figure style="display:inline-block;max-width:100%;margin:0 1em 1em 0">'
        f'<img style="max-width:100%" alt="{words}" src="data:image/webp;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )
