"""Peak memory of one training step, estimated without a GPU and without computing anything.

    python benchmarks/memory.py                                   # the table of docs/speed.md
    python benchmarks/memory.py --backbone resnet50 --batch 4096 --micro 128
    python benchmarks/memory.py --batch 65536 --processes 64      # of the loss alone, in one of 64

torch's MemTracker adds up what weights, gradients, optimizer, activations and temporaries of the
real training step would take, under FakeTensorMode: tensors with shapes and no content. What it
can't see is the CUDA context, cuDNN's workspaces and fragmentation, and what it leaves out are the
images (CIFAR-10: 154 MB) and the augmentation, which is done before: leave a GPU 1 to 2 GiB more.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import finish, parser

from models import SimCLR, nt_xent
from simclr import train_step
from training.optim import make_optimizer, set_learning_rate

GIB = 2**30


def step_memory(
    backbone: str,
    batch: int,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    size: int = 32,
    micro_batch_size: int | None = None,
) -> float:
    """Peak GiB of the second training step; in the first the optimizer has no momentum yet."""
    device = torch.device("cpu")  # a fake one: nothing is allocated
    with FakeTensorMode():
        memory = {"activation_checkpointing": activation_checkpointing}
        model = SimCLR(backbone, **memory, micro_batch_size=micro_batch_size)
        for weight in model.parameters():  # what model.to() does, but can't with fake tensors
            if weight.dim() == 4:
                weight.data = weight.data.to(memory_format=torch.channels_last)
        optimizer = make_optimizer("sgd", model.parameters(), momentum=0.9, weight_decay=1e-6)
        set_learning_rate(optimizer, 0.6)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        embed = model.embed

        def forget(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for module in (*model.enc.modules(), *model.projector.modules()):
                tracker.memory_tracking.pop(module, None)  # it refuses a second pass in a step
            return embed(x)

        model.embed = forget
        for _ in range(2):
            tracker.reset_mod_stats()
            with tracker:
                views = torch.rand(2 * batch, 3, size, size, device=device)
                train_step(model, optimizer, scaler, views, 0.5, dtype)
        return tracker.get_tracker_snapshot("peak")[device]["Total"] / GIB


def loss_memory(batch: int, processes: int = 1, dim: int = 128) -> float:
    """Peak bytes of NT-Xent, forward and backward, in one of the processes that share the batch."""
    with FakeTensorMode():
        z = [torch.rand(batch // processes, dim, requires_grad=True) for _ in range(2)]
        tracker = MemTracker()
        tracker.track_external(*z)
        with tracker:
            nt_xent(*z, gather=lambda own: torch.cat([own] * processes))[0].backward()
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
        loss = {f"loss_{n}": loss_memory(n, args.processes) / 2**20 for n in args.batch}
        print("NT-Xent in one process, MiB:")
        finish(loss)
        return
    columns = [
        (f"{name}{' checkpointed' * recompute}", dtype, recompute)
        for recompute in (False, True)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    results = {}
    print(f"{'GiB':20}" + "".join(f"{name:>18}" for name, _, _ in columns))
    for backbone in args.backbone:
        for batch in args.batch:
            row = f"{backbone}, batch {batch}"
            print(f"{row:20}", end="")
            for name, dtype, recompute in columns:
                gib = step_memory(backbone, batch, dtype, recompute, args.size, args.micro)
                results[f"{backbone}_{batch}_{name.replace(' ', '_')}"] = round(gib, 2)
                print(f"{gib:18.1f}", end="", flush=True)
            print()
    results["loss_matrices_at_4096"] = round(loss_memory(4096) / (4 * 8192**2), 3)
    print(f"NT-Xent at N = 4,096: {results['loss_matrices_at_4096']} matrices of 8,192 × 8,192")
    finish(results)


if __name__ == "__main__":
    main()
