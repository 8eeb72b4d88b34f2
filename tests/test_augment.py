"""The batched augmentations against torchvision's own, per operation and in distribution."""

import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import functional as tvf
from torchvision.transforms import v2

import simclr
from images import augment

SCALE = (0.08, 1.0)


def images(n: int = 8, height: int = 32, width: int = 32) -> torch.Tensor:
    """Smooth colours with noise: as many different hues as pixels, some pixels gray."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, height, width, generator=rng)
    x[:, :, 0] = x[:, :1, 0]  # a row of grays: no hue
    x[:, :, 1] = (x[:, :, 1] > 0.5).float()  # a row of saturated colours, black and white
    return x


def views(x: torch.Tensor, size: int, rng: torch.Generator) -> torch.Tensor:
    """Random views with the default settings."""
    return augment.random_views(x, augment.draw(len(x), rng), size, SCALE, 0.5, 0.5, 0.2)


def per_image(n: int, low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, n)


@pytest.mark.parametrize("size", [12, 32, 40])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_crop_and_flip_equal_torchvisions_for_the_same_box(device, size, height, width):
    x = images(64, height, width)
    u = augment.draw(64, torch.Generator().manual_seed(1))
    boxes = augment.sample_boxes(x.shape, u[augment.BOX], SCALE)
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
    amounts = torch.stack([per_image(n, 0.6, 1.4), per_image(n, 1.4, 0.6), per_image(n, 0.2, 1.8),
                           per_image(n, -0.5, 0.5)])  # fmt: skip
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
        alone = augment.color_jitter(
            x[:1].clone(), factors[:, :1], torch.zeros(1), orders[:, n : n + 1], 0
        )
        torch.testing.assert_close(together[n : n + 1], alone, atol=1e-6, rtol=0)
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
    u = augment.draw(n, torch.Generator().manual_seed(0))
    shape = torch.Size((n, 3, 32, 32))
    ours = torch.stack(augment.sample_boxes(shape, u[augment.BOX], SCALE))
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
    box = [t.item() for t in augment.sample_boxes(shape, u, (1.0, 1.0))]
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
    ours = views(image.repeat(n, 1, 1, 1), 16, rng)
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
    flat = views(x, 32, torch.Generator().manual_seed(0)).flatten(1)
    apart = torch.cdist(flat, flat).fill_diagonal_(1)
    assert apart.min() > 1e-3  # no two of 64 views of one image are the same


@pytest.fixture
def jitters(monkeypatch):
    """What `color_jitter` is asked to do: by the image's number, its parameters."""
    seen = []

    def record(x, factors, shift, order, hue_place):
        numbers = (x[:, 0, 0, 0] * 255).round().int().tolist()
        columns = zip(factors.T.tolist(), shift.tolist(), order.T.tolist(), strict=True)
        seen.extend((n, hue_place, *column) for n, column in zip(numbers, columns, strict=True))
        return x

    monkeypatch.setattr(augment, "color_jitter", record)
    return seen


def numbered(n: int, side: int = 8) -> torch.Tensor:
    """n images, each of one gray, which tells which it is."""
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, side, side)


def test_color_orders_and_amounts_are_drawn_for_each_image(jitters):
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        views(numbered(120), 8, rng)
    orders = Counter()
    for _, hue_place, _, _, blends in jitters:
        orders[(*blends[:hue_place], HUE, *blends[hue_place:])] += 1
    assert len(orders) == 24 and min(orders.values()) > 60 and max(orders.values()) < 140  # of 100
    factors = torch.tensor([factors for _, _, factors, _, _ in jitters])
    shift = torch.tensor([shift for _, _, _, shift, _ in jitters])
    assert factors.amin(0).tolist() == pytest.approx([0.6] * 3, abs=0.01)
    assert factors.amax(0).tolist() == pytest.approx([1.4] * 3, abs=0.01)
    assert (shift.min().item(), shift.max().item()) == pytest.approx((-0.1, 0.1), abs=0.01)
    correlation = torch.cat([factors, shift[:, None]], dim=1).T.corrcoef() - torch.eye(4)
    one = (factors == 1).all(dim=1)  # not jittered at all: these alone are equal in all four
    assert one.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert correlation.abs().max() < 0.1


@pytest.fixture
def hue_places(monkeypatch):
    """hue_places(n, rng): where in the order the hue of each of n views was, read off the views."""

    def read(n, rng):
        with monkeypatch.context() as patch:
            patch.setattr(augment, "random_crop_flip", lambda images, *arguments: images)
            patch.setattr(
                augment, "color_jitter", lambda x, f, s, o, hue_place: torch.full_like(x, hue_place)
            )
            found = views(images(n, 8, 8), 8, rng)
        return found.mean(dim=(1, 2, 3)).round().int().tolist()  # the luma sums to 0.9999

    return read


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 9])
def test_the_place_of_the_hue_is_uniform_for_each_image_of_any_batch(hue_places, n):
    rng = torch.Generator().manual_seed(0)
    repeats = 400
    places = Counter((i, p) for _ in range(repeats) for i, p in enumerate(hue_places(n, rng)))
    assert len(places) == 4 * n
    assert list(places.values()) == pytest.approx([repeats / 4] * (4 * n), abs=45)  # 5 σ


def test_the_place_of_the_hue_in_both_views_of_an_image_is_independent(hue_places):
    rng = torch.Generator().manual_seed(0)
    pairs = Counter()
    for _ in range(200):
        places = hue_places(16, rng)
        pairs.update(zip(places[:8], places[8:], strict=True))
    assert len(pairs) == 16 and max(pairs.values()) < 150 and min(pairs.values()) > 55  # of 100


@pytest.fixture
def pretraining_views(toy, thin, monkeypatch):
    """What simclr.train hands to random_views in 20 steps of 120 images: u, and the parameters.

    A list with u (36, 240) of each step, and one with the parameters of its 240 views by name, as
    the operations get them. Steps of the model are left out.
    """
    drawn, parameters = [], []
    crop_flip = augment.crop_flip

    def note(x, **values):
        numbers = (x[:, 0, 0, 0].float() * (1 if x.dtype == torch.uint8 else 255)).round().long()
        for name, value in values.items():
            parameters[-1].setdefault(name, torch.full((240,), torch.nan))[numbers] = value.float()

    def noted_crop_flip(x, boxes, flip, size):
        top, left, height, width = boxes
        note(x, top=top, left=left, height=height, width=width, flip=flip)
        return crop_flip(x, boxes, flip, size)

    def noted_color_jitter(x, factors, shift, order, hue_place):
        note(x, jitter=factors[0] != 1, shift=shift, hue_place=torch.full_like(shift, hue_place))
        for blend, factor, place in zip("bcs", factors, order, strict=True):
            note(x, **{f"factor {blend}": factor, f"order {blend}": place})
        return torch.cat([x[:, :1], 1 - x[:, :1], x[:, :1]], dim=1)  # gray only if made so

    def make_views(x, u, size, *settings):
        assert torch.equal(*x.chunk(2))  # columns i and N+i are the views of one image
        drawn.append(u.clone())
        parameters.append({})
        views = augment.random_views(numbered(240, side=32), u, size, *settings)
        parameters[-1]["gray"] = (views[:, 0] - views[:, 1]).abs().amax(dim=(1, 2)) < 1e-3
        return views

    class Record:
        def log_step(self, *arguments):
            pass

        def end_epoch(self, training, *arguments):
            training.end_epoch({})

    cfg = toy("batch_size=120", "epochs=20", "image_size=32", "compile=false")
    training = simclr.start_training(cfg, torch.device("cpu"), 20)
    training.make_views = make_views
    with monkeypatch.context() as patch:
        patch.setattr(augment, "crop_flip", noted_crop_flip)
        patch.setattr(augment, "color_jitter", noted_color_jitter)
        patch.setattr(simclr, "train_step", lambda *arguments: {"loss": torch.zeros(())})
        simclr.train(cfg, training, torch.zeros(120, 3, 32, 32, dtype=torch.uint8), None, Record())
    return drawn, parameters


def dependent(pairs):
    """The names of quantities that differ too rarely, or correlate, between first and second.

    pairs: by name, the values in the first views and in the second ones, 2,400 each.
    """
    found = []
    for name, (first, second) in pairs.items():
        assert len(first) == len(second) == 2400 and first.std() > 0 and first.isfinite().all()
        if torch.stack([first, second]).corrcoef()[0, 1].abs() > 0.1:  # 5 σ
            found.append(name)
    return found


def test_every_random_number_of_the_two_views_of_an_image_is_another(pretraining_views):
    drawn, _ = pretraining_views
    assert len(drawn) == 20 and all(u.shape == (36, 240) for u in drawn)
    first, second = torch.cat([u.unflatten(1, (2, 120)) for u in drawn], dim=2).unbind(1)
    assert (first == second).float().mean(dim=1).max() < 0.01
    assert dependent({row: (first[row], second[row]) for row in range(36)}) == []


def test_every_parameter_of_the_two_views_of_an_image_is_independent(pretraining_views):
    _, parameters = pretraining_views
    names = set(parameters[0])
    assert names == {
        "top", "left", "height", "width", "flip", "jitter", "factor b", "factor c", "factor s",
        "shift", "order b", "order c", "order s", "hue_place", "gray",
    }  # fmt: skip
    pairs = {
        name: torch.cat([step[name].float().unflatten(0, (2, 120)) for step in parameters], dim=1)
        for name in names
    }
    assert dependent(pairs) == []


@pytest.mark.parametrize("row", range(augment.HUE_PLACE.stop))
def test_a_random_number_of_one_view_does_not_reach_the_other_view_of_its_image(row):
    """Other numbers in this row, for the second views alone: these change, the first ones do not.

    View i takes its crop from try i mod 10 for a box; those before it do not fit.
    """
    n, rng = 64, torch.Generator().manual_seed(row)
    x = images(n, 16, 16).repeat(2, 1, 1, 1)
    u = augment.draw(2 * n, rng)
    tries = torch.arange(augment.CROP_TRIES)[:, None]
    early = tries < torch.arange(2 * n) % augment.CROP_TRIES
    area, ratio = u[: augment.CROP_TRIES], u[augment.CROP_TRIES : 2 * augment.CROP_TRIES]
    area[early] = ratio[early] = 0.999
    other = u.clone()
    other[row, n:] = torch.rand(n, generator=rng)
    before, after = (augment.random_views(x, v, 16, SCALE, 0.5, 0.5, 0.2) for v in (u, other))
    assert torch.equal(before[:n], after[:n])
    assert not torch.equal(before[n:], after[n:])
    other = u.clone()
    other[row, :n] = torch.rand(n, generator=rng)
    after = augment.random_views(x, other, 16, SCALE, 0.5, 0.5, 0.2)
    assert torch.equal(before[n:], after[n:]) and not torch.equal(before[:n], after[:n])


@pytest.mark.parametrize("n", [1, 5, 4000])
def test_probabilities_of_flip_jitter_and_grayscale_and_each_view_in_its_place(n):
    x = images(n, 8, 8)
    whole = (0.999999, 1.0)

    def share_changed(flip=0.0, strength=0.0, gray=0.0):
        u = augment.draw(n, torch.Generator().manual_seed(0))
        found = augment.random_views(x, u, 8, whole, flip, strength, gray)
        box = augment.sample_boxes(x.shape, u[augment.BOX], whole)
        plain = augment.crop_flip(x, box, torch.zeros(n, dtype=torch.bool), 8)
        return ((found - plain).abs().amax(dim=(1, 2, 3)) > 1e-4).float().mean().item()

    assert share_changed() == 0
    if n == 4000:
        assert share_changed(flip=0.5) == pytest.approx(0.5, abs=0.03)
        assert share_changed(strength=0.5) == pytest.approx(0.8, abs=0.03)
        assert share_changed(gray=0.2) == pytest.approx(0.2, abs=0.03)


def test_values_stay_in_range_and_follow_from_the_seed():
    x = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)
    found, again = (views(x, 24, torch.Generator().manual_seed(7)) for _ in range(2))
    assert found.shape == (128, 3, 24, 24) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(found, again)


def test_images_and_drawn_numbers_are_left_as_they_are():
    for x in (images(5), torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)):
        u = augment.draw(5, torch.Generator().manual_seed(0))
        before = x.clone(), u.clone()
        augment.random_views(x, u, 8, SCALE, 0.5, 0.5, 0.2)
        assert torch.equal(x, before[0]) and torch.equal(u, before[1])


def test_views_on_a_gpu_are_those_of_a_cpu(gpu):
    x = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    u = augment.draw(256, torch.Generator().manual_seed(0), blur=True)
    for size in (16, 24, 32):
        settings = size, SCALE, 0.5, 0.5, 0.2, 0.5
        found, expected = (augment.random_views(x.to(d), u.to(d), *settings) for d in (gpu, "cpu"))
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)


def test_one_graph_without_breaks_gives_the_same_views():
    """What torch.compile takes, less the code generation: no data-dependent control flow."""
    x = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    u = augment.draw(10, torch.Generator().manual_seed(0))
    compiled = torch.compile(augment.random_views, backend="aot_eager", fullgraph=True)
    settings = (24, SCALE, 0.5, 0.5, 0.2)
    torch.testing.assert_close(compiled(x, u, *settings), augment.random_views(x, u, *settings))
