"""Where the images of a split are: on the device, or, if they do not fit there, in host memory."""

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from system.memory import free_memory, in_words

# Of the GPU's free memory, as much as a split may take: weights, activations and the features of
# the evaluation need the rest, and how much that is depends on the batch.
SHARE = 0.5


class HostImages:
    """Images (N, 3, H, W), uint8, in host memory, read like a tensor on `device`.

    An index leads to a copy on the device. The copy has a CUDA stream of its own and starts from
    pinned memory, so that nothing waits for it but the kernels that use it.
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self.images, self.device = images, device
        self.shape, self.nbytes = images.shape, images.nbytes
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | list[int]) -> Tensor:
        """The images at the index, on the device; an index on a GPU is waited for."""
        index = torch.as_tensor(index, device="cpu")
        if self.stream is None:
            return self.images[index].to(self.device)
        # torch keeps pinned memory for the next batch, and hands it out once it has been copied
        pinned = torch.empty((len(index), *self.shape[1:]), dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.images, 0, index, out=pinned)
        with torch.cuda.stream(self.stream):
            batch = pinned.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        batch.record_stream(current)  # its memory belongs to the other stream
        return batch

    def split(self, size: int) -> Iterator[Tensor]:
        """Batches of `size` images, in order."""
        return (self[index] for index in torch.arange(len(self)).split(size))


Images: TypeAlias = Tensor | HostImages


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether the images leave enough of a GPU's free memory; elsewhere there is but one memory."""
    return device.type != "cuda" or images.nbytes <= SHARE * free_memory(device)


def place(images: Tensor, device: torch.device) -> Images:
    """The images (N, 3, H, W), uint8, on `device`, or in host memory if they do not fit there."""
    return images.to(device) if fits(images, device) else HostImages(images, device)


def take(images: Images, index: Tensor) -> Images:
    """The images at an index that may be too long for the device: placed again."""
    if isinstance(images, HostImages):
        return place(images.images[index.cpu()], images.device)
    return images[index]


def batches(images: Images, rows: Tensor) -> Iterator[Tensor]:
    """The images at each row of indices (steps, n), on the device: (n, 3, H, W), uint8.

    On a GPU a step only queues its kernels. While they run the CPU is here again, gathers the next
    batch and starts its copy: no thread, and no wait as long as that is faster than a step.
    """
    if isinstance(images, HostImages):
        rows = rows.cpu()  # here, once: a copy from a GPU waits for all that is queued there
    return (images[row] for row in rows)


def describe(images: Images, dataset: str) -> str:
    """Number, bytes and place for the log: `50,000 images of cifar10 (153.6 MB on cuda)`."""
    on_device = isinstance(images, Tensor)
    where = f"on {images.device}" if on_device else "in host memory, copied batch by batch"
    return f"{len(images):,} images of {dataset} ({in_words(images.nbytes)} {where})"
