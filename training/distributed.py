"""Data-parallel training under torchrun: every rank has a shard of each batch (torch.distributed).

In a single process each function here returns its input, so that simclr.py has one code path.
"""

import itertools
import logging
import math
import socket
import time
from system.environment import ALONE, Launch, launch
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from system import errors
from system.errors import ConfigError, UserError

log = logging.getLogger("simclr")

TIMEOUT = timedelta(hours=3)  # of a collective: as long as downloading or decoding may take
JOIN, SILENT = 300, 10  # seconds: for all ranks to start, and before a line says who waits
_groups = itertools.count()  # process groups of this process: one for each job of a sweep


def is_distributed() -> bool:
    """Whether this process is one of several ranks. Raises ConfigError as `launch`."""
    return launch().world_size > 1


def is_elastic_restart() -> bool:
    """Whether torchrun has restarted the ranks after a failure (--max-restarts)."""
    return all_reduce_max(launch().restarts) > 0


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Initialise and tear down the process group; each rank uses GPU `local_rank`.

    Rank 0 alone logs and draws progress bars. Raises ConfigError as `launch`; UserError if a
    machine has fewer GPUs than local ranks, or the ranks do not find each other.
    """
    here = launch()
    if here.world_size == 1:
        yield
        return
    errors.rank = here.rank
    if device.type == "cuda":
        if here.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {here.local_rank} has no GPU of its own: --nproc_per_node must be at "
                f"most {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(here.local_rank)
    store = _join(here)
    if here.rank != 0:
        logging.disable(logging.CRITICAL)
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, None, TIMEOUT, here.world_size, here.rank, store)
    except (RuntimeError, ValueError) as error:  # of GLOO_SOCKET_IFNAME and the like
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the ranks cannot be connected by {backend} ({reason})") from None
    try:
        yield
        barrier()
    finally:
        dist.destroy_process_group()


def _join(here: Launch) -> dist.Store:
    """Create a TCPStore on rank 0 for each (re)start, and wait for all ranks to join it.

    torchrun's own store can keep the addresses of ranks that ended before a restart (torch 2.14.1).
    The store at MASTER_PORT, torchrun's or else rank 0's, only passes the port of ours, which is
    read again until a server answers: an older port is dead. torch itself would wait for 30 minutes
    in C++, without a word and deaf to Ctrl-C.
    """
    try:
        socket.getaddrinfo(here.host, here.port)
    except (OSError, UnicodeError) as error:
        name = f"the environment variable MASTER_ADDR={here.host}"
        raise ConfigError(f"{name}: is no host known here ({error}); {ALONE}") from None
    key, launcher, store = f"simclr{next(_groups)}", None, None
    start = said = time.monotonic()
    ranks = [f"rank {number}" for number in range(here.world_size)]
    waits = f"rank {here.rank} of {here.world_size} waits for the others at {here.host}:{here.port}"
    while True:
        try:
            launcher = launcher or _tcp_store(here.host, here.port, here.serves)
            if store is None and here.rank == 0:
                store = _tcp_store(here.host, 0, serves=True)
                launcher.set(key, str(store.port))
            store = store or _tcp_store(here.host, int(launcher.get(key)), serves=False)
            store.set(ranks[here.rank], "")
            if store.check(ranks):
                store.set_timeout(TIMEOUT)
                return store
        except (dist.DistError, OSError) as error:
            if here.rank == 0:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"MASTER_PORT={here.port}: no store there ({reason})") from None
            launcher = store = None
        if time.monotonic() - start > JOIN:
            raise UserError(f"{waits} (MASTER_ADDR:MASTER_PORT) for {JOIN} seconds: {ALONE}")
        if time.monotonic() - said > SILENT:
            said = math.inf
            log.info(f"{waits}, as MASTER_ADDR and MASTER_PORT say, at most {JOIN} seconds")
        time.sleep(0.1)


def _tcp_store(host: str, port: int, serves: bool) -> dist.TCPStore:
    short = timedelta(seconds=3)
    if not serves:  # torch itself would print a stack of C++
        socket.create_connection((host, port), short.total_seconds()).close()
    return dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=short)


def check_ranks(
    batch_size: int,
    micro_batch_size: int | None,
    sync_batchnorm: bool,
    compile_choice: bool | str,
    device: torch.device,
) -> None:
    """Raise ConfigError for values that do not fit the number of ranks.

    Every rank gets an equal shard, in equal micro-batches. Shards are multiples of four images,
    since four neighbours share the places of the hue shift (`random_views`). torch's SyncBatchNorm
    exists on GPUs only.
    """
    if world_size() > 1 and batch_size % (4 * world_size()):
        raise ConfigError(
            f"batch_size={batch_size}: must be a multiple of {4 * world_size()}, four images for "
            f"each of {world_size()} ranks"
        )
    shard = batch_size // world_size()
    if micro_batch_size is not None and shard % micro_batch_size:
        raise ConfigError(  # a smaller last micro-batch would weigh more in the running statistics
            f"micro_batch_size={micro_batch_size}: must divide the {shard} images of each rank"
        )
    if world_size() > 1 and sync_batchnorm and device.type != "cuda":
        raise ConfigError(
            f"sync_batchnorm=true: needs GPUs, and {world_size()} ranks run on {device.type}: set "
            "sync_batchnorm=false for batch-norm statistics of each rank's own shard"
        )
    if world_size() > 1 and compile_choice is True:
        raise ConfigError(
            f"compile=true: must be false or auto with {world_size()} ranks, for which it has not "
            "been tried"
        )


def local_shard(x: Tensor, views: int = 1) -> Tensor:
    """Shard of the last dimension for this rank: x (…, views·N) -> (…, views·N / world size)."""
    return x.unflatten(-1, (views, -1)).chunk(world_size(), dim=-1)[rank()].flatten(-2)


def wrap_ddp(model: nn.Module, sync_batchnorm: bool) -> nn.Module:
    """Wrap the model in DistributedDataParallel, which averages gradients over the ranks.

    `sync_batchnorm` takes batch-norm statistics over the whole batch (GPUs only). Without it they
    are those of each rank's shard, and the running statistics that are saved are rank 0's.
    """
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
    """Concatenate the rows of all ranks, with gradient: (n, d) -> (world size · n, d).

    The gradient of a row is summed over the ranks. `all_gather` alone has no gradient, and
    torch.distributed.nn.functional, which has one, is deprecated in torch 2.14.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average scalars on the device over the ranks, in one collective."""
    if world_size() == 1:
        return values
    means = torch.stack(list(values.values())) / world_size()
    dist.all_reduce(means)
    return dict(zip(values, means, strict=True))


def all_reduce_max(number: int) -> int:
    """Maximum over the ranks."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)  # on the CPU: nothing waits for a GPU
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def barrier() -> None:
    """Block until all ranks reach this call."""
    all_reduce_max(0)


def check_same(numbers: tuple[int, ...], what: str) -> None:
    """Raise UserError, naming `what` they describe, unless `numbers` are equal on all ranks."""
    if any(all_reduce_max(number) != -all_reduce_max(-number) for number in numbers):
        raise UserError(f"the ranks see different {what}: it must be on a disk that all share")


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the block on local rank 0 of each machine first, then on the others: for downloads."""
    first = launch().local_rank == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()
