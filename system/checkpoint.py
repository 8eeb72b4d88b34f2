"""Checkpoints: weights and the resolved config, as plain data that holds no code.

from system.checkpoint import load_encoder
enc, feature_dim = load_encoder("simclr_resnet18_epoch1000.pt")
h = enc(images)  # (N, 3, 32, 32) in [0, 1] -> (N, feature_dim)
"""

import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import SimCLR
from system.errors import UserError, out_of_memory
from system.files import write_file

# The config keys that define the network and the size of its input.
ARCHITECTURE = ("backbone", "projection_dim", "hidden_dim", "cifar_stem", "image_size")

# Config keys that files of earlier versions lack, and what those versions did.
ADDED = {"init": None, "blur_probability": 0.0}

PARTS = {"model": dict, "config": dict, "epoch": int}
HEADS = {"projector", "fc"}  # of SimCLR, and of torchvision's ResNet
OLD = b"\x80\x02"  # start of what torch.save wrote before torch 1.6: a pickle, without CRCs
FORMAT = 1  # of checkpoints; files without a number have this one


class Damaged(UserError):
    """A file that is not a checkpoint of simclr.py, or not a complete one."""


def checkpoint_name(backbone: str, epoch: int) -> str:
    """The file name of the checkpoint after `epoch` epochs."""
    return f"simclr_{backbone}_epoch{epoch}.pt"


def save_checkpoint(
    path: Path, weights: dict[str, Tensor], config: dict[str, Any], epoch: int
) -> None:
    """Write {"model": state dict, "config": plain dict, "epoch": int} atomically.

    The weights are saved as CPU tensors, so that they load without a GPU. Raises UserError if the
    file cannot be written.
    """
    weights = {name: tensor.cpu() for name, tensor in weights.items()}
    write_file(path, to_bytes({"model": weights, "config": config, "epoch": epoch}))


def to_bytes(content: dict[str, Any]) -> bytes:
    """Serialise plain data with torch.save: a zip archive with a CRC of every entry."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_checkpoint(path: Path, parts: dict[str, Any] = PARTS) -> dict[str, Any]:
    """Read what `save_checkpoint` or torch.save wrote, on the CPU. Nothing in it is executed.

    parts: the required keys and their types. Raises UserError if there is no such file or it has
    another format, Damaged if the CRC of an entry is wrong or it was not written by simclr.py.
    """
    saved = _read(path)
    for key, kind in parts.items():
        if not isinstance(saved, dict) or not isinstance(saved.get(key), kind):
            raise Damaged(f"{path} was not written by simclr.py: it has no {key}")
    for key in ARCHITECTURE:
        if saved["config"].get(key) is None:
            raise Damaged(f"{path} was not written by simclr.py: its config lacks {key}")
    return {**saved, "config": {**ADDED, **saved["config"]}}


def _read(path: Path, unzipped: bool = False) -> Any:
    """What torch.save wrote; if `unzipped`, also what it wrote before torch 1.6."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: {describe_checkpoints(path.parent)}")
    content = path.read_bytes()
    try:
        if not (unzipped and content.startswith(OLD)):
            _check_archive(content)
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message tells how to execute it
        raise Damaged(
            f"{path} is no checkpoint: it is not the plain data of simclr.py or of a state dict"
        ) from None
    except Exception as error:  # the readers raise many types
        if out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Damaged(f"{path} is damaged or no checkpoint ({reason})") from None
    if isinstance(saved, dict) and saved.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} has format {saved['format']}, this version reads {FORMAT}: use the version "
            "of this repository that wrote it"
        )
    return saved


def _check_archive(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch.load compares no CRC
        if (entry := archive.testzip()) is not None:
            raise ValueError(f"wrong CRC of {entry}")
        if any(entry.external_attr & 0x10 for entry in archive.infolist()):
            # torch 2.14.1 takes it for a directory, and returns uninitialised memory
            raise ValueError("an entry is marked as a directory")


def load_init(enc: nn.Module, init: str) -> str:
    """Start the encoder from the file `init`; returns a line for the log that says what it has.

    init: a checkpoint or training state of simclr.py, a run directory (its newest checkpoint), or
    the state dict of a torchvision ResNet. The head in it is left out, as is a `conv1` of another
    shape (3×3 or 7×7), which stays random.
    Raises UserError if anything else does not fit or is not finite.
    """
    path = named_checkpoint(init, key="init")
    if not path.is_file():
        raise UserError(f"init={init}: must be a file with weights; there is no such file")
    if path.name != Path(init).name:  # a run directory: say which of its files
        init = str(path)
    saved = _read(path, unzipped=True)
    weights = _without_prefix(saved, init)
    heads = sorted({key.split(".")[0] for key in weights} & HEADS)
    weights = {key: value for key, value in weights.items() if key.split(".")[0] not in heads}
    line = f"epoch {saved['epoch']}" if "epoch" in saved else "a state dict"
    line = f"init: the encoder starts from {', without '.join([f'{init}, {line}', *heads])}"
    ours = enc.conv1.weight.detach()
    theirs = weights.get("conv1.weight", ours)
    if theirs.shape != ours.shape:
        weights["conv1.weight"] = ours
        line += f"; conv1 has another shape, {(*theirs.shape,)} not {(*ours.shape,)}: stays random"
    try:
        enc.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"init={init}: does not fit the encoder ({reason[:300]} …): choose the backbone that "
            "it holds with backbone=NAME, or another file"
        ) from None
    _check_values(enc, f"init={init}")
    return line


def _without_prefix(saved: Any, init: str) -> dict[str, Tensor]:
    weights = saved.get("model", saved) if isinstance(saved, dict) else {}
    items = weights.items() if isinstance(weights, dict) else ()
    if not items or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        raise UserError(
            f"init={init}: must hold a checkpoint of simclr.py or the state dict of a ResNet"
        )
    return {key.removeprefix("enc."): value for key, value in items}


def _check_values(model: nn.Module, where: str) -> None:
    """Raise UserError if a weight or statistic cannot be computed with."""
    bad = [
        name
        for name, value in model.state_dict().items()
        if not value.isfinite().all() or (name.endswith("running_var") and (value < 0).any())
    ]
    if bad:
        raise UserError(
            f"{where}: {', '.join(bad[:3])} has values that are not finite, or negative variances: "
            "take another file"
        )


def build_model(saved: dict[str, Any], path: Path, trained: bool = True) -> SimCLR:
    """Build the network of a checkpoint read from `path`, trained or randomly initialised.

    Raises UserError if the weights do not fit the architecture that the checkpoint names, or are
    not finite.
    """
    try:
        model = SimCLR(**{k: saved["config"][k] for k in ARCHITECTURE if k != "image_size"})
        if trained:
            model.load_state_dict(saved["model"])
            _check_values(model, str(path))
    except (RuntimeError, ValueError, TypeError) as error:
        if out_of_memory(error):
            raise
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


def named_checkpoint(
    name: str, backbone: str | None = None, epoch: int | None = None, key: str = "checkpoint"
) -> Path:
    """The file that `key`=name means: of a run directory as `find_checkpoint`, else that path."""
    path = Path(os.path.expanduser(name))
    return find_checkpoint(path, backbone, epoch, key) if path.is_dir() else path


def find_checkpoint(
    run_dir: Path, backbone: str | None, epoch: int | None, key: str = "checkpoint"
) -> Path:
    """The checkpoint of `backbone` in `run_dir` after `epoch` epochs; None: the newest.

    backbone: None for the one that the directory has checkpoints of. Raises UserError, listing
    what there is, if none is found, or if those found are of several backbones.
    """
    names = [path.name for path in run_dir.glob("simclr_*_epoch*.pt") if path.is_file()]
    matches = [re.fullmatch(r"simclr_(\w+)_epoch([1-9]\d*)\.pt", name) for name in names]
    found = [(m[1], int(m[2])) for m in matches if m and backbone in (None, m[1])]
    found = [pair for pair in found if epoch in (None, pair[1])]
    if len({name for name, _ in found}) == 1:
        return run_dir / checkpoint_name(*max(found))
    wanted = f" of {backbone}" if backbone else ""
    wanted += f" after epoch {epoch}" if epoch else ""
    many, make = "more than one backbone has a", ", or make one with simclr.py"
    raise UserError(
        f"{many if found else 'no'} checkpoint{wanted} in {run_dir}: "
        f"{describe_checkpoints(run_dir)}; name one with {key}=PATH{make * (not found)}"
    )


def describe_checkpoints(directory: Path) -> str:
    """For error messages: the checkpoints in a directory, or what it has instead."""
    if not directory.is_dir():
        return f"there is no directory {directory}"
    paths = sorted(directory.glob("*.pt")) or sorted(directory.glob("*/*.pt"))  # or of a sweep
    if not paths:
        return f"{directory} has no .pt file"
    names = [str(path.relative_to(directory)) for path in paths]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    states = all(re.search(r"_(last|previous)\.pt$", name) for name in names)
    early = ", the training state of a run that has no checkpoint yet" if states else ""
    return f"found {', '.join(names[:10])}{more}{early}"
