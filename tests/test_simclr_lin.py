"""Linear evaluation: frozen, on h, all labels, the test set once; and its helpers."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import simclr
import simclr_lin
from checkpoint import load_checkpoint
from errors import ConfigError, UserError

PEAK = "finetune_learning_rate"


@pytest.fixture
def checkpoint(toy, tmp_path):
    """The checkpoint of a toy run of one epoch."""
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
        n, *_, side = inputs[0].shape
        seen["calls"].append((enc.training, output.requires_grad, side, n))

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


def test_top_5_is_reported_from_ten_classes_up(
    toy, write_images, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(simclr_lin, "top_k_accuracy", lambda logits, labels, k: k / 100)
    data = write_images(tmp_path / "ten", classes=10, train=2, test=1)
    cfg = toy(f"data_dir={data}", peak=PEAK)
    results = simclr_lin.evaluate(cfg, checkpoint, tmp_path)
    assert (results["linear_acc"], results["linear_top5"]) == (0.01, 0.05)


@pytest.fixture
def plain_colors(tmp_path):
    """Classes that any classifier can tell: red, green or blue with noise; 8 and 12 a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 12)):
        for label in range(3):
            folder = tmp_path / "colors" / split / f"class{label}"
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 60, (12, 12, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{n}.png")
    return tmp_path / "colors"


@pytest.mark.parametrize("baseline", ["null", "pixels"])
def test_classes_that_are_easy_to_tell_are_told(evaluate, plain_colors, monkeypatch, baseline):
    settings = f"data_dir={plain_colors}", f"baseline={baseline}", "finetune_epochs=30"
    results = evaluate(*settings, "finetune_learning_rate=0.05")
    assert results["linear_acc"] >= 0.95 and results["knn_acc"] >= 0.95
    load = simclr_lin.load_split

    def shuffled(dataset, data_dir, split, *args):
        found = load(dataset, data_dir, split, *args)
        return found._replace(labels=found.labels.roll(1)) if split == "test" else found

    monkeypatch.setattr(simclr_lin, "load_split", shuffled)  # 3 of 36 labels are wrong now
    assert evaluate(*settings)["knn_acc"] <= 33 / 36


def test_the_encoder_is_the_checkpoints_before_and_after(evaluate, spy, checkpoint):
    evaluate()
    saved = load_checkpoint(checkpoint)["model"]
    after = spy["enc"].state_dict()
    assert all(torch.equal(value, saved[f"enc.{key}"]) for key, value in after.items())
    assert spy["calls"] and {call[:2] for call in spy["calls"]} == {(False, False)}


def test_the_linear_layer_maps_h_to_classes(evaluate, spy):
    evaluate()
    assert (spy["head"].in_features, spy["head"].out_features) == (512, 3)


def test_the_encoder_sees_each_view_once_and_each_test_image_once(evaluate, spy):
    """Whatever the batch, and however many epochs the layer is trained for."""
    evaluate("batch_size=7", "finetune_views=3", "finetune_epochs=5")
    seen = [n for *_, n in spy["calls"]]
    train, crops, test = [7, 7, 7, 3], [7, 7, 7, 3] * 3, [7, 2]
    assert seen == train + crops + test
    spy["calls"].clear()
    evaluate("batch_size=24", "finetune_views=9", "finetune_epochs=2")
    assert len(spy["calls"]) == 1 + 2 + 1  # crops that no epoch would see are not made


def test_the_layer_sees_each_image_once_an_epoch_and_cycles_through_the_views(
    evaluate, monkeypatch
):
    """Features that tell the view, 0 to 2, and the image, 0 to 23."""
    inputs = []
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, h: inputs.append(h) or forward(self, h)
    )

    def numbered(cfg, enc, train, test, size, dtype):
        view, image = torch.meshgrid(torch.arange(3.0), torch.arange(24.0), indexing="ij")
        return torch.ones(24, 2), torch.stack([view, image], dim=-1), torch.ones(9, 2)

    monkeypatch.setattr(simclr_lin, "all_features", numbered)
    evaluate("batch_size=7", "finetune_views=3", "finetune_epochs=5")
    epochs = [torch.cat(inputs[4 * e : 4 * e + 4]) for e in range(5)]
    assert [epoch[:, 0].unique().tolist() for epoch in epochs] == [[0], [1], [2], [0], [1]]
    orders = [epoch[:, 1].tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_reaches_the_features(evaluate, spy, monkeypatch, name, dtype):
    seen = []
    train = simclr_lin.train_linear_layer

    def record(cfg, views, *args):
        seen.append(views.dtype)
        return train(cfg, views, *args)

    monkeypatch.setattr(simclr_lin, "train_linear_layer", record)
    assert evaluate(f"precision={name}")["precision"] == str(dtype).removeprefix("torch.")
    assert seen == [dtype]


def test_fewer_labels_than_a_batch_still_train(evaluate, spy, monkeypatch):
    nn_linear = simclr_lin.nn.Linear
    initial = []
    monkeypatch.setattr(
        simclr_lin.nn,
        "Linear",
        lambda *args: initial.append(nn_linear(*args)) or copy.deepcopy(initial[-1]),
    )
    evaluate("batch_size=512", "finetune_learning_rate=0.1", "baseline=pixels")
    assert len(initial) == 1 and not torch.equal(initial[0].weight, spy["head"].weight)
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


def test_crops_and_flips_are_for_training_alone_and_new_in_every_view(evaluate, monkeypatch):
    seen, drawn = [], set()
    crop = simclr_lin.random_crop_flip

    def record(images, u, *args):
        seen.append((len(images), *args))
        drawn.add(tuple(u.flatten().tolist()))
        return crop(images, u, *args)

    monkeypatch.setattr(simclr_lin, "random_crop_flip", record)
    evaluate("crop_scale=[0.2,0.9]", "flip_probability=0.3", "finetune_views=2")
    assert seen == [(8, 8, (0.2, 0.9), 0.3)] * 6
    assert len(drawn) == 6


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
    simclr_lin.evaluate(cfg, file, run)
    assert spy["enc"].conv1.kernel_size == (7, 7)
    assert {side for _, _, side, _ in spy["calls"]} == {12}
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


@pytest.mark.parametrize("place", ["enc.train()", "weights"])
def test_an_evaluation_that_moves_the_encoder_fails(evaluate, monkeypatch, place):
    """The two bugs of the published repository, put into the run itself."""
    extract = simclr_lin.extract_features

    def unfrozen(enc, *args):
        if place == "enc.train()":
            enc.train()
        else:
            with torch.no_grad():
                next(enc.parameters()).add_(1e-6)
        return extract(enc, *args)

    monkeypatch.setattr(simclr_lin, "extract_features", unfrozen)
    with pytest.raises(RuntimeError, match="the frozen encoder has changed"):
        evaluate("batch_size=9")
