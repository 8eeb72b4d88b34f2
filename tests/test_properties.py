"""What holds for any input, searched for by hypothesis: augmentations, loss, config."""

import copy
import math
import os
from dataclasses import asdict, replace

import pytest
import torch
from conftest import make_config
from hydra import compose, initialize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from config import Config, ConfigError, keys
from images.augment import draw, random_crop_flip, random_views, sample_boxes
from models import nt_xent
from system.commandline import register_config, to_config
from system.errors import describe

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")

CONFIG = make_config()
shares = st.floats(0, 1)
seeds = st.integers(0, 2**32 - 1)
crop_scales = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted)
augmentations = st.builds(
    replace, st.just(CONFIG), crop_scale=crop_scales, flip_probability=shares,
    color_strength=st.floats(0, 2.5), grayscale_probability=shares, blur_probability=shares,
)  # fmt: skip


@st.composite
def pictures(draw_from):
    """Images (N, 3, H, W), uint8, of any small size; few shades, so that gray and black occur."""
    n, height, width = (draw_from(st.integers(1, high)) for high in (9, 20, 20))
    seed, shades = draw_from(st.integers(0, 2**31)), draw_from(st.sampled_from([1, 2, 256]))
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, shades, (n, 3, height, width), generator=rng)
    return (pixels * (255 // max(1, shades - 1))).to(torch.uint8)


@given(pictures(), seeds, st.integers(1, 24), augmentations)
def test_views_are_finite_in_range_and_each_image_s_own(x, seed, size, cfg):
    u = draw(len(x), seed, step=0)
    views = random_views(x, u, size, cfg)
    assert views.shape == (len(x), 3, size, size) and views.dtype == torch.float32
    assert views.isfinite().all() and views.min() >= 0 and views.max() <= 1 + 1e-6
    other = x.clone()
    other[1:] = 255 - other[1:]  # what the other images are is of no concern to the first
    torch.testing.assert_close(views[0], random_views(other, u, size, cfg)[0])


@given(st.integers(1, 40), st.integers(1, 40), seeds, crop_scales)
def test_boxes_lie_within_the_image_and_are_not_empty(height, width, seed, scale):
    u = draw(50, seed, step=0)[:22]
    top, left, h, w = sample_boxes(torch.Size((50, 3, height, width)), u, scale)
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@given(pictures(), seeds, st.integers(1, 24), augmentations)
def test_a_flip_mirrors_and_an_even_image_stays_even(x, seed, size, cfg):
    u = draw(len(x), seed, step=0)
    plain = random_crop_flip(x, u, size, replace(cfg, flip_probability=0.0))
    flipped = random_crop_flip(x, u, size, replace(cfg, flip_probability=1.0))
    torch.testing.assert_close(plain.flip(-1), flipped)
    crop = random_crop_flip(torch.full_like(x, 77), u, size, cfg)
    torch.testing.assert_close(crop, torch.full_like(crop, 77 / 255))


@st.composite
def embeddings(draw_from):
    """A pair (N, d) of any lengths, and a temperature."""
    n, d = draw_from(st.integers(1, 12)), draw_from(st.integers(1, 8))
    rng = torch.Generator().manual_seed(draw_from(st.integers(0, 2**31)))
    z = torch.randn(2, n, d, generator=rng)
    return z[0], z[1] * draw_from(st.floats(1e-3, 1e3)), draw_from(st.floats(0.02, 10))


@given(embeddings(), st.randoms(use_true_random=False))
def test_the_loss_is_bounded_and_does_not_see_order_length_or_rotation(pair, rng):
    """Between the loss of perfect and of opposite pairs: |sim| <= 1 bounds each term of Eq. 1."""
    z1, z2, temperature = pair
    loss, accuracy = nt_xent((z1, z2), temperature)
    n = len(z1)
    low = math.log1p((2 * n - 2) * math.exp(-2 / temperature))
    high = math.log1p((2 * n - 2) * math.exp(2 / temperature))
    assert low - 1e-4 <= loss.item() <= high * (1 + 1e-4) + 1e-4 and 0 <= accuracy <= 1
    order = torch.tensor(rng.sample(range(n), n))
    rotation = torch.linalg.qr(torch.randn(z1.shape[1], z1.shape[1]))[0]
    same = (z2, z1), (z1[order], z2[order]), (3 * z1, 0.5 * z2), (z1 @ rotation, z2 @ rotation)
    for a, b in same:
        found = nt_xent((a, b), temperature)[0].item()
        assert found == pytest.approx(loss.item(), rel=1e-3, abs=1e-4)


@given(embeddings())
def test_the_gradient_is_finite_and_a_step_along_it_lowers_the_loss(pair):
    z1, z2, temperature = pair
    z1 = z1.clone().requires_grad_()
    loss, _ = nt_xent((z1, z2), temperature)
    loss.backward()
    assert z1.grad.isfinite().all()
    norm = z1.grad.norm().item()
    if norm > 1e-3:
        step = z1.detach() - 1e-3 * z1.norm(dim=1).min().item() * temperature * z1.grad / norm
        assert nt_xent((step, z2), temperature)[0] <= loss + 1e-5


words = st.text(max_size=12) | st.sampled_from(
    ["auto", "cpu", "resnet18", "knn", "???", "${seed}", "${nosuch}", "${oc.env:X}", "${per_256:1}"]
)
numbers = st.booleans() | st.integers(-(2**40), 2**40) | st.floats()
values = st.recursive(
    st.none() | words | numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=2),
    max_leaves=6,
)

register_config()
with initialize(version_base="1.3", config_path=None):
    COMPOSED = compose("simclr_config")
FOLLOW = "learning_rate", "finetune_learning_rate", "min_learning_rate"  # another value


@settings(max_examples=400, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.sampled_from(sorted(keys(Config))), values)
def test_any_value_is_taken_as_it_is_or_refused_in_one_line(key, value):
    cfg = copy.deepcopy(COMPOSED)
    try:
        cfg[key] = value
        found = asdict(to_config(cfg))
    except (ConfigError, OmegaConfBaseException) as error:
        line, exit_code = describe(error)
        assert exit_code == 2 and "\n" not in line and key in line
        return
    except Exception as error:  # a text that is no interpolation, which OmegaConf's parser refuses
        assert type(error).__module__.startswith("antlr4"), error
        return
    if not (isinstance(value, str) and "${" in value):  # cfg[key]: what OmegaConf makes of "1"
        assert found[key] in (cfg[key], os.path.expanduser(str(cfg[key])))
    for name in keys(Config):
        assert name in (key, *FOLLOW) or found[name] == getattr(CONFIG, name)
