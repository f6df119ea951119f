"""The mark of pictures that a model drew: IPTC's digital source type, in the XMP of their PNG."""

from PIL.PngImagePlugin import PngInfo

DRAWN = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<Iptc4xmpExt:DigitalSourceType>{DRAWN}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def drawn_note() -> PngInfo:
    """Return what a PNG is saved with that a model drew."""
    note = PngInfo()
    note.add_itxt("XML:com.adobe.xmp", _PACKET)
    return note


def is_drawn(png: bytes) -> bool:
    """Tell whether a PNG is marked as drawn by a model."""
    return DRAWN.encode() in png
