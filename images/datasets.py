"""Datasets as one uint8 tensor: CIFAR-10, CIFAR-100, STL-10, digits, or a folder of images.

A split is decoded once and kept on the training device (CIFAR-10: 154 MB) or in host memory, so
that training needs neither PIL nor loader processes.
"""

import hashlib
import os
import tarfile
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10, VisionDataset
from torchvision.datasets.utils import check_integrity, download_url

from images.decode import decode
from images.folder import find_images, list_folder, name_few, name_others
from images.host import Images, place
from system.errors import ConfigError, UserError
from system.files import locked

DATASETS = ("cifar10", "cifar100", "stl10", "digits", "folder")
UNFETCHED = (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError)  # by torchvision
DOWNLOADS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}


class Split(NamedTuple):
    """One split of a dataset."""

    images: Images  # (N, 3, H, W), uint8
    labels: Tensor  # (N,), int64 in [0, len(classes)); -1 where the split has no labels
    classes: list[str]  # none if the dataset has no labels at all
    remarks: tuple[str, ...] = ()  # what to tell once the split is used: files left out, no kNN

    def to(self, device: torch.device) -> "Split":
        """The same split on `device`; its images in host memory if they do not fit there."""
        images, labels = place(self.images, device), self.labels.to(device)
        return self._replace(images=images, labels=labels)


def load_split(dataset: str, data_dir: str, split: str, image_size: int, workers: int = 1) -> Split:
    """The `split` of `dataset`: "pretrain", "train" or "test".

    "pretrain" is the unlabelled split of STL-10 and the same as "train" elsewhere, but for images
    of `folder` that lie in no class folder: without labels in "pretrain", refused in the others.
    No split shares an image with "test". Images keep their own size, except that those of `folder`
    are resized to (image_size, image_size) here. Nothing is written but the download to `data_dir`.
    Raises UserError, with the file and the remedy, if data is missing or damaged.
    """
    if split not in ("pretrain", "train", "test"):
        raise ValueError(f"unknown split {split!r}: choose one of pretrain, train, test")
    if dataset == "digits":
        return _digits(split)
    if dataset == "folder":
        return _folder(Path(os.path.expanduser(data_dir)), split, image_size, workers)
    return _download(dataset, data_dir, split)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 (N, 3, size, size) in [0, 1], bilinear and antialiased."""
    x = images.float() / 255
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def draw_stratified(labels: Tensor, amount: float, seed: int) -> Tensor:
    """Sorted indices of a random sample of each class.

    labels: (N,). amount: a fraction of the class if below 1, rounded and at least one image; else
    the number of images. Raises UserError if a class has fewer.
    """
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0].cpu()
        count = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        if count > len(members):
            raise UserError(
                f"{count} images of each class are too many: class number {label} has "
                f"{len(members)} training images"
            )
        parts.append(members[torch.randperm(len(members), generator=rng)[:count]])
    return torch.cat(parts).sort().values.to(labels.device)


def hold_out(labels: Tensor, fraction: float, seed: int, remedy: str) -> tuple[Tensor, Tensor]:
    """Hold out a random stratified fraction: indices of the other images, and of the held-out.

    The only image of a class is not held out. Raises UserError, which names the remedy, if nothing
    can be held out.
    """
    held_out = draw_stratified(labels, fraction, seed)
    held_out = held_out[labels.bincount()[labels[held_out]] > 1]
    if len(held_out) == 0:
        raise UserError(f"no class has two images, so that none can be held out: {remedy}")
    rest = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    rest[held_out] = False
    return rest.nonzero()[:, 0], held_out


def load_pretraining(
    dataset: str, data_dir: str, image_size: int, workers: int, device: torch.device, knn: bool
) -> tuple[Images, str, tuple[Split, Tensor, Tensor] | None, tuple[str, ...]]:
    """Training images for the device, their fingerprint (shape and SHA-256), data for kNN, remarks.

    The third is, if `knn`, the labelled training images and the indices of bank and queries. The
    queries are the same stratified tenth in every run, held out of the bank, not of pretraining.
    For STL-10, whose pretraining images are unlabelled, its "train" split is loaded for it; a
    folder with fewer than two classes has no kNN.
    """
    split = load_split(dataset, data_dir, "pretrain", image_size, workers)
    digest = hashlib.sha256(split.images.contiguous().numpy()).hexdigest()  # a second for 1 GB
    split = split.to(device)
    images, fingerprint = split.images, f"{(*split.images.shape,)} {digest}"
    remarks = split.remarks
    if not knn or len(split.classes) < 2:
        return images, fingerprint, None, remarks
    if split.labels.min() < 0:
        split = load_split(dataset, data_dir, "train", image_size).to(device)
    held_out = hold_out(split.labels, 0.1, seed=0, remedy="knn_interval=0 leaves kNN out")
    return images, fingerprint, (split, *held_out), remarks


def check_batch_size(batch_size: int, images: int) -> None:
    """Raise UserError if there are fewer than two images, ConfigError if fewer than a batch."""
    if images < 2:
        raise UserError(f"there is {images} training image: a batch takes two or more, add some")
    if batch_size > images:
        raise ConfigError(
            f"batch_size={batch_size}: must be an integer from 2 to {images}, the number of "
            "training images"
        )


def _digits(split: str) -> Split:
    """scikit-learn's 1,797 digits of 8×8 pixels; a fixed fifth of each class is the test set."""
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)  # 0 to 16
    images = images[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    index = torch.from_numpy(np.sort(test if split == "test" else train))
    return Split(images[index], labels[index], [str(name) for name in digits.target_names])


def _download(dataset: str, data_dir: str, split: str) -> Split:
    """CIFAR or STL-10, downloaded, verified by checksum and unpacked by torchvision.

    One process at a time downloads and unpacks; others wait for it, and use what is there then.
    """
    source, data_dir = DOWNLOADS[dataset], os.path.expanduser(data_dir)
    part = {"pretrain": "unlabeled"}.get(split, split)
    which = {"split": part} if dataset == "stl10" else {"train": split != "test"}
    try:
        found = source(data_dir, **which)
    except RuntimeError:  # not there, or not complete
        found = _fetch(source, data_dir, which)
    images = found.data if dataset == "stl10" else found.data.transpose(0, 3, 1, 2)
    labels = found.labels if dataset == "stl10" else found.targets
    labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return Split(torch.from_numpy(np.ascontiguousarray(images)), labels, list(found.classes))


def _fetch(source: type, data_dir: str, which: dict[str, Any]) -> VisionDataset:
    """Download and unpack one of DOWNLOADS; an archive gets its name once it is complete."""
    if hasattr(tarfile, "data_filter"):  # PEP 706: no member, no link leads out of data_dir
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    archive, part = Path(data_dir) / source.filename, f".{source.filename}.part"
    archive.parent.mkdir(parents=True, exist_ok=True)
    wait = f"waits for another process, which fetches {source.filename} into {data_dir}"
    try:
        with locked(archive.parent, "download", wait=wait):
            if archive.exists() and not check_integrity(str(archive), source.tgz_md5):
                raise UserError(
                    f"{archive} is damaged or incomplete (its MD5 is not {source.tgz_md5}): "
                    f"delete it to download it again, or replace it with {source.url}"
                )
            if not archive.exists():
                download_url(source.url, data_dir, part, source.tgz_md5)
                archive.with_name(part).replace(archive)
            return source(data_dir, download=True, **which)
    except UNFETCHED as error:
        raise UserError(
            f"could not fetch {source.url} ({error}): put {source.filename} into {data_dir} "
            "yourself; dataset=digits needs no download"
        ) from None
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): delete it") from None


def _folder(data_dir: Path, split: str, image_size: int, workers: int) -> Split:
    """data_dir/train/<class>/* or data_dir/test/<class>/*, one class a folder, sorted by name.

    "pretrain" is all images below data_dir/train, without labels, if one lies directly in it.
    """
    root = data_dir / ("test" if split == "test" else "train")
    classes, loose, others = list_folder(root, data_dir)
    unsorted = f"{root} has images in no class folder ({name_few(loose)})"
    if loose and split != "pretrain":
        raise UserError(
            f"{unsorted}: labels are needed, each image in data_dir/train/<class>/ or "
            "data_dir/test/<class>/"
        )
    expected = list_folder(data_dir / "train", data_dir).classes if split == "test" else classes
    if classes != expected:
        raise UserError(
            f"{root} must have the classes of {root.with_name('train')}: "
            f"only one of them has {', '.join(sorted(set(classes) ^ set(expected)))}"
        )
    found, left_out = find_images([root] if loose else [root / name for name in classes], data_dir)
    labels = [-1 if loose else label for label, files in enumerate(found) for _ in files]
    images = decode([file for files in found for file in files], image_size, workers)
    remarks = [*name_others(root, {*others, *left_out})]
    if loose:
        remarks.append(f"{unsorted}: all below it are taken without labels, so there is no kNN")
    elif split == "pretrain" and len(classes) == 1:
        only = name_few([root / classes[0]])
        remarks.append(f"{root} has one class, {only}, so there is no kNN")
    return Split(images, torch.tensor(labels), [] if loose else classes, tuple(remarks))
