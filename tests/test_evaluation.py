"""The frozen encoder, its features, kNN against scikit-learn's."""

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from data import load_split, resize
from evaluation import extract_features, frozen, knn_accuracy, top_k_accuracy
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
    accuracy = [
        knn_accuracy(f[:180], digits.labels[:180], f[180:], digits.labels[180:])
        for f in (exact, mixed)
    ]
    assert accuracy[0] > 0.5 and abs(accuracy[0] - accuracy[1]) <= 2 / 180


@pytest.mark.parametrize("k", [1, 10])
def test_knn_is_scikit_learns_cosine_knn(k):
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(2, 300, 8, generator=rng)
    labels, wanted = torch.randint(0, 7, (2, 300), generator=rng)
    bank = bank * torch.rand(300, 1, generator=rng)  # lengths must not matter
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(bank, labels)
    expected = (reference.predict(queries) == wanted.numpy()).mean()
    assert knn_accuracy(bank, labels, queries, wanted, k) == pytest.approx(expected)


def test_knn_with_a_bank_smaller_than_k_and_queries_in_several_parts():
    bank, labels = torch.eye(3), torch.arange(3)
    assert knn_accuracy(bank[:1], labels[:1], bank, labels) == pytest.approx(1 / 3)
    queries = bank.repeat(700, 1)  # 2,100: three parts
    assert knn_accuracy(bank, labels, queries, labels.repeat(700), k=1) == 1


def test_top_k_accuracy():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 1, 2, 2])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
