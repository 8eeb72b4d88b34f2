"""Random numbers as a function of seed and step; the views against torchvision's own, per operation
and in distribution."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_config
from scipy.stats import ks_2samp, kstest, uniform
from torchvision.transforms import functional as tvf
from torchvision.transforms import v2

import simclr
from images import augment
from images.augment import CROPS, VIEWS, draw, shuffle

CONFIG = make_config()
SCALE = CONFIG.crop_scale


def images(n: int = 8, height: int = 32, width: int = 32) -> torch.Tensor:
    """Smooth colours with noise: as many different hues as pixels, some pixels gray."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, height, width, generator=rng)
    x[:, :, 0] = x[:, :1, 0]  # a row of grays: no hue
    x[:, :, 1] = (x[:, :, 1] > 0.5).float()  # a row of saturated colours, black and white
    return x


def views(x: torch.Tensor, size: int, step: int = 0) -> torch.Tensor:
    """Random views with the default settings."""
    return augment.random_views(x, draw(len(x), 0, step), size, CONFIG)


def test_steps_seeds_streams_and_views_share_no_random_number():
    """Three numbers in a row, 72 bits, occur once: all seeds, steps and streams, so that seed 0 at
    step 1 is not seed 1 at step 0; and all views within a step, so the two views of an image."""
    keys = list(itertools.product(range(4), range(4), (VIEWS, CROPS)))
    seen = set()
    for key in keys:
        numbers = draw(64, *key).flatten().tolist()
        seen.update(zip(numbers, numbers[1:], numbers[2:], strict=False))
    assert len(seen) == len(keys) * (38 * 64 - 2)


def test_numbers_are_uniform_and_a_pure_function_of_their_key():
    u = draw(5000, 42, 7)
    assert u.shape == (38, 5000) and u.dtype == torch.float32 and u.device.type == "cpu"
    assert u.min() >= 0 and u.max() < 1
    assert min(kstest(row.numpy(), "uniform").pvalue for row in u) > 1e-5
    assert (u.corrcoef() - torch.eye(38)).abs().max() < 0.08  # 5 σ
    np.random.seed(1)
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(draw(5000, 42, 7), u)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert draw(2, 2**32 - 1, 2**40).shape == (38, 2)  # the largest seed


def test_the_order_of_an_epoch_is_a_permutation_of_its_own():
    keys = list(itertools.product(range(4), range(4)))
    orders = torch.stack([shuffle(1000, *key) for key in keys])  # of seeds and epochs
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort().values, torch.arange(1000).expand(16, -1))
    in_order = torch.arange(1000).expand(1, -1)
    for one, other in itertools.combinations([*orders, *in_order], 2):
        assert (one == other).sum() < 10  # one on average
    assert torch.equal(shuffle(1000, 2, 3), orders[keys.index((2, 3))])


def test_training_takes_orders_and_numbers_of_its_steps(toy, thin, tmp_path, monkeypatch):
    """Rows i and N + i are one image; each epoch has each image once, in the order of `shuffle`."""
    cfg = toy("blur_probability=0.25", "image_size=20", "seed=3", "projection_dim=8")
    loaded, seen = [], []
    load, make_views = simclr.load_pretraining, simclr.random_views

    def noted_load(*arguments):
        found = load(*arguments)
        loaded.append(found[0])
        return found

    def noted_views(x, u, size, settings):
        assert settings.blur_probability == 0.25
        seen.append((x.clone(), u.clone()))
        return make_views(x, u, size, settings)

    monkeypatch.setattr(simclr, "load_pretraining", noted_load)
    monkeypatch.setattr(simclr, "random_views", noted_views)
    simclr.pretrain(cfg, tmp_path)
    assert len(seen) == 6  # 2 epochs of 24 images in batches of 8
    for step, (x, u) in enumerate(seen):
        assert torch.equal(u, draw(16, 3, step))
        assert torch.equal(*x.chunk(2))
    for epoch in range(2):
        read = torch.cat([x[:8] for x, _ in seen[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(read, loaded[0][shuffle(24, 3, epoch)])


@pytest.mark.parametrize("size", [12, 32, 40])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_crop_and_flip_equal_torchvisions_for_the_same_box(device, size, height, width):
    x = images(64, height, width)
    boxes = augment.sample_boxes(x.shape, draw(64, 1, 0)[augment.BOX], SCALE)
    flip = torch.arange(64) % 2 == 0
    there = tuple(box.to(device) for box in boxes)
    found = augment.crop_flip(x.to(device), there, flip.to(device), size).cpu()
    for n, (top, left, h, w) in enumerate(zip(*(box.tolist() for box in boxes), strict=True)):
        expected = tvf.resized_crop(x[n], top, left, h, w, [size, size], antialias=True)
        expected = tvf.hflip(expected) if flip[n] else expected
        torch.testing.assert_close(found[n], expected, atol=1e-5, rtol=0)


def test_whole_box_leaves_an_image_as_it_is():
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    whole = tuple(torch.full((4,), value) for value in (0, 0, 32, 32))
    found = augment.crop_flip(x, whole, torch.zeros(4, dtype=torch.bool), 32)
    torch.testing.assert_close(found, x / 255, atol=1e-6, rtol=0)


HUE = 3
TORCHVISION = {
    augment.BRIGHTNESS: tvf.adjust_brightness,
    augment.CONTRAST: tvf.adjust_contrast,
    augment.SATURATION: tvf.adjust_saturation,
    HUE: tvf.adjust_hue,
}


def test_color_jitter_equals_torchvisions_operations_in_every_order(device):
    n = 8
    x = images(n)
    ranges = (0.6, 1.4), (1.4, 0.6), (0.2, 1.8), (-0.5, 0.5)
    amounts = torch.stack([torch.linspace(low, high, n) for low, high in ranges])
    seen = []
    for order in itertools.permutations(range(4)):
        blends = torch.tensor([op for op in order if op != HUE])[:, None].expand(3, n)
        drawn = (part.to(device) for part in (x.clone(), amounts[:3], amounts[3], blends))
        jittered = augment.color_jitter(*drawn, order.index(HUE)).cpu()
        expected = x
        for op in order:
            expected = torch.stack(
                [TORCHVISION[op](expected[i], amounts[op, i].item()) for i in range(n)]
            )
        torch.testing.assert_close(jittered, expected, atol=1e-5, rtol=0)
        seen.append(jittered)
    apart = torch.pdist(torch.stack(seen).flatten(1))
    assert apart.min() > 0.1  # the order matters, so that the comparison above can fail


def test_each_image_has_its_own_order_of_the_blends():
    orders = torch.tensor(list(itertools.permutations(range(3)))).T  # 3×6
    x = images(1).repeat(6, 1, 1, 1)
    factors = torch.tensor([[0.6], [1.4], [0.2]]).expand(3, 6)
    together = augment.color_jitter(x.clone(), factors, torch.zeros(6), orders, 0)
    for n in range(6):
        one = slice(n, n + 1)
        alone = augment.color_jitter(
            x[:1].clone(), factors[:, one], torch.zeros(1), orders[:, one], 0
        )
        torch.testing.assert_close(together[one], alone, atol=1e-6, rtol=0)
    assert torch.pdist(together.flatten(1)).max() > 0.1


def test_grayscale_equals_torchvisions():
    x = images()
    expected = tvf.rgb_to_grayscale(x, num_output_channels=3)
    torch.testing.assert_close(augment.grayscale(x).expand_as(x), expected, atol=1e-6, rtol=0)


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
    boxes = augment.sample_boxes(torch.Size((n, 3, 32, 32)), draw(n, 0, 0)[augment.BOX], SCALE)
    ours = torch.stack(boxes)
    for mine, reference in zip(ours, theirs, strict=True):
        assert distance(mine, reference) < 0.02  # 0.02 is seen once in a thousand at n = 20,000
    area, ratio = ours[2] * ours[3] / 1024, ours[3] / ours[2]
    assert distance(area, theirs[2] * theirs[3] / 1024) < 0.02
    assert distance(ratio, theirs[3] / theirs[2]) < 0.02
    assert area.min() >= 0.06 and ratio.min() > 0.6 and ratio.max() < 1.6


@pytest.mark.parametrize(("height", "width"), [(10, 60), (60, 10), (32, 32)])
def test_a_box_that_never_fits_falls_back_as_in_torchvision(height, width):
    u = torch.full((22, 1), 0.999)  # area and ratio at their largest: wider than the image
    shape = torch.Size((1, 3, height, width))
    box = [t.item() for t in augment.sample_boxes(shape, u, [1.0, 1.0])]
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
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    image = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")  # smooth
    image = (image * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1)).round(decimals=3)
    torch.manual_seed(0)
    theirs = their_views(image[0], n)
    ours = views(image.repeat(n, 1, 1, 1), 16)
    error = 5 * theirs.std(dim=0) / n**0.5 * 2**0.5  # 5 σ of the difference of two means
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() <= error).all()
    corners = [v[:, :, ::5, ::5].reshape(n, -1) for v in (ours, theirs)]  # 3 × 4 × 4 values
    ours_cov, theirs_cov = (v.T.cov() for v in corners)
    largest = (ours_cov - theirs_cov).abs().max() / theirs_cov.diagonal().mean()
    assert largest < 0.25  # of two sets of torchvision's own views it is 0.13 to 0.21
    assert abs(ours_cov.diagonal().mean() / theirs_cov.diagonal().mean() - 1) < 0.05
    gray = [(v.amax(dim=1) - v.amin(dim=1)).amax(dim=(1, 2)) < 1e-6 for v in (ours, theirs)]
    assert abs(gray[0].float().mean() - 0.2) < 0.04
    assert abs(gray[1].float().mean() - 0.2) < 0.04


def test_color_orders_and_amounts_are_drawn_for_each_image(monkeypatch):
    jitters = []  # the place of the hue, factors, shift and order of each view

    def record(x, factors, shift, order, hue_place):
        columns = zip(factors.T.tolist(), shift.tolist(), order.T.tolist(), strict=True)
        jitters.extend((hue_place, *column) for column in columns)
        return x

    monkeypatch.setattr(augment, "color_jitter", record)
    for step in range(20):
        views(images(120, 8, 8), 8, step)
    orders = Counter()
    for hue_place, _, _, blends in jitters:
        orders[(*blends[:hue_place], HUE, *blends[hue_place:])] += 1
    assert len(orders) == 24 and min(orders.values()) > 60 and max(orders.values()) < 140  # of 100
    factors = torch.tensor([factors for _, factors, _, _ in jitters])
    shift = torch.tensor([shift for _, _, shift, _ in jitters])
    assert factors.amin(0).tolist() == pytest.approx([0.6] * 3, abs=0.01)
    assert factors.amax(0).tolist() == pytest.approx([1.4] * 3, abs=0.01)
    assert (shift.min().item(), shift.max().item()) == pytest.approx((-0.1, 0.1), abs=0.01)
    correlation = torch.cat([factors, shift[:, None]], dim=1).T.corrcoef() - torch.eye(4)
    one = (factors == 1).all(dim=1)  # not jittered at all: these alone are equal in all four
    assert one.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert correlation.abs().max() < 0.1


@pytest.fixture
def hue_places(monkeypatch):
    """hue_places(n, step): where in the order the hue of each of n views was, read off them."""

    def read(n, step):
        with monkeypatch.context() as patch:
            patch.setattr(augment, "random_crop_flip", lambda images, *arguments: images)
            patch.setattr(
                augment, "color_jitter", lambda x, f, s, o, hue_place: torch.full_like(x, hue_place)
            )
            found = views(images(n, 8, 8), 8, step)
        return found.mean(dim=(1, 2, 3)).round().int().tolist()  # the luma sums to 0.9999

    return read


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 9])
def test_the_place_of_the_hue_is_uniform_for_each_image_of_any_batch(hue_places, n):
    repeats, places = 400, Counter()
    for step in range(repeats):
        places.update(enumerate(hue_places(n, step)))
    assert len(places) == 4 * n
    assert list(places.values()) == pytest.approx([repeats / 4] * (4 * n), abs=45)  # 5 σ


@pytest.mark.parametrize("row", range(augment.ROWS))
def test_a_random_number_of_one_view_does_not_reach_the_other_view_of_its_image(row):
    """Other numbers in this row, for the second views alone: these change, the first ones do not.

    View i takes its crop from try i mod 10 for a box; those before it do not fit.
    """
    n, cfg = 64, replace(CONFIG, blur_probability=0.5)
    x = images(n, 24, 24).repeat(2, 1, 1, 1)
    u, others = draw(2 * n, 0, row), draw(2 * n, 1, row)
    tries = torch.arange(augment.CROP_TRIES)[:, None]
    early = tries < torch.arange(2 * n) % augment.CROP_TRIES
    area, ratio = u[: augment.CROP_TRIES], u[augment.CROP_TRIES : 2 * augment.CROP_TRIES]
    area[early] = ratio[early] = 0.999
    before = augment.random_views(x, u, 24, cfg)
    for changed, same in ((slice(n, None), slice(n)), (slice(n), slice(n, None))):
        other = u.clone()
        other[row, changed] = others[row, changed]
        after = augment.random_views(x, other, 24, cfg)
        assert torch.equal(before[same], after[same])
        assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("n", [1, 5, 4000])
def test_probabilities_of_flip_jitter_and_grayscale_and_each_view_in_its_place(n):
    x, u = images(n, 8, 8), draw(n, 0, 0)
    none = {"flip_probability": 0, "color_strength": 0, "grayscale_probability": 0}
    cfg = replace(CONFIG, crop_scale=[0.999999, 1.0], **none)
    box = augment.sample_boxes(x.shape, u[augment.BOX], cfg.crop_scale)
    plain = augment.crop_flip(x, box, torch.zeros(n, dtype=torch.bool), 8)

    def share_changed(**settings):
        found = augment.random_views(x, u, 8, replace(cfg, **settings))
        return ((found - plain).abs().amax(dim=(1, 2, 3)) > 1e-4).float().mean().item()

    assert share_changed() == 0
    if n == 4000:
        assert share_changed(flip_probability=0.5) == pytest.approx(0.5, abs=0.03)
        assert share_changed(color_strength=0.5) == pytest.approx(0.8, abs=0.03)
        assert share_changed(grayscale_probability=0.2) == pytest.approx(0.2, abs=0.03)


def blurred(x: torch.Tensor, sigma: torch.Tensor, kernel: int) -> torch.Tensor:
    """torchvision's blur, image by image."""
    pairs = zip(x, sigma.tolist(), strict=True)
    return torch.stack([tvf.gaussian_blur(image, [kernel, kernel], [s, s]) for image, s in pairs])


@pytest.mark.parametrize(
    ("size", "kernel"), [(8, 1), (20, 3), (32, 3), (45, 5), (64, 7), (96, 9), (224, 23)]
)
def test_blur_equals_torchvisions_with_a_kernel_of_a_tenth_of_the_side(size, kernel):
    """σ of each image of its own; noise up to the borders, where torchvision reflects."""
    x, sigma = images(5, size, size), torch.tensor([0.1, 0.4, 0.9, 1.5, 2.0])
    before = x.clone()
    found = augment.gaussian_blur(x, sigma)
    torch.testing.assert_close(found, blurred(x, sigma, kernel), atol=5e-6, rtol=0)
    assert torch.equal(x, before) and found.min() >= 0 and found.max() <= 1
    assert size < 20 or (found[4] - x[4]).abs().max() > 0.1  # so that the comparison can fail


def test_blur_on_a_gpu_is_in_float32_too(gpu):
    x, sigma = images(64, 224, 224), torch.linspace(0.1, 2, 64)
    found = augment.gaussian_blur(x.to(gpu), sigma.to(gpu)).cpu()
    torch.testing.assert_close(found, blurred(x, sigma, 23), atol=1e-5, rtol=0)  # TF32: 1e-3


def test_sigma_is_uniform_and_the_other_images_stay_as_they_are(monkeypatch):
    n, seen = 20_000, []
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, sigma: seen.append(sigma))
    augment.random_blur(torch.zeros(n, 3, 1, 1), draw(n, 0, 0)[augment.BLUR], 0.3)
    chosen = seen[0] >= 0.1
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.015)  # 5 σ
    assert kstest(seen[0][chosen].numpy(), uniform(0.1, 1.9).cdf).pvalue > 1e-3
    monkeypatch.undo()
    x = images(8)
    found = augment.random_blur(x, torch.stack([torch.arange(8) / 8, torch.ones(8)]), 0.5)
    changed = [not torch.equal(*pair) for pair in zip(found, x, strict=True)]
    assert changed == [True] * 4 + [False] * 4


def test_blur_is_the_last_operation_and_changes_no_other():
    x, u = images(10, 40, 40), draw(10, 0, 0)
    u[augment.BLUR.start] = torch.tensor([0.9, 0.0]).repeat(5)  # every second view is blurred
    plain = augment.random_views(x, u, 32, CONFIG)
    found = augment.random_views(x, u, 32, replace(CONFIG, blur_probability=0.5))
    sigma = 0.1 + 1.9 * u[augment.BLUR.start + 1]
    assert torch.equal(found[::2], plain[::2])
    expected = blurred(plain[1::2], sigma[1::2], 3)
    torch.testing.assert_close(found[1::2], expected, atol=5e-6, rtol=0)
    assert (found[1::2] - plain[1::2]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_images_and_drawn_numbers_are_left_as_they_are():
    for x in (images(5), torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)):
        u = draw(5, 0, 0)
        before = x.clone(), u.clone()
        augment.random_views(x, u, 8, CONFIG)
        assert torch.equal(x, before[0]) and torch.equal(u, before[1])


def test_views_on_a_gpu_are_those_of_a_cpu(gpu):
    x, u = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8), draw(256, 0, 0)
    cfg = replace(CONFIG, blur_probability=0.5)
    for size in (20, 24, 32):
        found = augment.random_views(x.to(gpu), u.to(gpu), size, cfg).cpu()
        expected = augment.random_views(x, u, size, cfg)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_one_graph_without_breaks_gives_the_same_views():
    """What torch.compile takes, less the code generation: no data-dependent control flow."""
    x, u = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8), draw(10, 0, 0)
    cfg = replace(CONFIG, blur_probability=0.5)
    compiled = torch.compile(augment.random_views, backend="aot_eager", fullgraph=True)
    expected = augment.random_views(x, u, 24, cfg)
    torch.testing.assert_close(compiled(x, u, 24, cfg), expected)
