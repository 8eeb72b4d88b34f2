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
from torch import Tensor, nn

from errors import UserError
from files import write_file
from models import SimCLR

# What of the config has to be known to build the network, and to feed it.
ARCHITECTURE = ("backbone", "projection_dim", "hidden_dim", "cifar_stem", "image_size")

PARTS = {"model": dict, "config": dict, "epoch": int}  # of a file of weights
DIGEST = 64  # hexadecimal digits
FORMAT = 1  # of checkpoints; a file without a number has this one


class Damaged(UserError):
    """A file that is no checkpoint of ours, or not whole."""


def checkpoint_name(backbone: str, epoch: int) -> str:
    """The file name of the checkpoint after `epoch` epochs."""
    return f"simclr_{backbone}_epoch{epoch}.pt"


def save_checkpoint(
    path: Path, weights: dict[str, Tensor], config: dict[str, Any], epoch: int
) -> None:
    """Write {"model": state dict, "config": plain dict, "epoch": int}, whole or not at all.

    The weights are written as CPU tensors, to be read where there is no GPU. Raises UserError
    where that is not possible.
    """
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    write_file(path, to_bytes({"model": weights, "config": config, "epoch": epoch}))


def to_bytes(content: dict[str, Any]) -> bytes:
    """What torch.save makes of plain data, a zip archive, with its SHA-256 as the zip's comment.

    The archive's own checksums cover neither its directory nor does torch.load compare them.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(DIGEST.to_bytes(2, "little"))  # the length of the comment
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    return buffer.getvalue()


def from_bytes(file: bytes, must_have_checksum: bool) -> Any:
    """The content of `to_bytes`, on the CPU, or of torch.save alone if it need not have a checksum.

    Nothing is executed. Raises whatever the readers raise on bytes that are something else.
    """
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        if len(archive.comment) == DIGEST:
            if hashlib.sha256(file[:-DIGEST]).hexdigest().encode() != archive.comment:
                raise ValueError("its checksum is wrong")
        elif must_have_checksum or archive.testzip() is not None:
            raise ValueError("its checksum is wrong or missing")
    return torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)


def load_checkpoint(path: Path, parts: dict[str, Any] = PARTS, state: bool = False) -> Any:
    """What `save_checkpoint` wrote, on the CPU. Nothing in the file is executed.

    parts: the keys that it must have, and their types; `state`: a checksum too, which files of
    weights by others lack. Raises UserError if there is no such file or it has another format,
    Damaged if its checksum is wrong or it is not one of ours.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: there is {_listing(path.parent)}")
    file = path.read_bytes()
    try:
        saved = from_bytes(file, must_have_checksum=state)
    except pickle.UnpicklingError:  # whose message tells how to execute it
        raise Damaged(f"{path} is no checkpoint: it is not the plain data of simclr.py") from None
    except Exception as error:  # the readers raise what they like
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Damaged(f"{path} is damaged or no checkpoint ({reason})") from None
    if isinstance(saved, dict) and saved.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} has format {saved['format']}, this version reads {FORMAT}: use the version "
            "of this repository that wrote it"
        )
    for key, kind in parts.items():
        if not isinstance(saved, dict) or not isinstance(saved.get(key), kind):
            raise Damaged(f"{path} was not written by simclr.py: it has no {key}")
    for key in ARCHITECTURE:
        if saved["config"].get(key) is None:
            raise Damaged(f"{path} was not written by simclr.py: its config lacks {key}")
    return saved


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
