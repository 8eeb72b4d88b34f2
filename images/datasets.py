"""Datasets as one uint8 tensor: CIFAR-10, CIFAR-100, STL-10, digits, or a folder of images.

A split is decoded once and kept on the training device (CIFAR-10: 154 MB) or in host memory, so
that training needs neither PIL nor loader processes.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from config import Config, ConfigError
from images.folder import LEFT_OUT, decode_files, list_images, remark_left_out
from system.device import to_device
from system.errors import UserError
from system.files import locked

DOWNLOADS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}


class HostImages:
    """Images (N, 3, H, W), uint8, in host memory, read like a tensor on `device`."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self.images, self.device = images, device
        self.shape, self.nbytes = images.shape, images.nbytes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        """A copy of the images at the index, on the device."""
        return to_device(self.images[index.cpu()], self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        """Batches of `size` images, in order."""
        return (self[index] for index in torch.arange(len(self)).split(size))


Images: TypeAlias = Tensor | HostImages


def move_images(images: Tensor, device: torch.device) -> Images:
    """Images (N, 3, H, W), uint8, on the device.

    In host memory if they take over half of a GPU's free memory: weights and activations need some.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if images.nbytes > (torch.cuda.mem_get_info(device)[0] + unused) / 2:
            return HostImages(images, device)
    return images.to(device)


def select_images(images: Images, index: Tensor) -> Images:
    """The images at an index; those from host memory on the device if they fit there."""
    if isinstance(images, HostImages):
        return move_images(images.images[index.cpu()], images.device)
    return images[index]


def describe_images(images: Images, dataset: str) -> str:
    """Number, size and where they are: `50,000 images of cifar10 (153.6 MB on cuda)`."""
    where = "in host memory" if isinstance(images, HostImages) else f"on {images.device}"
    return f"{len(images):,} images of {dataset} ({images.nbytes / 1e6:,.1f} MB {where})"


class Split(NamedTuple):
    """One split of a dataset."""

    images: Images  # (N, 3, H, W), uint8
    labels: Tensor  # (N,), int64 in [0, len(classes)); -1 where the split has no labels
    classes: list[str]  # none if the dataset has no labels at all
    remarks: tuple[str, ...] = ()  # for the log: files left out, no kNN

    def to(self, device: torch.device) -> "Split":
        """The same split on the device, but for images that do not fit there."""
        images, labels = move_images(self.images, device), self.labels.to(device)
        return self._replace(images=images, labels=labels)


class Probe(NamedTuple):
    """The data of kNN in pretraining."""

    split: Split  # labelled training images
    bank: Tensor  # indices of the images whose labels vote
    queries: Tensor  # indices of the images that are classified


def load_pretraining(
    cfg: Config, device: torch.device
) -> tuple[Images, str, Probe | None, tuple[str, ...]]:
    """Training images for the device, their fingerprint (shape and SHA-256), a probe, and remarks.

    The probe's queries are the same stratified tenth in every run, held out of the bank, not of
    pretraining; there is none without classes. Raises ConfigError if batch_size is too large.
    """
    split = load_split(cfg, "pretrain")
    if cfg.batch_size > len(split.images):
        allowed = f"at most {len(split.images)}, the number of training images"
        raise ConfigError(f"batch_size={cfg.batch_size}: must be {allowed}")
    digest = hashlib.sha256(split.images.contiguous().numpy()).hexdigest()  # a second for 1 GB
    fingerprint = f"{tuple(split.images.shape)} {digest}"
    split, probe = split.to(device), None
    if cfg.knn_interval > 0 and len(split.classes) > 1:
        unlabelled = split.labels.min() < 0  # STL-10
        labelled = load_split(cfg, "train").to(device) if unlabelled else split
        remedy = "knn_interval=0 leaves kNN out"
        bank, queries = hold_out(labelled.labels, 0.1, seed=0, remedy=remedy)
        probe = Probe(labelled, bank, queries)
    return split.images, fingerprint, probe, split.remarks


def load_split(cfg: Config, split: str) -> Split:
    """The `split` of cfg.dataset: "pretrain", "train" or "test".

    "pretrain" is the unlabelled split of STL-10, and "train" elsewhere. Images keep their size, but
    those of `folder`, which are resized to cfg.image_size. Nothing is written but the download to
    data_dir. Raises UserError if data is missing or damaged.
    """
    if cfg.dataset == "digits":
        return _load_digits(split)
    return _load_folder(cfg, split) if cfg.dataset == "folder" else _load_download(cfg, split)


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
            found = f"class number {label} has {len(members)} training images"
            raise UserError(f"{count} images of each class are too many: {found}")
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


def _load_digits(split: str) -> Split:
    """scikit-learn's 1,797 digits of 8×8 pixels; a fixed fifth of each class is the test set."""
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)  # 0 to 16
    rows, labels = np.arange(len(images)), digits.target
    train, test = train_test_split(rows, test_size=0.2, stratify=labels, random_state=0)
    index = np.sort(test if split == "test" else train)
    classes = [str(name) for name in digits.target_names]
    return Split(images[index, None].repeat(1, 3, 1, 1), torch.from_numpy(labels[index]), classes)


def _load_download(cfg: Config, split: str) -> Split:
    """CIFAR or STL-10, downloaded, verified by MD5 and unpacked by torchvision.

    One process at a time downloads; the others wait for it, and use what is there then.
    """
    source = DOWNLOADS[cfg.dataset]
    which = {"train": split != "test"}
    if source is STL10:
        which = {"split": "unlabeled" if split == "pretrain" else split}
    load = partial(source, cfg.data_dir, **which)
    try:
        found = load()
    except RuntimeError:  # torchvision's for data that is missing or incomplete
        try:
            os.makedirs(cfg.data_dir, exist_ok=True)
            with locked(Path(cfg.data_dir), "download", wait=True):
                found = load(download=True)
        except (OSError, HTTPException, RuntimeError) as error:
            remedy = f"put {source.filename} into {cfg.data_dir}, or take dataset=digits"
            raise UserError(f"{source.url} cannot be fetched ({error}): {remedy}") from None
    images = found.data if source is STL10 else found.data.transpose(0, 3, 1, 2)
    labels = torch.tensor(found.labels if source is STL10 else found.targets, dtype=torch.int64)
    return Split(torch.from_numpy(np.ascontiguousarray(images)), labels, list(found.classes))


def _load_folder(cfg: Config, split: str) -> Split:
    """data_dir/train/<class>/* or data_dir/test/<class>/*, one class a folder, sorted by name.

    "pretrain" is all images below data_dir/train, without labels, if one lies directly in it.
    """
    root = Path(cfg.data_dir, "test" if split == "test" else "train")
    files, left_out = list_images(root)
    if not files:
        raise UserError(f"{root} has no image: put each into {root}/<class>/")
    names, labels = np.unique(_class_names(root, files), return_inverse=True)
    classes, labels = names.tolist(), torch.from_numpy(labels)
    if split != "pretrain" and "" in classes:
        raise UserError(f"{root} has images without labels: put each into {root}/<class>/")
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    empty = [name for name in folders - set(classes) if not name.startswith(LEFT_OUT)]
    if empty and "" not in classes:
        raise UserError(f"{root} has folders without an image, {sorted(empty)}: remove them")
    if split == "test":
        train = root.with_name("train")
        differ = set(classes) ^ set(_class_names(train, list_images(train)[0]))
        if differ:
            raise UserError(f"{root} must have the classes of {train}: one lacks {sorted(differ)}")
    remarks = remark_left_out(root, left_out)
    if "" in classes:
        classes, labels = [], torch.full_like(labels, -1)
    if split == "pretrain" and len(classes) < 2:
        reason = "one class" if classes else "images in no class folder, so no labels"
        remarks += (f"no kNN, since {root} has {reason}",)
    return Split(decode_files(files, cfg.image_size, cfg.workers), labels, classes, remarks)


def _class_names(root: Path, files: list[Path]) -> list[str]:
    """The name of each image's class folder; empty for an image directly in `root`."""
    return ["" if path.parent == root else path.relative_to(root).parts[0] for path in files]
