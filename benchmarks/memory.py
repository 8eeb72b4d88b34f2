"""Peak memory of one training step, estimated without a GPU and without computing anything.

    python benchmarks/memory.py                                   # the table of docs/speed.md
    python benchmarks/memory.py --backbone resnet50 --batch 4096 --micro 128
    python benchmarks/memory.py --batch 65536 --processes 64      # of the loss alone, in one of 64

torch's MemTracker adds up what weights, gradients, optimizer, activations and temporaries of the
real training step would take, under FakeTensorMode: tensors with shapes and no content. What it
can't see is the CUDA context, cuDNN's workspaces and fragmentation, and what it leaves out are the
images (CIFAR-10: 154 MB) and the augmentation, which is done before: leave a GPU 1 to 2 GiB more.
"""

from itertools import product

import torch
from harness import config, finish, parser
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from models import SimCLR, nt_xent
from simclr import train_step
from training.optim import make_optimizer
from training.state import Learner

GIB = 2**30


def step_memory(backbone: str, batch: int, *overrides: str, size: int = 32) -> float:
    """Peak GiB of the second training step; in the first the optimizer has no momentum yet.

    overrides: precision, activation_checkpointing, micro_batch_size.
    """
    device = torch.device("cpu")  # a fake one: nothing is allocated
    cfg = config(f"backbone={backbone}", f"batch_size={batch}", *overrides)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with FakeTensorMode():
        recompute = {"activation_checkpointing": cfg.activation_checkpointing}
        model = SimCLR(backbone, micro_batch_size=cfg.micro_batch_size, **recompute)
        for weight in model.parameters():  # what model.to() does, but can't with fake tensors
            if weight.dim() == 4:
                weight.data = weight.data.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(cfg, model.parameters())
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        embed = model.embed

        def forget(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for module in (*model.enc.modules(), *model.projector.modules()):
                tracker.memory_tracking.pop(module, None)  # it refuses a second pass in a step
            return embed(x)

        def make_views(*args: object) -> torch.Tensor:  # the views alone, not how they are made
            return torch.rand(2 * batch, 3, size, size, device=device)

        model.embed = forget
        learner = Learner(model, model, optimizer, scaler, make_views=make_views, graphed=False)
        images = noise = torch.empty(0, 1, 1, 1)
        for _ in range(2):
            tracker.reset_mod_stats()
            with tracker:
                train_step(cfg, learner, images, noise, size)
        return tracker.get_tracker_snapshot("peak")[device]["Total"] / GIB


def loss_memory(batch: int, processes: int = 1, dim: int = 128) -> float:
    """Peak bytes of NT-Xent, forward and backward, in one of the processes that share the batch."""
    with FakeTensorMode():
        z = [torch.rand(batch // processes, dim, requires_grad=True) for _ in range(2)]
        tracker = MemTracker()
        tracker.track_external(*z)
        with tracker:
            nt_xent(z, gather=lambda own: torch.cat([own] * processes))[0].backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def main() -> None:
    """A table, and as the last line one JSON object: GiB by backbone, format and recomputation."""
    args = parser(__doc__)
    args.add_argument("--backbone", nargs="+", default=["resnet18", "resnet34", "resnet50"])
    args.add_argument("--batch", type=int, nargs="+", default=[256, 512, 1024])
    args.add_argument("--size", type=int, default=32)
    args.add_argument("--micro", type=int, help="micro_batch_size")
    args.add_argument("--processes", type=int, help="that share the batch, for the loss alone")
    args = args.parse_args()
    if args.processes:
        print("NT-Xent in one process, MiB:")
        finish({f"loss_{n}": loss_memory(n, args.processes) / 2**20 for n in args.batch})
        return
    micro = f"micro_batch_size={args.micro or 'null'}"
    columns, results = ("fp32", "bf16", "fp32 checkpointed", "bf16 checkpointed"), {}
    print(f"{'GiB':20}" + "".join(f"{name:>18}" for name in columns))
    for backbone, batch in product(args.backbone, args.batch):
        print(f"{f'{backbone}, batch {batch}':20}", end="")
        for name in columns:
            precision, _, checkpointed = name.partition(" ")
            options = f"precision={precision}", f"activation_checkpointing={bool(checkpointed)}"
            gib = step_memory(backbone, batch, *options, micro, size=args.size)
            results[f"{backbone}_{batch}_{name.replace(' ', '_')}"] = round(gib, 2)
            print(f"{gib:18.1f}", end="", flush=True)
        print()
    results["loss_matrices_at_4096"] = round(loss_memory(4096) / (4 * 8192**2), 3)
    print(f"NT-Xent at N = 4,096: {results['loss_matrices_at_4096']} matrices of 8,192 × 8,192")
    finish(results)


if __name__ == "__main__":
    main()
