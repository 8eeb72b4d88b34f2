"""Data-parallel training under torchrun: every rank has a shard of each batch (torch.distributed).

In a single process each function here returns its input, so that simclr.py has one code path.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import Config
from system.errors import UserError

TIMEOUT = timedelta(hours=3)  # of a collective: as long as downloading or decoding may take


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the ranks within the block; each uses GPU `LOCAL_RANK`, rank 0 alone logs."""
    if os.environ.get("WORLD_SIZE") in (None, "", "1"):
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    dist.init_process_group(backend, timeout=TIMEOUT)
    if rank() != 0:
        logging.disable(logging.CRITICAL)
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    try:
        yield
        all_reduce_max(0)  # a barrier
    finally:
        dist.destroy_process_group()


def check_ranks(cfg: Config, device: torch.device) -> None:
    """Raise ConfigError for values that do not fit the number of ranks. Shards are multiples of
    four: four neighbours share the places of the hue shift. SyncBatchNorm exists on GPUs only."""
    ranks, shard = world_size(), cfg.batch_size // world_size()
    if ranks > 1:
        equal = cfg.batch_size % (4 * ranks) == 0
        cfg.require("batch_size", equal, f"a multiple of {4 * ranks}, for {ranks} ranks")
        synchronised = not cfg.sync_batchnorm or device.type == "cuda"
        cfg.require("sync_batchnorm", synchronised, f"false for {ranks} ranks on {device.type}")
        cfg.require("compile", cfg.compile is not True, f"false or auto for {ranks} ranks")
    # a smaller last micro-batch would weigh more in the running statistics
    divides = cfg.micro_batch_size is None or shard % cfg.micro_batch_size == 0
    cfg.require("micro_batch_size", divides, f"a divisor of the {shard} images of each rank")


def local_shard(x: Tensor, views: int = 1) -> Tensor:
    """Shard of the last dimension for this rank: x (…, views·N) -> (…, views·N / world size)."""
    return x.unflatten(-1, (views, -1)).chunk(world_size(), dim=-1)[rank()].flatten(-2)


def wrap_ddp(model: nn.Module, sync_batchnorm: bool) -> nn.Module:
    """The model, under torchrun in DistributedDataParallel, which averages gradients over ranks."""
    if world_size() == 1:
        return model
    if sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        shards = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(shards, x.contiguous())
        return torch.cat(shards)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()  # the loss of every rank depends on every row
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, (n, d) -> (world size · n, d), with their gradients."""
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_mean(values: Tensor) -> Tensor:
    """Average values on the device over the ranks."""
    if world_size() > 1:
        values = values / world_size()
        dist.all_reduce(values)
    return values


def all_reduce_max(number: int) -> int:
    """Maximum over the ranks."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)  # on the CPU: nothing waits for a GPU
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def check_same(number: int, what: str) -> None:
    """Raise UserError, naming `what` it counts, unless the number is the same on all ranks."""
    if all_reduce_max(number) != -all_reduce_max(-number):
        raise UserError(f"the ranks see different {what}: it must be on a disk that all share")
