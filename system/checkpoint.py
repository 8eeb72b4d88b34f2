"""Checkpoints: weights and the resolved config, as plain data that holds no code.

from system.checkpoint import load_encoder
enc, feature_dim = load_encoder("simclr_resnet18_epoch1000.pt")
h = enc(images)  # (N, 3, 32, 32) in [0, 1] -> (N, feature_dim)
"""

import io
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Architecture, ConfigError, keys
from models import SimCLR
from system.errors import OUT_OF_MEMORY, UserError

log = logging.getLogger("simclr")

ARCHITECTURE = keys(Architecture)
CONTENT = {"model": dict, "config": dict, "epoch": int}
HEADS = ("projector.", "fc.")  # of SimCLR, and of torchvision's ResNet
WRAPPERS = re.compile(r"^((module|_orig_mod|enc)\.)+")  # DistributedDataParallel, torch.compile


def checkpoint_name(backbone: str, epoch: int) -> str:
    """The file name of the checkpoint after `epoch` epochs."""
    return f"simclr_{backbone}_epoch{epoch}.pt"


def to_bytes(content: dict[str, Any]) -> bytes:
    """Serialise plain data with torch.save: a zip archive with a CRC of every entry."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_checkpoint(path: Path, content: dict[str, type] = CONTENT) -> dict[str, Any]:
    """Read {"model": state dict, "config": plain dict, "epoch": int} on the CPU; executes nothing.

    content: required keys and their types. Raises UserError if it is missing, damaged, or not ours.
    """
    saved = _read(path)
    lacks = f"{path} was not written by this simclr.py: it lacks"
    for key, kind in content.items():
        if not isinstance(saved, dict) or not isinstance(saved.get(key), kind):
            raise UserError(f"{lacks} {key}")
    for key in ARCHITECTURE:
        if saved["config"].get(key) is None:
            raise UserError(f"{lacks} {key} in its config")
    return saved


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load compares no CRC
            # torch 2.14.1 takes the flag 0x10 for a directory, and returns uninitialised memory
            directory = any(entry.external_attr & 0x10 for entry in archive.infolist())
            if directory or archive.testzip() is not None:
                raise ValueError("an entry is damaged")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many types
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise
        raise UserError(f"{path} is damaged, or holds more than plain data: not loaded") from None


def load_weights(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load weights and statistics; raises UserError if they do not fit, or are not finite."""
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


def load_init(enc: nn.Module, init: str) -> None:
    """Start the encoder from the file `init`, and log which. Raises UserError as `load_weights`.

    init: a checkpoint or training state of simclr.py, a run directory (its newest checkpoint), or
    a torchvision ResNet's state dict. Its head is left out, as is a `conv1` of another shape.
    """
    path = find_checkpoint(Path(init))
    saved = _read(path)
    found = saved.get("model", saved) if isinstance(saved, dict) else None
    if not isinstance(found, dict) or not all(isinstance(w, Tensor) for w in found.values()):
        raise UserError(f"init={path}: must hold a checkpoint of simclr.py or a ResNet's weights")
    found = {WRAPPERS.sub("", str(key)): value for key, value in found.items()}
    weights = {key: value for key, value in found.items() if not key.startswith(HEADS)}
    own = enc.conv1.weight.detach()
    other_stem = weights.get("conv1.weight", own).shape != own.shape
    if other_stem:
        weights["conv1.weight"] = own
    load_weights(enc, weights, f"init={path}")
    without = f", but for conv1, which is not {(*own.shape,)}" if other_stem else ""
    log.info(f"init: the encoder starts from {path}{without}")


def build_model(saved: dict[str, Any], path: Path, trained: bool = True) -> SimCLR:
    """The network of a checkpoint read from `path`; its encoder is trained, or all is random."""
    model = SimCLR(**{key: saved["config"][key] for key in ARCHITECTURE if key != "image_size"})
    if trained:
        weights = {str(k): value for k, value in saved["model"].items()}  # may lack the head
        weights = {k[4:]: value for k, value in weights.items() if k.startswith("enc.")}
        load_weights(model.enc, weights, str(path))
    return model


def load_encoder(path: str | Path) -> tuple[nn.Module, int]:
    """The encoder of a checkpoint, frozen and in eval mode, on the CPU; and its feature size D.

    It maps images (N, 3, S, S) with values in [0, 1], not standardised, S the `image_size` of
    the run, to representations h (N, D). Raises UserError, as `load_checkpoint`.
    """
    path = Path(path)
    model = build_model(load_checkpoint(path), path)
    return model.enc.eval().requires_grad_(False), model.feature_dim


def find_checkpoint(path: Path, backbone: str | None = None, epoch: int | None = None) -> Path:
    """The path itself; of a run directory the newest checkpoint that fits.

    Raises UserError if none fits, ConfigError if `epoch` is given beside a file.
    """
    if not path.is_dir():
        if epoch is not None:
            raise ConfigError(f"load_epoch={epoch}: must be null where checkpoint is a file")
        return path
    found: list[tuple[str, int]] = []
    for file in path.glob("simclr_*_epoch*.pt"):
        match = re.fullmatch(r"simclr_(\w+)_epoch([1-9]\d*)\.pt", file.name)
        if match and backbone in (None, match[1]) and epoch in (None, int(match[2])):
            found.append((match[1], int(match[2])))
    names = {name for name, _ in found}
    if len(names) == 1:
        return path / checkpoint_name(names.pop(), max(number for _, number in found))
    reason = "checkpoints of several backbones" if found else "no such checkpoint"
    raise UserError(f"{reason} in {path}: simclr.py writes them, or give the path of one")
