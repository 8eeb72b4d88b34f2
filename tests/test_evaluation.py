"""The frozen encoder, its features, kNN against scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation import features
from evaluation.features import (
    accuracy,
    clean_features,
    crop_features,
    effective_rank,
    extract_features,
    frozen,
    held_out_knn,
    knn_scores,
    sample_rank,
)
from images.datasets import Probe, Split, load_split, resize
from models import SimCLR


def encoder():
    torch.manual_seed(0)
    return SimCLR(projection_dim=2, hidden_dim=2).enc


def noise(n):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=rng)


def test_frozen_gives_no_gradient_and_is_silent_when_nothing_moves():
    enc = encoder().train()
    with frozen(enc):
        assert not enc.training and not enc(torch.rand(2, 3, 8, 8)).requires_grad


def test_features_are_of_every_image_in_order_and_do_not_depend_on_the_batch(toy):
    enc, images = encoder().eval(), noise(7)
    whole = clean_features(enc, images, toy("batch_size=7", "precision=fp32"))
    parts = clean_features(enc, images, toy("batch_size=3", "precision=fp32"))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, enc(images / 255))
    assert whole.shape == (7, 512) and not whole.requires_grad


def test_mixed_precision_barely_changes_the_features(thin, config):
    """bfloat16 has 8 bits: an error of some 0.4 % in each of 128 numbers, and no other neighbours
    to speak of. A trained encoder's are further apart than those of this random one."""
    enc = encoder().eval()
    digits = load_split(config("dataset=digits"), "test")
    x, labels = resize(digits.images[:200], 8), digits.labels[:200]
    exact, mixed = (extract_features(enc, [x], name) for name in ("fp32", "bf16"))
    assert exact.dtype == torch.float32 and mixed.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(exact, mixed.float())
    assert cosine.min() > 0.9995
    votes = [knn_scores(h[:100], labels[:100], h[100:], 10) for h in (exact, mixed)]
    found = [accuracy(scores, labels[100:]) for scores in votes]
    assert found[0] > 0.4 and abs(found[0] - found[1]) <= 0.03


def test_crops_and_flips_are_new_in_every_view_and_follow_from_the_seed(toy):
    enc, images = torch.nn.Flatten(), noise(5)

    def crops(*overrides, views=3):
        cfg = toy("precision=fp32", "crop_scale=[0.2,0.9]", "batch_size=2", *overrides)
        return crop_features(enc, images, cfg, views)

    views = crops()
    assert views.shape == (3, 5, 3 * 8 * 8)
    assert torch.equal(views, crops("batch_size=5")) and not torch.equal(views, crops("seed=1"))
    assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    square = "crop_scale=[1,1]"  # no box of the whole image's area but the image itself
    [upright], [flipped] = (crops(square, f"flip_probability={p}", views=1) for p in (0, 1))
    assert torch.allclose(flipped.view(5, 3, 8, 8).flip(-1), upright.view(5, 3, 8, 8), atol=1e-6)
    assert torch.allclose(upright.view(5, 3, 8, 8), images / 255, atol=1e-5)


def random_bank():
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(2, 300, 8, generator=rng)
    bank = bank * torch.rand(300, 1, generator=rng)  # lengths must not matter
    return bank, torch.randint(0, 7, (300,), generator=rng), queries


@pytest.mark.parametrize("k", [1, 10])
def test_knn_is_scikit_learns_cosine_knn(k):
    bank, labels, queries = random_bank()
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(bank, labels)
    votes = knn_scores(bank, labels, queries, 7, k=k)
    assert votes.argmax(dim=1).tolist() == reference.predict(queries).tolist()
    expected = torch.from_numpy(reference.predict(queries))
    assert accuracy(votes, expected) == 1  # a tie of votes goes to the smallest class
    assert knn_scores(bank, labels, queries, 7).sum(dim=1).unique().tolist() == [10]  # the default


def test_weighted_knn_is_wu_et_als():
    """Sec. 3.4: each of the k neighbours votes with exp(cosine / τ)."""
    bank, labels, queries = random_bank()
    reference = KNeighborsClassifier(
        200, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank.double(), labels)
    votes = knn_scores(bank, labels, queries, 7, k=200, temperature=0.07)
    shares = (votes / votes.sum(dim=1, keepdim=True)).double()
    expected = torch.from_numpy(reference.predict_proba(queries.double()))
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-4)


def test_knn_with_a_bank_smaller_than_k_and_queries_in_several_parts(monkeypatch):
    bank, labels = torch.eye(3), torch.arange(3)
    assert accuracy(knn_scores(bank[:1], labels[:1], bank, 3), labels) == pytest.approx(1 / 3)
    monkeypatch.setattr(features, "SIMILARITIES", 3000)
    queries = bank.repeat(700, 1)  # 2,100: three parts
    assert accuracy(knn_scores(bank, labels, queries, 3, k=1), labels.repeat(700)) == 1


def test_accuracy_is_of_the_first_largest_score():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 3.0, 3.0], [1.0, 3.0, 3.0]])
    assert accuracy(scores, torch.tensor([0, 1, 1, 2])) == 0.5


def probe_of(images):
    split = Split(images, torch.arange(len(images)) % 3, ["a", "b", "c"])
    return Probe(images, split, torch.arange(9), torch.arange(9, len(images)))


def test_knn_in_training_leaves_the_encoder_in_its_mode_and_its_statistics_alone(toy):
    enc, probe, checks = encoder().train(), probe_of(noise(12)), []
    before = {name: tensor.clone() for name, tensor in enc.state_dict().items()}
    cfg = toy("precision=fp32", "batch_size=5")
    found = held_out_knn(enc, probe, cfg, lambda: checks.append(enc.training))
    assert enc.training and checks == [False] * 3  # before each batch
    assert all(torch.equal(before[name], tensor) for name, tensor in enc.state_dict().items())
    h, labels = enc.eval()(probe.sample / 255), probe.labelled.labels
    assert found == accuracy(knn_scores(h[:9], labels[:9], h[9:], 3), labels[9:])


def test_features_that_are_not_finite_leave_knn_out_of_pretraining(toy, caplog):
    enc = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).train()
    torch.nn.init.constant_(enc[1].bias, torch.inf)
    probe = probe_of(noise(12))
    assert held_out_knn(enc, probe, toy("precision=fp32"), bool) is None
    assert sample_rank(enc, probe.sample, toy("precision=fp32")) is None
    assert enc.training and "no kNN: in eval" in caplog.text and "no rank: in eval" in caplog.text


def test_the_effective_rank_is_the_exponential_of_an_entropy_and_falls_in_a_collapse():
    """Directly, from the eigenvalues of hᵀh; k equal singular values have rank k."""
    h = torch.randn(60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h *= torch.arange(1, 9)
    values = torch.linalg.eigvalsh(h.T @ h).sqrt()
    p = (values / values.sum()).tolist()
    assert effective_rank(h) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-5)
    assert effective_rank(5 * torch.eye(9, 6)) == pytest.approx(6)
    assert effective_rank(torch.eye(9, 6).bfloat16()[:, :3]) == pytest.approx(3)
    one, noise = torch.ones(60, 8), 1e-3 * h.float()
    assert effective_rank(one + noise) < 1.1 and effective_rank(torch.zeros(5, 3)) == 1
