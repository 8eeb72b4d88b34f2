"""JPEG and PNG files without their metadata, for when it is what cannot be read."""

import re
import zlib
from collections.abc import Iterator

# What decides about pixels, transparency, frames and orientation; everything else is metadata.
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND"}
JPEG_PIXELS = re.compile(rb"\xff([^\xe0-\xef\xfe]|\xe1..Exif|\xee..Adobe.{7})", re.DOTALL)


def without_metadata(content: bytes) -> bytes | None:
    """The JPEG or PNG file without metadata but its EXIF data; None for another format.

    Pixels are not looked at, so that damage in them stays, and a file that ends too early still
    does.
    """
    parts = {b"\xff\xd8": _jpeg, b"\x89P": _png}.get(content[:2])
    return parts and b"".join(parts(content))


def _jpeg(content: bytes) -> Iterator[bytes]:
    """Without comments and the segments APP0 to APP15, but for EXIF and Adobe's colour space."""
    yield content[:2]
    place = 2
    while place < len(content) and content[place : place + 2] != b"\xff\xda":  # the pixels
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if JPEG_PIXELS.match(content[place:end]):
            yield content[place:end]
        place = end
    yield content[place:]


def _png(content: bytes) -> Iterator[bytes]:
    yield content[:8]
    place = 8
    while place < len(content):
        chunk = content[place : place + 12 + int.from_bytes(content[place : place + 4], "big")]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if chunk[4:8] in PNG_PIXELS or (chunk[4:8] == b"eXIf" and intact):
            yield chunk
        place += len(chunk)
