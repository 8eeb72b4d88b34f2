"""Several processes under torchrun, each with its part of every batch (torch.distributed).

In a single process each function here gives back what it got, so that simclr.py has one path.
"""

import itertools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from batchnorm import BatchNorm
from errors import ConfigError, UserError

RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_groups = itertools.count()  # a job of a sweep after the other
TIMEOUT = timedelta(minutes=30)  # of waiting, for a download at most; torchrun ends all if one ends


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun started processes again, after a failure (--max-restarts)."""
    return largest(int(os.environ.get(RESTARTS, "0"))) > 0


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes share the batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within the block the processes of torchrun know each other; each has a GPU of its own.

    Raises UserError if a machine has fewer GPUs than processes.
    """
    if not launched():
        yield
        return
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local + 1} of this machine has no GPU of its own: --nproc_per_node must "
                f"be at most {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local)
    if os.environ["RANK"] != "0":  # the first process alone logs and draws
        logging.disable(logging.CRITICAL)
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, number, processes = fresh_store()
    dist.init_process_group(
        backend, store=store, rank=number, world_size=processes, timeout=TIMEOUT
    )
    try:
        yield
        wait_for_all()
    finally:
        dist.destroy_process_group()


def fresh_store() -> tuple[dist.Store, int, int]:
    """A store that the first process serves, the number of this process, and of how many.

    torchrun's store can outlive a restart (torch 2.14.1), and in it the addresses of those that
    have ended; nor do all machines count the same restarts. So it is only asked for the port of
    ours, again and again until someone answers there: the one of the start before is dead.
    """
    torchruns, number, processes = next(dist.rendezvous("env://"))
    host, key = os.environ["MASTER_ADDR"], f"simclr{next(_groups)}"
    if number == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        torchruns.set(key, str(store.port))
        return store, number, processes
    end = time.monotonic() + TIMEOUT.total_seconds()
    while True:
        try:
            port = int(torchruns.get(key))
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=3))
        except dist.DistError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            store.set_timeout(TIMEOUT)
            return store, number, processes


def check_parts(batch_size: int, micro_batch_size: int | None) -> None:
    """Raise ConfigError unless the batch makes equal parts for all processes.

    Of multiples of four, because four neighbours share the places of the hue (`random_views`).
    """
    if world() > 1 and batch_size % (4 * world()):
        raise ConfigError(
            f"batch_size={batch_size}: must be a multiple of {4 * world()}, four images for each "
            f"of {world()} processes"
        )
    part = batch_size // world()
    if micro_batch_size is not None and part % micro_batch_size:
        raise ConfigError(  # a smaller last part would count as much in the running statistics
            f"micro_batch_size={micro_batch_size}: must divide the {part} images of each process"
        )


def own_part(x: Tensor, views: int = 1) -> Tensor:
    """Columns of this process: x (…, views·N) -> (…, views·n), n = N / processes, N images."""
    return x.unflatten(-1, (views, -1)).chunk(world(), dim=-1)[rank()].flatten(-2)


def parallel(model: nn.Module, sync_batchnorm: bool) -> nn.Module:
    """The model as a module whose gradients are averaged over the processes in the backward pass.

    With `sync_batchnorm` its batch norm takes the statistics of all of the batch, else those of
    this process's part; the running ones that are kept are then those of the first process.
    """
    if world() == 1:
        return model
    if sync_batchnorm and next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif sync_batchnorm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = BatchNorm  # in place: what refers to the module keeps it
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()  # every process's loss depends on every row
        dist.all_reduce(gradient)
        return gradient.chunk(world())[rank()]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes: (n, d) -> (processes·n, d), by rank.

    The gradient of a row is the sum of what it is in each process. `all_gather` itself has none,
    and torch.distributed.nn.functional, which has, is deprecated in torch 2.14.
    """
    return x if world() == 1 else _Gather.apply(x)


def average(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars on the device: the means over the processes, in one collective."""
    if world() == 1:
        return values
    means = torch.stack(list(values.values())) / world()
    dist.all_reduce(means)
    return dict(zip(values, means, strict=True))


def largest(number: int) -> int:
    """The largest that any process has."""
    if world() == 1:
        return number
    numbers = torch.tensor(number)  # on the CPU: nothing waits for a GPU
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def wait_for_all() -> None:
    """Go on when every process is here."""
    largest(0)


def check_same(found: tuple[int, ...], what: str) -> None:
    """Raise UserError unless `found` is the same in every process; what: what it tells about."""
    if any(largest(number) != -largest(-number) for number in found):
        raise UserError(f"the processes differ in {what}: it must be on a disk that all share")


@contextmanager
def one_first() -> Iterator[None]:
    """One process on each machine runs the block alone, then the others: for downloads."""
    alone = os.environ.get("LOCAL_RANK", "0") == "0"
    if not alone:
        wait_for_all()
    yield
    if alone:
        wait_for_all()
