"""weights/resnet18.pt, which comes with the repository, and how such a file is made."""

import importlib

import pytest
import torch
from conftest import REPOSITORY

import simclr_lin
from evaluation.features import accuracy, clean_features, knn_scores
from images.datasets import load_split
from models import SimCLR
from system.checkpoint import load_checkpoint, load_encoder, load_init

WEIGHTS = REPOSITORY / "weights" / "resnet18.pt"
DATA, PNG = REPOSITORY / "data", REPOSITORY / "data" / "cifar10-png"
KNN = 0.656  # of 1,000 test images by 5,000 training images


def test_the_weights_load_and_their_features_differ():
    enc, feature_dim = load_encoder(WEIGHTS)
    h = enc(torch.rand(4, 3, 32, 32))
    assert h.shape == (4, feature_dim) and feature_dim == 512 and h.isfinite().all()
    assert h.std(dim=0).mean() > 0.01 and WEIGHTS.stat().st_size < 23e6
    assert "data_dir" not in load_checkpoint(WEIGHTS)["config"]


def test_their_knn_accuracy_is_that_of_the_card(config):
    if not PNG.is_dir() and not (DATA / "cifar-10-batches-py").is_dir():
        pytest.skip("without CIFAR-10 in data: downloaded, or as image files in data/cifar10-png")
    files = ["dataset=folder", f"data_dir={PNG}"] if PNG.is_dir() else [f"data_dir={DATA}"]
    cfg = config(*files, "precision=fp32")
    train, test = (load_split(cfg, split) for split in ("train", "test"))
    enc, index = load_encoder(WEIGHTS)[0], slice(None, None, 10)  # of each class as many
    bank, queries = (clean_features(enc, s.images[index], cfg) for s in (train, test))
    scores = knn_scores(bank, train.labels[index], queries, classes=10)
    assert abs(accuracy(scores, test.labels[index]) - KNN) < 0.04  # or other images


def test_an_encoder_in_float16_is_evaluated_and_started_from(
    thin, trained, toy, monkeypatch, tmp_path
):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    half_encoder = importlib.import_module("half_encoder").half_encoder
    whole, path = trained / "simclr_resnet18_epoch2.pt", tmp_path / "half.pt"
    path.write_bytes(half_encoder(whole))
    assert path.stat().st_size < 0.3 * whole.stat().st_size
    x, (half, _) = torch.rand(5, 3, 8, 8), load_encoder(path)
    torch.testing.assert_close(half(x), load_encoder(whole)[0](x), atol=0.01, rtol=0.01)
    rows = simclr_lin.evaluate(toy("protocols=[knn]"), path, tmp_path)["protocols"]
    assert rows[0]["protocol"] == "knn"
    model = SimCLR()
    load_init(model.enc, str(path))
    assert torch.equal(model.enc.layer1[0].conv1.weight, half.layer1[0].conv1.weight)
