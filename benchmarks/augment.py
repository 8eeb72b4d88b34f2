"""Views a second of SimCLR's augmentation, against torchvision's and kornia's.

    python benchmarks/augment.py                  # under a minute, half of it compiling
    pip install -r benchmarks/requirements.txt    # kornia, without which that row is left out

Two views each of `--batch` random 32×32 images. `torchvision` is the plain pipeline: PIL images
in a DataLoader with two workers, timed over whole epochs of four batches, so that they do not
work while another row is timed. kornia has parameters of its own for every sample too.
"""

import importlib.util
from collections.abc import Callable
from itertools import count

import torch
from harness import alternate, config, finish, parser, ratio, report
from plain import plain_loader, plain_transform
from torch import Tensor

from config import Views
from images.augment import draw, random_views
from system.device import select_device, to_device

BATCHES = 4  # of the plain pipeline, an epoch
PLAIN, KORNIA = "torchvision, two processes", "kornia, eager"
EAGER, COMPILED = "ours, eager", "ours, compiled"


def kornia_views(cfg: Views, size: int) -> Callable[[Tensor], Tensor]:
    """The same pipeline in kornia's words."""
    from kornia import augmentation as K

    s = cfg.color_strength
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=tuple(cfg.crop_scale)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        K.RandomGrayscale(p=cfg.grayscale_probability),
    )


def main() -> None:
    """Time all of them in turn; the last line is one JSON object."""
    args = parser(__doc__)
    args.add_argument("--batch", type=int, default=512, help="images, of two views each")
    args.add_argument("--size", type=int, default=32)
    args.add_argument("--repeats", type=int, default=15)
    args.add_argument("--no-compile", action="store_true")
    args = args.parse_args()
    cfg, device, steps = config(), select_device("auto"), count()
    size, n = args.size, 2 * args.batch
    cpu_images = torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8)
    images = cpu_images.to(device).repeat(2, 1, 1, 1)
    epoch = cpu_images.repeat(BATCHES, 1, 1, 1)
    loader = plain_loader(epoch, args.batch, plain_transform(cfg, size))
    compiled = torch.compile(random_views, dynamic=False, fullgraph=True)

    def ours(make_views: Callable[..., Tensor]) -> Tensor:
        return make_views(images, to_device(draw(n, 0, next(steps)), device), size, cfg)

    functions = {PLAIN: lambda: list(loader)}
    if importlib.util.find_spec("kornia"):
        kornia, floats = kornia_views(cfg, size), images / 255
        functions[KORNIA] = lambda: kornia(floats)
    functions[EAGER] = lambda: ours(random_views)
    if not args.no_compile:
        functions[COMPILED] = lambda: ours(compiled)
    seconds = alternate(functions, args.repeats)
    seconds[PLAIN] = [value / BATCHES for value in seconds[PLAIN]]
    report(seconds, n)
    finish(
        {
            "augment_eager_vs_torchvision": ratio(seconds, PLAIN, EAGER),
            "augment_compiled_vs_torchvision": ratio(seconds, PLAIN, COMPILED),
            "augment_eager_vs_kornia": ratio(seconds, KORNIA, EAGER),
        }
    )


if __name__ == "__main__":
    main()
