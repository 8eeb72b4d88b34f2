"""The model and the loss of SimCLR (Chen et al. 2020, arXiv 2002.05709).

h = enc(x)          representation, kept for evaluation
z = projector(h)    projection, input of the contrastive loss
nt_xent(z1, z2)     normalised temperature-scaled cross-entropy, Eq. 1
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
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
    gradients, with half (resnet18) to a third (resnet50) of the memory. `micro_batch_size`: see
    `embed_in_micro_batches`.

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
    ) -> None:
        super().__init__()
        self.micro_batch_size = micro_batch_size
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
    """Gradient caching: `model.embed` in micro-batches; views: (2N, 3, S, S), rows i, N+i: image i.

    Both views of `micro_batch_size` images go through the model without keeping activations, and
    again in the backward pass, when the gradient of the loss of all views is known: the memory of
    one micro-batch, the time of a second forward pass. Batch norm takes each one's statistics once.
    """
    repeated, n = recomputed(model.embed, model), model.micro_batch_size
    firsts, seconds = views.chunk(2)
    h1, h2, z1, z2 = [], [], [], []
    for pair in zip(firsts.split(n), seconds.split(n), strict=True):
        h, z = repeated(torch.cat(pair))
        for parts, part in zip((h1, h2, z1, z2), (*h.chunk(2), *z.chunk(2)), strict=True):
            parts.append(part)
    return torch.cat(h1 + h2), torch.cat(z1 + z2)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.5,
    gather: Callable[[Tensor], Tensor] = lambda z: z,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """NT-Xent, Eq. 1 of the paper, averaged over all 2N views (Algorithm 1).

        l(i, j) = -log( exp(sim(z_i, z_j) / τ) / Σ_{k≠i} exp(sim(z_i, z_k) / τ) )

    z1, z2: (N, d), N >= 1, of any floating type; row i of both comes from image i, and the other
    2N-2 rows are its negatives. sim is the cosine, negative values included. Everything is
    computed in float32, under autocast too: a half-precision softmax loses the small terms.
    With several ranks z1 and z2 are the N images of this rank, `gather` concatenates the rows of
    all ranks in order of rank, and the loss is the mean over this rank's 2N views.

    Returns two float32 scalars: the loss, log(2N-1) if all embeddings are the same; and, detached,
    the contrastive accuracy, the fraction of views whose partner is the most similar of the others.
    Raises ValueError if the shapes differ, are not (N, d), or the temperature is not positive.
    """
    if z1.shape != z2.shape or z1.dim() != 2 or len(z1) == 0:
        raise ValueError(f"z1 and z2 must both be (N, d), N >= 1: {(*z1.shape,)}, {(*z2.shape,)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    n, loss, nearest, device = len(z1), 0.0, [], z1.device.type
    autocast = torch.amp.is_autocast_available(device)  # not on the meta device
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # 2N×d, rows i and N+i from image i
        all_z, first = gather(z), 2 * n * rank  # z itself and 0 with a single rank
        # One view at a time: the backward pass holds four matrices of N×2N (the softmax of each
        # view, two gradients of one), as large as two of 2N×2N; both at once would take three.
        for own, partner in ((0, n), (n, 0)):
            similarity = (z[own : own + n] / temperature) @ all_z.T  # N×2N
            similarity.diagonal(first + own).fill_(float("-inf"))  # k ≠ i
            target = torch.arange(n, device=z.device) + (first + partner)  # i <-> N+i
            loss = loss + F.cross_entropy(similarity, target, reduction="sum")
            nearest.append(similarity.detach().argmax(dim=1) == target)
    return loss / (2 * n), torch.cat(nearest).float().mean()
