"""Steps with images on the GPU, in host memory, and blurred: whether a GPU waits for its images.

    python benchmarks/placement.py --size 224 --batch 256 --images 4096      # on a GPU

Epochs of simclr.py on random images take turns; unlike a run each records a CUDA graph. `gather`
is what the CPU does for the images of an epoch in host memory, before they are copied.
"""

from collections.abc import Callable
from functools import partial

import torch
from harness import Recorder, alternate, config, finish, parser, ratio, report, train_epoch

from images.datasets import HostImages, Images
from simclr import make_learner
from system.device import select_device

DEVICE, HOST, BLUR, GATHER = "on the device", "in host memory", "on the device, blurred", "gather"


def epochs(images: Images, device: torch.device, *overrides: str) -> Callable[[], None]:
    """The next epoch of a run of simclr.py on these images."""
    cfg = config("epochs=1000000", "compile=false", *overrides)
    return partial(train_epoch, cfg, make_learner(cfg, device), images, Recorder())


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
    options = *size, f"cifar_stem={args.size < 96}"
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
    names = {"host": HOST, "blur": BLUR, "gather": GATHER}
    finish({f"{name}_vs_device": ratio(seconds, row, DEVICE) for name, row in names.items()})


if __name__ == "__main__":
    main()
