"""Gaussian blur against torchvision's, in distribution, and that without it nothing changes."""

import pytest
import torch
from matplotlib import pyplot
from scipy.stats import kstest, uniform
from torchvision.transforms.v2.functional import gaussian_blur

import simclr
from evaluation import figures
from images import augment

SETTINGS = (0.08, 1.0), 0.5, 0.5, 0.2


def noise(n, size):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def theirs(x, sigma, kernel):
    """torchvision's blur, image by image."""
    pairs = zip(x, sigma.tolist(), strict=True)
    return torch.stack([gaussian_blur(image, [kernel, kernel], [s, s]) for image, s in pairs])


@pytest.mark.parametrize(
    ("size", "kernel"), [(8, 1), (20, 3), (32, 3), (45, 5), (64, 7), (96, 9), (224, 23)]
)
def test_blur_equals_torchvisions_with_a_kernel_of_a_tenth_of_the_side(size, kernel):
    """σ of each image of its own; noise up to the borders, where torchvision reflects."""
    x, sigma = noise(5, size), torch.tensor([0.1, 0.4, 0.9, 1.5, 2.0])
    before = x.clone()
    found = augment.gaussian_blur(x, sigma)
    torch.testing.assert_close(found, theirs(x, sigma, kernel), atol=5e-6, rtol=0)
    assert torch.equal(x, before) and found.min() >= 0 and found.max() <= 1
    assert size < 20 or (found[4] - x[4]).abs().max() > 0.1  # so that the comparison can fail


def test_blur_on_a_gpu_is_in_float32_too(gpu):
    x, sigma = noise(64, 224), torch.linspace(0.1, 2, 64)
    found = augment.gaussian_blur(x.to(gpu), sigma.to(gpu)).cpu()
    torch.testing.assert_close(found, theirs(x, sigma, 23), atol=1e-5, rtol=0)  # TF32: 1e-3


def test_sigma_is_uniform_and_the_other_images_stay_as_they_are(monkeypatch):
    n = 20_000
    u = augment.draw(n, torch.Generator().manual_seed(0), blur=True)[augment.BLUR]
    seen = []
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, sigma: seen.append(sigma))
    augment.random_blur(torch.zeros(n, 3, 1, 1), u, 0.3)
    blurred = seen[0] >= 0.1
    assert blurred.float().mean().item() == pytest.approx(0.3, abs=0.015)  # 5 σ
    assert kstest(seen[0][blurred].numpy(), uniform(0.1, 1.9).cdf).pvalue > 1e-3
    monkeypatch.undo()
    x = noise(8, 32)
    found = augment.random_blur(x, torch.stack([torch.arange(8) / 8, torch.ones(8)]), 0.5)
    changed = [not torch.equal(*pair) for pair in zip(found, x, strict=True)]
    assert changed == [True] * 4 + [False] * 4


def test_blur_is_the_last_operation_and_changes_no_other():
    x = noise(10, 40)
    u = augment.draw(10, torch.Generator().manual_seed(0), blur=True)
    u[augment.BLUR.start, ::2] = 0.9  # these are not blurred
    plain = augment.random_views(x, u[:36], 32, *SETTINGS)
    found = augment.random_views(x, u, 32, *SETTINGS, 0.5)
    u[augment.BLUR.start, 1::2] = 0
    found[1::2] = augment.random_views(x, u, 32, *SETTINGS, 0.5)[1::2]
    sigma = 0.1 + 1.9 * u[augment.BLUR.start + 1]
    assert torch.equal(found[::2], plain[::2])
    expected = theirs(plain[1::2], sigma[1::2], 3)
    torch.testing.assert_close(found[1::2], expected, atol=5e-6, rtol=0)
    assert (found[1::2] - plain[1::2]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_without_blur_the_random_numbers_are_those_from_before_it_existed():
    rng, old = (torch.Generator().manual_seed(5) for _ in range(2))
    for n in (3, 8):
        assert torch.equal(augment.draw(n, rng), torch.rand((36, n), generator=old))
    assert torch.equal(rng.get_state(), old.get_state())
    assert augment.draw(8, rng, blur=True).shape == (38, 8)


@pytest.mark.parametrize("row", range(36, 38))
def test_a_random_number_of_one_view_does_not_reach_the_other_view_of_its_image(row):
    n, rng = 64, torch.Generator().manual_seed(row)
    u = augment.draw(2 * n, rng, blur=True)
    other = u.clone()
    other[row, n:] = torch.rand(n, generator=rng)
    x = noise(n, 24).repeat(2, 1, 1, 1)
    before, after = (augment.random_views(x, v, 24, *SETTINGS, 0.5) for v in (u, other))
    assert torch.equal(before[:n], after[:n]) and not torch.equal(before[n:], after[n:])


def test_one_graph_without_breaks_gives_the_same_views():
    x = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    u = augment.draw(10, torch.Generator().manual_seed(0), blur=True)
    compiled = torch.compile(augment.random_views, backend="aot_eager", fullgraph=True)
    settings = (24, *SETTINGS, 0.5)
    torch.testing.assert_close(compiled(x, u, *settings), augment.random_views(x, u, *settings))


@pytest.mark.parametrize(("probability", "rows"), [(0, 36), (0.5, 38)])
def test_pretraining_blurs_both_views_by_numbers_of_their_own(
    toy, thin, tmp_path, monkeypatch, probability, rows
):
    seen = []
    views = simclr.random_views

    def record(images, u, *settings):
        seen.append((u, settings[-1]))
        return views(images, u, *settings)

    monkeypatch.setattr(simclr, "random_views", record)
    cfg = toy(f"blur_probability={probability}", "image_size=20", "epochs=4", "knn_interval=0")
    simclr.pretrain(cfg, tmp_path)
    assert len(seen) == 4 * 3 and all(u.shape == (rows, 16) for u, _ in seen)
    assert {settings for _, settings in seen} == {probability}
    numbers = torch.cat([u for u, _ in seen], dim=1)
    assert len(numbers.flatten().unique()) > 0.99 * numbers.numel()  # none is used twice


def test_the_picture_of_the_views_is_blurred_too(toy):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    plain = "crop_scale=[1,1]", "flip_probability=0", "color_strength=0", "grayscale_probability=0"
    figure = figures.plot_views(toy(*plain, "image_size=32", "blur_probability=1"), images)
    grid = [axis.images[0].get_array() for axis in figure.axes]
    pyplot.close(figure)
    for row in range(3):
        original, *views = (picture.std() for picture in grid[9 * row : 9 * row + 9])
        assert min(views) < 0.6 * original and max(views) < original + 1e-6
