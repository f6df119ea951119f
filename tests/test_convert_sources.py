"""convert/sources.py: images of other programs, decoded."""

import numpy as np
import pytest
from PIL import Image

from diffumask_fast.convert.sources import decode_image
from diffumask_fast.errors import DiffuMaskError


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    Image.new("RGB", (5, 4), (51, 51, 51)).convert(mode).save(tmp_path / "x.png")
    image = decode_image(tmp_path / "x.png", 100)
    assert image.shape == (4, 5, 3) and image.dtype == np.uint8 and (image == 51).all()


def test_what_is_refused(tmp_path):
    with pytest.raises(DiffuMaskError, match="x.png is missing"):
        decode_image(tmp_path / "x.png", 100)
    Image.new("I;16", (5, 4)).save(tmp_path / "x.png")
    with pytest.raises(DiffuMaskError, match="has mode I;16: images have 8 bits a channel"):
        decode_image(tmp_path / "x.png", 100)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png", exif=turned)
    with pytest.raises(DiffuMaskError, match="is to be turned when it is shown"):
        decode_image(tmp_path / "x.png", 100)
    Image.new("RGB", (50, 40)).save(tmp_path / "x.png")
    with pytest.raises(DiffuMaskError, match="has 40x50, more than 100 pixels"):
        decode_image(tmp_path / "x.png", 100)
