"""Folders of image files, decoded to uint8 RGB pixels of one size. Nothing is written to them."""

import logging
import os
import re
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from system.errors import UserError

log = logging.getLogger("simclr")

LEFT_OUT = (".", "@", "#", "__")  # how names of hidden files and of other programs' folders begin
# Formats that Pillow names or writes, but does not decode; for EPS it would run Ghostscript.
UNREAD = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF")
SUFFIXES = tuple(s for s, name in Image.registered_extensions().items() if name not in UNREAD)
FORMATS = [name for name in Image.ID if name not in UNREAD]


def list_images(folder: Path, follow: bool = True) -> tuple[list[Path], int]:
    """The images in and below a folder, sorted, and the number of files and folders left out.

    Links to folders are followed directly in the folder, and left out below it: no loop is read.
    """
    images, left_out = [], 0
    for entry in os.scandir(folder):
        hidden = entry.name.startswith(LEFT_OUT)
        if entry.is_dir() and not hidden and (follow or not entry.is_symlink()):
            inside, number = list_images(Path(entry.path), follow=False)
            images += inside
            left_out += number
        elif entry.is_dir() or hidden or not entry.name.lower().endswith(SUFFIXES):
            left_out += 1
        else:
            images.append(Path(entry.path))
    return sorted(images), left_out


def find_images(folder: Path) -> list[Path]:
    """`list_images`, with a log of how many are left out. Raises UserError if there is none."""
    images, left_out = list_images(folder)
    if left_out > 0:
        log.info(f"left out of {folder}: {left_out:,} files or folders (hidden, @…, no images, …)")
    if not images:
        raise UserError(f"{folder} has no image")
    return images


def decode_files(files: list[Path], image_size: int, workers: int) -> Tensor:
    """uint8 (N, 3, S, S); raises UserError for all files together that `decode_file` refuses."""
    images = np.empty((len(files), 3, image_size, image_size), np.uint8)

    def decode_one(n: int) -> str | None:
        try:
            images[n] = decode_file(files[n], image_size)
        except Exception as error:  # each of Pillow's decoders raises what it likes
            return f"{files[n]} ({error or type(error).__name__})"

    with warnings.catch_warnings(), ThreadPool(workers) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 90 million pixels
        problems = [problem for problem in pool.map(decode_one, range(len(files))) if problem]
    if problems:
        first = "; ".join(problems[:10])
        raise UserError(f"{len(problems):,} images cannot be read, mend or remove them: {first}")
    return torch.from_numpy(images)


def decode_file(path: Path, size: int) -> np.ndarray:
    """Decode an image of any size to uint8 (3, size, size): upright, RGB, on white, the centre.

    Raises ValueError for several frames (MPO: a photo with previews), and for more than 8 bits,
    which Pillow would clip or cut.
    """
    with Image.open(path, formats=FORMATS) as file:
        if file.format != "MPO" and getattr(file, "n_frames", 1) > 1:
            raise ValueError(f"{file.n_frames} frames")
        bits = getattr(file, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, ())  # of TIFF
        if file.mode[0] in "IF" or 16 in bits or re.search(";16[BLN]|SGI16|65535", str(file.tile)):
            raise ValueError("more than 8 bits: convert it to 8")
        image = ImageOps.exif_transpose(file)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(fitted).transpose(2, 0, 1)
