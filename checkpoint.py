"""Checkpoints: weights and the resolved config, as plain data that holds no code."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errors import UserError

# What the zip reader and the restricted unpickler raise on bytes that torch.save did not write.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError)


def checkpoint_name(backbone: str, epoch: int) -> str:
    """The file name of the checkpoint after `epoch` epochs."""
    return f"simclr_{backbone}_epoch{epoch}.pt"


def save_checkpoint(path: Path, model: nn.Module, config: dict[str, Any], epoch: int) -> None:
    """Write {"model": state dict, "config": plain dict, "epoch": int}, whole or not at all.

    The weights are written as CPU tensors, to be read where there is no GPU.
    """
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"model": weights, "config": config, "epoch": epoch}, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU. Nothing in the file is executed.

    Raises UserError if there is no such file or it is not one of ours.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: there is {_listing(path.parent)}")
    try:
        if not zipfile.is_zipfile(path):  # torch would read it as a bare pickle
            raise ValueError("not a zip archive")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no checkpoint ({reason})") from None
    parts = {"model": dict, "config": dict, "epoch": int}
    for key, kind in parts.items():
        if not isinstance(saved, dict) or not isinstance(saved.get(key), kind):
            raise UserError(f"{path} was not written by simclr.py: it has no {key}")
    return saved


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
