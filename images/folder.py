"""Folders of image files: read once, never written; symbolic links that leave are refused."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from system.errors import UserError


class Listing(NamedTuple):
    """What is visible directly in a folder, sorted."""

    classes: list[str]  # names of the folders, one for each class
    images: list[Path]  # files that lie in no class folder, images by their extension
    others: list[Path]  # all other files


def list_folder(root: Path, within: Path) -> Listing:
    """What is visible directly in `root`.

    Raises UserError if that is neither folder nor image, and for a folder that is a link out of
    `within`.
    """
    try:
        visible = {path for path in root.iterdir() if path.name[0] != "."}
        folders = {path for path in visible if path.is_dir()}
    except OSError as error:
        raise UserError(
            f"{root} cannot be read ({error.strerror}): dataset=folder needs images in "
            "data_dir/train/, and for labels in data_dir/train/<class>/ and data_dir/test/<class>/"
        ) from None
    for path in (root, *sorted(folders)):
        _refuse_link(path, within)
    images = {path for path in visible - folders if _is_image(path)}
    others = sorted(visible - folders - images)
    if not folders and not images:
        found = f" but {name_few(others)}" if others else ""
        raise UserError(f"{root} has no image{found}: add some, for labels in {root}/<class>/")
    return Listing(sorted(path.name for path in folders), sorted(images), others)


def name_few(files: list[Path]) -> str:
    """The first three names, and how many files there are besides."""
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    return ", ".join(path.name for path in files[:3]) + more


def _is_image(path: Path) -> bool:
    """Whether Pillow reads files with this extension; MPO, of cameras, it opens as JPEG."""
    return Image.registered_extensions().get(path.suffix.lower()) in {*Image.OPEN, "MPO"}


def load_images(
    folder: Path, image_size: int, workers: int, within: Path | None = None
) -> tuple[list[Path], Tensor]:
    """All images below a folder: sorted paths, and (N, 3, image_size, image_size) uint8.

    Raises UserError as `find_images` and `decode`.
    """
    files = find_images(folder, within)
    return files, decode(files, image_size, workers)


def find_images(
    folder: Path, within: Path | None = None, without: Sequence[Path] = ()
) -> list[Path]:
    """The sorted paths of all files below a folder, but for those in `without`.

    Raises UserError if there is none, and for a link out of `within` (None: out of the folder).
    """
    files = sorted(_visible_files(folder, within or folder) - {*without})
    if not files:
        raise UserError(f"{folder} has no image: add some, or leave the folder out")
    return files


def decode(files: list[Path], image_size: int, workers: int) -> Tensor:
    """The images in the files, (N, 3, image_size, image_size) uint8, with no second copy of them.

    Raises UserError for a file that is not a single image.
    """
    images = np.empty((len(files), 3, image_size, image_size), np.uint8)

    def fill(n: int) -> None:
        images[n] = _decode(files[n], image_size)

    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # from 90 million pixels
        list(pool.map(fill, range(len(files))))
    return torch.from_numpy(images)


def _visible_files(folder: Path, within: Path) -> set[Path]:
    files = set()
    for directory, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if name[0] != "."]
        visible = [Path(directory, name) for name in folders + names if name[0] != "."]
        for path in visible:
            _refuse_link(path, within)
            if path.is_symlink() and path.is_dir():
                raise UserError(f"{path} is a link to a folder, not followed: copy what is meant")
        files.update(path for path in visible if path.is_file())
    return files


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
