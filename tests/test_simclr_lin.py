"""Linear evaluation: frozen, on h, all labels, the test set once; and its helpers."""

import json
import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import simclr
import simclr_lin
from checkpoint import load_checkpoint
from errors import ConfigError, UserError
from evaluation import extract_features, frozen, knn_accuracy, top_k_accuracy
from models import SimCLR

PEAK = "finetune_learning_rate"


@pytest.fixture
def checkpoint(toy, tmp_path):
    """The checkpoint of a toy run of two epochs."""
    run = tmp_path / "run"
    run.mkdir()
    simclr.pretrain(toy("epochs=1"), run)
    return run / "simclr_resnet18_epoch1.pt"


@pytest.fixture
def evaluate(toy, checkpoint):
    """evaluate("seed=1", …): the results of the toy checkpoint, written to its folder."""

    def run(*overrides):
        return simclr_lin.evaluate(toy(*overrides, peak=PEAK), checkpoint, checkpoint.parent)

    return run


@pytest.fixture
def spy(monkeypatch):
    """The encoder and the linear layer of the last evaluation, and every call of the encoder."""
    seen = {"calls": []}
    build, train = simclr_lin.build_encoder, simclr_lin.train_linear_layer

    def record_call(enc, inputs, output):
        seen["calls"].append((enc.training, output.requires_grad, len(inputs[0])))

    def build_and_record(*args):
        seen["enc"] = build(*args)
        seen["enc"].register_forward_hook(record_call)
        return seen["enc"]

    def train_and_record(*args):
        seen["head"] = train(*args)
        return seen["head"]

    monkeypatch.setattr(simclr_lin, "build_encoder", build_and_record)
    monkeypatch.setattr(simclr_lin, "train_linear_layer", train_and_record)
    return seen


def test_results_are_written_with_their_source(evaluate, checkpoint):
    results = evaluate()
    assert json.loads((checkpoint.parent / "results.json").read_text()) == results
    assert results["epoch"] == 1 and results["checkpoint"] == str(checkpoint)
    assert results["backbone"] == "resnet18" and results["dataset"] == "folder"
    for key in ("linear_acc", "knn_acc"):  # shares of the 9 test images: none is left out
        assert 0 <= results[key] <= 1 and results[key] * 9 == pytest.approx(round(results[key] * 9))
    assert results["linear_top5"] is None  # three classes
    assert not list(checkpoint.parent.glob("*.tmp"))


def test_top_5_is_reported_from_ten_classes_up(toy, write_images, checkpoint, tmp_path):
    data = write_images(tmp_path / "ten", classes=10, train=2, test=1)
    cfg = toy(f"data_dir={data}", peak=PEAK)
    results = simclr_lin.evaluate(cfg, checkpoint, tmp_path)
    assert results["linear_acc"] <= results["linear_top5"] <= 1


def test_the_encoder_is_the_checkpoints_before_and_after(evaluate, spy, checkpoint):
    evaluate()
    saved = load_checkpoint(checkpoint)["model"]
    after = spy["enc"].state_dict()
    assert all(torch.equal(value, saved[f"enc.{key}"]) for key, value in after.items())
    assert spy["calls"] and {call[:2] for call in spy["calls"]} == {(False, False)}


def test_the_linear_layer_maps_h_to_classes(evaluate, spy):
    evaluate()
    assert (spy["head"].in_features, spy["head"].out_features) == (512, 3)


def test_every_training_image_is_used_in_every_epoch_whatever_the_batch(evaluate, spy):
    evaluate("batch_size=7")
    seen = [n for *_, n in spy["calls"]]
    bank, train, test = [7, 7, 7, 3], [7, 7, 7, 3] * 2, [7, 2]
    assert seen == bank + train + test


def test_fewer_labels_than_a_batch_still_train(evaluate, spy):
    evaluate("batch_size=512", "finetune_learning_rate=0.1")
    torch.manual_seed(42)
    assert not torch.equal(nn.Linear(512, 3).weight, spy["head"].weight)
    assert [n for *_, n in spy["calls"]] == [24, 24, 24, 9]


def test_the_layer_uses_the_cosine_over_the_finetune_epochs(evaluate, monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *args: rates.append(self.param_groups[0]["lr"]) or step(self, *args),
    )
    evaluate("finetune_epochs=4", "epochs=1000", "finetune_learning_rate=0.2")
    total = 4 * 3
    expected = [
        0.001 + 0.199 * (1 + math.cos(math.pi * step / (total - 1))) / 2 for step in range(total)
    ]
    assert rates == pytest.approx(expected)


def test_the_layer_has_momentum_and_no_weight_decay(evaluate, monkeypatch):
    calls = []
    make = simclr_lin.make_optimizer

    def record(*args, **kwargs):
        calls.append(make(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(simclr_lin, "make_optimizer", record)
    evaluate("weight_decay=0.1")
    group = calls[0].param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0)
    assert len(group["params"]) == 2  # the layer's weight and bias, nothing of the encoder


def test_crops_and_flips_are_for_training_alone(evaluate, monkeypatch):
    seen = []
    crop = simclr_lin.random_crop_flip
    monkeypatch.setattr(
        simclr_lin,
        "random_crop_flip",
        lambda images, *args: seen.append((len(images), *args[:-1])) or crop(images, *args),
    )
    evaluate("crop_scale=[0.2,0.9]", "flip_probability=0.3")
    assert seen == [(8, 8, (0.2, 0.9), 0.3)] * 6


def test_nothing_is_chosen_on_the_test_set(evaluate, spy, monkeypatch):
    """Other test images and labels give the same linear layer, to the bit."""
    evaluate()
    weight = spy["head"].weight.clone()
    load = simclr_lin.load_split

    def other_test_set(dataset, data_dir, split, *args):
        found = load(dataset, data_dir, split, *args)
        if split == "test":
            found = found._replace(images=255 - found.images, labels=found.labels.flip(0))
        return found

    monkeypatch.setattr(simclr_lin, "load_split", other_test_set)
    evaluate()
    assert torch.equal(spy["head"].weight, weight)


def test_the_same_seed_gives_the_same_results(evaluate, spy):
    evaluate()
    weight = spy["head"].weight.clone()
    evaluate()
    assert torch.equal(spy["head"].weight, weight)
    evaluate("seed=1")
    assert not torch.equal(spy["head"].weight, weight)


def test_random_baseline_is_the_same_network_untrained(evaluate, spy, checkpoint):
    evaluate()
    results = (checkpoint.parent / "results.json").read_text()
    trained = spy["enc"].conv1.weight
    baseline = evaluate("baseline=random")
    assert spy["enc"].conv1.weight.shape == trained.shape
    assert not torch.equal(spy["enc"].conv1.weight, trained)
    assert baseline["baseline"] == "random" and baseline["epoch"] is None
    assert json.loads((checkpoint.parent / "results_random.json").read_text()) == baseline
    assert (checkpoint.parent / "results.json").read_text() == results


def test_pixels_baseline_has_no_encoder(evaluate, spy, checkpoint):
    assert evaluate("baseline=pixels")["backbone"] is None
    assert spy["head"].in_features == 3 * 8 * 8
    assert (checkpoint.parent / "results_pixels.json").is_file()


def test_architecture_and_size_come_from_the_checkpoint(toy, spy, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    simclr.pretrain(toy("epochs=1", "cifar_stem=false", "hidden_dim=16", "image_size=12"), run)
    file = run / "simclr_resnet18_epoch1.pt"
    cfg = toy("image_size=8", peak=PEAK)
    sizes = []
    simclr_lin.evaluate(cfg, file, run)
    assert spy["enc"].conv1.kernel_size == (7, 7)
    spy["enc"].register_forward_pre_hook(lambda enc, x: sizes.append(x[0].shape[-1]))
    with pytest.raises(ConfigError, match=r"image_size=8: must be 12, as in .*leave it out"):
        simclr_lin.evaluate(cfg, file, run, frozenset({"image_size", "seed"}))


def test_weights_that_do_not_fit_the_config_are_refused(evaluate, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    for change, message in (
        ({"backbone": "resnet34"}, "do not fit its config.*layer1.2"),
        ({"backbone": "eval('1')"}, "unknown backbone"),
        ({"hidden_dim": None}, "config lacks hidden_dim"),
    ):
        torch.save({**saved, "config": {**saved["config"], **change}}, checkpoint)
        with pytest.raises(UserError, match=f"(?s){message}"):
            evaluate()
    weights = {**saved["model"]}
    del weights["enc.bn1.running_mean"]
    torch.save({**saved, "model": weights}, checkpoint)
    with pytest.raises(UserError, match=r"(?s)do not fit.*bn1\.running_mean"):
        evaluate()


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


@pytest.mark.parametrize("place", ["enc.train()", "weights"])
def test_an_evaluation_that_moves_the_encoder_fails(evaluate, monkeypatch, place):
    """The two bugs of the published repository, put into the run itself."""
    train = simclr_lin.train_linear_layer

    def unfrozen(cfg, enc, *args):
        if place == "enc.train()":
            enc.train()
        else:
            with torch.no_grad():
                next(enc.parameters()).add_(1e-6)
        return train(cfg, enc, *args)

    monkeypatch.setattr(simclr_lin, "train_linear_layer", unfrozen)
    with pytest.raises(RuntimeError, match="the frozen encoder has changed"):
        evaluate("batch_size=9")


def test_features_are_of_every_image_in_order_and_do_not_depend_on_the_batch():
    enc = encoder().eval()
    images = torch.randint(0, 256, (7, 3, 12, 12), dtype=torch.uint8)
    features = extract_features(enc, images, 8, batch_size=3)
    whole = extract_features(enc, images, 8, batch_size=7)
    torch.testing.assert_close(features, whole)
    assert features.shape == (7, 512) and not features.requires_grad


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
