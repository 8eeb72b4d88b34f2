"""Steps with images on the GPU, in host memory, and blurred: whether a GPU waits for its images.

    python benchmarks/placement.py --size 224 --batch 256 --images 4096      # on a GPU

Epochs of simclr.py on random images take turns. Like a run it reads the metrics of a step while
the next is computed, so that the CPU is never further ahead; unlike one it records a CUDA graph
in each epoch. `gather` is what the CPU does for the images of an epoch in host memory: copying
stays hidden while that is below the time of an epoch.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import EpochEnd, NoRecord, alternate, config, finish, parser, report

import simclr
from images.host import HostImages, Images
from system.device import select_device, start_copy
from training.state import Training

DEVICE, HOST, BLUR, GATHER = "on the device", "in host memory", "on the device, blurred", "gather"


class Record(NoRecord):
    """Reads the metrics of the step before, as training.record.RunRecord does."""

    def log_step(self, training: Training, metrics: dict[str, Tensor], rate: float) -> None:
        """Start to copy the metrics, and wait for those of the step before."""
        self.step_metrics.append(start_copy(metrics))
        if len(self.step_metrics) > 1:
            self.step_metrics[-2]()


def epochs(images: Images, device: torch.device, *overrides: str) -> Callable[[], object]:
    """The next epoch of a run of simclr.py on these images."""
    cfg = config("epochs=1000000", "compile=false", *overrides)
    training = simclr.start_training(cfg, device, cfg.epochs)

    def epoch() -> None:
        with suppress(EpochEnd):
            simclr.train(cfg, training, images, None, Record())

    return epoch


def main() -> None:
    """Time all of them in turn; the last line is one JSON object."""
    args = parser(__doc__)
    args.add_argument("--backbone", default="resnet18")
    args.add_argument("--size", type=int, default=224)
    args.add_argument("--batch", type=int, default=256, help="images, of two views each")
    args.add_argument("--images", type=int, default=4096)
    args.add_argument("--repeats", type=int, default=3)
    args = args.parse_args()
    device = select_device("auto")
    images = torch.randint(0, 256, (args.images, 3, args.size, args.size), dtype=torch.uint8)
    size = f"backbone={args.backbone}", f"batch_size={args.batch}", f"image_size={args.size}"
    options = *size, f"cifar_stem={str(args.size < 96).lower()}"
    rows = torch.randperm(args.images).split(args.batch)
    seconds = alternate(
        {
            DEVICE: epochs(images.to(device), device, *options),
            HOST: epochs(HostImages(images, device), device, *options),
            BLUR: epochs(images.to(device), device, *options, "blur_probability=0.5"),
            GATHER: lambda: [images[row] for row in rows],
        },
        args.repeats,
    )
    report(seconds, 2 * (args.images // args.batch * args.batch))
    middle = {name: median(times) for name, times in seconds.items()}
    names = {"host": HOST, "blur": BLUR, "gather": GATHER}
    finish({f"{name}_vs_device": middle[row] / middle[DEVICE] for name, row in names.items()})


if __name__ == "__main__":
    main()
