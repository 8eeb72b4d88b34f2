"""Checkpoints: weights and the resolved config, as plain data that holds no code.

from system.checkpoint import load_encoder
enc, feature_dim = load_encoder("simclr_resnet18_epoch1000.pt")
h = enc(images)  # (N, 3, 32, 32) in [0, 1] -> (N, feature_dim)
"""

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Architecture, keys
from models import SimCLR
from system.errors import OUT_OF_MEMORY, UserError
from system.files import write_file

ARCHITECTURE = keys(Architecture)
CONTENT = {"model": dict, "config": dict, "epoch": int}
# Config keys that checkpoints of earlier versions lack, and what those versions did.
ADDED = {"init": None, "blur_probability": 0.0}
HEADS = ("projector", "fc")  # of SimCLR, and of torchvision's ResNet
WRAPPERS = re.compile(r"^((module|_orig_mod|enc)\.)+")  # DistributedDataParallel, torch.compile


def checkpoint_name(backbone: str, epoch: int) -> str:
    """The file name of the checkpoint after `epoch` epochs."""
    return f"simclr_{backbone}_epoch{epoch}.pt"


def save_checkpoint(
    path: Path, weights: dict[str, Tensor], config: dict[str, Any], epoch: int
) -> None:
    """Write {"model": state dict, "config": plain dict, "epoch": int} atomically, on the CPU.

    Raises UserError if the file cannot be written.
    """
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    write_file(path, to_bytes({"model": weights, "config": config, "epoch": epoch}))


def to_bytes(content: dict[str, Any]) -> bytes:
    """Serialise plain data with torch.save: a zip archive with a CRC of every entry."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_checkpoint(path: Path, content: dict[str, type] = CONTENT) -> dict[str, Any]:
    """Read a file of `save_checkpoint` on the CPU. Nothing in it is executed.

    content: the required keys and their types. Raises UserError if it is missing, damaged (the CRC
    of an entry is wrong) or not of simclr.py.
    """
    saved = _read(path)
    for key, kind in content.items():
        if not isinstance(saved, dict) or not isinstance(saved.get(key), kind):
            raise UserError(f"{path} was not written by this simclr.py: it has no {key}")
    for key in ARCHITECTURE:
        if saved["config"].get(key) is None:
            raise UserError(f"{path} was not written by simclr.py: its config lacks {key}")
    return {**saved, "config": {**ADDED, **saved["config"]}}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load compares no CRC
            if (entry := archive.testzip()) is not None:
                raise ValueError(f"wrong CRC of {entry}")
            if any(entry.external_attr & 0x10 for entry in archive.infolist()):
                # torch 2.14.1 takes it for a directory, and returns uninitialised memory
                raise ValueError("an entry is marked as a directory")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message tells how to execute it
        reason = "it is not the plain data of simclr.py or of a state dict"
    except Exception as error:  # the readers raise many types
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path} is damaged or no checkpoint ({reason})")


def load_weights(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load all weights and statistics of a module.

    Raises UserError, naming `where` they are from, if they do not fit or are not finite.
    """
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:  # other shapes, no tensors
        raise UserError(f"{where} does not fit: {' '.join(str(error).split())[:300]}") from None
    if missing or unexpected:
        differ = f"missing: {missing[:2]}, unexpected: {unexpected[:2]}"
        raise UserError(f"{where} does not fit ({differ}): choose its network with backbone=NAME")
    for name, value in module.state_dict().items():
        negative = name.endswith("running_var") and (value < 0).any()
        if negative or not value.isfinite().all():
            raise UserError(f"{where}: {name} has values that are not finite, or negative variance")


def load_init(enc: nn.Module, init: str) -> str:
    """Start the encoder from the file `init`; returns a line for the log that says what it has.

    init: a checkpoint or training state of simclr.py, a run directory (its newest checkpoint), or
    the state dict of a torchvision ResNet. The head in it is left out, as is a `conv1` of another
    shape (3×3 or 7×7), which stays random. Raises UserError as `load_weights`.
    """
    path = find_checkpoint(Path(init))
    saved = _read(path)
    weights = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UserError(f"init={path}: must hold a checkpoint of simclr.py or a ResNet's weights")
    weights = {WRAPPERS.sub("", str(key)): value for key, value in weights.items()}
    heads = sorted({key.split(".")[0] for key in weights} & {*HEADS})
    weights = {key: value for key, value in weights.items() if key.split(".")[0] not in heads}
    line = f"init: the encoder starts from {', without '.join([str(path), *heads])}"
    own = enc.conv1.weight.detach()
    given = weights.get("conv1.weight", own)
    if given.shape != own.shape:
        weights["conv1.weight"] = own
        line += f"; conv1 has another shape, {(*given.shape,)} not {(*own.shape,)}: stays random"
    load_weights(enc, weights, f"init={path}")
    return line


def build_model(saved: dict[str, Any], path: Path, trained: bool = True) -> SimCLR:
    """Build the network of a checkpoint read from `path`, trained or randomly initialised.

    Raises UserError as `load_weights`.
    """
    model = SimCLR(**{key: saved["config"][key] for key in ARCHITECTURE if key != "image_size"})
    if trained:
        load_weights(model, saved["model"], str(path))
    return model


def load_encoder(path: str | Path) -> tuple[nn.Module, int]:
    """The encoder of a checkpoint, frozen and in eval mode, on the CPU; and its feature size D.

    It maps images (N, 3, S, S) with values in [0, 1], not standardised, S the `image_size` of
    the run, to representations h (N, D). Raises UserError, as `load_checkpoint` and `load_weights`.
    """
    path = Path(path)
    model = build_model(load_checkpoint(path), path)
    return model.enc.eval().requires_grad_(False), model.feature_dim


def find_checkpoint(path: Path, backbone: str | None = None, epoch: int | None = None) -> Path:
    """The path itself, or the checkpoint of `backbone` after `epoch` epochs in that run directory.

    None: of the backbone that it has checkpoints of; the newest. Raises UserError if none is found,
    or if those found are of several backbones.
    """
    if not path.is_dir():
        return path
    found: list[tuple[str, int]] = []
    for file in path.glob("simclr_*_epoch*.pt"):
        match = re.fullmatch(r"simclr_(\w+)_epoch([1-9]\d*)\.pt", file.name)
        if match and backbone in (None, match[1]) and epoch in (None, int(match[2])):
            found.append((match[1], int(match[2])))
    names = {name for name, _ in found}
    if len(names) == 1:
        return path / checkpoint_name(names.pop(), max(number for _, number in found))
    reason = "checkpoints of several backbones" if found else "no checkpoint"
    wanted = "" if backbone is None else f" of {backbone}"
    wanted += "" if epoch is None else f" after epoch {epoch}"
    there = ", ".join(sorted(file.name for file in path.glob("*.pt"))[-5:]) or "no .pt file"
    raise UserError(
        f"{reason}{wanted} in {path}, which has {there}: name one with checkpoint=PATH or "
        "init=PATH, or make one with simclr.py"
    )
