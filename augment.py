"""SimCLR's augmentations (App. A) as batched tensor operations.

Every operation takes one set of parameters per image of the batch and has static shapes, so
a whole batch of views is made on the device at once. They compute what torchvision's
operations do, with parameters from the same distributions; the tests compare both.
"""

import math

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in torchvision
CROP_TRIES = 10  # draws of a box before torchvision falls back to the whole image


def random_views(
    images: Tensor,
    size: int,
    crop_scale: tuple[float, float],
    flip_probability: float,
    color_strength: float,
    grayscale_probability: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One random view of every image: crop, resize, flip, colour jitter, grayscale (App. A).

    images: (N, 3, H, W), uint8 or float in [0, 1], on the generator's device.
    Returns (N, 3, size, size), float32 in [0, 1]. Each image has its own parameters.
    """
    x = random_crop_flip(images, size, crop_scale, flip_probability, generator)
    x = random_color_jitter(x, color_strength, generator)
    gray = uniform((len(x), 1, 1, 1), x, generator) < grayscale_probability
    return torch.where(gray, grayscale(x), x)


def random_crop_flip(
    images: Tensor,
    size: int,
    crop_scale: tuple[float, float],
    flip_probability: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random resized crop and horizontal flip: what linear evaluation trains on.

    Shapes and types as for `random_views`.
    """
    boxes = sample_boxes(images, crop_scale, generator)
    flip = uniform((len(images),), images, generator) < flip_probability
    return crop_flip(images, boxes, flip, size)


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Float32 numbers in [0, 1) on the device of `like`."""
    return torch.rand(shape, device=like.device, generator=generator)


def sample_boxes(
    images: Tensor, crop_scale: tuple[float, float], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (top, left, height, width), each (N,) int64, as RandomResizedCrop draws them.

    The area is uniform in `crop_scale` as a share of the image, the logarithm of the aspect
    ratio uniform between 3/4 and 4/3. A box that does not fit is drawn again, up to ten times,
    all tries at once here to keep the shapes static; then the largest box with an allowed ratio
    is taken from the centre.
    """
    n, height, width = len(images), *images.shape[-2:]
    area, ratio = uniform((2, CROP_TRIES, n), images, generator)
    area = height * width * (crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area)
    ratio = torch.exp(math.log(3 / 4) + math.log(16 / 9) * ratio)
    w = (area * ratio).sqrt().round().long()
    h = (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=0, keepdim=True)  # the first try that fits, 1×N
    fits, h, w = (t.gather(0, first).squeeze(0) for t in (fits, h, w))

    h = torch.where(fits, h, min(height, round(width / (3 / 4))))
    w = torch.where(fits, w, min(width, round(height * (4 / 3))))
    top, left = uniform((2, n), images, generator)
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
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    wy = resize_weights(top, h, images.shape[-2], size)  # N×size×H
    wx = resize_weights(left, w, images.shape[-1], size)  # N×size×W
    wx = torch.where(flip[:, None, None], wx.flip(1), wx)
    out = wy[:, None] @ x @ wx[:, None].transpose(-1, -2)  # N×3×size×size
    return out.clamp(0, 1)  # sums of weights are 1 up to rounding


def resize_weights(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """(N, size, full): row i holds the weights of the pixels that make output pixel i.

    A triangle around the pixel's centre, one input pixel wide, or, where the interval
    [start, start + length) shrinks, one output pixel wide: that is the antialiasing. Pixels
    outside the interval have no weight.
    """
    start, length = start[:, None, None], length[:, None, None]  # N×1×1
    scale = length / size
    center = start + scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    pixel = torch.arange(full, device=start.device)
    weights = (1 - (pixel + 0.5 - center).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel >= start) & (pixel < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)


def random_color_jitter(
    x: Tensor, strength: float, generator: torch.Generator | None = None
) -> Tensor:
    """With probability 0.8, `color_jitter` of (0.8s, 0.8s, 0.8s, 0.2s) for strength s (App. A)."""
    n = len(x)
    span = 0.8 * strength
    low, high = max(0.0, 1 - span), 1 + span
    factors = low + (high - low) * uniform((3, n), x, generator)
    hue = 0.2 * strength * (2 * uniform((1, n), x, generator) - 1)
    order = uniform((n, 4), x, generator).argsort(dim=1)
    jittered = color_jitter(x, torch.cat([factors, hue]), order)
    apply = uniform((n, 1, 1, 1), x, generator) < 0.8
    return torch.where(apply, jittered, x)


def color_jitter(x: Tensor, amounts: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order.

    x: (N, 3, H, W) in [0, 1]. amounts: (4, N), the factors of brightness, contrast and
    saturation (1 leaves the image as it is) and the hue shift in turns, in [-0.5, 0.5].
    order: (N, 4), row n a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE.

    The first three are blends with another image: black, the mean gray, the gray image. All four
    are computed at each of the four places and one is kept, which is what static shapes cost.
    """
    amounts = amounts[:, :, None, None, None]  # 4×N×1×1×1
    for op in order.T[..., None, None, None]:  # N×1×1×1
        gray = grayscale(x)
        other = torch.where(op == CONTRAST, gray.mean(dim=(1, 2, 3), keepdim=True), gray)
        other = torch.where(op == BRIGHTNESS, 0.0, other)
        factor = torch.where(op == BRIGHTNESS, amounts[BRIGHTNESS], amounts[CONTRAST])
        factor = torch.where(op == SATURATION, amounts[SATURATION], factor)
        blended = (factor * x + (1 - factor) * other).clamp(0, 1)
        x = torch.where(op == HUE, shift_hue(x, amounts[HUE]), blended)
    return x


def grayscale(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> the same shape, the luma in all three channels."""
    red, green, blue = x.unbind(dim=1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return luma[:, None].expand_as(x)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (N, 1, 1, 1), in turns, through HSV and back.

    In HSV the value is the largest channel and the chroma the largest less the smallest; the way
    back is f(n) = value - chroma · max(0, min(k, 4-k, 1)), k = (n + 6·hue) mod 6, for n = 5, 3, 1.
    """
    red, green, blue = x.split(1, dim=1)
    value, chroma = x.amax(dim=1, keepdim=True), x.amax(1, True) - x.amin(1, True)
    divisor = torch.where(chroma == 0, 1.0, chroma)  # gray has no hue
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = (n + sixths + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
