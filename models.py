"""The model and the loss of SimCLR (Chen et al. 2020, arXiv 2002.05709).

h = enc(x)          representation, kept for evaluation
z = projector(h)    projection, input of the contrastive loss
nt_xent(zs)         normalised temperature-scaled cross-entropy, Eq. 1
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck

BACKBONES = {name: getattr(resnet, name) for name in resnet.__all__ if name.islower()}


class SimCLR(nn.Module):
    """ResNet encoder and two-layer projection head without batch norm (Sec. 2.1, Fig. 2).

    The encoder is torchvision's, without pretrained weights and without `fc`. `cifar_stem`
    replaces its first convolution (7×7, stride 2) by one of 3×3, stride 1, padding 1 and drops
    the max-pool, which would reduce a 32×32 image to 8×8 before the first residual block
    (App. B.9). By default the state dict has the keys of the published one (p3i0t/SimCLR-CIFAR10).
    `activation_checkpointing` recomputes each residual block in the backward pass: the same
    gradients, with half (resnet18) to a third (resnet50) of the memory. `micro_batch_size`, and
    `views` of each image in a batch: see `embed_in_micro_batches`.

    Attributes: `enc`, `projector`, and `feature_dim`, the size D of the representation h: 512
    for resnet18 and resnet34, else 2048. Raises ValueError for a name not in `BACKBONES`.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        projection_dim: int = 128,
        hidden_dim: int = 2048,
        cifar_stem: bool = True,
        activation_checkpointing: bool = False,
        micro_batch_size: int | None = None,
        views: int = 2,
    ) -> None:
        super().__init__()
        self.micro_batch_size, self.views = micro_batch_size, views
        if backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {backbone!r}: choose one of {', '.join(BACKBONES)}")
        self.enc = BACKBONES[backbone](weights=None)
        self.feature_dim = self.enc.fc.in_features
        self.enc.fc = nn.Identity()
        if cifar_stem:
            self.enc.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            # the initialisation that torchvision gives the other convolutions
            nn.init.kaiming_normal_(self.enc.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.enc.maxpool = nn.Identity()
        for block in self.enc.modules() if activation_checkpointing else ():
            if isinstance(block, BasicBlock | Bottleneck):
                block.forward = recomputed(block.forward, block)
        self.projector = nn.Sequential(
            nn.Linear(self.feature_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, projection_dim),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, 3, H, W), values in [0, 1]. Returns h: (N, D) and z: (N, projection_dim)."""
        if self.training and self.micro_batch_size is not None:
            return embed_in_micro_batches(self, x)
        return self.embed(x)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` for all of x at once."""
        h = self.enc(x)  # N×D
        z = self.projector(h)  # N×d
        return h, z


def recomputed(f: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """`f`, a pass through `module` that keeps its input alone: the backward pass repeats it."""
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in it is random
    return partial(checkpoint, f, context_fn=partial(_keep_statistics, module), **options)


def _keep_statistics(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the forward pass and of the recomputation, which must not count a batch again."""

    @contextmanager
    def buffers_restored() -> Iterator[None]:
        before = [buffer.clone() for buffer in module.buffers()]
        try:
            yield
        finally:  # torch's checkpoint ends the recomputation early, by an exception
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)

    return nullcontext(), buffers_restored()


def embed_in_micro_batches(model: SimCLR, views: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient caching: `model.embed` in micro-batches; views: (V·N, 3, S, S), V = `model.views`.

    All views of `micro_batch_size` images (rows i, N+i, …) go through the model without keeping
    activations, and again in the backward pass, when the gradient of the loss of all views is
    known: the memory of one, the time of a second forward pass. Batch norm counts each once.
    """
    repeated, by_view = recomputed(model.embed, model), (model.views, -1)
    hs, zs = [], []
    for images in views.unflatten(0, by_view).split(model.micro_batch_size, dim=1):  # V×n×3×S×S
        h, z = repeated(images.flatten(0, 1))
        hs.append(h.unflatten(0, by_view))
        zs.append(z.unflatten(0, by_view))
    return torch.cat(hs, dim=1).flatten(0, 1), torch.cat(zs, dim=1).flatten(0, 1)


def nt_xent(
    zs: Sequence[Tensor],
    temperature: float = 0.5,
    gather: Callable[[Tensor], Tensor] = lambda z: z,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """NT-Xent, Eq. 1 of the paper, averaged over all positive pairs of views (Algorithm 1).

        l(i, j) = -log( exp(sim(z_i, z_j) / τ) / Σ_{k≠i} exp(sim(z_i, z_k) / τ) )

    zs: the projections of each view, V >= 2 times (N, d), N >= 1, of any floating type; row i of
    each comes from image i. The paper has V = 2; with more, any two views of an image are a pair,
    and k is j or one of the V(N-1) views of other images: the denominator has no other positive.
    sim is the cosine, negative values included. Everything is computed in float32, under autocast
    too: a half-precision softmax loses the small terms. With several ranks zs are of the images of
    this rank, as is the mean; `gather` concatenates the rows of all ranks, in order of rank.

    Returns two float32 scalars: the loss, log(V(N-1)+1) if all embeddings are the same; and,
    detached, the contrastive accuracy, the fraction of pairs in which j is the most similar of k.
    Raises ValueError for one view, shapes that differ or are not (N, d), temperature not positive.
    """
    shapes = [tuple(z.shape) for z in zs]
    if len(shapes) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] == 0:
        raise ValueError(f"zs must be two or more of the same (N, d), N >= 1: {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    n, loss, nearest, device = len(zs[0]), 0.0, [], zs[0].device.type
    autocast = torch.amp.is_autocast_available(device)  # not on the meta device
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        z = F.normalize(torch.cat(tuple(zs)).float(), dim=1)  # VN×d, rows i, N+i, … from image i
        all_z, first = gather(z), len(z) * rank  # z itself and 0 with a single rank
        views = range(0, len(z), n)  # the first row of each
        # One pair of views at a time: with V = 2 the backward pass holds four matrices of N×2N (the
        # softmax of each, two gradients of one), as large as two of 2N×2N; both at once: three.
        for own, partner in permutations(views, 2):
            similarity = (z[own : own + n] / temperature) @ all_z.T  # N×VN
            for other in views:
                if other != partner:  # k ≠ i, and no further positive
                    similarity.diagonal(first + other).fill_(float("-inf"))
            target = torch.arange(n, device=z.device) + (first + partner)  # with V = 2: i <-> N+i
            loss = loss + F.cross_entropy(similarity, target, reduction="sum")
            nearest.append(similarity.detach().argmax(dim=1) == target)
    return loss / (n * len(nearest)), torch.cat(nearest).float().mean()
