"""Steps of simclr.train for test_distributed.py, in one process or as one rank under torchrun.

    torchrun --nproc_per_node=2 tests/parallel_steps.py DIRECTORY REFERENCE

Writes DIRECTORY/<case>.pt for each of CASES: by step the state that it began with, the loss, and
the gradient of each weight and the running statistics after it. In float64, so that rounding stays
small through all steps: in float32 a unit at the kink of a ReLU, on one side or the other of it by
rounding, changes a gradient by a thousandth. The case float32 begins each step with the state that
the same step in REFERENCE began with, which a single process has written.
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
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

import simclr
from config import check_config, register_config
from models import BACKBONES
from training import distributed
from training.state import Training

MICRO = ["sync_batchnorm=false", "micro_batch_size=4"]
LARS = ["optimizer=lars", "learning_rate=4", "activation_checkpointing=true"]
CASES = {  # without batch norm, but for the statistics: those of a rank or of a micro-batch
    "float64": [],
    "float32": [],
    "lars": LARS,
    "statistics of 8 images": [],
    "statistics of 4 images": [],
    "lars with statistics": [*LARS, *MICRO],
    "no gradient through the gather": [],
    "gradient too small": [],
    "numbers of its own": [],
}
STEPS = 20


def without_batch_norm(weights: None) -> ResNet:
    """thin_resnet in which no image sees another: each is normalised alone."""
    return thin_resnet(weights, norm_layer=lambda width: nn.GroupNorm(1, width))


def overrides_of(case: str) -> list[str]:
    """Of "statistics of n images" on N / n ranks; elsewhere n images are a micro-batch."""
    if not case.startswith("statistics"):
        return ["sync_batchnorm=false", *CASES[case]]
    images = int(case.split()[2])
    alone = distributed.world_size() * images == 16
    return ["sync_batchnorm=false", *([] if alone else [f"micro_batch_size={images}"])]


def mistake(case: str) -> list:
    """Patches that put in what published code has got wrong."""
    rank, world_size = distributed.rank(), distributed.world_size()
    if case.startswith("no gradient"):  # as torch.distributed.all_gather leaves it
        own = staticmethod(lambda ctx, gradient: gradient.chunk(world_size)[rank])
        return [patch.object(distributed._Gather, "backward", own)]
    if case == "gradient too small":  # as where the loss is a mean over all rows, and averaged
        right = simclr.nt_xent
        wrong = patch.object(
            simclr, "nt_xent", lambda *args: (right(*args)[0] / world_size, right(*args)[1])
        )
        return [wrong]
    if case == "numbers of its own":
        right = simclr.draw
        return [patch.object(simclr, "draw", lambda *args: right(*args).roll(rank, 1))]
    return []


def in_float64() -> list:
    """Patches: views and weights in float64, and .float() leaves such tensors as they are."""
    to_float, views, wrap = torch.Tensor.float, simclr.random_views, distributed.wrap_ddp
    return [
        patch.object(torch.Tensor, "float", lambda x: x if x.is_floating_point() else to_float(x)),
        patch.object(simclr, "random_views", lambda *args: views(*args).double()),
        patch.object(distributed, "wrap_ddp", lambda model, sync: wrap(model.double(), sync)),
    ]


class Steps:
    """Stands in for RunRecord: keeps what each step, which is an epoch, began and ended with."""

    def __init__(self, training: Training, begin: Callable[[Training, int], None]) -> None:
        self.training, self.begin, self.done = training, begin, []
        self.start()

    def start(self) -> None:
        self.begin(self.training, len(self.done))
        state = self.training.model.state_dict()
        self.before = {name: value.clone() for name, value in state.items()}

    def log_step(self, training: Training, metrics: dict[str, Tensor], rate: float) -> None:
        model = training.model
        self.done.append(
            {
                "before": self.before,
                "loss": float(metrics["loss"]),
                "accuracy": float(metrics["contrastive_accuracy"]),
                "gradients": {n: w.grad.clone() for n, w in model.named_parameters()},
                "buffers": {name: b.clone() for name, b in model.named_buffers()},
            }
        )

    def end_epoch(self, training: Training, *line: object) -> None:
        training.end_epoch({})
        self.start()


def steps(cfg: DictConfig, begin: Callable[[Training, int], None]) -> list[dict]:
    """A step an epoch, of all images; `begin` is called before each."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (cfg.batch_size, 3, 12, 12), dtype=torch.uint8, generator=rng)
    training = simclr.start_training(cfg, torch.device("cpu"), cfg.epochs)
    record = Steps(training, begin)
    simclr.train(cfg, training, images, None, record)
    return record.done


def run(case: str, reference: Path) -> list[dict]:
    """One of CASES."""
    BACKBONES["resnet18"] = thin_resnet if "statistics" in case else without_batch_norm
    size = "batch_size=16", "image_size=8", "hidden_dim=32", "projection_dim=16", "precision=fp32"
    epochs = f"epochs={STEPS if case.startswith(('float', 'stat')) else 3}"
    overrides = [*size, epochs, "device=cpu", "learning_rate=0.1", *overrides_of(case)]
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
        if i < len(saved):
            training.model.load_state_dict(saved[i]["before"])

    return steps(cfg, begin)


def main() -> None:
    """All cases, one after the other."""
    directory, reference = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    register_config()
    with distributed.process_group(torch.device("cpu")):
        for case in CASES:
            done = run(case, reference)
            if distributed.rank() == 0:
                directory.mkdir(exist_ok=True)
                torch.save(done, directory / f"{case}.pt")


if __name__ == "__main__":
    main()
