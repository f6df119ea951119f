"""dataset/origin.py: a reader of XMP finds the mark, in what a model drew and in nothing else."""

import dataclasses
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
from samples import draw, requests

from diffumask_fast.dataset.origin import is_drawn
from diffumask_fast.dataset.schema import decode_png, make_row

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"


def xmp_of(png):
    """Read the XMP of a PNG as the specifications have it: an uncompressed iTXt chunk, RDF in it."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place, found = 8, []
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", png, place + 8 + length) == (zlib.crc32(kind + data),)
        keyword, _, rest = data.partition(b"\0")
        if kind == b"iTXt" and keyword == b"XML:com.adobe.xmp":
            assert rest[:2] == b"\0\0"  # not compressed
            found.append(rest[2:].split(b"\0", 2)[2].decode("utf-8"))
        place += 12 + length
    return found


def test_a_reader_of_xmp_finds_the_mark():
    sample = draw(requests(1)[0])
    row = make_row(dataclasses.replace(sample, drawn=True))
    (packet,) = xmp_of(row["image"]["bytes"])
    assert packet.startswith("<?xpacket begin=") and packet.endswith('<?xpacket end="r"?>')
    kinds = ElementTree.fromstring(packet).findall(f".//{RDF}Description/{IPTC}DigitalSourceType")
    assert [kind.text for kind in kinds] == ["http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"]
    assert np.array_equal(decode_png(row["image"]), sample.image) and is_drawn(row["image"]["bytes"])


def test_masks_and_pictures_of_others_are_not_marked():
    sample = draw(requests(1)[0])
    for row, names in (
        (make_row(dataclasses.replace(sample, drawn=True)), ["mask"]),
        (make_row(sample), ["image", "mask"]),
    ):
        assert [xmp_of(row[name]["bytes"]) for name in names] == [[]] * len(names)
        assert not any(is_drawn(row[name]["bytes"]) for name in names)
