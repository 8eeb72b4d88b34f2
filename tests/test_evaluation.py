"""The frozen encoder, its features, kNN against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation import features
from evaluation.features import (
    accuracy,
    clean_features,
    crop_features,
    extract_features,
    frozen,
    held_out_knn,
    knn_scores,
    top_k_accuracy,
)
from images.datasets import Split, load_split, resize
from models import SimCLR


def encoder():
    return SimCLR(projection_dim=2, hidden_dim=2).enc


def test_frozen_catches_batch_norm_in_train_mode():
    enc = encoder()
    with pytest.raises(RuntimeError, match=r"changed:.*bn1\.running_mean"), frozen(enc):
        enc.train()
        with torch.no_grad():
            enc(torch.rand(4, 3, 8, 8))


def test_frozen_catches_a_step_on_the_encoder():
    enc = encoder()
    with pytest.raises(RuntimeError, match=r"changed:.*conv1\.weight"), frozen(enc):
        enc.requires_grad_(True)
        enc(torch.rand(4, 3, 8, 8)).sum().backward()
        torch.optim.SGD(enc.parameters(), lr=0.1).step()


def test_frozen_gives_no_gradient_and_is_silent_when_nothing_moves():
    enc = encoder().train()
    with frozen(enc):
        assert not enc.training and not enc(torch.rand(2, 3, 8, 8)).requires_grad


def test_features_are_of_every_image_in_order_and_do_not_depend_on_the_batch():
    enc = encoder().eval()
    x = torch.rand(7, 3, 8, 8)
    features = extract_features(enc, x.split(3), torch.float32)
    torch.testing.assert_close(features, extract_features(enc, [x], torch.float32))
    assert features.shape == (7, 512) and not features.requires_grad


def test_mixed_precision_barely_changes_the_features():
    """bfloat16 has 8 bits: an error of some 0.4 % in each of 512 numbers, and no other neighbours
    to speak of. A trained encoder's are further apart than those of this random one."""
    torch.manual_seed(0)
    enc = encoder().eval()
    digits = load_split("digits", "", "test", 16)
    x = resize(digits.images, 16)
    exact, mixed = (extract_features(enc, [x], t) for t in (torch.float32, torch.bfloat16))
    assert exact.dtype == torch.float32 and mixed.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(exact, mixed.float())
    assert cosine.min() > 0.9995
    found = [
        accuracy(knn_scores(f[:180], digits.labels[:180], f[180:], 10), digits.labels[180:])
        for f in (exact, mixed)
    ]
    assert found[0] > 0.5 and abs(found[0] - found[1]) <= 2 / 180


def random_bank():
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(2, 300, 8, generator=rng)
    bank = bank * torch.rand(300, 1, generator=rng)  # lengths must not matter
    return bank, torch.randint(0, 7, (300,), generator=rng), queries


@pytest.mark.parametrize("k", [1, 10])
def test_knn_is_scikit_learns_cosine_knn(k):
    bank, labels, queries = random_bank()
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(bank, labels)
    predicted = knn_scores(bank, labels, queries, 7, k).argmax(dim=1)
    assert predicted.tolist() == reference.predict(queries).tolist()
    assert knn_scores(bank, labels, queries, 7).sum(dim=1).unique().tolist() == [10]  # the default


def test_weighted_knn_is_wu_et_als():
    """Sec. 3.4: each of the k neighbours votes with exp(cosine / τ)."""
    bank, labels, queries = random_bank()
    reference = KNeighborsClassifier(
        200, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank.double(), labels)
    votes = knn_scores(bank, labels, queries, 7, k=200, temperature=0.07)
    expected = torch.from_numpy(reference.predict_proba(queries.double()))
    torch.testing.assert_close(
        (votes / votes.sum(dim=1, keepdim=True)).double(), expected, atol=1e-5, rtol=1e-4
    )


def test_knn_with_a_bank_smaller_than_k_and_queries_in_several_parts(monkeypatch):
    bank, labels = torch.eye(3), torch.arange(3)
    assert accuracy(knn_scores(bank[:1], labels[:1], bank, 3), labels) == pytest.approx(1 / 3)
    monkeypatch.setattr(features, "SIMILARITIES", 3000)
    queries = bank.repeat(700, 1)  # 2,100: three parts
    assert accuracy(knn_scores(bank, labels, queries, 3, k=1), labels.repeat(700)) == 1


def test_a_tie_of_votes_goes_to_the_smallest_class():
    bank, labels = torch.eye(3), torch.tensor([2, 1, 1])
    votes = knn_scores(bank[:2], labels[:2], torch.ones(1, 3), 3)
    assert votes.tolist() == [[0, 1, 1]] and votes.argmax() == 1
    assert accuracy(votes, torch.tensor([1])) == 1


def test_crops_and_flips_are_new_in_every_view_and_follow_from_the_seed():
    enc = torch.nn.Flatten()
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)

    def crops(seed, scale=(0.2, 0.9), flip=0.5, batch=2):
        return crop_features(enc, images, 3, 6, scale, flip, batch, torch.float32, seed)

    assert crops(0).shape == (3, 5, 3 * 6 * 6)
    assert torch.equal(crops(0), crops(0)) and not torch.equal(crops(0), crops(1))
    views = crops(0)
    assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    whole = clean_features(enc, images, 6, 2, torch.float32)
    square = (1.0, 1.0)  # no box of the whole image's area but the image itself: nothing random
    upright = crop_features(enc, images, 1, 6, square, 0.0, 2, torch.float32, 0)[0]
    flipped = crop_features(enc, images, 1, 6, square, 1.0, 2, torch.float32, 0)[0]
    assert torch.allclose(flipped.view(5, 3, 6, 6).flip(-1), upright.view(5, 3, 6, 6), atol=1e-6)
    assert torch.allclose(upright, whole, atol=1e-5)


def test_knn_in_training_leaves_the_encoder_in_its_mode_and_its_statistics_alone():
    enc = encoder().train()
    before = {name: tensor.clone() for name, tensor in enc.state_dict().items()}
    split = Split(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 3,
                  ["a", "b", "c"])  # fmt: skip
    bank, queries = torch.arange(9), torch.arange(9, 12)
    found = held_out_knn(enc, split, bank, queries, 8, 5, torch.float32)
    assert enc.training
    assert all(torch.equal(before[name], tensor) for name, tensor in enc.state_dict().items())
    h = extract_features(enc.eval(), [resize(split.images, 8)], torch.float32)
    assert found == accuracy(knn_scores(h[:9], split.labels[:9], h[9:], 3), split.labels[9:])


def test_top_k_accuracy():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 1, 2, 2])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
