"""The batched augmentations against torchvision's own, per operation and in distribution."""

import itertools

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import functional as tvf
from torchvision.transforms import v2

import augment

SCALE = (0.08, 1.0)


def images(n: int = 8, height: int = 32, width: int = 32) -> torch.Tensor:
    """Smooth colours with noise: as many different hues as pixels, some pixels gray."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, height, width, generator=rng)
    x[:, :, 0] = x[:, :1, 0]  # a row of grays: no hue
    x[:, :, 1] = (x[:, :, 1] > 0.5).float()  # a row of saturated colours, black and white
    return x


def per_image(n: int, low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, n)


@pytest.mark.parametrize("size", [12, 32, 40])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_crop_and_flip_equal_torchvisions_for_the_same_box(size, height, width):
    x = images(64, height, width)
    rng = torch.Generator().manual_seed(1)
    boxes = augment.sample_boxes(x, SCALE, rng)
    flip = torch.arange(64) % 2 == 0
    views = augment.crop_flip(x, boxes, flip, size)
    for n, (top, left, h, w) in enumerate(zip(*(box.tolist() for box in boxes), strict=True)):
        expected = tvf.resized_crop(x[n], top, left, h, w, [size, size], antialias=True)
        expected = tvf.hflip(expected) if flip[n] else expected
        torch.testing.assert_close(views[n], expected, atol=1e-5, rtol=0)


def test_whole_box_leaves_an_image_as_it_is():
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    whole = tuple(torch.full((4,), value) for value in (0, 0, 32, 32))
    views = augment.crop_flip(x, whole, torch.zeros(4, dtype=torch.bool), 32)
    torch.testing.assert_close(views, x / 255, atol=1e-6, rtol=0)


TORCHVISION = {
    augment.BRIGHTNESS: tvf.adjust_brightness,
    augment.CONTRAST: tvf.adjust_contrast,
    augment.SATURATION: tvf.adjust_saturation,
    augment.HUE: tvf.adjust_hue,
}


def test_color_jitter_equals_torchvisions_operations_in_every_order():
    orders = list(itertools.permutations(range(4)))
    n = len(orders)
    x = images(n)
    amounts = torch.stack([per_image(n, 0.6, 1.4), per_image(n, 1.4, 0.6), per_image(n, 0.2, 1.8),
                           per_image(n, -0.5, 0.5)])  # fmt: skip
    jittered = augment.color_jitter(x, amounts, torch.tensor(orders))
    for i, order in enumerate(orders):
        expected = x[i]
        for op in order:
            expected = TORCHVISION[op](expected, amounts[op, i].item())
        torch.testing.assert_close(jittered[i], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(
        augment.color_jitter(x[:1], amounts[:, :1], torch.tensor(orders[:1])),
        augment.color_jitter(x[:1], amounts[:, :1], torch.tensor(orders[-1:])),
    )  # the order matters, so that the comparison above can fail


def test_grayscale_equals_torchvisions():
    x = images()
    expected = tvf.rgb_to_grayscale(x, num_output_channels=3)
    torch.testing.assert_close(augment.grayscale(x), expected, atol=1e-6, rtol=0)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Kolmogorov-Smirnov: the largest difference of the two distribution functions."""
    return ks_2samp(ours.double().numpy(), theirs.double().numpy()).statistic


def test_boxes_have_the_distribution_of_random_resized_crop():
    n = 20_000
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(32, scale=SCALE)
    x = torch.zeros(3, 32, 32)
    drawn = [crop.make_params([x]) for _ in range(n)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn]).T
    rng = torch.Generator().manual_seed(0)
    ours = torch.stack(augment.sample_boxes(torch.zeros(n, 3, 32, 32), SCALE, rng))
    for mine, reference in zip(ours, theirs, strict=True):
        assert distance(mine, reference) < 0.02  # 0.02 is seen once in a thousand at n = 20,000
    area, ratio = ours[2] * ours[3] / 1024, ours[3] / ours[2]
    assert distance(area, theirs[2] * theirs[3] / 1024) < 0.02
    assert distance(ratio, theirs[3] / theirs[2]) < 0.02
    assert area.min() >= 0.06 and ratio.min() > 0.6 and ratio.max() < 1.6


@pytest.mark.parametrize(("height", "width"), [(10, 60), (60, 10), (32, 32)])
def test_a_box_that_never_fits_falls_back_as_in_torchvision(height, width, monkeypatch):
    monkeypatch.setattr(augment, "uniform", lambda shape, like, generator: torch.full(shape, 0.999))
    x = torch.zeros(1, 3, height, width)  # area and ratio at their largest: wider than the image
    box = [t.item() for t in augment.sample_boxes(x, (1.0, 1.0))]
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    assert box == [(height - h) // 2, (width - w) // 2, h, w]


def their_views(image: torch.Tensor, n: int) -> torch.Tensor:
    """The pipeline of App. A in torchvision's own words."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(16, scale=SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(p=0.2),
        ]
    )
    return torch.stack([pipeline(image) for _ in range(n)])


def test_many_views_of_one_image_have_torchvisions_mean_and_covariance():
    n = 3000
    rng = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, 5, 5, generator=rng)
    image = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")  # smooth
    image = (image * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1)).round(decimals=3)
    torch.manual_seed(0)
    theirs = their_views(image[0], n)
    ours = augment.random_views(image.repeat(n, 1, 1, 1), 16, SCALE, 0.5, 0.5, 0.2, rng)
    error = 5 * theirs.std(dim=0) / n**0.5 * 2**0.5  # 5 σ of the difference of two means
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() <= error).all()
    corners = [v[:, :, ::5, ::5].reshape(n, -1) for v in (ours, theirs)]  # 3 × 4 × 4 values
    ours_cov, theirs_cov = (v.T.cov() for v in corners)
    assert (ours_cov - theirs_cov).abs().max() < 0.15 * theirs_cov.diagonal().mean()
    assert abs(ours_cov.diagonal().mean() / theirs_cov.diagonal().mean() - 1) < 0.05
    gray = [(v.amax(dim=1) - v.amin(dim=1)).amax(dim=(1, 2)) < 1e-6 for v in (ours, theirs)]
    assert abs(gray[0].float().mean() - 0.2) < 0.04
    assert abs(gray[1].float().mean() - 0.2) < 0.04


def test_every_view_has_parameters_of_its_own():
    x = images(1).repeat(64, 1, 1, 1)
    views = augment.random_views(x, 32, SCALE, 0.5, 0.5, 0.2, torch.Generator().manual_seed(0))
    flat = views.flatten(1)
    apart = torch.cdist(flat, flat).fill_diagonal_(1)
    assert apart.min() > 1e-3  # no two of 64 views of one image are the same


def test_color_orders_and_amounts_are_drawn_for_each_image(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        augment, "color_jitter", lambda x, amounts, order: seen.update(order=order, amounts=amounts)
        or x
    )  # fmt: skip
    augment.random_color_jitter(images(2400, 8, 8), 0.5, torch.Generator().manual_seed(0))
    orders, counts = seen["order"].unique(dim=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 60 and counts.max() < 140  # 100 each expected
    low = torch.tensor([0.6, 0.6, 0.6, -0.1])
    high = torch.tensor([1.4, 1.4, 1.4, 0.1])
    torch.testing.assert_close(seen["amounts"].amin(dim=1), low, atol=0.01, rtol=0)
    torch.testing.assert_close(seen["amounts"].amax(dim=1), high, atol=0.01, rtol=0)


def test_probabilities_of_flip_jitter_and_grayscale():
    n = 4000
    x = images(1, 8, 8).repeat(n, 1, 1, 1)

    def share_changed(flip=0.0, strength=0.0, gray=0.0):
        rng = torch.Generator().manual_seed(0)
        views = augment.random_views(x, 8, (0.999999, 1.0), flip, strength, gray, rng)
        same_box = augment.sample_boxes(x, (0.999999, 1.0), torch.Generator().manual_seed(0))
        plain = augment.crop_flip(x, same_box, torch.zeros(n, dtype=torch.bool), 8)
        return ((views - plain).abs().amax(dim=(1, 2, 3)) > 1e-4).float().mean().item()

    assert share_changed() == 0
    assert share_changed(flip=0.5) == pytest.approx(0.5, abs=0.03)
    assert share_changed(strength=0.5) == pytest.approx(0.8, abs=0.03)
    assert share_changed(gray=0.2) == pytest.approx(0.2, abs=0.03)


def test_values_stay_in_range_and_follow_from_the_seed():
    x = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)
    views, again = (
        augment.random_views(x, 24, SCALE, 0.5, 1.0, 0.2, torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert views.shape == (128, 3, 24, 24) and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1
    assert torch.equal(views, again)
