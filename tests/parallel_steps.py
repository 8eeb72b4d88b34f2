"""Steps of simclr.train for test_distributed.py, in one process or as one rank under torchrun.

    torchrun --nproc_per_node=2 tests/parallel_steps.py FILE

Writes for each of CASES the loss and the gradients of each step. In float64, so that rounding stays
small through all steps: in float32 a unit at the kink of a ReLU, on one side or the other of it by
rounding, changes a gradient by a thousandth.
"""

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
from conftest import make_config, thin_resnet
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

import simclr
from models import BACKBONES
from system.errors import UserError
from training import distributed
from training.run import Learner

CASES = {  # the first without batch norm, the others with that of 8 or 4 images
    "whole batch": [],
    "statistics of 8 images": ["views=3"],
    "lars": ["optimizer=lars", "learning_rate=4", "activation_checkpointing=true"],
}


def without_batch_norm(weights: None) -> ResNet:
    """thin_resnet in which no image sees another: each is normalised alone."""
    return thin_resnet(weights, norm_layer=lambda width: nn.GroupNorm(1, width))


def overrides_of(case: str) -> list[str]:
    """The case's keys; the images of a rank are a micro-batch where there is one rank."""
    if case == "lars":
        return [*CASES[case], "micro_batch_size=4"]
    alone = distributed.world_size() == 1 and case != "whole batch"
    return [*CASES[case], *(["micro_batch_size=8"] if alone else [])]


class Recorder:
    """Stands in for training.run.Run: keeps loss and gradients of each step."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.epoch, self.steps_done, self.done = learner, 0, 0, []

    def log_step(self, metrics: dict[str, Tensor]) -> None:
        weights = self.learner.model.named_parameters()
        self.done.append(
            {
                "loss": distributed.all_reduce_mean(metrics["loss"]),
                "accuracy": distributed.all_reduce_mean(metrics["contrastive_accuracy"]),
                "gradients": {name: weight.grad.clone() for name, weight in weights},
            }
        )

    def end_epoch(self, *measured: None) -> None:
        self.epoch += 1


def run(case: str) -> list[dict]:
    """Two epochs of two steps: the batches are not the same in each."""
    BACKBONES["resnet18"] = without_batch_norm if case == "whole batch" else thin_resnet
    size = "batch_size=16", "image_size=8", "hidden_dim=32", "projection_dim=16", "precision=fp32"
    options = "epochs=2", "device=cpu", "learning_rate=0.1", "sync_batchnorm=false"
    cfg = make_config(*size, *options, *overrides_of(case))
    to_float, views, wrap = torch.Tensor.float, simclr.random_views, distributed.wrap_ddp
    in_float64 = (  # views and weights; .float() leaves such tensors as they are
        patch.object(torch.Tensor, "float", lambda x: x if x.is_floating_point() else to_float(x)),
        patch.object(simclr, "random_views", lambda *args: views(*args).double()),
        patch.object(distributed, "wrap_ddp", lambda model, sync: wrap(model.double(), sync)),
    )
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (32, 3, 12, 12), dtype=torch.uint8, generator=rng)
    with ExitStack() as stack:
        for changed in in_float64:
            stack.enter_context(changed)
        learner = simclr.make_learner(cfg, torch.device("cpu"))
        recorder = Recorder(learner)
        simclr.train(cfg, learner, images, None, recorder)
    return recorder.done


def refused(number: int) -> str | None:
    """What `check_same` says about a number of this rank."""
    try:
        distributed.check_same(number, "training states in run")
    except UserError as error:
        return str(error)
    return None


if __name__ == "__main__":
    with distributed.process_group(torch.device("cpu")):
        found = {case: run(case) for case in CASES}
        found["same"], found["different"] = refused(7), refused(distributed.rank())
        if distributed.rank() == 0:
            torch.save(found, sys.argv[1])
