"""Datasets as one uint8 tensor: CIFAR-10, CIFAR-100, STL-10, digits, or a folder of images.

A split is decoded once and kept on the training device (CIFAR-10: 154 MB) or in host memory, so
that training needs neither PIL nor loader processes.
"""

import hashlib
import logging
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

from config import Config
from images.augment import shuffle
from images.folder import decode_files, find_images, list_images
from system.device import to_device
from system.errors import UserError
from system.files import locked

log = logging.getLogger("simclr")

DOWNLOADS = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}


class HostImages:
    """Images (N, 3, H, W), uint8, in host memory, read like a tensor on `device`."""

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self.images, self.device = images, device

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
    """uint8 images on the device; in host memory if they take over half of what a GPU has free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if images.nbytes > (torch.cuda.mem_get_info(device)[0] + unused) / 2:
            log.info(f"{images.nbytes / 1e6:,.0f} MB of images stay in host memory")
            return HostImages(images, device)
    return images.to(device)


def select_images(images: Images, index: Tensor) -> Images:
    """The images at an index; those from host memory on the device if they fit there."""
    if isinstance(images, HostImages):
        return move_images(images.images[index.cpu()], images.device)
    return images[index]


class Split(NamedTuple):
    """One split of a dataset."""

    images: Images  # (N, 3, H, W), uint8
    labels: Tensor  # (N,), int64 in [0, len(classes)); -1 where the split has no labels
    classes: list[str]  # none if the dataset has no labels at all

    def to(self, device: torch.device) -> "Split":
        """The same split on the device, but for images that do not fit there."""
        return Split(move_images(self.images, device), self.labels.to(device), self.classes)


class Probe(NamedTuple):
    """What is measured on in pretraining."""

    sample: Images  # at most 2,048 training images, for the effective rank
    labelled: Split | None = None  # training images for kNN
    bank: Tensor | None = None  # indices of those whose labels vote
    queries: Tensor | None = None  # indices of those that are classified


def load_pretraining(cfg: Config, device: torch.device) -> tuple[Images, str, Probe | None]:
    """Training images for the device, their fingerprint (shape, SHA-256), and a probe, the same in
    every run: its queries, a stratified tenth, are held out of the bank, not of pretraining."""
    split = load_split(cfg, "pretrain")
    allowed = f"at most {len(split.images)}, the number of training images"
    cfg.require("batch_size", cfg.batch_size <= len(split.images), allowed)
    digest = hashlib.sha256(split.images.contiguous().numpy()).hexdigest()  # a second for 1 GB
    fingerprint = f"{tuple(split.images.shape)} {digest}"
    split = split.to(device)
    if cfg.knn_interval == 0:
        return split.images, fingerprint, None
    probe = Probe(select_images(split.images, shuffle(len(split.images), seed=0, epoch=0)[:2048]))
    if len(split.classes) > 1:
        # STL-10 pretrains on images without labels
        labelled = load_split(cfg, "train").to(device) if split.labels.min() < 0 else split
        probe = Probe(probe.sample, labelled, *hold_out(labelled.labels, 0.1, seed=0))
    return split.images, fingerprint, probe


def load_split(cfg: Config, split: str) -> Split:
    """The split "train", "test" or "pretrain", which is STL-10's unlabelled one, else "train".

    Images keep their size, but those of `folder` get cfg.image_size. Raises UserError if damaged.
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
    """Sorted indices of a random sample of each class of labels (N,).

    amount: a fraction below 1, or a number; at least one. Raises UserError if it is too large.
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


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out a stratified fraction, but never a class's only image: the other indices, and these.
    Raises UserError if there is none."""
    held_out = draw_stratified(labels, fraction, seed)
    held_out = held_out[labels.bincount()[labels[held_out]] > 1]
    if len(held_out) == 0:
        raise UserError("no class has two labelled images: take more (pretraining: knn_interval=0)")
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
    """CIFAR or STL-10 by torchvision; one process at a time downloads, the others wait for it."""
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
    """data_dir/train/<class>/* or test/<class>/*, a class a folder. "pretrain" is all images below
    data_dir/train, without labels, if one lies directly in it."""
    root = Path(cfg.data_dir, "test" if split == "test" else "train")
    files = find_images(root)
    names, labels = np.unique(_class_names(root, files), return_inverse=True)
    classes, labels = names.tolist(), torch.from_numpy(labels)
    if "" in classes and split != "pretrain":
        raise UserError(f"{root} has images without labels: put each into {root}/<class>/")
    if split == "test":
        train = root.with_name("train")
        differ = set(classes) ^ set(_class_names(train, list_images(train)[0]))
        if differ:
            raise UserError(f"{root} must have the classes of {train}: one lacks {sorted(differ)}")
    if "" in classes:
        classes, labels = [], torch.full_like(labels, -1)
    return Split(decode_files(files, cfg.image_size, cfg.workers), labels, classes)


def _class_names(root: Path, files: list[Path]) -> list[str]:
    """The name of each image's class folder; empty for an image directly in `root`."""
    return ["" if path.parent == root else path.relative_to(root).parts[0] for path in files]
