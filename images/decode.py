"""Image files to uint8 RGB pixels of one size; files without such pixels are refused."""

import errno
import io
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from images.metadata import without_metadata
from system.errors import UserError

BITS = (8, 10, 12, 14, 16)  # of cameras, scanners and microscopes
BILINEAR = Image.Resampling.BILINEAR
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)  # no matter which file it is
OUT_OF_MEMORY = re.compile("out of memory|decoder error -9")  # Pillow's own words
CONTRAST = 8  # of 256 levels: as much as a picture has, if its file has any


class Unusable(Exception):
    """The content of a file is no picture that can be trained on."""


def decode(files: list[Path], image_size: int, workers: int) -> Tensor:
    """The images in the files, (N, 3, image_size, image_size) uint8, with no second copy of them.

    Raises UserError: for files that are no single image, have values out of the ranges in
    docs/evaluation.md or cannot be read, all together; and if memory or threads run out.
    """
    wrong: dict[str, str] = {}
    fewer = f"lower workers, which is {workers}, or allow the process more"

    def fill(numbers: range) -> None:
        for n in numbers:
            try:
                images[n] = _decode(files[n], image_size)
            except Unusable as error:
                wrong[f"{files[n]} cannot be read as an image ({error})"] = "mend or remove it"
            except MemoryError:
                wrong[f"{files[n]} cannot be read (not enough memory)"] = fewer
            except OSError as error:
                remedy = fewer if error.errno in SHORTAGES else "make it readable"
                wrong[f"{files[n]} cannot be read ({error.strerror})"] = remedy

    try:
        images = np.empty((len(files), 3, image_size, image_size), np.uint8)
    except MemoryError as error:
        raise UserError(f"{error}: take a smaller image_size, or fewer images") from None
    some = min(64, len(files) // (8 * workers) + 1)  # at once: handing over one takes as long
    parts = [range(n, min(n + some, len(files))) for n in range(0, len(files), some)]
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")  # about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 90 million pixels
        try:
            list(pool.map(fill, parts))
        except RuntimeError as error:  # of threading
            if "start new thread" not in str(error):
                raise
            raise UserError(f"{error}: {fewer}") from None
    refuse(wrong)
    return torch.from_numpy(images)


def refuse(problems: dict[str, str]) -> None:
    """Raise UserError for problems and their remedies, if any: their number, and the first ten."""
    if problems:
        number = f"{len(problems):,} files or folders: " if len(problems) > 1 else ""
        more = f"; and {len(problems) - 10:,} more" if len(problems) > 10 else ""
        remedies = ", or ".join(dict.fromkeys(problems.values()))
        raise UserError(f"{number}{'; '.join(sorted(problems)[:10])}{more}: {remedies}")


@contextmanager
def _pillow() -> Iterator[None]:
    """What Pillow raises in the block, as Unusable; what the system raises, as it is."""
    try:
        yield
    except Exception as error:  # each of Pillow's decoders raises what it likes
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # EINVAL: a place that the file itself names and does not have
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise MemoryError from None
        if isinstance(error, UnidentifiedImageError):
            raise Unusable("no format that Pillow reads") from None
        raise Unusable(str(error) or type(error).__name__) from None


def _decode(path: Path, size: int) -> np.ndarray:
    """Decode an image file of any size and mode to uint8 (3, size, size).

    The shorter side is resized to `size` and the centre is cropped, without distortion; an RGB
    image of that size is returned bit by bit. What is transparent is white.
    """
    image = _open(path)
    if image.mode[0] in "IF":
        image = Image.fromarray(_in_8_bits(np.asarray(image), image.info.get("transparency")))
    with _pillow():
        rgb = _on_white(image) if image.has_transparency_data else image.convert("RGB")
    return np.asarray(ImageOps.fit(rgb, (size, size), BILINEAR)).transpose(2, 0, 1)


def _open(path: Path) -> Image.Image:
    """The image in a file; if need be, in what the file is without metadata."""
    try:
        return _load(path)
    except Unusable:
        bare = without_metadata(path.read_bytes())
        if bare is None:
            raise
    return _load(io.BytesIO(bare))


def _load(source: Path | io.BytesIO) -> Image.Image:
    """The image in a file, upright, in one of Pillow's modes: colours of 16 bits by the high 8."""
    with _pillow():
        file = Image.open(source)
        pages = file.n_frames if getattr(file, "is_animated", False) else 1
    with file:
        if pages > 1 and file.format != "MPO":  # a photo and its preview
            raise Unusable(f"it has {pages} frames")
        tags = file.tag_v2 if file.format == "TIFF" else {}
        planes = tags.get(284) == 2 and tags.get(258, ()).count(16) > 1  # 258: bits of each channel
        if planes or (tags.get(262) == 0 and file.mode[0] in "IF"):  # Pillow misreads both
            raise Unusable("TIFF with 16 bits in planes or with 0 as white: save it as PNG")
        if tags.get(339, (1,))[0] == 2 and file.mode[0] not in "IF":  # whose signs Pillow ignores
            raise Unusable("TIFF with signed values of 8 bits: save it as PNG")
        deep = file.format in ("PNG", "TIFF") and ";16" in str(file.tile[:1])  # not BMP's 5, 6, 5
        with _pillow():
            file.load()
        if deep and file.mode[0] != "I":
            levels = np.asarray(file.convert("RGB"))
            low, high = 256 * int(levels.min()), 256 * int(levels.max()) + 255
            if high - low < 2**14:  # 14 bits or fewer: the low bytes, which Pillow drops
                raise Unusable(f"its values reach from {low} to {high}: stretch them to 16 bits")
        turn = None
        with suppress(Unusable), _pillow():  # ignored where it cannot be read
            turn = TURNS.get(file.getexif().get(0x0112))
        return file if turn is None else file.transpose(turn)


def _in_8_bits(values: np.ndarray, transparent: int | None) -> np.ndarray:
    """Floats in [0, 1], or integers by the fewest BITS that hold them all, to uint8.

    The `transparent` value becomes white. Raises Unusable for values out of these ranges, and if
    fewer than CONTRAST levels remain of several.
    """
    low, high = values.min(), values.max()
    limit = next((2**bits - 1 for bits in BITS if high < 2**bits), 0)
    limit = 1 if values.dtype.kind == "f" else limit
    found = f"its values reach from {low:g} to {high:g}"
    if not 0 <= low <= high <= limit:  # nor for nan
        raise Unusable(f"{found}: integers may be 0 to 65535, floats 0 to 1")
    scaled = np.rint(values * np.float32(255 / limit)).astype(np.uint8)
    if low < high and np.ptp(scaled) < CONTRAST:
        raise Unusable(f"{found}, which would be {np.ptp(scaled) + 1} of 256 levels")
    scaled[values == transparent] = 255
    return scaled


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB, where it is transparent white; raises Unusable if it then has no more CONTRAST."""
    image = image.convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    before, after = (max(high - low for low, high in i.getextrema()) for i in (image, rgb))
    if after < CONTRAST <= before:
        raise Unusable("what it shows cannot be seen on white, where it is transparent")
    return rgb
