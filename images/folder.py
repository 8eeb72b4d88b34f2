"""Folders of image files: read once, never written; symbolic links that leave are refused."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from system.errors import UserError


def class_folders(root: Path, within: Path) -> list[str]:
    """The names of the visible folders in `root`, sorted: one for each class.

    Raises UserError if there is none, or one is a link out of `within`.
    """
    try:
        folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError as error:
        raise UserError(
            f"{root} cannot be read ({error.strerror}): dataset=folder needs images in "
            "data_dir/train/<class>/ and data_dir/test/<class>/"
        ) from None
    for path in (root, *folders):
        _refuse_link(path, within)
    if not folders:
        raise UserError(f"{root} has no folder in it: each class needs one, {root}/<class>/*.png")
    return sorted(path.name for path in folders)


def load_images(
    folder: Path, image_size: int, workers: int, within: Path | None = None
) -> tuple[list[Path], Tensor]:
    """Load all images below a folder: sorted paths, and (N, 3, image_size, image_size) uint8.

    Raises UserError if there is none, for a file that is not a single image, and for a link out of
    `within` (None: out of the folder).
    """
    files = _visible_files(folder, within or folder)
    if not files:
        raise UserError(f"{folder} has no image: add some, or leave the folder out")
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 90 million pixels
        images = list(pool.map(lambda path: _decode(path, image_size), files))
    return files, torch.from_numpy(np.stack(images))


def _visible_files(folder: Path, within: Path) -> list[Path]:
    files = []
    for directory, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if name[0] != "."]
        visible = [Path(directory, name) for name in folders + names if name[0] != "."]
        for path in visible:
            _refuse_link(path, within)
            if path.is_symlink() and path.is_dir():
                raise UserError(f"{path} is a link to a folder, not followed: copy what is meant")
        files += [path for path in visible if path.is_file()]
    return sorted(files)


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable")


def _refuse_link(path: Path, within: Path) -> None:
    """Raise UserError for a symbolic link out of `within`, or to nothing."""
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        if not target.exists() or not target.is_relative_to(os.path.realpath(within)):
            raise UserError(f"{path} is a link out of {within}, or to nothing: copy what is meant")


def _decode(path: Path, size: int) -> np.ndarray:
    """Decode an image file of any size and mode to uint8 (3, size, size).

    The shorter side is resized to `size` and the centre is cropped, without distortion; an RGB
    image of that size is returned bit by bit.
    """
    try:
        with Image.open(path) as file:
            if getattr(file, "is_animated", False) and file.format != "MPO":  # a photo's preview
                raise ValueError(f"it has {file.n_frames} frames")
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip at 255
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # each of Pillow's decoders raises what it likes
        raise UserError(f"{path} cannot be read as an image ({error}): mend or remove it") from None
    return np.asarray(image).transpose(2, 0, 1)
