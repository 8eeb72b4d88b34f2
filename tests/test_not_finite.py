"""What is not finite outside pretraining is refused; what was finished before it is kept."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from evaluation import features, protocols
from images.datasets import Split
from system.checkpoint import load_encoder, to_bytes
from system.errors import UserError

WEIGHTS = Path("w.pt")


@pytest.fixture
def evaluate(thin, trained, call, write_images, tmp_path):
    """evaluate("key=value", …): exit code, stderr and the rows of results.json, by protocol."""
    write_images(tmp_path / "images", train=8, test=3)
    shutil.copy(trained / "simclr_resnet18_epoch2.pt", tmp_path / WEIGHTS)
    data = "dataset=folder", "data_dir=images", "batch_size=8", "finetune_epochs=2", "device=cpu"

    def evaluate(*overrides):
        where = f"checkpoint={WEIGHTS}", "hydra.run.dir=out"
        code, error = call("simclr_lin.py", *data, *where, *overrides)
        results = tmp_path / "out" / "results.json"
        rows = json.loads(results.read_text())["protocols"] if results.exists() else []
        return code, error, {row["protocol"]: row for row in rows}

    return evaluate


def spoil(name, change):
    """Change one tensor of the checkpoint by its name."""
    saved = torch.load(WEIGHTS, weights_only=True)
    saved["model"][name] = change(saved["model"][name])
    WEIGHTS.write_bytes(to_bytes(saved))


def one(value, tensor):
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[0] = value
    return tensor


UNUSABLE = {
    "enc.conv1.weight": partial(one, torch.inf),
    "enc.layer1.0.conv2.weight": partial(one, -torch.inf),
    "enc.bn1.bias": partial(one, torch.nan),
    "enc.layer2.0.bn1.running_mean": partial(one, torch.nan),
    "enc.layer2.0.bn2.running_var": partial(one, torch.inf),
    "enc.bn1.running_var": partial(one, -1.0),  # finite, its root is not
    "projector.2.weight": partial(one, torch.nan),
    "enc.layer2.0.conv2.weight": lambda w: w.double() * 1e300,  # finite, in float32 not
}


def test_a_checkpoint_with_a_weight_that_is_not_finite_is_refused(
    evaluate, call, trained, tmp_path
):
    whole = WEIGHTS.read_bytes()
    for name, change in UNUSABLE.items():
        WEIGHTS.write_bytes(whole)
        spoil(name, change)
        code, error, rows = evaluate("protocols=[knn]")
        assert (code, rows) == (1, {}), name
        assert error.startswith(f"error: w.pt: {name} has values that are not finite"), error
        assert error.count("\n") == 1 and "take another file" in error
        with pytest.raises(UserError, match="not finite"):
            load_encoder(WEIGHTS)
    shutil.copytree(trained, tmp_path / "run")
    shutil.copy(WEIGHTS, tmp_path / "run" / "simclr_resnet18_epoch2.pt")
    code, error = call(
        "plot.py", "run", "device=cpu", f"data_dir={tmp_path}/images", "--out", "pic"
    )
    assert code == 0 and f"{name} has values that are not finite" in call.stdout  # curves are drawn
    code, error = call(
        "simclr.py", "dataset=folder", "data_dir=images", "image_size=8", "device=cpu",
        "batch_size=8", "init=w.pt", "hydra.run.dir=new",
    )  # fmt: skip
    assert code == 1 and error.startswith("error: init=w.pt: layer2.0.conv2.weight has values that")


def scale(factor):
    spoil("enc.layer2.0.bn2.weight", lambda w: w.abs() * factor + factor)


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear_clean", "logistic"])
def test_features_that_are_not_finite_are_refused(evaluate, protocol):
    scale(1e6)  # too large for float16
    code, error, rows = evaluate(f"protocols=[{protocol}]", "precision=fp16")
    said = error.splitlines()[-1]
    assert (code, rows) == (1, {}) and said.startswith(f"error: features for {protocol}")
    assert "of checkpoint, seed 42: the output of the network is not finite (norm inf): " in said
    assert said.endswith("take precision=fp32, or take another checkpoint")
    code, error, rows = evaluate(f"protocols=[{protocol}]", "precision=fp32")
    assert code == 0 and protocol in rows
    scale(1e30)  # finite, but not their norm
    code, error, _ = evaluate(f"protocols=[{protocol}]", "precision=fp32")
    assert code == 1 and error.splitlines()[-1].endswith("(norm inf): take another checkpoint")


@pytest.mark.parametrize("protocol", ["linear", "linear_clean", "finetune"])
def test_a_classifier_that_diverges_is_refused_and_what_was_finished_is_kept(evaluate, protocol):
    for rate in ("1e38", "1e20"):
        code, error, rows = evaluate(
            f"protocols=[knn,{protocol}]", f"finetune_learning_rate={rate}", "precision=fp32"
        )
        said = error.splitlines()[-1]
        assert code == 1 and list(rows) == ["knn", "weighted_knn"]
        assert (
            said.startswith(f"error: {protocol} of checkpoint, seed 42: ") and "not finite" in said
        )
        assert said.endswith(": lower finetune_learning_rate")
        assert "the loss in epoch 1 is" in said or rate == "1e20"  # not only the scores at the end
    code, error, _ = evaluate("predict=images/test", "finetune_learning_rate=1e38")
    assert code == 1 and "not finite" in error and not Path("out/predictions.csv").exists()


def test_scores_that_are_not_finite_are_refused_whatever_the_protocol(evaluate, monkeypatch):
    for number, name in enumerate(protocols.RUN):
        result = protocols.ProtocolResult(
            torch.full((9, 3), (torch.nan, torch.inf)[number % 2]), {}
        )
        monkeypatch.setitem(protocols.RUN, name, lambda task, result=result: result)
        code, error, rows = evaluate(f"protocols=[{name.removeprefix('weighted_')}]")
        assert (code, rows) == (1, {}) and "the scores are not finite" in error.splitlines()[-1]


@pytest.mark.parametrize("protocol", ["linear", "linear_clean", "finetune"])
def test_a_candidate_that_is_not_finite_loses_and_all_of_them_are_refused(evaluate, protocol):
    code, error, rows = evaluate(
        f"protocols=[{protocol}]", "finetune_learning_rate=[1e38,0.01]", "precision=fp32"
    )
    assert code == 0, error
    [selection] = rows[protocol]["selections"]
    assert selection["chosen"]["learning_rate"] == 0.01
    assert [c["accuracy"] is None for c in selection["candidates"]] == [True, False]
    log = Path("out/simclr_lin.log").read_text()
    assert "warning: one of 2 candidates is left out: " in log
    before = Path("out/results.json").read_bytes()
    code, error, _ = evaluate(f"protocols=[{protocol}]", "finetune_learning_rate=[1e38,1e37]")
    assert code == 1 and "no candidate of 2 is left: " in error.splitlines()[-1]
    assert Path("out/results.json").read_bytes() == before  # none of its protocols was finished


def test_a_candidate_with_no_accuracy_at_all_is_still_better_than_one_that_is_not_finite():
    """Of which the worst are 0 out of N."""
    train = Split(None, torch.arange(30) % 3, ["a", "b", "c"])
    task = protocols.EvaluationTask(
        *[None] * 3,
        train,
        *[None] * 9,
        seed=5,
        h=train.labels[:, None],
        test_h=train.labels[:, None],
    )

    def fit(index, c):
        return lambda h: torch.eye(3)[(h[:, 0] + 1) % 3] * c

    found = protocols.select_and_fit(task, [{"c": torch.nan}, {"c": 1.0}], fit)
    assert found.selection["chosen"] == {"c": 1.0}
    assert [c["accuracy"] for c in found.selection["candidates"]] == [None, 0]


def test_results_of_finished_protocols_are_kept_whatever_ends_the_others(evaluate, monkeypatch):
    """They belong to this evaluation alone, and take the place of earlier ones."""
    evaluate("protocols=[logistic]", "seed=7")
    names = "protocols=[knn,linear,linear_clean,logistic]"
    for end, expected in ((KeyboardInterrupt(), 130), (OSError(28, "No space left"), 1)):

        def fail(task, end=end):
            raise end

        monkeypatch.setitem(protocols.RUN, "linear_clean", fail)
        code, error, rows = evaluate(names)
        assert code == expected and list(rows) == ["knn", "weighted_knn", "linear"], error
        results = json.loads(Path("out/results.json").read_text())
        assert results["linear_acc"] == rows["linear"]["accuracy"] and results["confusion"]
        assert results["evaluation_config"]["seed"] == 42
        table = Path("out/results.md").read_text()
        assert "| linear " in table and "logistic" not in table
    run, done = protocols.RUN["linear"], []
    monkeypatch.setitem(
        protocols.RUN, "linear", lambda t: fail(t) if done else done.append(run(t)) or done[0]
    )
    code, error, rows = evaluate("protocols=[linear]", "runs=3")
    assert code == 1 and rows["linear"]["n"] == 1


def test_features_that_are_not_finite_leave_knn_out_of_pretraining(caplog):
    enc = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).train()
    torch.nn.init.constant_(enc[1].bias, torch.inf)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(12) % 3, ["a", "b", "c"])
    inference = torch.arange(9), torch.arange(9, 12), 8, 5, torch.float32
    assert features.held_out_knn(enc, split, *inference) is None and enc.training
    assert "no kNN: in eval mode the features are not finite" in caplog.text
