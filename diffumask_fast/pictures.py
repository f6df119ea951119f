"""Decode pictures, of which none may fill the memory: the header is read before the pixels."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from diffumask_fast.errors import DiffuMaskError, in_one_line
from diffumask_fast.options import MAX_PIXELS, MOST_PIXELS

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow's other decoders see no untrusted bytes


def decode_picture(source: bytes | Path, name: object = None, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture, unless its header says that it is too large.

    Args:
        source: its bytes, or the file.
        name: what an error calls it; the file's own when None.
        max_pixels: height times width, at most.

    Returns:
        The picture, decoded, in its own mode.

    Raises:
        DiffuMaskError: it is too large, damaged, or of another format.
    """
    name = source if name is None and isinstance(source, Path) else name or "the picture"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture:
            if picture.width * picture.height <= max_pixels:
                picture.load()
                return picture
            size = f"{picture.height}x{picture.width}"
    except Image.DecompressionBombError:
        size = f"more than {MOST_PIXELS} pixels"
    except Exception as error:  # a decoder fails in many ways
        cause = in_one_line(error, 100)
        raise DiffuMaskError(f"{name} cannot be decoded ({cause}): bring the file back as it was") from error
    raise DiffuMaskError(
        f"{name} has {size}, more than {max_pixels} pixels: leave it out, or raise `max_pixels` (up to {MOST_PIXELS})"
    )
