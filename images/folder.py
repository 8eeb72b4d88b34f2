"""Folders of image files: read once, never written; symbolic links that leave are refused."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image
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
    problems: dict[str, str] = {}
    classes, images, others = next(_visible(root, problems), ([], [], []))
    if problems:
        raise UserError(
            f"{''.join(problems)}: dataset=folder needs images in data_dir/train/, and for labels "
            "in data_dir/train/<class>/ and data_dir/test/<class>/"
        )
    refuse(_wrong_links([root, *classes], within, to_folders=True))
    if not classes and not images:
        what = f"{root} has no image{_but(others)}"
        raise UserError(f"{what}: add some, for labels in {root}/<class>/")
    return Listing([path.name for path in classes], images, others)


def name_few(files: list[Path], root: Path | None = None) -> str:
    """The first three names, or paths from `root`, and how many files there are besides.

    In one line, with escapes for what is not UTF-8 in names, which no log takes.
    """
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    names = (path.relative_to(root).as_posix() if root else path.name for path in files[:3])
    line = ", ".join(names).encode(errors="backslashreplace").decode()
    return " ".join(line.split()) + more


def name_others(root: Path, others: Iterable[Path]) -> Iterator[str]:
    """A remark about what was left out of `root`, if anything: the first names and the number."""
    if others:
        names = name_few(sorted(others), root)
        yield f"left out of {root}, no images by their extension or of other programs: {names}"


def load_images(
    folder: Path, image_size: int, workers: int, within: Path | None = None
) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """All images below a folder: sorted paths, (N, 3, image_size, image_size) uint8, and remarks.

    The remarks say what was left out. Raises UserError as `find_images` and `decode`.
    """
    [files], others = find_images([folder], within)
    images = decode(files, image_size, workers)
    return files, images, tuple(name_others(folder, others))


def find_images(
    folders: Sequence[Path], within: Path | None = None
) -> tuple[list[list[Path]], list[Path]]:
    """The sorted images below each folder, as deep as it goes, and what is left out of them all.

    Raises UserError, for all folders together, if one has no image or cannot be read, and for links
    to folders, to nothing or out of `within` (None: out of the folder).
    """
    found, others, problems = [], [], {}
    for folder in folders:
        images, left_out, wrong = [], [], {}
        for below, shown, more in _visible(folder, wrong):
            wrong |= _wrong_links(below + shown, within or folder)
            images += shown
            left_out += more
        if not images and not wrong:
            wrong[f"{folder} has no image{_but(left_out)}"] = "add some, or leave the folder out"
        found.append(sorted(images))
        others += left_out
        problems |= wrong
    refuse(problems)
    return found, others


def _visible(
    folder: Path, problems: dict[str, str]
) -> Iterator[tuple[list[Path], list[Path], list[Path]]]:
    """Folders, images and others, sorted, directly in the folder and then in each one below it.

    Hidden ones are none of them; litter is one of the others. `problems` gets what cannot be read.
    """

    def unreadable(error: OSError) -> None:
        problems[f"{error.filename} cannot be read ({error.strerror})"] = "make it readable"

    for directory, folders, names in os.walk(folder, onerror=unreadable):
        litter = [name for name in folders if name.casefold() in LITTER]
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in litter)
        files = sorted(name for name in litter + names if name[0] != ".")
        images = [name for name in files if name.lower().endswith(_extensions())]
        others = [name for name in files if not name.lower().endswith(_extensions())]
        yield tuple([Path(directory, name) for name in some] for some in (folders, images, others))


def _but(others: list[Path]) -> str:
    return f" but {name_few(others)}" if others else ""


@cache
def _extensions() -> tuple[str, ...]:
    """Those of the formats that Pillow reads; MPO, of cameras, it opens as JPEG."""
    formats = Image.registered_extensions()  # this loads them
    read = {*Image.OPEN, "MPO"} - UNREAD
    return tuple(extension for extension, name in formats.items() if name in read)


def _wrong_links(paths: list[Path], within: Path, to_folders: bool = False) -> dict[str, str]:
    """Problems: symbolic links out of `within`, to nothing, or to folders unless those may be."""
    problems = []
    for path in filter(Path.is_symlink, paths):
        target = Path(os.path.realpath(path))
        if not target.exists() or not target.is_relative_to(os.path.realpath(within)):
            problems.append(f"{path} is a link out of {within}, or to nothing")
        elif target.is_dir() and not to_folders:
            problems.append(f"{path} is a link to a folder, not followed")
    return dict.fromkeys(problems, "copy what is meant")
