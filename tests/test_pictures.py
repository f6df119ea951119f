"""pictures.py: no picture fills the memory, and none ends in a decoder's own error."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.options import MAX_PIXELS
from diffumask_fast.pictures import decode_picture


def png(height, width, rows=None):
    """Return a black RGB PNG; `rows` of it are there in fact."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    line = bytes(1 + 3 * width)
    data = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(4097, 4096), (1, MAX_PIXELS + 1), (20_000, 20_000)])
def test_a_bomb_is_refused_by_its_header(size):
    bomb = png(*size, rows=1)
    tracemalloc.start()
    with pytest.raises(DiffuMaskError, match="dog.png has .*pixels: leave it out, or raise `max_pixels`"):
        decode_picture(bomb, "dog.png")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_the_limit_is_an_option():
    assert decode_picture(png(30, 20), max_pixels=600).size == (20, 30)
    with pytest.raises(DiffuMaskError, match="30x20, more than 599 pixels"):
        decode_picture(png(30, 20), max_pixels=599)


def test_every_flipped_byte_is_a_sentence_or_a_picture():
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(stream, "PNG")
    whole, refused = stream.getvalue(), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        try:
            decode_picture(bytes(damaged), "dog.png")
        except DiffuMaskError as error:
            assert "dog.png" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0.9 * len(whole)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"])
def test_other_formats_are_refused(data):
    with pytest.raises(DiffuMaskError, match="the picture cannot be decoded"):
        decode_picture(data)


def test_a_file_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(DiffuMaskError, match="a.png cannot be decoded"):
        decode_picture(tmp_path / "a.png")
