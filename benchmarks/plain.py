"""The plain pipeline, the reference of every ratio: what a user of torchvision would write.

PIL images through torchvision's transforms in a DataLoader with two workers, a ResNet in float32
with contiguous tensors, eager, plain SGD. Model, loss and settings are those of simclr.py.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from config import Config, Views
from models import SimCLR, nt_xent
from system.device import select_device


def plain_transform(cfg: Views, size: int) -> transforms.Compose:
    """App. A of the paper in torchvision's words, without blur."""
    s = cfg.color_strength
    jitter = transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=tuple(cfg.crop_scale)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(cfg.grayscale_probability),
            transforms.ToTensor(),
        ]
    )


class TwoViews(Dataset):
    """Two random views of each image, made one image at a time."""

    def __init__(self, images: Tensor, transform: transforms.Compose) -> None:
        self.images = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())  # N×H×W×3
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.images[index])
        return self.transform(image), self.transform(image)


def plain_loader(
    images: Tensor, batch_size: int, transform: transforms.Compose, seed: int = 0, workers: int = 2
) -> DataLoader:
    """Batches of two views each, in a new random order every epoch, from loader processes."""
    return DataLoader(
        TwoViews(images, transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=True,
        generator=torch.Generator().manual_seed(seed),
    )


class Plain:
    """Model and SGD of the plain pipeline, on the device that `auto` takes."""

    def __init__(self, model: SimCLR, cfg: Config, weight_decay: float = 0.0) -> None:
        self.device, self.temperature = select_device("auto"), cfg.temperature
        self.model = model.to(self.device)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=cfg.momentum, nesterov=True,
            weight_decay=weight_decay,
        )  # fmt: skip

    def epoch(self, loader: DataLoader) -> None:
        """An epoch at a constant learning rate."""
        for pair in loader:
            self.step(pair)

    def step(self, pair: tuple[Tensor, Tensor]) -> None:
        """One step in float32 on a batch of the loader."""
        _, z = self.model.train()(torch.cat(pair).to(self.device))
        loss, _ = nt_xent(z.chunk(2), self.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
