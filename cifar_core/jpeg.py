"""Reads the segments of a JPEG file before its first scan, to know what libjpeg will do with it.

Decoders skip junk between segments, each in its own way. A header is `is_regular` only if there is none, so that every
decoder finds the same segments.
"""

from dataclasses import dataclass

SCAN = b"\xff\xda"
"""The marker (SOS) at the start of each scan. Inside compressed data FF is followed by 00 or a restart marker."""

_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables and an extension have the other three numbers
_BASELINE, _SEQUENTIAL, _PROGRESSIVE = 0xC0, 0xC1, 0xC2


@dataclass(frozen=True)
class JpegHeader:
    """What precedes the first scan.

    Attributes:
        frame: Number of the frame's marker (SOF), which is the kind of compression; 0 without a frame.
        components: Number of colour components of the frame.
        components_of_scan: Number of colour components of the first scan; 0 without a scan.
        segments: Number of segments and of skipped bytes.
        is_regular: Whether the file has one frame and a scan, and nothing between its segments.
    """

    frame: int
    components: int
    components_of_scan: int
    segments: int
    is_regular: bool

    @property
    def is_scalable(self) -> bool:
        """Whether libjpeg can decode the file at a reduced size.

        A lossless file is decoded in full size whatever was asked for, and Pillow before version 13 has then allocated
        too little memory.
        """
        return self.is_regular and self.frame in (_BASELINE, _SEQUENTIAL, _PROGRESSIVE)

    @property
    def is_single_scan(self) -> bool:
        """Whether libjpeg reads one scan only, while it decodes, and keeps no coefficients."""
        return (
            self.is_regular
            and self.frame in (_BASELINE, _SEQUENTIAL)
            and self.components == self.components_of_scan > 0
        )


def read_jpeg_header(data: bytes, max_segments: int | None = None) -> JpegHeader:
    """Reads the header of a file that begins with FF D8; stops after `max_segments`, if given. Raises nothing."""
    place, segments, is_regular = 2, 0, True
    frame = components = components_of_scan = 0
    while place + 4 <= len(data):
        marker = data[place + 1]
        if data[place] != 0xFF or marker in (0x00, 0xFF):
            place, is_regular = place + 1, False
        elif marker == _SOS:
            components_of_scan = data[place + 4] if place + 4 < len(data) else 0
            break
        elif marker == _EOI:
            break
        elif marker in _WITHOUT_LENGTH:
            place, is_regular = place + 2, False
        else:
            if marker in _FRAMES:
                is_regular &= not frame
                frame, components = marker, data[place + 9] if place + 9 < len(data) else 0
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        segments += 1
        if max_segments is not None and segments > max_segments:
            break
    return JpegHeader(frame, components, components_of_scan, segments, is_regular and components_of_scan > 0)
