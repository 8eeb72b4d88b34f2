"""Training steps on several ranks under torchrun: views per second, share of communication.

    python benchmarks/scaling.py                          # 1 and 2 ranks of one thread each
    python benchmarks/scaling.py --processes 1 2 4 8 --batch 4096      # on a machine with 8 GPUs

All ranks share the same batch, so twice as many are at best twice as fast. In turn with each step
the same step without communication is timed: collectives return their input, gradients are not
averaged. The difference is the share of communication, the wait for the slower rank included. On
CPUs each rank has one thread, so one rank uses one core; batch norm takes the statistics of each
rank's shard there, of the whole batch on GPUs. All steps are eager, as those of several ranks are
in a run; that of one GPU is a CUDA graph there, and faster (docs/gpu.md).
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from statistics import median
from unittest.mock import patch

import torch
import torch.distributed as dist
from harness import Recorder, alternate, config, describe_machine, finish, parser, train_epoch

from simclr import make_learner
from system.device import select_device
from training import distributed


def leave(parts: list[torch.Tensor], own: torch.Tensor) -> None:
    """An all_gather that takes nothing from anyone."""
    for part in parts:
        part.copy_(own)


def time_steps(backbone: str, batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of training steps with and without communication, in this process."""
    device = select_device("auto")
    sync = f"sync_batchnorm={device.type == 'cuda'}"
    sizes = f"backbone={backbone}", f"batch_size={batch}", "epochs=1000000"
    cfg = config(*sizes, sync, "compile=false")
    if device.type == "cpu":
        torch.set_num_threads(1)
    with distributed.process_group(device):
        learner, recorder = make_learner(cfg, device), Recorder()
        images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)

        def step() -> None:
            train_epoch(cfg, learner, images, recorder)  # an epoch of one step

        def alone() -> None:
            ddp = learner.ddp_model
            gradients = ddp.no_sync() if distributed.world_size() > 1 else nullcontext()
            reduce = patch.object(dist, "all_reduce", lambda *args, **kwargs: None)
            with gradients, reduce, patch.object(dist, "all_gather", leave):
                step()

        return alternate({"all": step, "alone": alone}, repeats)


def measure(processes: int, arguments: list[str]) -> dict[str, list[float]]:
    """`time_steps` of the first of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [__file__, "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """A row for each number of processes, and as the last line one JSON object."""
    args = parser(__doc__)
    args.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args.add_argument("--backbone", default="resnet18")
    args.add_argument("--batch", type=int, default=128)
    args.add_argument("--repeats", type=int, default=10)
    args.add_argument("--worker", action="store_true", help="one of the processes: not by hand")
    args = args.parse_args()
    if args.worker:
        seconds = time_steps(args.backbone, args.batch, args.repeats)
        if os.environ["RANK"] == "0":
            print(json.dumps(seconds))
        return
    arguments = [f"--{key}={getattr(args, key)}" for key in ("backbone", "batch", "repeats")]
    describe_machine()
    print(f"{'processes':>10}{'views/s':>9}{'median s':>10}{'min to max':>16}{'speed':>7}  shared")
    results, first = {}, None
    for processes in args.processes:
        seconds = measure(processes, arguments)
        times, middle = seconds["all"], median(seconds["all"])
        first = first or middle
        share = max(0.0, 1 - median(seconds["alone"]) / middle)
        spread = f"{min(times):.3f} to {max(times):.3f}"
        print(
            f"{processes:10}{2 * args.batch / middle:9,.0f}{middle:10.3f}{spread:>16}"
            f"{first / middle:6.2f}×{share:8.1%}"
        )
        results[f"speed_{processes}"] = first / middle
        results[f"communication_{processes}"] = share
    finish(results)


if __name__ == "__main__":
    main()
