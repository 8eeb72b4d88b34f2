"""simclr.py with four views of each image, every other one of which is a positive.

    python benchmarks/four_views.py recipe=fast epochs=2 hydra.run.dir=logs/four-views
    python benchmarks/race.py IMAGES --script benchmarks/four_views.py

A step has four views of batch_size / 2 images, so it costs as much as one of simclr.py, which has
two views of batch_size; an epoch is half a pass over the images: two epochs have each image once.
Nothing in the run directory tells it from a run of simclr.py: give it one of its own. The line at
the end compares with a collapsed encoder of two views, and uniformity counts positive pairs. Two of
the views of an image never have their hue shift at the same place.
"""

import runpy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from race import SIMCLR
from torch import Tensor

import models
from images import augment

shuffle = augment.shuffle


def half_pass(n: int, seed: int, epoch: int) -> Tensor:
    """In place of `shuffle`: half of the images, each twice in a row; the other half comes next."""
    return shuffle(n, seed, epoch // 2).chunk(2)[epoch % 2].repeat_interleave(2)


def every_pair(z: Tensor, image: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The mean of NT-Xent over all pairs of views of an image; z: (V, d); image: (V,), of each row.

    The negatives of a pair are the views of other images; further positives are in no denominator.
    With two views of each image this is Eq. 1. Returns loss and contrastive accuracy.
    """
    z = F.normalize(z.float(), dim=1)
    similarity = (z / temperature) @ z.T
    same = image[:, None] == image
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    negatives = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    positive = same & ~itself
    loss = F.softplus(negatives - similarity).where(positive, 0).sum() / positive.sum()  # no sync
    nearest = similarity.detach().masked_fill(itself, -torch.inf).argmax(dim=1)
    return loss, (image[nearest] == image).float().mean()


def four_views(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    gather: Callable[[Tensor], Tensor] = lambda z: z,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """In place of `nt_xent`: of both, rows 2i and 2i+1 are views of image i. Raises ValueError."""
    if len(z1) % 2 or gather(z1) is not z1:
        raise ValueError("four views need an even batch_size and one device")
    image = torch.arange(len(z1), device=z1.device) // 2
    return every_pair(torch.cat([z1, z2]), image.repeat(2), temperature)


if __name__ == "__main__":
    augment.shuffle, models.nt_xent = half_pass, four_views  # before simclr.py imports them
    sys.argv[0] = str(SIMCLR)
    runpy.run_path(sys.argv[0], run_name="__main__")
