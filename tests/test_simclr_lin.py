"""Evaluation: frozen, on h, all labels, nothing chosen on the test set; and what it writes."""

import csv
import hashlib
import json
import math
import re
import shutil
from functools import partial
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import slowed
from PIL import Image
from sklearn.linear_model import LogisticRegression

import simclr
import simclr_lin
from config import PROTOCOLS
from evaluation import classifiers, protocols
from evaluation import results as report
from models import SimCLR
from system.checkpoint import load_checkpoint
from system.errors import ConfigError, UserError

PEAK = "finetune_learning_rate"
FROZEN = "protocols=[knn,linear,linear_clean,logistic]"


@pytest.fixture
def checkpoint(thin, trained, tmp_path):
    """A copy of the checkpoint of a toy run of two epochs, in a directory of its own."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "simclr_resnet18_epoch2.pt"
    return shutil.copy(trained / file.name, file)


@pytest.fixture
def evaluate(toy, checkpoint):
    """evaluate("seed=1", …): the results of the toy checkpoint, written to its directory."""

    def run(*overrides):
        return simclr_lin.evaluate(toy(*overrides, peak=PEAK), checkpoint, checkpoint.parent)

    return run


@pytest.fixture
def spy(monkeypatch):
    """The encoders, what they were called with, and the trained models of an evaluation."""
    seen = {"encoders": [], "calls": [], "trained": []}
    build, train = simclr_lin.build_encoder, classifiers.train_classifier

    def record_call(enc, inputs, output):
        n, *_, side = inputs[0].shape
        seen["calls"].append((enc.training, output.requires_grad, side, n))

    def build_and_record(*args):
        enc, dim = build(*args)
        seen["encoders"].append(enc)
        enc.register_forward_hook(record_call)
        return enc, dim

    def train_and_record(model, inputs, task, index, *args, **candidate):
        train(model, inputs, task, index, *args, **candidate)
        seen["trained"].append((model, index.tolist(), candidate))

    monkeypatch.setattr(simclr_lin, "build_encoder", build_and_record)
    monkeypatch.setattr(classifiers, "train_classifier", train_and_record)
    return seen


def rows(results):
    """The rows of a table of results by encoder and protocol."""
    return {(row["encoder"], row["protocol"]): row for row in results["protocols"]}


def test_results_are_written_with_their_source(evaluate, checkpoint):
    results = evaluate("protocols=[knn,linear]")
    assert json.loads((checkpoint.parent / "results.json").read_text()) == results
    assert results["epoch"] == 2 and results["checkpoint"] == str(checkpoint)
    assert results["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert results["config"] == load_checkpoint(checkpoint)["config"]
    assert results["evaluation_config"]["seed"] == 42
    assert results["evaluation_config"]["protocols"] == ["knn", "linear"]
    assert results["backbone"] == "resnet18" and results["dataset"] == "folder"
    assert (results["training_images"], results["test_images"]) == (24, 9)
    found = rows(results)
    assert list(found) == [("checkpoint", name) for name in ("knn", "weighted_knn", "linear")]
    for row in found.values():  # shares of the 9 test images: none is left out
        assert row["n"] == 1 and row["std"] is None and row["seconds"] > 0
        assert row["accuracy"] * 9 == pytest.approx(round(row["accuracy"] * 9), abs=1e-5)
    assert results["linear_acc"] == found["checkpoint", "linear"]["accuracy"]
    assert results["knn_acc"] == found["checkpoint", "knn"]["accuracy"]
    assert results["linear_top5"] is None  # three classes
    assert found["checkpoint", "weighted_knn"]["settings"] == {"k": 200, "temperature": 0.07}
    assert found["checkpoint", "linear"]["settings"] == {
        "views": 2, "epochs": 2, "batch_size": 8, "learning_rate": pytest.approx(0.1 * 8 / 256),
        "weight_decay": 0,
    }  # fmt: skip
    assert not list(checkpoint.parent.glob("*.tmp"))


def test_the_table_is_written_to_be_pasted(evaluate, checkpoint):
    results = evaluate("runs=2", "finetune_learning_rate=[0.002,0.01]")
    text = (checkpoint.parent / "results.md").read_text()
    assert (
        hashlib.sha256(checkpoint.read_bytes()).hexdigest() in text
        and "24 labelled training images, 9 test images" in text
    )
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["encoder", "protocol", "accuracy", "n", "top-5", "seconds a run",
                        "settings"]  # fmt: skip
    knn, linear = cells[2], cells[4]
    assert knn[:4] == ["checkpoint", "knn", f"{100 * results['knn_acc']:.2f}", "1"]
    row = rows(results)["checkpoint", "linear"]
    assert linear[2] == f"{100 * row['accuracy']:.2f} ± {100 * row['std']:.2f}"
    assert re.fullmatch(
        r"epochs 2, batch size 8, views 2; learning rate 0\.\d+, weight decay 0"
        r"( or learning rate 0\.\d+, weight decay 0)?, "
        r"the best of 2 on 3 held-out training images",
        linear[6],
    )
    assert len({len(line) for line in table}) == 1


def test_per_class_accuracy_and_confusion_matrix_are_the_headlines(evaluate, monkeypatch):
    """Predictions that are all class 1, and then all but the first."""
    monkeypatch.setattr(
        simclr_lin,
        "run_protocols",
        lambda *args: [("linear", protocols.ProtocolResult(torch.eye(3)[[0] + [1] * 8], {}), 1.0)],
    )
    results = evaluate("protocols=[linear]", "runs=2")
    assert results["classes"] == ["class0", "class1", "class2"]
    assert results["confusion"] == [[2, 4, 0], [0, 6, 0], [0, 6, 0]]  # two runs, nine images
    assert results["per_class_accuracy"] == pytest.approx(
        {"class0": 1 / 3, "class1": 1, "class2": 0}
    )


def test_the_headline_is_the_checkpoints_whatever_the_baselines():
    rows = [
        {"encoder": encoder, "protocol": protocol, "accuracy": share, "top5": share}
        for encoder, share in (("checkpoint", 0.9), ("random", 0.3), ("pixels", 0.2))
        for protocol in ("knn", "linear")
    ]
    expected = {"linear_acc": 0.9, "linear_top5": 0.9, "knn_acc": 0.9}
    assert report.headline(rows) == expected


def test_top_5_is_the_share_of_labels_among_the_five_best_and_its_mean():
    result = protocols.ProtocolResult(torch.arange(10.0).expand(10, 10), {})
    found = report.score(result, torch.arange(10), 1.0)
    assert (found["accuracy"], found["top5"]) == (0.1, 0.5)
    runs = [found, {**found, "top5": 0.7, "seconds": 3.0}]
    row = report.summarise("checkpoint", "linear", runs)
    assert row["top5"] == pytest.approx(0.6) and row["seconds"] == 2


def test_top_5_is_reported_from_ten_classes_up(toy, write_images, checkpoint, tmp_path):
    data = write_images(tmp_path / "ten", classes=10, train=2, test=1)
    cfg = toy(f"data_dir={data}", peak=PEAK)
    results = simclr_lin.evaluate(cfg, checkpoint, tmp_path)
    assert results["linear_acc"] <= results["linear_top5"] <= 1
    assert rows(results)["checkpoint", "knn"]["top5"] is None


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


ALL = f"protocols=[{','.join(PROTOCOLS)}]"


@pytest.fixture
def easy(evaluate, plain_colors):
    """evaluate with classes that are easily told, and settings that suffice for it."""

    def run(*overrides):
        settings = f"data_dir={plain_colors}", "finetune_epochs=30", "finetune_learning_rate=0.05"
        return evaluate(*settings, *overrides)

    return run


def test_every_protocol_tells_classes_that_are_easy_to_tell(easy, monkeypatch):
    """And scores by the labels of the test set."""
    found = rows(easy(ALL, "baselines=[random,pixels]"))
    names = "knn", "weighted_knn", "linear", "linear_clean", "logistic", "finetune"
    assert list(found) == [
        *(("checkpoint", name) for name in names),
        *(("random", name) for name in names),
        *(("pixels", name) for name in names[:5]),
    ]
    assert all(row["accuracy"] >= 0.95 for row in found.values()), found
    load = simclr_lin.load_split

    def shuffled(dataset, data_dir, split, *args):
        loaded = load(dataset, data_dir, split, *args)
        return loaded._replace(labels=loaded.labels.roll(1)) if split == "test" else loaded

    monkeypatch.setattr(simclr_lin, "load_split", shuffled)  # 3 of 36 labels are wrong now
    found = rows(easy(ALL))
    assert all(row["accuracy"] <= 33 / 36 + 1e-6 for row in found.values()), found


def test_the_encoder_is_the_checkpoints_before_and_after(evaluate, spy, checkpoint):
    evaluate(FROZEN)
    saved = load_checkpoint(checkpoint)["model"]
    after = spy["encoders"][0].state_dict()
    assert all(torch.equal(value, saved[f"enc.{key}"]) for key, value in after.items())
    assert spy["calls"] and {call[:2] for call in spy["calls"]} == {(False, False)}


def test_every_protocol_is_given_h_of_the_whole_split(evaluate, checkpoint, toy, monkeypatch):
    """Not z; the bank of kNN has the training images and no test image."""
    saved = load_checkpoint(checkpoint)
    model = SimCLR()
    model.load_state_dict(saved["model"])
    cfg = toy()
    expected = [
        model.eval().enc(simclr_lin.load_split("folder", cfg.data_dir, s, 8).images / 255)
        for s in ("train", "test")
    ]
    seen = []
    run = {name: f for name, f in protocols.RUN.items() if name != "finetune"}
    for name, function in run.items():
        monkeypatch.setitem(
            protocols.RUN, name, lambda task, f=function: seen.append(task) or f(task)
        )
    banks = []
    knn = protocols.knn_scores
    monkeypatch.setattr(
        protocols, "knn_scores", lambda *args, **kw: banks.append((args, kw)) or knn(*args, **kw)
    )
    evaluate(FROZEN, "precision=fp32")
    assert len(seen) == 5
    assert [kw for _, kw in banks] == [{"k": 10}, {"k": 200, "temperature": 0.07}]
    for h, test_h in [(t.h, t.test_h) for t in seen] + [(b[0], b[2]) for b, _ in banks]:
        torch.testing.assert_close(h, expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(test_h, expected[1], atol=1e-5, rtol=1e-4)


def test_the_encoder_sees_each_view_once_and_each_test_image_once(evaluate, spy):
    """Whatever the batch, the protocols, and the number of epochs."""
    evaluate(FROZEN, "batch_size=7", "finetune_views=3", "finetune_epochs=5")
    seen = [n for *_, n in spy["calls"]]
    train, test, crops = [7, 7, 7, 3], [7, 2], [7, 7, 7, 3] * 3
    assert seen == train + test + crops
    spy["calls"].clear()
    evaluate("batch_size=24", "finetune_views=9", "finetune_epochs=2")
    assert len(spy["calls"]) == 1 + 1 + 2  # crops that no epoch would see are not made


def test_the_layer_sees_each_image_once_an_epoch_and_cycles_through_the_views(
    evaluate, spy, monkeypatch
):
    """Features that tell the view, 0 to 2, and the image, 0 to 23."""
    inputs = []
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, h: inputs.append(h) or forward(self, h)
    )
    view, image = torch.meshgrid(torch.arange(3.0), torch.arange(24.0), indexing="ij")
    numbered = torch.stack([view, image], dim=-1)
    monkeypatch.setattr(protocols, "crop_features", lambda *args: numbered)
    monkeypatch.setattr(protocols, "clean_features", lambda enc, x, *args: torch.ones(len(x), 2))
    evaluate("protocols=[linear]", "batch_size=7", "finetune_views=3", "finetune_epochs=5")
    assert [len(x) for x in inputs] == [6] * 20 + [9]  # then the test images, once
    epochs = [torch.cat(inputs[4 * e : 4 * e + 4]) for e in range(5)]
    assert [epoch[:, 0].unique().tolist() for epoch in epochs] == [[0], [1], [2], [0], [1]]
    orders = [epoch[:, 1].tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


def test_linear_trains_on_crops_and_linear_clean_on_the_images_as_they_are(evaluate, monkeypatch):
    seen = []
    fit = protocols.fit_linear

    def record(task, views, *args, **candidate):
        seen.append((views, task.h))
        return fit(task, views, *args, **candidate)

    monkeypatch.setattr(protocols, "fit_linear", record)
    evaluate("protocols=[linear,linear_clean]")
    (crops, h), (clean, _) = seen
    assert clean.shape == (1, 24, 128) and torch.equal(clean[0], h)
    assert crops.shape == (2, 24, 128) and not any(torch.equal(view, h) for view in crops)


def test_the_config_reaches_the_crops(evaluate, monkeypatch):
    seen = []
    crops = protocols.crop_features
    monkeypatch.setattr(
        protocols, "crop_features", lambda *args: seen.append(args[2:]) or crops(*args)
    )
    evaluate("crop_scale=[0.2,0.9]", "flip_probability=0.3", "precision=bf16", "seed=5")
    assert seen == [(2, 8, (0.2, 0.9), 0.3, 8, torch.bfloat16, 5)]


def test_fewer_labels_than_a_batch_still_train(evaluate, spy):
    evaluate("batch_size=512", "protocols=[linear]", "labels=1", "finetune_epochs=40")
    head, index, _ = spy["trained"][0]
    torch.manual_seed(42)
    initial = torch.nn.Linear(128, 3)
    assert index == [0, 1, 2] and not torch.equal(head.weight, initial.weight)


def test_the_layer_uses_the_cosine_momentum_and_no_weight_decay(evaluate, monkeypatch):
    used = []
    step = torch.optim.SGD.step

    def record(self, *args):
        group = self.param_groups[0]
        used.append((group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]))
        assert len(group["params"]) == 2  # the layer's weight and bias, nothing of the encoder
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    evaluate("finetune_epochs=4", "epochs=1000", "finetune_learning_rate=0.2", "weight_decay=0.1")
    total = 4 * 3
    expected = [
        0.001 + 0.199 * (1 + math.cos(math.pi * step / (total - 1))) / 2 for step in range(total)
    ]
    assert [rate for rate, *_ in used] == pytest.approx(expected)
    assert {rest for _, *rest in map(tuple, used) for rest in [tuple(rest)]} == {(0.9, True, 0)}


def test_hyperparameters_are_chosen_on_a_validation_part_and_fitted_again_on_all(easy, spy):
    """The rate 1e-6 learns nothing; the part that scores it is not in what it is fitted on."""
    for protocol in ("linear", "linear_clean", "finetune"):
        spy["trained"].clear()
        results = easy(
            f"protocols=[{protocol}]", "min_learning_rate=0",
            "finetune_learning_rate=[1e-6,0.05]", "finetune_weight_decay=[0,0.001]",
        )  # fmt: skip
        [row] = results["protocols"]
        [selection] = row["selections"]
        assert selection["validation_images"] == 3 and len(selection["candidates"]) == 4
        assert selection["chosen"] == {"learning_rate": 0.05, "weight_decay": 0}  # the first best
        assert row["settings"] | selection["chosen"] == row["settings"]
        assert row["accuracy"] >= 0.95
        *tried, (_, everything, final) = spy["trained"]
        assert final == selection["chosen"] and everything == list(range(24))
        assert [candidate for *_, candidate in tried] == [
            {"learning_rate": rate, "weight_decay": decay}
            for rate in (1e-6, 0.05) for decay in (0, 0.001)
        ]  # fmt: skip
        [rest] = {tuple(index) for _, index, _ in tried}
        part = sorted(set(range(24)) - set(rest))
        assert [image // 8 for image in part] == [0, 1, 2] and len(rest) == 21


def test_candidates_are_scored_on_the_validation_part_alone(evaluate, monkeypatch):
    """By its inputs and labels, in their order; then the test inputs, once."""
    scored = []

    def fit(index, c):
        def classifier(x):
            scored.append((c, len(index), x.flatten().tolist()))
            return torch.nn.functional.one_hot((x.flatten() + c) % 3, 3).float()

        return classifier

    labels = torch.arange(30) % 3
    train = simclr_lin.Split(None, labels, ["a", "b", "c"])
    inputs, test = labels[:, None] + 3 * torch.arange(30)[:, None], torch.tensor([[1], [2]])
    task = protocols.EvaluationTask(*[None] * 3, train, *[None] * 9, seed=5, h=inputs, test_h=test)
    found = protocols.select_and_fit(task, [{"c": 1}, {"c": 0}], fit)
    part = inputs[protocols.hold_out(labels, 0.1, 5, "")[1]].flatten().tolist()
    assert scored == [(1, 27, part), (0, 27, part), (0, 30, [1, 2])]
    assert found.scores.argmax(dim=1).tolist() == [1, 2]
    assert [c["accuracy"] for c in found.selection["candidates"]] == [0, 1]


def test_the_penalty_of_the_logistic_regression_is_chosen_on_training_images(easy, monkeypatch):
    fitted = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(
        LogisticRegression, "fit", lambda self, x, y: fitted.append((self.C, x)) or fit(self, x, y)
    )
    [row] = easy("protocols=[logistic]")["protocols"]
    *tried, (c, x) = fitted
    assert [len(x) for _, x in tried] == [21] * len(protocols.INVERSE_PENALTIES) and len(x) == 24
    assert row["settings"] == {"C": c} == row["selections"][0]["chosen"]
    assert abs(x.mean()) < 1e-6  # standardised


@pytest.mark.parametrize("setting", ["finetune_learning_rate=[0.1,0.2]", "protocols=[logistic]"])
def test_too_few_labels_to_choose_with_are_refused_before_anything_is_computed(
    evaluate, spy, setting
):
    with pytest.raises(UserError, match=r"no class has two images.*: give more labels, or one fin"):
        evaluate("labels=1", setting)
    assert not spy["calls"]


def test_nothing_is_chosen_on_the_test_set(evaluate, spy, monkeypatch):
    """Other test images and labels give the same layers and choices, to the bit."""
    settings = ALL, "finetune_learning_rate=[0.01,0.1]"
    first = [row["selections"] for row in evaluate(*settings)["protocols"]]
    heads = [model.state_dict() for model, *_ in spy["trained"]]
    spy["trained"].clear()
    load = simclr_lin.load_split

    def other_test_set(dataset, data_dir, split, *args):
        found = load(dataset, data_dir, split, *args)
        if split == "test":
            found = found._replace(images=255 - found.images, labels=found.labels.flip(0))
        return found

    monkeypatch.setattr(simclr_lin, "load_split", other_test_set)
    assert [row["selections"] for row in evaluate(*settings)["protocols"]] == first
    for (model, *_), before in zip(spy["trained"], heads, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_few_labels_are_stratified_drawn_by_seed_and_the_same_for_every_protocol(
    evaluate, checkpoint, monkeypatch
):
    seen = []
    run = simclr_lin.run_protocols
    monkeypatch.setattr(
        simclr_lin, "run_protocols", lambda names, task: seen.append(task.train) or run(names, task)
    )
    results = evaluate("labels=2", "runs=2", "baselines=[random,pixels]", "seed=3")
    assert [split.labels.tolist() for split in seen] == [[0, 0, 1, 1, 2, 2]] * 6
    first, second, *rest = [split.images for split in seen]
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(rest, [first, second] * 2, strict=True))
    assert results["training_images"] == 6
    assert {row["n"] for row in results["protocols"]} == {2}  # kNN too: its bank is random
    before = (checkpoint.parent / "results_labels2.json").read_text()
    assert json.loads(before) == results
    assert evaluate("labels=0.25")["training_images"] == 6
    evaluate()
    written = {path.name for path in checkpoint.parent.glob("results*")}
    assert written == {
        f"results{labels}.{suffix}"
        for labels in ("", "_labels2", "_labels0.25") for suffix in ("json", "md")
    }  # fmt: skip
    assert (checkpoint.parent / "results_labels2.json").read_text() == before
    with pytest.raises(UserError, match="9 images of each class are too many"):
        evaluate("labels=9")


def test_runs_repeat_what_is_random_over_seeds(evaluate, spy):
    results = evaluate("runs=3", "seed=7", "baselines=[random]", "protocols=[knn,linear]")
    found = rows(results)
    assert found["checkpoint", "knn"]["n"] == 1 and found["random", "knn"]["n"] == 3
    row = found["checkpoint", "linear"]
    assert row["n"] == len(row["accuracies"]) == 3
    assert row["accuracy"] == mean(row["accuracies"]) and row["std"] == stdev(row["accuracies"])
    heads = [model.weight for model, *_ in spy["trained"]]
    assert not torch.equal(heads[0], heads[1])
    randoms = [enc.conv1.weight for enc in spy["encoders"][3:]]
    assert len(randoms) == 3 and not torch.equal(randoms[0], randoms[1])
    spy["trained"].clear()
    evaluate("seed=8", "protocols=[linear]")
    assert torch.equal(spy["trained"][0][0].weight, heads[1])  # seed + 1, whatever else runs


def test_the_random_baseline_is_the_same_network_untrained(evaluate, spy):
    evaluate("baselines=[random]")
    trained, random = spy["encoders"]
    assert random.conv1.weight.shape == trained.conv1.weight.shape
    assert not torch.equal(random.conv1.weight, trained.conv1.weight)


def test_pixels_have_no_encoder_and_no_fine_tuning(evaluate, spy):
    found = rows(evaluate(ALL, "baselines=[pixels]"))
    assert [name for encoder, name in found if encoder == "pixels"] == [
        "knn", "weighted_knn", "linear", "linear_clean", "logistic",
    ]  # fmt: skip
    assert spy["trained"][-1][0].in_features == 3 * 8 * 8


def test_fine_tuning_trains_all_of_a_copy(evaluate, spy, checkpoint):
    """Of an encoder that a protocol before it has frozen."""
    results = evaluate("protocols=[knn,finetune]")
    assert list(rows(results))[2:] == [("checkpoint", "finetune")] and results["linear_acc"] is None
    assert "confusion" not in results
    [(model, index, _)] = spy["trained"]
    saved = load_checkpoint(checkpoint)["model"]
    tuned = model[0].state_dict()
    assert index == list(range(24))
    assert not torch.equal(tuned["conv1.weight"], saved["enc.conv1.weight"])
    assert not torch.equal(tuned["bn1.running_mean"], saved["enc.bn1.running_mean"])
    kept = spy["encoders"][0].state_dict()
    assert all(torch.equal(kept[name], saved[f"enc.{name}"]) for name in kept)
    modes = [call[0] for call in spy["calls"][5:]]  # after kNN; hooks are copied with the encoder
    assert modes == [True] * 6 + [False] * 2  # two epochs, then the test images


def test_fine_tuning_sees_new_crops_in_every_epoch(evaluate, monkeypatch):
    drawn = []
    crop = classifiers.random_crop_flip

    def record(images, u, *args):
        drawn.append((tuple(u.flatten().tolist()), args))
        return crop(images, u, *args)

    monkeypatch.setattr(classifiers, "random_crop_flip", record)
    evaluate("protocols=[finetune]", "crop_scale=[0.2,0.9]", "flip_probability=0.3")
    assert len(drawn) == 6 == len({u for u, _ in drawn})
    assert {args for _, args in drawn} == {(8, (0.2, 0.9), 0.3)}


def test_crops_of_fine_tuning_are_made_in_float32(evaluate, monkeypatch):
    """As in pretraining: in half precision the weights of a resize do not sum to 1."""
    crops = []
    crop = classifiers.random_crop_flip
    monkeypatch.setattr(
        classifiers, "random_crop_flip", lambda *args: crops.append(crop(*args)) or crops[-1]
    )
    evaluate("protocols=[finetune]", "precision=bf16")
    assert {x.dtype for x in crops} == {torch.float32}


def test_no_batch_of_fine_tuning_has_one_image(evaluate, spy):
    """For which batch norm has no statistics: nine labels in batches of two."""
    evaluate("protocols=[finetune]", "labels=3", "batch_size=2", "finetune_learning_rate=0.1")
    assert sorted({n for training, *_, n in spy["calls"] if training}) == [2, 3]


def test_fine_tuning_in_float16_is_scaled(evaluate, monkeypatch):
    scalers = []
    make = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, **kw: scalers.append(make(*a, **kw)) or scalers[-1]
    )
    evaluate("protocols=[finetune,linear]", "precision=fp16")
    assert [scaler.is_enabled() for scaler in scalers] == [True, False]


def test_architecture_and_size_come_from_the_checkpoint(thin, toy, spy, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    simclr.pretrain(toy("epochs=1", "cifar_stem=false", "hidden_dim=16", "image_size=32"), run)
    file = run / "simclr_resnet18_epoch1.pt"
    cfg = toy("image_size=8", peak=PEAK)
    simclr_lin.evaluate(cfg, file, run)
    assert spy["encoders"][0].conv1.kernel_size == (7, 7)
    assert {side for _, _, side, _ in spy["calls"]} == {32}
    with pytest.raises(ConfigError, match=r"image_size=8: must be 32, as in .*leave it out"):
        simclr_lin.evaluate(cfg, file, run, frozenset({"image_size", "seed"}))


def test_weights_that_do_not_fit_the_config_are_refused(evaluate, checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    for change, message in (
        ({"backbone": "resnet34"}, "do not fit its config.*layer1.1"),
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


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear_clean", "logistic"])
@pytest.mark.parametrize("place", ["enc.train()", "weights"])
def test_a_frozen_protocol_that_moves_the_encoder_fails(evaluate, monkeypatch, place, protocol):
    """The two bugs of the published repository, put into each protocol."""
    run = protocols.RUN[protocol]

    def unfrozen(task):
        if place == "enc.train()":
            task.enc.train()
            with torch.no_grad():
                task.enc(torch.rand(4, 3, 8, 8))
        else:
            with torch.no_grad():
                next(task.enc.parameters()).add_(1e-6)
        return run(task)

    monkeypatch.setitem(protocols.RUN, protocol, unfrozen)
    with pytest.raises(RuntimeError, match="the frozen encoder has changed"):
        evaluate(f"protocols=[{protocol}]")


def test_one_class_is_refused(toy, write_images, checkpoint, tmp_path):
    data = write_images(tmp_path / "one", classes=1, train=2, test=1)
    with pytest.raises(UserError, match="one class, class0: a classifier needs two or more"):
        simclr_lin.evaluate(toy(f"data_dir={data}", peak=PEAK), checkpoint, tmp_path)


def test_predictions_are_those_of_the_linear_layer(toy, checkpoint, plain_colors, tmp_path):
    """Of a folder of images in no classes; the test set is not read."""
    folder = tmp_path / "unknown"
    folder.mkdir()
    for name, source in (("ä b.png", "class2"), ("sub/c.png", "class0")):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.open(plain_colors / "test" / source / "0.png").save(folder / name)
    (plain_colors / "test").rename(tmp_path / "hidden")
    cfg = toy(f"data_dir={plain_colors}", f"predict={folder}", "finetune_epochs=30",
              "finetune_learning_rate=0.05", peak=PEAK)  # fmt: skip
    path = simclr_lin.predict(cfg, checkpoint, checkpoint.parent)
    with open(path, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["file"], row["class"]) for row in found] == [
        (str(folder / "sub/c.png"), "class0"), (str(folder / "ä b.png"), "class2"),
    ]  # fmt: skip
    assert all(0.5 < float(row["probability"]) <= 1 for row in found)
    with pytest.raises(UserError, match=r"nowhere: there is no directory .*nowhere"):
        cfg = toy(f"predict={tmp_path / 'nowhere'}", peak=PEAK)
        simclr_lin.predict(cfg, checkpoint, checkpoint.parent)


def test_seconds_are_those_that_a_protocol_takes_alone(evaluate, monkeypatch):
    """Features are computed once, and count for each protocol that has them."""
    clock = [0.0]
    takes = partial(slowed, clock)
    monkeypatch.setattr(protocols, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(protocols, "clean_features", takes(10, protocols.clean_features))
    for name, function in [*protocols.RUN.items()]:
        monkeypatch.setitem(protocols.RUN, name, takes(1, function))
    found = rows(evaluate("protocols=[knn,linear,finetune]"))
    assert [row["seconds"] for row in found.values()] == [21, 21, 21, 1]
