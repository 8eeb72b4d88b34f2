"""Folders of image files: read once, never written; symbolic links that leave are refused."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from images.decode import decode, refuse
from system.errors import UserError

# Folders that archives, file servers and operating systems make, in lower case.
LITTER = {
    *("__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "$recycle.bin"),
    *("recycler", "system volume information", "found.000", "lost+found", "lost.dir"),
    *("temporary items", "network trash folder", "__pycache__"),
}
UNREAD = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows by name alone


class Listing(NamedTuple):
    """What is visible directly in a folder, sorted."""

    classes: list[str]  # names of the folders, one for each class
    images: list[Path]  # images that lie in no class folder
    others: list[Path]  # what is left out: all other files, and folders named in LITTER


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
    classes = {path for path in folders if path.name.casefold() not in LITTER}
    refuse([*_links((root, *sorted(classes)), within)])
    images = {path for path in visible - folders if _is_image(path)}
    others = sorted(visible - classes - images)
    if not classes and not images:
        raise UserError(
            f"{root} has no image{_but(others)}: add some, for labels in {root}/<class>/"
        )
    return Listing(sorted(path.name for path in classes), sorted(images), others)


def name_few(files: list[Path], root: Path | None = None) -> str:
    """The first three names, or paths from `root`, and how many files there are besides."""
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    names = (path.relative_to(root).as_posix() if root else path.name for path in files[:3])
    return ", ".join(names) + more


def name_others(root: Path, others: Iterable[Path]) -> Iterator[str]:
    """A remark for each kind of what was left out of `root`: the first names and the number."""
    others = sorted(others)
    litter = [path for path in others if path.name.casefold() in LITTER]
    files = [path for path in others if path not in litter]
    for kind, paths in (("no images by their extension", files), ("of other programs", litter)):
        if paths:
            yield f"left out of {root}, {kind}: {name_few(paths, root)}"


def load_images(
    folder: Path, image_size: int, workers: int, within: Path | None = None
) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """All images below a folder: sorted paths, (N, 3, image_size, image_size) uint8, and remarks.

    The remarks say what was left out. Raises UserError as `find_images` and `decode`.
    """
    [files], others = find_images([folder], within)
    images = decode(files, image_size, workers)
    return files, images, tuple(map(printable, name_others(folder, others)))


def printable(text: str) -> str:
    """The text with escapes for what is not UTF-8 in a file's name, which no log takes."""
    return text.encode(errors="backslashreplace").decode()


def find_images(
    folders: Sequence[Path], within: Path | None = None
) -> tuple[list[list[Path]], list[Path]]:
    """The sorted images below each folder, as deep as it goes, and what is left out of them all.

    Raises UserError, for all folders together, if one has no image or cannot be read, and for links
    to folders, to nothing or out of `within` (None: out of the folder).
    """
    found, others, problems = [], [], []
    for folder in folders:
        images, left_out, wrong = _walk(folder, within or folder)
        if not images and not wrong:
            what = f"{folder} has no image{_but(left_out)}"
            wrong = [(what, "add some, or leave the folder out")]
        found.append(sorted(images))
        others += left_out
        problems += wrong
    refuse(problems)
    return found, others


def _walk(folder: Path, within: Path) -> tuple[list[Path], list[Path], list[tuple[str, str]]]:
    """Images below a folder, what is left out, and problems."""
    images, others, problems = [], [], []

    def unreadable(error: OSError) -> None:
        problems.append((f"{error.filename} cannot be read ({error.strerror})", "make it readable"))

    for directory, folders, names in os.walk(folder, onerror=unreadable):
        below = [Path(directory, name) for name in sorted(folders) if name[0] != "."]
        others += (path for path in below if path.name.casefold() in LITTER)
        below = [path for path in below if path.name.casefold() not in LITTER]
        folders[:] = [path.name for path in below]
        problems += _links(below, within, to_folders=False)
        files = [Path(directory, name) for name in names if name[0] != "."]
        files = {path: _is_image(path) for path in files}
        problems += _links((path for path, image in files.items() if image), within)
        images += (path for path, image in files.items() if image and path.is_file())
        others += (path for path, image in files.items() if not image)
    return images, sorted(others), problems


def _but(others: list[Path]) -> str:
    return f" but {name_few(others)}" if others else ""


@cache
def _extensions() -> dict[str, bool]:
    """Whether files with an extension are images; MPO, of cameras, Pillow opens as JPEG."""
    extensions = Image.registered_extensions().items()  # this loads the formats
    read = {*Image.OPEN, "MPO"} - UNREAD
    return {suffix: kind in read for suffix, kind in extensions}


def _is_image(path: Path) -> bool:
    """Whether a file is an image: by its extension, or by its content if that says nothing."""
    known = _extensions().get(path.suffix.lower())
    if known is None and not path.is_symlink() and path.is_file():
        try:
            with Image.open(path) as file:
                known = file.format not in UNREAD
        except UnidentifiedImageError:
            known = False
        except Exception:  # `decode` says what is wrong
            known = True
    return bool(known)


def _links(
    paths: Iterable[Path], within: Path, to_folders: bool = True
) -> Iterator[tuple[str, str]]:
    """Problems: symbolic links out of `within`, to nothing, or to folders."""
    for path in paths:
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not target.exists() or not target.is_relative_to(os.path.realpath(within)):
                yield f"{path} is a link out of {within}, or to nothing", "copy what is meant"
            elif not to_folders:
                yield f"{path} is a link to a folder, not followed", "copy what is meant"
