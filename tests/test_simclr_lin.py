"""simclr_lin.py: frozen, on h, all labels, nothing chosen on the test set; and what it writes."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

import simclr
import simclr_lin
from config import PROTOCOLS, ConfigError
from evaluation import classifiers, features, protocols
from evaluation.results import add_row, table
from images.datasets import Split, hold_out
from models import SimCLR
from system.checkpoint import load_checkpoint
from system.errors import UserError
from system.files import locked

FILE = "simclr_resnet18_epoch2.pt"
FROZEN = "protocols=[knn,linear,linear_clean,logistic]"
ALL = f"protocols=[{','.join(PROTOCOLS)}]"
FP32 = "precision=fp32"


@pytest.fixture
def checkpoint(thin, trained, tmp_path):
    """A copy of the checkpoint of a toy run of two epochs, in a directory of its own."""
    (tmp_path / "run").mkdir()
    return Path(shutil.copy(trained / FILE, tmp_path / "run" / FILE))


@pytest.fixture
def evaluate(toy, checkpoint):
    """evaluate("seed=1", …): the results of the toy checkpoint, written to its directory."""

    def run(*overrides):
        given = frozenset(override.split("=")[0] for override in overrides)
        return simclr_lin.evaluate(toy(*overrides), checkpoint, checkpoint.parent, given)

    return run


@pytest.fixture
def spy(monkeypatch):
    """The encoders of an evaluation, each of their calls, and the trained models."""
    seen = {"encoders": [], "calls": [], "trained": []}
    build, train = simclr_lin.build_encoder, classifiers.train_classifiers

    def record_call(enc, inputs, output):
        n, *_, side = inputs[0].shape
        seen["calls"].append((enc.training, output.requires_grad, side, n))

    def build_and_record(*args):
        enc = build(*args)
        seen["encoders"].append(enc)
        enc.register_forward_hook(record_call)
        return enc

    def train_and_record(models, scores, task, index, candidates):
        train(models, scores, task, index, candidates)
        pairs = zip(models, candidates, strict=True)
        seen["trained"] += [(model, index.tolist(), settings) for model, settings in pairs]

    monkeypatch.setattr(simclr_lin, "build_encoder", build_and_record)
    monkeypatch.setattr(classifiers, "train_classifiers", train_and_record)
    return seen


@pytest.fixture
def tasks(monkeypatch):
    """What each protocol was given, by name, in order."""
    seen = []
    for name, function in protocols.RUN.items():

        def record(task, name=name, function=function):
            seen.append((name, task))
            return function(task)

        monkeypatch.setitem(protocols.RUN, name, record)
    return seen


def rows(results):
    """The rows of a table of results by encoder and protocol."""
    return {(row["encoder"], row["protocol"]): row for row in results["protocols"]}


def same_weights(enc, checkpoint):
    """Whether all tensors of the encoder are those of the checkpoint, to the bit."""
    saved = load_checkpoint(checkpoint)["model"]
    return all(torch.equal(value, saved[f"enc.{key}"]) for key, value in enc.state_dict().items())


def test_results_are_written_with_their_source(evaluate, checkpoint):
    results = evaluate("protocols=[knn,linear]")
    assert json.loads((checkpoint.parent / "results.json").read_text()) == results
    assert results["epoch"] == 2 and results["checkpoint"] == str(checkpoint)
    assert results["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert results["config"] == load_checkpoint(checkpoint)["config"]
    assert results["evaluation_config"]["protocols"] == ["knn", "linear"]
    assert results["backbone"] == "resnet18" and results["dataset"] == "folder"
    assert (results["training_images"], results["test_images"]) == (24, 9)
    found = rows(results)
    assert list(found) == [("checkpoint", name) for name in ("knn", "weighted_knn", "linear")]
    for row in found.values():  # shares of the 9 test images: none is left out
        assert row["n"] == 1 and row["std"] is None
        assert row["accuracy"] * 9 == pytest.approx(round(row["accuracy"] * 9), abs=1e-5)
    assert results["linear_acc"] == found["checkpoint", "linear"]["accuracy"]
    assert results["knn_acc"] == found["checkpoint", "knn"]["accuracy"]
    assert found["checkpoint", "knn"]["settings"] == {"k": 10}
    assert found["checkpoint", "weighted_knn"]["settings"] == {"k": 200, "temperature": 0.07}
    assert found["checkpoint", "linear"]["settings"] == {
        "views": 2, "epochs": 2, "batch_size": 8, "learning_rate": pytest.approx(0.1 * 8 / 256),
        "weight_decay": 0,
    }  # fmt: skip
    assert not list(checkpoint.parent.glob("*.tmp"))


def outcome(accuracy):
    """What `score` returns, of three classes, for one run."""
    counts = torch.tensor([[1, 2, 0], [0, 3, 0], [0, 3, 0]])
    return {"accuracy": accuracy, "confusion": counts, "settings": {}, "selection": None}


def test_a_row_is_the_mean_of_its_runs_and_the_deviation_of_a_sample():
    """Of 2, 4, 4, 4, 5, 5, 7 and 9 the mean is 5, the population's deviation 2, the sample's
    √(32 / 7)."""
    runs = [outcome(n / 10) for n in (2, 4, 4, 4, 5, 5, 7, 9)]
    results = {"protocols": []}
    add_row(results, "random", "linear", runs)
    [row] = results["protocols"]
    assert row["accuracy"] == pytest.approx(0.5) and row["n"] == 8
    assert row["std"] == pytest.approx(math.sqrt(32 / 7) / 10)
    assert f"| 50.00 ± {10 * math.sqrt(32 / 7):.2f} | 8 |" in table(results)
    assert results["linear_acc"] is None and "confusion" not in results  # of the checkpoint alone
    add_row(results, "checkpoint", "linear", [outcome(0.4), outcome(0.6)])
    assert [row["encoder"] for row in results["protocols"]] == ["checkpoint", "random"]
    assert (results["linear_acc"], results["knn_acc"]) == (0.5, None)
    assert results["confusion"] == [[2, 4, 0], [0, 6, 0], [0, 6, 0]]


def test_scores_are_compared_with_the_labels():
    result = protocols.Result(torch.eye(3)[[0, 1, 1, 1]], {})
    found = simclr_lin.score(result, torch.tensor([0, 0, 1, 2]))
    assert found["accuracy"] == 0.5
    assert found["confusion"].tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_rows_of_the_same_checkpoint_and_settings_stay(evaluate, checkpoint):
    first = evaluate("protocols=[linear]", "baselines=[pixels]")
    both = evaluate("protocols=[knn]", "log_interval=7", "runs=2")
    assert list(rows(both)) == [
        ("checkpoint", "linear"), ("checkpoint", "knn"), ("checkpoint", "weighted_knn"),
        ("pixels", "linear"),
    ]  # fmt: skip
    for key in ("linear_acc", "confusion"):
        assert both[key] == first[key]
    assert both["knn_acc"] is not None
    assert json.loads((checkpoint.parent / "results.json").read_text()) == both
    newer = evaluate("protocols=[linear]", "runs=2")
    assert list(rows(newer)) == list(rows(both))
    assert rows(newer)["checkpoint", "linear"]["n"] == 2
    assert rows(newer)["pixels", "linear"] == rows(first)["pixels", "linear"]


@pytest.mark.parametrize("change", ["seed=5", "finetune_epochs=3", "data_dir", "checkpoint"])
def test_other_rows_are_dropped(evaluate, checkpoint, write_images, tmp_path, change):
    """Of another checkpoint, of other data, or with other settings."""
    evaluate("protocols=[linear]")
    if change == "data_dir":
        change = f"data_dir={write_images(tmp_path / 'other', train=9, test=3)}"
    if change == "checkpoint":
        torch.save({**torch.load(checkpoint, weights_only=True), "epoch": 3}, checkpoint)
        change = "seed=42"
    results = evaluate("protocols=[knn]", change)
    assert list(rows(results)) == [("checkpoint", "knn"), ("checkpoint", "weighted_knn")]
    assert results["linear_acc"] is None and "confusion" not in results


def test_finished_protocols_are_kept_whatever_ends_the_others(evaluate, checkpoint, monkeypatch):
    for end in (KeyboardInterrupt(), OSError(28, "No space left")):

        def fail(task, end=end):
            raise end

        monkeypatch.setitem(protocols.RUN, "linear_clean", fail)
        with pytest.raises(type(end)):
            evaluate(FROZEN)
        results = json.loads((checkpoint.parent / "results.json").read_text())
        assert [name for _, name in rows(results)] == ["knn", "weighted_knn", "linear"]
        assert results["linear_acc"] is not None and results["confusion"]


@pytest.mark.parametrize("content", ['{"accuracy": 1}', "[1"])
def test_results_of_another_program_are_never_replaced(evaluate, checkpoint, spy, content):
    file = checkpoint.parent / "results.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"results\.json was not written by simclr_lin"):
        evaluate()
    assert file.read_text() == content and not spy["calls"]
    assert {path.name for path in checkpoint.parent.iterdir()} == {FILE, file.name}


@pytest.fixture(scope="module")
def plain_colors(tmp_path_factory):
    """Classes that any classifier can tell: red, green or blue with noise; 8 and 12 a class."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("colors")
    for split, count in (("train", 8), ("test", 12)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 60, (12, 12, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{n}.png")
    return root


EASY = "finetune_epochs=12", "finetune_learning_rate=0.1"


def change_test_set(monkeypatch, change):
    """Let `load_split` return another test set."""
    load, changed = simclr_lin.load_split, {"train": lambda split: split, "test": change}
    monkeypatch.setattr(simclr_lin, "load_split", lambda cfg, name: changed[name](load(cfg, name)))


def test_every_protocol_tells_classes_that_are_easy_to_tell(evaluate, plain_colors, monkeypatch):
    """And is scored by the labels of the test set."""
    easy = f"data_dir={plain_colors}", *EASY, ALL
    found = rows(evaluate(*easy, "baselines=[random,pixels]"))
    names = "knn", "weighted_knn", "linear", "linear_clean", "logistic", "finetune"
    assert list(found) == [
        *(("checkpoint", name) for name in names),
        *(("random", name) for name in names),
        *(("pixels", name) for name in names[:5]),  # which have no network to fine-tune
    ]
    assert all(row["accuracy"] >= 0.95 for row in found.values()), found
    change_test_set(monkeypatch, lambda split: split._replace(labels=split.labels.roll(1)))
    found = rows(evaluate(*easy, "seed=1"))  # 3 of 36 labels are wrong now
    assert all(row["accuracy"] <= 33 / 36 + 1e-6 for row in found.values()), found


def test_the_encoder_is_the_checkpoints_before_and_after(evaluate, spy, checkpoint):
    evaluate(FROZEN)
    assert same_weights(spy["encoders"][0], checkpoint)
    assert spy["calls"] and {call[:2] for call in spy["calls"]} == {(False, False)}


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear_clean", "logistic", "finetune"])
@pytest.mark.parametrize("place", ["enc.train()", "weights"])
def test_a_protocol_that_moves_the_encoder_fails(
    evaluate, checkpoint, monkeypatch, place, protocol
):
    """The two bugs of the published repository, put into each protocol: there is no row of it."""
    run = protocols.RUN[protocol]

    def unfrozen(task):
        with torch.no_grad():
            if place == "enc.train()":
                task.enc.train()(torch.rand(4, 3, 8, 8))
            else:
                next(task.enc.parameters()).add_(1e-6)
        return run(task)

    monkeypatch.setitem(protocols.RUN, protocol, unfrozen)
    with pytest.raises(RuntimeError, match="the frozen encoder has changed"):
        evaluate(f"protocols=[{protocol}]")
    assert not (checkpoint.parent / "results.json").exists()


def test_every_protocol_is_given_h_of_all_images(evaluate, checkpoint, toy, tasks):
    """Not z; of the test set no labels."""
    model = SimCLR()
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    splits = [simclr_lin.load_split(toy(), name) for name in ("train", "test")]
    with torch.no_grad():
        expected = [model.eval().enc(split.images / 255) for split in splits]
    evaluate(ALL, FP32)
    assert [name for name, _ in tasks] == [*protocols.RUN]
    for _, task in tasks:
        torch.testing.assert_close(task.h, expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(task.test_h, expected[1], atol=1e-5, rtol=1e-4)
        assert torch.equal(task.train.labels, splits[0].labels)
        assert isinstance(task.test_images, torch.Tensor) and len(task.test_images) == 9


def test_the_encoder_sees_each_view_once_and_each_test_image_once(evaluate, spy):
    """Whatever the batch, the protocols, and the number of epochs."""
    evaluate(FROZEN, "batch_size=7", "finetune_views=3", "finetune_epochs=5")
    seen = [n for *_, n in spy["calls"]]
    train, test, crops = [7, 7, 7, 3], [7, 2], [7, 7, 7, 3] * 3
    assert seen == train + test + crops
    spy["calls"].clear()
    evaluate("batch_size=24", "finetune_views=9", "finetune_epochs=2", "protocols=[linear]")
    assert len(spy["calls"]) == 1 + 1 + 2  # crops that no epoch would see are not made


def test_the_layer_sees_each_image_once_an_epoch_and_cycles_through_the_views(
    evaluate, monkeypatch
):
    """Features that tell the view, 0 to 2, and the image, 0 to 23; three classes come out."""
    inputs, forward = [], torch.nn.functional.linear

    def record(h, weight, bias):
        inputs.append(h)
        assert len(weight) == 3
        return forward(h, weight, bias)

    view, image = torch.meshgrid(torch.arange(3.0), torch.arange(24.0), indexing="ij")
    numbered = torch.stack([view, image], dim=-1)
    monkeypatch.setattr(torch.nn.functional, "linear", record)
    monkeypatch.setattr(features, "crop_features", lambda *args: numbered)
    monkeypatch.setattr(features, "clean_features", lambda enc, x, *args: torch.ones(len(x), 2))
    evaluate("protocols=[linear]", "batch_size=7", "finetune_views=3", "finetune_epochs=5")
    assert [len(x) for x in inputs] == [6] * 20 + [9]  # then the test images, once
    epochs = [torch.cat(inputs[4 * e : 4 * e + 4]) for e in range(5)]
    assert [epoch[:, 0].unique().tolist() for epoch in epochs] == [[0], [1], [2], [0], [1]]
    orders = [epoch[:, 1].tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


def test_linear_trains_on_crops_and_linear_clean_on_the_images_as_they_are(evaluate, monkeypatch):
    seen, fit = [], classifiers.fit_linear

    def record(task, views, *args):
        seen.append((views, task.h))
        return fit(task, views, *args)

    monkeypatch.setattr(classifiers, "fit_linear", record)
    evaluate("protocols=[linear,linear_clean]")
    (crops, h), (clean, _) = seen
    assert clean.shape == (1, 24, 128) and torch.equal(clean[0], h)
    assert crops.shape == (2, 24, 128) and not any(torch.equal(view, h) for view in crops)


@pytest.mark.parametrize(("protocol", "where"), [("linear", features), ("finetune", classifiers)])
def test_crops_are_those_of_the_config_in_float32_and_new_each_time(
    evaluate, monkeypatch, protocol, where
):
    """Linear: two views of three batches each. Fine-tuning: two epochs of three."""
    seen, crop = [], where.random_crop_flip

    def record(images, u, size, cfg):
        x = crop(images, u, size, cfg)
        seen.append((tuple(u.flatten().tolist()), size, cfg.crop_scale, cfg.flip_probability))
        assert x.dtype == torch.float32
        return x

    monkeypatch.setattr(where, "random_crop_flip", record)
    crops = "crop_scale=[0.2,0.9]", "flip_probability=0.3", "precision=bf16"
    evaluate(f"protocols=[{protocol}]", *crops)
    assert len({u for u, *_ in seen}) == len(seen) == 6
    assert {tuple(map(str, rest)) for _, *rest in seen} == {("8", "[0.2, 0.9]", "0.3")}
    first = [u for u, *_ in seen]
    seen.clear()
    evaluate(f"protocols=[{protocol}]", *crops, "seed=43")
    assert not {u for u, *_ in seen} & {*first}


def test_fewer_labels_than_a_batch_still_train(evaluate, spy):
    evaluate("batch_size=512", "protocols=[linear]", "labels=1", "finetune_epochs=40")
    layer, index, _ = spy["trained"][0]
    torch.manual_seed(42)
    initial = torch.nn.Linear(128, 3)
    assert index == [0, 1, 2] and not torch.equal(layer.weight, initial.weight)


def test_the_layer_uses_the_cosine_momentum_and_no_weight_decay(evaluate, monkeypatch):
    used, step = [], torch.optim.SGD.step

    def record(self, *args):
        group = self.param_groups[0]
        used.append((group["lr"], (group["momentum"], group["nesterov"], group["weight_decay"])))
        assert len(group["params"]) == 2  # the layer's weight and bias, nothing of the encoder
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    evaluate("finetune_epochs=4", "epochs=1000", "finetune_learning_rate=0.2", "weight_decay=0.1")
    total = 4 * 3
    expected = [0.001 + 0.199 * (1 + math.cos(math.pi * s / (total - 1))) / 2 for s in range(total)]
    assert [rate for rate, _ in used] == pytest.approx(expected)
    assert {rest for _, rest in used} == {(0.9, True, 0)}


def test_settings_are_chosen_on_held_out_training_images_and_fitted_again_on_all(
    evaluate, spy, plain_colors
):
    """The rate 1e-6 learns nothing; what scores it is not in what it is fitted on."""
    rates = "min_learning_rate=0", "finetune_learning_rate=[1e-6,0.1]"
    for protocol in ("linear", "linear_clean", "finetune"):
        spy["trained"].clear()
        results = evaluate(
            f"data_dir={plain_colors}", "finetune_epochs=12", f"protocols=[{protocol}]", *rates,
            "finetune_weight_decay=[0,0.001]",
        )  # fmt: skip
        row = rows(results)["checkpoint", protocol]
        [selection] = row["selections"]
        chosen = selection["chosen"]
        assert selection["validation_images"] == 3 and len(selection["candidates"]) == 4
        assert (chosen["learning_rate"], chosen["weight_decay"]) == (0.1, 0)  # the first best
        assert chosen.items() <= row["settings"].items() and row["accuracy"] >= 0.95
        *tried, (_, everything, final) = spy["trained"]
        assert final == chosen and everything == list(range(24))
        assert [(s["learning_rate"], s["weight_decay"]) for *_, s in tried] == [
            (1e-6, 0), (1e-6, 0.001), (0.1, 0), (0.1, 0.001),
        ]  # fmt: skip
        [rest] = {tuple(index) for _, index, _ in tried}
        part = sorted(set(range(24)) - set(rest))
        assert [image // 8 for image in part] == [0, 1, 2] and len(rest) == 21


def small_task(cfg):
    """A task of 30 training images in three classes, whose feature is the number of the image."""
    labels = torch.arange(30) % 3
    train = Split(torch.zeros(30, 3, 8, 8), labels, ["a", "b", "c"])
    h = torch.arange(30)[:, None]
    return classifiers.Task(cfg, None, train, train.images, h=h, test_h=h, name="")


def test_candidates_are_scored_on_the_held_out_images_alone(toy):
    """By their inputs and labels. One that diverges loses to one that is always wrong."""
    task, scored = small_task(toy("seed=5")), []

    def fit(index, candidates):
        for c in (settings["c"] for settings in candidates):

            def classifier(h, c=c):
                scored.append((c, len(index), h.flatten().tolist()))
                return c * torch.nn.functional.one_hot((h.flatten() + 1) % 3, 3)  # always wrong

            yield classifier

    held_out = hold_out(task.train.labels, 0.1, 5)[1].tolist()
    candidates = [{"c": math.nan}, {"c": 1.0}]
    test_h = torch.arange(6)[:, None]
    result = protocols.fit_best(task, candidates, fit, inputs=task.h, test_inputs=test_h)
    assert [(number, part) for _, number, part in scored[:2]] == [(27, held_out)] * 2
    assert len(held_out) == 3 and result.settings == result.selection["chosen"] == {"c": 1.0}
    assert [one["accuracy"] for one in result.selection["candidates"]] == [None, 0]
    assert scored[2:] == [(1.0, 30, [*range(6)])] and len(result.scores) == 6


def test_the_penalty_of_the_logistic_regression_is_chosen(evaluate, plain_colors, monkeypatch):
    fitted, fit = [], classifiers.LogisticRegression.fit

    def record(self, x, y):
        fitted.append((self.C, x))
        return fit(self, x, y)

    monkeypatch.setattr(classifiers.LogisticRegression, "fit", record)
    [row] = evaluate(f"data_dir={plain_colors}", "protocols=[logistic]")["protocols"]
    *tried, (c, x) = fitted
    assert [len(x) for _, x in tried] == [21] * len(protocols.INVERSE_PENALTIES) and len(x) == 24
    assert row["settings"] == {"C": c} == row["selections"][0]["chosen"]
    assert abs(x.mean()) < 1e-6  # standardised


def test_nothing_is_chosen_on_the_test_set(evaluate, spy, monkeypatch):
    """Other test images and labels give the same classifiers and choices, to the bit."""
    settings = ALL, "finetune_learning_rate=[0.01,0.1]"
    first = [row["selections"] for row in evaluate(*settings)["protocols"]]
    before = [model.state_dict() for model, *_ in spy["trained"]]
    spy["trained"].clear()
    change_test_set(
        monkeypatch,
        lambda split: split._replace(images=255 - split.images, labels=split.labels.flip(0)),
    )
    assert [row["selections"] for row in evaluate(*settings)["protocols"]] == first
    for (model, *_), weights in zip(spy["trained"], before, strict=True):
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_few_labels_are_stratified_and_the_same_for_every_encoder(evaluate, checkpoint, tasks):
    overrides = "labels=2", "runs=2", "baselines=[random,pixels]", "seed=3", "protocols=[knn]"
    results = evaluate(*overrides)
    splits = [task.train for name, task in tasks if name == "knn"]
    assert [split.labels.tolist() for split in splits] == [[0, 0, 1, 1, 2, 2]] * 6
    first, second, *rest = [split.images for split in splits]
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(rest, [first, second] * 2, strict=True))
    assert results["training_images"] == 6
    assert {row["n"] for row in results["protocols"]} == {2}  # kNN too: its bank is random
    before = (checkpoint.parent / "results_labels2.json").read_text()
    assert json.loads(before) == results
    evaluate("labels=0.25", "protocols=[knn]")
    evaluate("protocols=[knn]")
    written = {path.name for path in checkpoint.parent.glob("results*")}
    assert written == {f"results{labels}.json" for labels in ("", "_labels2", "_labels0.25")}
    assert (checkpoint.parent / "results_labels2.json").read_text() == before
    for overrides, reason in (
        (["labels=9"], "9 images of each class are too many"),
        (["labels=1", "protocols=[logistic]"], "no class has two labelled images: take more"),
    ):
        with pytest.raises(UserError, match=reason):
            evaluate(*overrides)


def test_runs_repeat_what_is_random_over_seeds(evaluate, spy):
    overrides = "runs=3", "seed=7", "baselines=[random,pixels]", "protocols=[knn,linear]"
    found = rows(evaluate(*overrides))
    assert {key: row["n"] for key, row in found.items() if key[1] == "knn"} == {
        ("checkpoint", "knn"): 1, ("random", "knn"): 3, ("pixels", "knn"): 1,
    }  # fmt: skip
    row = found["checkpoint", "linear"]
    assert row["n"] == len(row["accuracies"]) == 3
    layers = [model.weight for model, *_ in spy["trained"]]
    assert not torch.equal(layers[0], layers[1])
    trained, randoms = spy["encoders"][:3], [enc.conv1.weight for enc in spy["encoders"][3:6]]
    assert not any(torch.equal(trained[0].conv1.weight, weight) for weight in randoms)
    assert not torch.equal(randoms[0], randoms[1])
    assert layers[-1].shape == (3, 3 * 8 * 8)  # of the pixels
    spy["trained"].clear()
    evaluate("seed=8", "protocols=[linear]")
    assert torch.equal(spy["trained"][0][0].weight, layers[1])  # seed + 1, whatever else runs


def test_fine_tuning_trains_all_of_a_copy(evaluate, spy, checkpoint):
    results = evaluate("protocols=[finetune]")
    assert list(rows(results)) == [("checkpoint", "finetune")] and results["linear_acc"] is None
    assert "confusion" not in results
    [(model, index, _)] = spy["trained"]
    saved = load_checkpoint(checkpoint)["model"]
    tuned = model[0].state_dict()
    assert index == list(range(24)) and model[1].out_features == 3
    assert not torch.equal(tuned["conv1.weight"], saved["enc.conv1.weight"])
    assert not torch.equal(tuned["bn1.running_mean"], saved["enc.bn1.running_mean"])
    assert same_weights(spy["encoders"][0], checkpoint)
    modes = [call[0] for call in spy["calls"][5:]]  # after the features; a copy keeps its hooks
    assert modes == [True] * 6 + [False] * 2  # two epochs, then the test images


def test_no_batch_of_fine_tuning_has_one_image(evaluate, spy):
    """For which batch norm has no statistics: nine labels in batches of two."""
    evaluate("protocols=[finetune]", "labels=3", "batch_size=2", "finetune_learning_rate=0.1")
    assert sorted({n for training, *_, n in spy["calls"] if training}) == [2, 3]


def test_fine_tuning_in_float16_is_computed_in_float32(evaluate, monkeypatch):
    """So that it needs no gradient scaler."""
    seen, autocast = set(), classifiers.autocast
    monkeypatch.setattr(classifiers, "autocast", lambda d, p: seen.add(p) or autocast(d, p))
    evaluate("protocols=[finetune]", "precision=fp16")
    assert seen == {"fp32"}


def test_layers_that_are_trained_at_once_are_those_of_each_rate_alone(toy):
    torch.manual_seed(0)
    cfg = toy("finetune_epochs=5", "batch_size=7", "finetune_learning_rate=null")
    task, views = small_task(cfg), torch.randn(2, 30, 4)
    candidates = protocols.sgd_settings(cfg, [0.1, 3.0])
    assert [settings["learning_rate"] for settings in candidates] == [0.1 * 7 / 256, 3 * 7 / 256]
    candidates = [{**candidates[0], "learning_rate": 1e30}, *candidates]  # one that diverges
    index = torch.arange(3, 30)
    together = classifiers.fit_linear(task, views, index, candidates)
    for classify, settings in zip(together[1:], candidates[1:], strict=True):
        [alone] = classifiers.fit_linear(task, views, index, [settings])
        torch.testing.assert_close(classify(views[0]), alone(views[0]))
    assert not torch.allclose(together[1](views[0]), together[2](views[0]), rtol=0.1)


def test_linear_layers_choose_their_rate_by_default_and_finetune_has_one(evaluate):
    results = evaluate("finetune_learning_rate=null", "protocols=[linear,linear_clean,finetune]")
    *linear, tuned = results["protocols"]
    for row in linear:
        assert len(row["selections"][0]["candidates"]) == len(protocols.LINEAR_RATES)
    assert tuned["selections"] == [] and tuned["settings"]["learning_rate"] == 0.1 * 8 / 256
    [row] = evaluate("finetune_learning_rate=null", "protocols=[linear]", "labels=1")["protocols"]
    assert row["settings"]["learning_rate"] == 0.1 * 8 / 256  # there is none to choose on


def test_architecture_size_and_crops_come_from_the_checkpoint(thin, toy, spy, tmp_path):
    """The crops unless the command line has others."""
    model, crops = ("cifar_stem=false", "hidden_dim=16"), "crop_scale=[0.3,0.9]"
    simclr.pretrain(toy("epochs=1", "image_size=32", *model, crops, "flip_probability=0"), tmp_path)
    file, cfg = tmp_path / "simclr_resnet18_epoch1.pt", toy("protocols=[knn]")
    for given, crop_scale in ({"seed"}, [0.3, 0.9]), ({"crop_scale"}, [0.08, 1.0]):
        used = simclr_lin.evaluate(cfg, file, tmp_path, given)["evaluation_config"]
        assert (used["crop_scale"], used["flip_probability"]) == (crop_scale, 0)
        assert used["image_size"] == 32
    assert spy["encoders"][0].conv1.kernel_size == (7, 7)
    assert {side for _, _, side, _ in spy["calls"]} == {32}
    with pytest.raises(ConfigError, match=r"image_size=8: must be 32, as in "):
        simclr_lin.evaluate(cfg, file, tmp_path, {"image_size", "seed"})


def test_one_class_is_refused(toy, write_images, checkpoint, tmp_path):
    data = write_images(tmp_path / "one", classes=1, train=2, test=1)
    with pytest.raises(ConfigError, match="two classes or more: there is class0 alone"):
        simclr_lin.evaluate(toy(f"data_dir={data}"), checkpoint, tmp_path)


@pytest.mark.parametrize("protocol", ["linear", "linear_clean", "finetune"])
def test_a_schedule_that_would_climb_is_refused_where_there_is_one(evaluate, protocol):
    climbs = "min_learning_rate=0.1", "learning_rate=1", "finetune_learning_rate=[0.05,0.2]"
    assert rows(evaluate("protocols=[knn,logistic]", *climbs))
    with pytest.raises(ConfigError, match=r"min_learning_rate=0\.1: must be at most finetune_lear"):
        evaluate(f"protocols=[{protocol}]", *climbs)


@pytest.mark.parametrize("protocol", ["linear", "linear_clean", "finetune"])
def test_a_classifier_that_diverges_is_refused(evaluate, checkpoint, protocol):
    """What was finished is kept."""
    for rates in ("1e38", "[1e38,1e37]"):
        with pytest.raises(UserError, match=f"not finite: scores of {protocol}, checkpoint, seed"):
            evaluate(f"protocols=[knn,{protocol}]", f"finetune_learning_rate={rates}", FP32)
    results = json.loads((checkpoint.parent / "results.json").read_text())
    assert [name for _, name in rows(results)] == ["knn", "weighted_knn"]
    rates = "finetune_learning_rate=[1e38,0.01]"
    [row] = evaluate(f"protocols=[{protocol}]", rates, FP32)["protocols"]
    [selection] = row["selections"]
    assert [one["accuracy"] is None for one in selection["candidates"]] == [True, False]
    assert selection["chosen"]["learning_rate"] == 0.01


def test_features_that_are_not_finite_are_refused(evaluate, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    weight = saved["model"]["enc.layer2.0.bn2.weight"]
    weight.copy_(weight.abs() * 1e6 + 1e6)  # too large for float16
    torch.save(saved, checkpoint)
    with pytest.raises(UserError, match="not finite: features of checkpoint, seed 42; take precis"):
        evaluate("protocols=[knn]", "precision=fp16")
    assert evaluate("protocols=[knn]", FP32)["knn_acc"] is not None
    weight.mul_(1e30)  # finite, but not their norm
    torch.save(saved, checkpoint)
    with pytest.raises(UserError, match="not finite: features of checkpoint"):
        evaluate("protocols=[knn]", FP32)


@pytest.fixture
def lin(thin, trained, call, write_images, tmp_path):
    """lin("key=value", …): exit code and stderr of the command, beside a copy of the toy run."""
    write_images(tmp_path / "images", train=8, test=3)
    shutil.copytree(trained, tmp_path / "run")
    data = "dataset=folder", "data_dir=images", "batch_size=8", "finetune_epochs=2", "device=cpu"

    def lin(*overrides, script="simclr_lin.py"):
        return call(script, *data, "protocols=[knn]", *overrides)

    return lin


def test_the_command_finds_the_checkpoint(lin, call, tmp_path):
    for where in ("hydra.run.dir=run", "checkpoint=run", f"checkpoint=run/{FILE}"):
        code, error = lin(where, "hydra.run.dir=run")
        assert code == 0, error
    assert f"run/{FILE}, resnet18 at 8 px, folder, on cpu" in call.stdout
    assert "| checkpoint | knn " in (tmp_path / "run" / "simclr_lin.log").read_text()
    for code, override, reason in (
        (2, "load_epoch=2", "load_epoch=2: must be null where checkpoint is a file"),
        (2, "image_size=16", f"image_size=16: must be 8, as in run/{FILE}"),
        (1, "checkpoint=gone.pt", "there is no file gone.pt"),
    ):
        found, error = lin(f"checkpoint=run/{FILE}", "hydra.run.dir=out", override)
        assert found == code and reason in error and error.count("\n") == 1, error
    assert lin("hydra.run.dir=run", "load_epoch=2")[0] == 0
    assert "no such checkpoint in run" in lin("hydra.run.dir=run", "load_epoch=9")[1]


def test_a_second_process_is_refused(lin, tmp_path):
    """Such as another rank of torchrun."""
    with locked(tmp_path / "run", "simclr_lin"):
        code, error = lin("hydra.run.dir=run")
    assert code == 1 and "run is in use by another simclr_lin.py" in error


def test_a_copy_of_the_script_behaves_as_the_script(lin, tmp_path):
    copy = shutil.copy(REPOSITORY / "simclr_lin.py", tmp_path / "my_simclr_lin.py")
    code, error = lin("hydra.run.dir=run", "min_learning_rate=1", script=copy)
    assert code == 2 and "min_learning_rate=1" in error
    assert lin("hydra.run.dir=run", script=copy)[0] == 0
    assert (tmp_path / "run" / "results.json").exists()
