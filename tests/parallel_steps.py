"""Steps of simclr.train_steps for test_distributed.py, alone or as one of torchrun's processes.

    torchrun --nproc_per_node=2 tests/parallel_steps.py FOLDER REFERENCE

Writes FOLDER/<case>.pt for each of CASES: by step the state that it began with, the loss, and what
came out: the gradient of each weight and the running statistics. In float64, so that rounding
stays small through all steps: in float32 a unit at the kink of a ReLU, on one side or the other of
it by rounding, changes a gradient by a thousandth. The case float32 begins each step with the
state that the same step in REFERENCE began with, which a single process has written.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import thin_resnet
from hydra import compose, initialize
from omegaconf import DictConfig

import distributed
import simclr
from config import check_config, register_config
from errors import StopSignals
from models import BACKBONES
from state import Training

CASES = {
    "float64": [],
    "float32": [],
    "parts": ["sync_batchnorm=false"],
    "small parts": ["sync_batchnorm=false", "micro_batch_size=4"],
    "lars": ["optimizer=lars", "learning_rate=4", "activation_checkpointing=true"],
    "no gradient through the gather": [],
    "gradient too small": [],
    "numbers of its own": [],
}
SINGLE = {"parts": ["micro_batch_size=8"], "small parts": ["micro_batch_size=4"]}
STEPS = 20


def mistake(case: str) -> list:
    """Patches that put in what published code has got wrong."""
    rank, world = distributed.rank(), distributed.world()
    if case.startswith("no gradient"):  # as torch.distributed.all_gather leaves it
        own = staticmethod(lambda ctx, gradient: gradient.chunk(world)[rank])
        return [patch.object(distributed._Gather, "backward", own)]
    if case == "gradient too small":  # as where the loss is a mean over all rows, and averaged
        right = simclr.nt_xent
        wrong = patch.object(
            simclr, "nt_xent", lambda *args: (right(*args)[0] / world, right(*args)[1])
        )
        return [wrong]
    if case == "numbers of its own":
        right = simclr.draw
        return [patch.object(simclr, "draw", lambda n, rng: right(n, rng).roll(rank, 1))]
    return []


def in_float64() -> list:
    """Patches: views and weights in float64, and .float() leaves such tensors as they are."""
    to_float, views, parallel = torch.Tensor.float, simclr.random_views, distributed.parallel
    return [
        patch.object(torch.Tensor, "float", lambda x: x if x.is_floating_point() else to_float(x)),
        patch.object(simclr, "random_views", lambda *args: views(*args).double()),
        patch.object(distributed, "parallel", lambda model, sync: parallel(model.double(), sync)),
    ]


def steps(cfg: DictConfig, begin: Callable[[Training, int], None]) -> list[dict]:
    """A step an epoch, with the same batch; `begin` is called before each."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (cfg.batch_size, 3, 12, 12), dtype=torch.uint8, generator=rng)
    training = simclr.start_training(cfg, torch.device("cpu"), cfg.epochs)
    training.order = torch.arange(len(images))
    done = []
    for epoch in range(cfg.epochs):
        begin(training, epoch)
        before = {name: value.clone() for name, value in training.model.state_dict().items()}
        training.epoch = epoch
        (found,) = simclr.train_steps(cfg, training, images, StopSignals())
        done.append(
            {
                "before": before,
                "loss": float(found["loss"]),
                "accuracy": float(found["contrastive_accuracy"]),
                "gradients": {n: w.grad.clone() for n, w in training.model.named_parameters()},
                "buffers": {name: b.clone() for name, b in training.model.named_buffers()},
            }
        )
    return done


def run(case: str, reference: Path) -> list[dict]:
    """One of CASES."""
    overrides = CASES[case] if distributed.world() > 1 else SINGLE.get(case, CASES[case])
    size = "batch_size=16", "image_size=8", "hidden_dim=32", "projection_dim=16", "precision=fp32"
    epochs = f"epochs={STEPS if case.startswith('float') else 3}"
    overrides = [*size, epochs, "device=cpu", "learning_rate=0.1", *overrides]
    with initialize(version_base="1.3", config_path=None):
        cfg = check_config(compose("simclr_config", overrides=overrides), "learning_rate")
    if case != "float32":
        with ExitStack() as stack:
            for changed in (*in_float64(), *mistake(case)):
                stack.enter_context(changed)
            return steps(cfg, lambda training, i: None)
    file = reference / "float32.pt"
    saved = torch.load(file, weights_only=True) if file.exists() else []

    def begin(training: Training, i: int) -> None:
        if saved:
            training.model.load_state_dict(saved[i]["before"])

    return steps(cfg, begin)


def main() -> None:
    """All cases, one after the other."""
    folder, reference = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    BACKBONES["resnet18"] = thin_resnet
    register_config()
    with distributed.joined(torch.device("cpu")):
        for case in CASES:
            done = run(case, reference)
            if distributed.rank() == 0:
                folder.mkdir(exist_ok=True)
                torch.save(done, folder / f"{case}.pt")


if __name__ == "__main__":
    main()
