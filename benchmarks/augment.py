"""Views a second of SimCLR's augmentation, against torchvision's and kornia's.

    python benchmarks/augment.py                  # under a minute, half of it compiling
    pip install -r benchmarks/requirements.txt    # kornia, without which that row is left out

Two views each of `--batch` random 32×32 images. `torchvision` is the plain pipeline: PIL images
in a DataLoader with two workers, timed over whole epochs of four batches, so that they do not
work while another row is timed. kornia has parameters of its own for every sample too.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import alternate, finish, parser, report
from plain import plain_loader, plain_transform

from images.augment import draw, random_views
from system.device import select_device

CROP_SCALE, STRENGTH, GRAY = (0.08, 1.0), 0.5, 0.2
BATCHES = 4  # of the plain pipeline, an epoch
PLAIN, KORNIA = "torchvision, two processes", "kornia, eager"
EAGER, COMPILED = "ours, eager", "ours, compiled"


def kornia_views(size: int) -> Callable[[Tensor], Tensor]:
    """The same pipeline in kornia's words."""
    from kornia import augmentation as K

    s = STRENGTH
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=CROP_SCALE),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
        K.RandomGrayscale(p=GRAY),
    )


def main() -> None:
    """Time all of them in turn; the last line is one JSON object."""
    args = parser(__doc__)
    args.add_argument("--batch", type=int, default=512, help="images, of two views each")
    args.add_argument("--size", type=int, default=32)
    args.add_argument("--repeats", type=int, default=15)
    args.add_argument("--no-compile", action="store_true")
    args = args.parse_args()
    device = select_device("auto")
    size, n = args.size, 2 * args.batch
    cpu_images = torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8)
    images = cpu_images.to(device).repeat(2, 1, 1, 1)
    rng = torch.Generator(device).manual_seed(0)
    transform = plain_transform(size, CROP_SCALE, STRENGTH, GRAY)
    loader = plain_loader(cpu_images.repeat(BATCHES, 1, 1, 1), args.batch, transform)
    compiled = torch.compile(random_views, dynamic=False, fullgraph=True)

    def ours(make_views: Callable[..., Tensor]) -> Tensor:
        return make_views(images, draw(n, rng), size, CROP_SCALE, 0.5, STRENGTH, GRAY)

    functions = {PLAIN: lambda: list(loader)}
    if importlib.util.find_spec("kornia"):
        kornia, floats = kornia_views(size), images / 255
        functions[KORNIA] = lambda: kornia(floats)
    functions[EAGER] = lambda: ours(random_views)
    if not args.no_compile:
        functions[COMPILED] = lambda: ours(compiled)
    seconds = alternate(functions, args.repeats)
    seconds[PLAIN] = [value / BATCHES for value in seconds[PLAIN]]
    report(seconds, n)

    def ratio(reference: str, name: str) -> float | None:
        rows = [seconds.get(row) for row in (reference, name)]
        return median(rows[0]) / median(rows[1]) if all(rows) else None

    finish(
        {
            "augment_eager_vs_torchvision": ratio(PLAIN, EAGER),
            "augment_compiled_vs_torchvision": ratio(PLAIN, COMPILED),
            "augment_eager_vs_kornia": ratio(KORNIA, EAGER),
        }
    )


if __name__ == "__main__":
    main()
