"""Image files without their metadata, for when it is what cannot be read."""

import re
import struct
from collections.abc import Iterator

# What decides about pixels, transparency and frames; everything else is metadata.
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND"}
JPEG_PIXELS = re.compile(rb"\xff([^\xe0-\xef\xfe]|\xee..Adobe.{7})", re.DOTALL)
JPEG_PIXELS_EXIF = re.compile(JPEG_PIXELS.pattern + rb"|\xff\xe1..Exif", re.DOTALL)
TIFF_PIXELS = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532),
}
TIFF_ORIENTATION = 274


def without_metadata(content: bytes) -> Iterator[bytes]:
    """The JPEG, PNG, TIFF or AVIF file without metadata but the EXIF data, then without it too.

    The EXIF data has the orientation. Pixels are not looked at, so that damage in them stays, and a
    file that ends too early still does. Nothing for another format.
    """
    formats = {b"\xff\xd8": _jpeg, b"\x89P": _png, b"II": _tiff, b"MM": _tiff}
    strip = _avif if content[4:8] == b"ftyp" else formats.get(content[:2])
    for keep_exif in (True, False) if strip else ():
        try:
            yield strip(content, keep_exif)
        except (struct.error, IndexError):  # the file ends before its pixels
            return


def _jpeg(content: bytes, keep_exif: bool) -> bytes:
    """Without comments and the segments APP0 to APP15, but for Adobe's, with the colour space."""
    kept, place = content[:2], 2
    while content[place] == 0xFF and content[place + 1] != 0xDA:  # where the pixels start
        (length,) = struct.unpack_from(">H", content, place + 2)
        segment = content[place : place + 2 + length]
        if (JPEG_PIXELS_EXIF if keep_exif else JPEG_PIXELS).match(segment):
            kept += segment
        place += 2 + length
    return kept + content[place:]


def _png(content: bytes, keep_exif: bool) -> bytes:
    kept, place, kind = bytearray(content[:8]), 8, b""
    while kind != b"IEND" and place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind in PNG_PIXELS or (kind == b"eXIf" and keep_exif):
            kept += content[place : place + 12 + length]
        place += 12 + length
    return bytes(kept)


def _tiff(content: bytes, keep_exif: bool) -> bytes:
    """The first directory with fewer entries, at its place: what they point to does not move."""
    order, big = "<" if content[:1] == b"I" else ">", 43 in content[2:4]
    number, pointer, size = (
        (order + "Q", order + "Q", 20) if big else (order + "H", order + "I", 12)
    )
    (start,) = struct.unpack_from(pointer, content, 8 if big else 4)
    (count,) = struct.unpack_from(number, content, start)
    first = start + struct.calcsize(number)
    last = first + count * size
    entries = content[first:last]
    entries = [entries[place : place + size] for place in range(0, len(entries), size)]
    tags = TIFF_PIXELS | {TIFF_ORIENTATION} if keep_exif else TIFF_PIXELS
    entries = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in tags]
    next_page = content[last : last + struct.calcsize(pointer)]
    directory = struct.pack(number, len(entries)) + b"".join(entries) + next_page
    return content[:start] + directory + content[start + len(directory) :]


def _avif(content: bytes, keep_exif: bool) -> bytes:
    """With items that are EXIF data named as free space."""
    return content if keep_exif else content.replace(b"\0Exif\0", b"\0free\0", 1)
