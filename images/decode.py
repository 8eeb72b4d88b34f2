"""Image files to uint8 RGB pixels of one size, or a word on what is wrong with them."""

import errno
import io
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from images.metadata import without_metadata
from system.errors import UserError

BITS = (8, 10, 12, 14, 16)  # of cameras, scanners and microscopes
BILINEAR = Image.Resampling.BILINEAR
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)  # no matter which file it is
OUT_OF_MEMORY = re.compile("out of memory|decoder error -9")  # Pillow's own words
CONTRAST = 8  # of 256 levels: as much as a picture has, if its file has any
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


class Unusable(Exception):
    """The content of a file is no picture that can be trained on."""


def decode(files: list[Path], image_size: int, workers: int) -> Tensor:
    """The images in the files, (N, 3, image_size, image_size) uint8, with no second copy of them.

    Raises UserError: for files that are no single image, have values out of the ranges in
    docs/evaluation.md or cannot be read, all together; and if memory or open files run out.
    """
    wrong: dict[int, tuple[str, str]] = {}

    def fill(numbers: range) -> None:
        for n in numbers:
            try:
                images[n] = _decode(files[n], image_size)
            except Unusable as error:
                wrong[n] = f"{files[n]} cannot be read as an image ({error})", "mend or remove it"
            except MemoryError:
                raise UserError(f"{files[n]}: not enough memory, {_fewer(workers)}") from None
            except OSError as error:
                if error.errno in SHORTAGES:
                    raise UserError(f"{files[n]}: {error.strerror}, {_fewer(workers)}") from None
                wrong[n] = f"{files[n]} cannot be read ({error.strerror})", "make it readable"

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
            raise UserError(f"{error}: {_fewer(workers)}") from None
    refuse([wrong[n] for n in sorted(wrong)])
    return torch.from_numpy(images)


def refuse(problems: list[tuple[str, str]]) -> None:
    """Raise UserError for problems (what, remedy), if any: their number, and the first ten."""
    if not problems:
        return
    number = f"{len(problems):,} files or folders: " if len(problems) > 1 else ""
    more = f"; and {len(problems) - 10:,} more" if len(problems) > 10 else ""
    what = "; ".join(what for what, _ in problems[:10])
    remedies = ", or ".join(dict.fromkeys(remedy for _, remedy in problems))
    raise UserError(f"{number}{what}{more}: {remedies}")


def _fewer(workers: int) -> str:
    return f"with {workers} files read at once: lower workers" if workers > 1 else "with workers=1"


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
        raise Unusable(str(error) or type(error).__name__) from None


def _decode(path: Path, size: int) -> np.ndarray:
    """Decode an image file of any size and mode to uint8 (3, size, size).

    The shorter side is resized to `size` and the centre is cropped, without distortion; an RGB
    image of that size is returned bit by bit. What is transparent is white.
    """
    image = _open(path)
    with _pillow():
        clear = image.has_transparency_data
        rgb = _on_white(image) if clear else image.convert("RGB")
    if clear and _contrast(rgb) < CONTRAST <= _contrast(image):
        raise Unusable("what it shows cannot be seen on white, where it is transparent")
    return np.asarray(ImageOps.fit(rgb, (size, size), BILINEAR)).transpose(2, 0, 1)


def _open(path: Path) -> Image.Image:
    """The image in a file, 8 bits a channel; if need be, by what the file is without metadata."""
    try:
        return _load(path)
    except Unusable:
        for bare in without_metadata(path.read_bytes()):
            with suppress(Unusable):
                return _load(io.BytesIO(bare))
        raise


def _load(source: Path | io.BytesIO) -> Image.Image:
    """The image in a file, upright, 8 bits a channel, in one of Pillow's modes."""
    with _pillow():
        file = Image.open(source)
        pages = file.n_frames if getattr(file, "is_animated", False) else 1
    with file:
        if pages > 1 and file.format != "MPO":  # a photo and its preview
            raise Unusable(f"it has {pages} frames")
        layout = _layout(file)
        with _pillow():
            file.load()
        image = file
        if file.mode[0] in "IF":
            image = _in_8_bits(np.asarray(file)[..., None], "L", file.info.get("transparency"))
        elif layout == "signed":
            image = _in_8_bits(np.asarray(file).view(np.int8)[..., None], "L", None)
        elif ";16" in layout:
            image = _in_8_bits(*_both_bytes(file, layout, source), file.info.get("transparency"))
        if layout == "white is 0":
            image = ImageOps.invert(image)
        try:
            with _pillow():
                turn = TURNS.get(file.getexif().get(0x0112))
        except Unusable:  # metadata that cannot be read
            turn = None
        return image if turn is None else image.transpose(turn)


def _layout(file: Image.Image) -> str:
    """How samples lie in a file, by Pillow's names, where that is more than the mode says.

    Raises Unusable where Pillow takes them for others.
    """
    codec, _, _, arguments = file.tile[0] if file.tile else ("", None, 0, "")
    layout = str(arguments[0] if isinstance(arguments, tuple) else arguments)
    if file.format == "SGI" and (codec == "SGI16" or arguments[-1] == 2):
        raise Unusable("SGI with 16 bits a channel: save it as PNG")
    if file.format == "TIFF":
        tags = file.tag_v2
        planes = tags.get(284) == 2 and 16 in tags.get(258, ())
        if planes or "RGBa;16" in layout or (codec == "libtiff" and layout[-2:] in ("BS", "BF")):
            raise Unusable("TIFF whose planes or byte order Pillow mistakes: save it as PNG")
        if tags.get(339) == (2,) and file.mode == "L":
            return "signed"
        if tags.get(262) == 0 and file.mode[0] in "IF":
            return "white is 0"
    return layout if file.format in ("PNG", "TIFF") else ""


def _both_bytes(
    file: Image.Image, layout: str, source: Path | io.BytesIO
) -> tuple[np.ndarray, str]:
    """The samples of 16 bits of which Pillow keeps the high byte: (H, W, channels), and the mode.

    The file is read again, with the bytes the other way round. LA has no such way: as RGBA it is
    read byte by byte.
    """
    name, order = layout.split(";16")
    other = "RGBA" if name == "LA" else f"{name};16{OTHER_ORDER[order]}"
    with _pillow(), Image.open(source) as again:
        again.tile = [
            tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
            for tile in again.tile
        ]
        again.load()
        low = np.asarray(again).astype(np.uint16)
    if name == "LA":
        return low[..., ::2] * 256 + low[..., 1::2], "LA"
    return np.asarray(file) * np.uint16(256) + low, file.mode


def _in_8_bits(values: np.ndarray, mode: str, transparent: object) -> Image.Image:
    """An image of `mode` from values (H, W, channels); `transparent`: a colour that is."""
    colours = values[..., :-1] if mode in ("LA", "RGBA") else values
    parts = [_scaled(colours)]
    if mode in ("LA", "RGBA"):
        parts.append(_scaled(values[..., -1:]))
    elif transparent is not None:
        mode += "A"
        parts.append(255 * (values != transparent).any(-1, keepdims=True))
    pixels = np.concatenate(parts, -1).astype(np.uint8)
    return Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())


def _scaled(values: np.ndarray) -> np.ndarray:
    """Floats in [0, 1], or integers by the fewest BITS that hold them all, to [0, 255]."""
    low, high = np.fmin.reduce(values, None), np.fmax.reduce(values, None)  # without nan
    whole = values.dtype.kind != "f"
    limit = next((2**bits - 1 for bits in BITS if high < 2**bits), 0) if whole else 1
    nan = np.isnan(values).any()
    found = f"its values reach from {low:g} to {high:g}{' and nan' if nan else ''}"
    if not 0 <= low <= high <= limit or nan:
        raise Unusable(f"{found}: integers may be 0 to 65535, floats 0 to 1")
    scaled = np.rint(values * np.float32(255 / limit))
    levels = scaled.max() - scaled.min()
    if levels < CONTRAST and levels < (high - low if whole else 255 * (high > low)):
        raise Unusable(f"{found}, which would be {levels + 1:g} of 256 levels")
    return scaled


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB; what is transparent is white."""
    image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _contrast(image: Image.Image) -> int:
    """The largest difference within red, green, blue or alpha."""
    return max(high - low for low, high in image.convert("RGBA").getextrema())
