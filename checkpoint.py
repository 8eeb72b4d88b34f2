"""Checkpoints: weights and the resolved config, as plain data that holds no code.

from checkpoint import load_encoder
enc, feature_dim = load_encoder("simclr_resnet18_epoch1000.pt")
h = enc(images)  # (N, 3, 32, 32) in [0, 1] -> (N, feature_dim)
"""

import hashlib
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errors import UserError
from files import write_file
from models import SimCLR

# What of the config has to be known to build the network, and to feed it.
ARCHITECTURE = ("backbone", "projection_dim", "hidden_dim", "cifar_stem", "image_size")

FORMAT = 1  # of checkpoints; a file without a number has this one

# What the zip reader and the restricted unpickler raise on bytes that torch.save did not write.
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError,
    LookupError,
)  # fmt: skip


def checkpoint_name(backbone: str, epoch: int) -> str:
    """The file name of the checkpoint after `epoch` epochs."""
    return f"simclr_{backbone}_epoch{epoch}.pt"


def save_checkpoint(path: Path, model: nn.Module, config: dict[str, Any], epoch: int) -> None:
    """Write {"model": state dict, "config": plain dict, "epoch": int}, whole or not at all.

    The weights are written as CPU tensors, to be read where there is no GPU. Raises UserError
    where that is not possible.
    """
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    write_file(path, to_bytes({"model": weights, "config": config, "epoch": epoch}))


def to_bytes(content: dict[str, Any]) -> bytes:
    """What torch.save makes of plain data: a zip archive with a CRC-32 of each tensor."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_checkpoint(path: Path, parts: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU. Nothing in the file is executed.

    parts: the keys that it must have, and their types; None: those of a file of weights. Raises
    UserError if there is no such file, its checksums are wrong, or it is not one of ours.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: there is {_listing(path.parent)}")
    try:
        _compare_checksums(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no checkpoint: it is not the plain data of simclr.py") from None
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no checkpoint ({reason})") from None
    for key, kind in (parts or {"model": dict, "config": dict, "epoch": int}).items():
        if not isinstance(saved, dict) or not isinstance(saved.get(key), kind):
            raise UserError(f"{path} was not written by simclr.py: it has no {key}")
    if saved.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} has format {saved['format']}, this version reads {FORMAT}: use the version "
            "of this repository that wrote it"
        )
    for key in ARCHITECTURE:
        if saved["config"].get(key) is None:
            raise UserError(f"{path} was not written by simclr.py: its config lacks {key}")
    return saved


def is_whole(path: Path) -> bool:
    """Whether there is a file that torch.save wrote, with all its checksums right."""
    try:
        _compare_checksums(path)
    except UNREADABLE:
        return False
    return True


def _compare_checksums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:  # torch.load reads the CRC-32s, but compares none
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_model(saved: dict[str, Any], path: Path, trained: bool = True) -> SimCLR:
    """The network of a checkpoint that was loaded from `path`, or the same one untrained.

    Raises UserError if the weights do not fit the architecture that the checkpoint names.
    """
    try:
        model = SimCLR(**{k: saved["config"][k] for k in ARCHITECTURE if k != "image_size"})
        if trained:
            model.load_state_dict(saved["model"])
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: its weights do not fit its config ({reason[:300]} …)") from None
    return model


def load_encoder(path: str | Path) -> tuple[nn.Module, int]:
    """The encoder of a checkpoint, frozen and in eval mode, on the CPU; and its feature size D.

    It maps images (N, 3, S, S) with values in [0, 1], not standardised, S the `image_size` of
    the run, to representations h (N, D). Raises UserError, as `load_checkpoint` and `build_model`.
    """
    path = Path(path)
    model = build_model(load_checkpoint(path), path)
    return model.enc.eval().requires_grad_(False), model.feature_dim


def find_checkpoint(folder: Path, backbone: str, epoch: int | None) -> Path:
    """The checkpoint of `backbone` in `folder` after `epoch` epochs; None: the newest epoch.

    Raises UserError, listing those that are there, if it is missing.
    """
    if epoch is None:
        epochs = [_epoch(path, backbone) for path in folder.glob(f"simclr_{backbone}_epoch*.pt")]
        epoch = max((found for found in epochs if found is not None), default=None)
    if epoch is not None and (path := folder / checkpoint_name(backbone, epoch)).is_file():
        return path
    wanted = f"{backbone} after epoch {epoch}" if epoch is not None else backbone
    raise UserError(
        f"no checkpoint of {wanted} in {folder}: there is {_listing(folder)}; "
        "make one with simclr.py or name one with checkpoint=PATH"
    )


def _epoch(path: Path, backbone: str) -> int | None:
    match = re.fullmatch(rf"simclr_{backbone}_epoch(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.glob("*.pt"))) or "none"
