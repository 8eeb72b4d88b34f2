"""SimCLR's augmentations (App. A) as batched tensor operations.

Every image has its own parameters, and shapes are static: a batch of views is made on the device
without a host sync, and `torch.compile` traces all of it. The operations and the distributions of
their parameters are torchvision's; the tests compare both.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import Views

BRIGHTNESS, CONTRAST, SATURATION = range(3)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in torchvision
CROP_TRIES = 10  # draws of a box before torchvision falls back to a centre crop

# Which rows of `draw` each operation uses.
BOX, FLIP, JITTER, GRAY, HUE_PLACE = slice(0, 22), 22, slice(23, 31), 31, slice(32, 36)
BLUR = slice(36, 38)
ROWS = 38

# The first part of the key of a random stream: what its numbers are for.
VIEWS, CROPS, ORDER = range(3)


def draw(n: int, seed: int, step: int, stream: int = VIEWS) -> Tensor:
    """Random numbers for n views: (38, n), float32, uniform in [0, 1), on the CPU.

    A pure function: numpy's SeedSequence mixes (stream, seed, step), so none shares a number.
    """
    rng = np.random.default_rng((stream, seed, step))
    return torch.from_numpy(rng.random((ROWS, n), dtype=np.float32))


def shuffle(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n images in an epoch: (n,), on the CPU, a pure function of its arguments."""
    return torch.from_numpy(np.random.default_rng((ORDER, seed, epoch)).permutation(n))


def random_views(images: Tensor, u: Tensor, size: int, cfg: Views) -> Tensor:
    """One random view of every image: crop, resize, flip, colour jitter, grayscale, blur (App. A).

    images: (N, 3, H, W), uint8 or float in [0, 1]; u: from `draw`, N columns, on the same device.
    Returns (N, 3, size, size), float32 in [0, 1]. Each image has its own parameters, and its own
    order of the colour operations. The hue shift, the costly one, has four possible places among
    them: every four neighbours in the (shuffled) batch take these in a random order, so that four
    groups of a fixed size are each shifted once.
    """
    n = len(images)
    rows = u[HUE_PLACE, ::4].argsort(dim=0) + torch.arange(0, n, 4, device=images.device)  # 4×⌈N/4⌉
    views = torch.empty(rows.numel(), 3, size, size, device=images.device)
    for hue_place, group in enumerate(rows):
        chosen = group.clamp(max=n - 1)  # padding: copies of the last, dropped below
        own = u[:, chosen]
        x = random_crop_flip(images[chosen], own, size, cfg)
        x = random_color_jitter(x, own[JITTER], hue_place, cfg.color_strength)
        keep = (own[GRAY] >= cfg.grayscale_probability).float().view(-1, 1, 1, 1)
        x = torch.lerp(grayscale(x), x, keep)
        if cfg.blur_probability > 0:
            x = random_blur(x, own[BLUR], cfg.blur_probability)
        views[group] = x
    return views[:n]


def random_crop_flip(images: Tensor, u: Tensor, size: int, cfg: Views) -> Tensor:
    """Random resized crop and horizontal flip; shapes and types as for `random_views`."""
    boxes = sample_boxes(images.shape, u[BOX], cfg.crop_scale)
    return crop_flip(images, boxes, u[FLIP] < cfg.flip_probability, size)


def sample_boxes(
    shape: torch.Size, u: Tensor, crop_scale: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample crop boxes (top, left, height, width), each (N,) int64, as RandomResizedCrop does.

    shape: of the images, (N, 3, H, W); u: (22, N). The area is uniform in `crop_scale`, the log of
    the aspect ratio between those of 3/4 and 4/3. A box that does not fit is drawn again up to ten
    times (all at once, for static shapes); then the largest centre box is taken.
    """
    height, width = shape[-2:]
    area, ratio = u[:CROP_TRIES], u[CROP_TRIES : 2 * CROP_TRIES]
    area = height * width * (crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area)
    ratio = torch.exp(math.log(3 / 4) + math.log(16 / 9) * ratio)
    w = (area * ratio).sqrt().round().long()
    h = (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=0, keepdim=True)  # the first try that fits, 1×N
    fits, h, w = (t.gather(0, first).squeeze(0) for t in (fits, h, w))

    h = torch.where(fits, h, min(height, round(width / (3 / 4))))
    w = torch.where(fits, w, min(width, round(height * (4 / 3))))
    top, left = u[2 * CROP_TRIES :]
    top = torch.where(fits, (top * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(fits, (left * (width - w + 1)).long(), (width - w) // 2)
    return top, left, h, w


def crop_flip(
    images: Tensor, boxes: tuple[Tensor, Tensor, Tensor, Tensor], flip: Tensor, size: int
) -> Tensor:
    """Crop, resize to (size, size) and flip horizontally where `flip` (N,) is true.

    images: (N, 3, H, W), uint8 or float in [0, 1]; returns float32. Bilinear and antialiased,
    as torchvision's `resized_crop`. Both are linear and separable, so a crop is two small
    matrix products, Wy · image · Wxᵀ; a flip reverses the rows of Wx.
    """
    top, left, h, w = boxes
    n, channels, height, width = images.shape
    wy = resize_weights(top, h, height, size)  # N×size×H
    wx = resize_weights(left, w, width, size)  # N×size×W
    wx = torch.where(flip[:, None, None], wx.flip(1), wx)
    if images.dtype == torch.uint8:
        wy = wy / 255
    x = images.float().reshape(n, channels * height, width)
    x = (x @ wx.transpose(1, 2)).view(n, channels, height, size)
    # a product a channel: broadcasting wy would copy it for each of them first
    return torch.stack([wy @ channel for channel in x.unbind(1)], dim=1).clamp_(0, 1)


def resize_weights(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """Weights of the antialiased bilinear resize, (N, size, full): row i makes output pixel i.

    A triangle around the pixel's centre, one input pixel wide, or, where the interval
    [start, start + length) shrinks, one output pixel wide. Pixels outside have no weight.
    """
    start, length = start[:, None, None], length[:, None, None]  # N×1×1
    scale = length / size
    center = start + scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    pixel = torch.arange(full, device=start.device)
    inside = ((pixel >= start) & (pixel < start + length)).float()
    weights = (pixel + 0.5 - center).abs_().mul_(-1 / scale.clamp(min=1)).add_(1).clamp_(min=0)
    weights.mul_(inside)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def random_color_jitter(x: Tensor, u: Tensor, hue_place: int, strength: float) -> Tensor:
    """`color_jitter` of (0.8s, 0.8s, 0.8s, 0.2s), with probability 0.8 (App. A); u: (8, N)."""
    span = 0.8 * strength
    low, high = max(0.0, 1 - span), 1 + span
    apply = u[0] < 0.8
    factors = torch.where(apply, low + (high - low) * u[1:4], 1.0)
    shift = torch.where(apply, 0.2 * strength * (2 * u[4] - 1), 0.0)
    return color_jitter(x, factors, shift, u[5:8].argsort(dim=0), hue_place)


def color_jitter(
    x: Tensor, factors: Tensor, shift: Tensor, order: Tensor, hue_place: int
) -> Tensor:
    """Brightness, contrast and saturation in each image's own order, the hue at `hue_place`.

    x: (N, 3, H, W) in [0, 1], modified in place. factors: (3, N) of the three; 1 changes nothing.
    shift: (N,), of the hue, in turns, in [-0.5, 0.5]. order: (3, N), column n a permutation of
    BRIGHTNESS, CONTRAST, SATURATION. hue_place: from 0, before these, to 3, after them.
    """
    factors = factors.gather(0, order)[..., None, None, None]  # 3×N×1×1×1, as they are applied
    order, shift = order[..., None, None, None], shift[:, None, None, None]
    for place in range(4):
        if place == hue_place:
            x = shift_hue(x, shift)
        if place < 3:
            x = blend(x, factors[place], order[place])
    return x


def blend(x: Tensor, factor: Tensor, operation: Tensor) -> Tensor:
    """Blend x with another image: factor · x + (1 - factor) · other, in place: memory costs more.

    operation (N, 1, 1, 1): BRIGHTNESS (other: black), CONTRAST (the mean gray), SATURATION (gray).
    """
    gray = grayscale(x)
    mean = gray.mean(dim=(2, 3), keepdim=True)
    rest = 1 - factor
    gray.mul_(rest * (operation == SATURATION)).add_(rest * (operation == CONTRAST) * mean)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def grayscale(x: Tensor) -> Tensor:
    """Convert RGB images (N, 3, H, W) to grayscale (N, 1, H, W)."""
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by `shift` (N, 1, 1, 1), in turns, through HSV and back.

    In HSV, value is the largest channel and chroma the largest minus the smallest. Back in RGB a
    channel is value - chroma · clamp(2 - |k|, 0, 1), where k is the distance in sixths of a turn
    from the hue with the least of this channel: cyan, magenta and yellow for red, green and blue.
    """
    red, green, blue = x.split(1, dim=1)
    value, chroma = x.amax(dim=1, keepdim=True), x.amax(1, True) - x.amin(1, True)
    divisor = torch.where(chroma == 0, 1.0, chroma)  # gray has no hue
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    least = torch.arange(3, 8, 2, device=x.device).view(1, 3, 1, 1)  # 3, 5 and 7, which is 1
    k = (hue + 6 * shift) - least
    k = k.sub_((k / 6).round_(), alpha=6).abs_()  # the shorter way round
    return value - k.neg_().add_(2).clamp_(0, 1).mul_(chroma)


def random_blur(x: Tensor, u: Tensor, probability: float) -> Tensor:
    """`gaussian_blur` with this probability and σ uniform in [0.1, 2] (App. A); u: (2, N)."""
    identity = 1e-3  # pixels: the weight of a neighbour, exp(-500,000), is 0
    return gaussian_blur(x, torch.where(u[0] < probability, 0.1 + 1.9 * u[1], identity))


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur every image with its own σ (N,), in pixels, as torchvision's; x: (N, 3, S, S) in [0, 1].

    The kernel is a tenth of the side (App. A), rounded down, then up to an odd number: 23 pixels at
    224, 3 at 32, and 1, which changes nothing, below 20. Each channel of each image is a group of
    two convolutions, one along the rows and one along the columns.
    """
    n, channels, size, _ = x.shape
    radius = size // 10 // 2
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-0.5 * (offset / sigma[:, None]) ** 2).softmax(dim=1)  # N×(2·radius + 1)
    kernel = kernel.repeat_interleave(channels, dim=0)[:, None, None]
    x = F.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    x = F.conv2d(x, kernel, groups=n * channels)
    x = F.conv2d(x, kernel.transpose(2, 3), groups=n * channels)
    return x.view(n, channels, size, size).clamp_(0, 1)
