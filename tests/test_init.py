"""init=PATH: pretraining starts from the encoder of a file, and is never taken for a resume."""

import shutil

import pytest
import torch
from conftest import stop_in_step, thin_resnet

import simclr
import training.run
from config import ConfigError
from models import SimCLR
from system.checkpoint import load_checkpoint, load_init, to_bytes
from system.errors import Stopped, UserError

pytestmark = pytest.mark.usefixtures("thin")
CHECKPOINT = "simclr_resnet18_epoch2.pt"


def new_model(**options: object) -> SimCLR:
    torch.manual_seed(3)
    return SimCLR("resnet18", **options)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The names of what is equal in two state dicts."""
    return {name for name in one if name in other and torch.equal(one[name], other[name])}


@pytest.mark.parametrize("name", [CHECKPOINT, "simclr_resnet18_last.pt", "."])
def test_a_checkpoint_a_training_state_or_a_run_directory_is_taken(trained, caplog, name):
    model, fresh = new_model(), new_model()
    caplog.set_level("INFO")
    load_init(model.enc, str(trained / name))
    path = trained / (name if name != "." else CHECKPOINT)
    assert caplog.messages == [f"init: the encoder starts from {path}"]
    theirs = torch.load(path, weights_only=True)["model"]
    ours = model.state_dict()
    assert same(ours, theirs) >= {key for key in theirs if key.startswith("enc.")}
    head = {key for key in theirs if key.startswith("projector.")}
    assert head <= same(ours, fresh.state_dict()) and model.enc.bn1.weight.requires_grad


@pytest.mark.parametrize("cifar_stem", [True, False])
def test_a_torchvision_state_dict_is_taken_but_for_fc_and_a_stem_of_another_shape(
    tmp_path, caplog, cifar_stem
):
    theirs = thin_resnet(None).state_dict()
    theirs["bn1.running_mean"] += 0.5  # of a trained network
    torch.save(theirs, tmp_path / "resnet.pth")
    model, fresh = new_model(cifar_stem=cifar_stem), new_model(cifar_stem=cifar_stem)
    caplog.set_level("INFO")
    load_init(model.enc, str(tmp_path / "resnet.pth"))
    line = f"init: the encoder starts from {tmp_path}/resnet.pth"
    but = ", but for conv1, which is not (64, 3, 3, 3)" if cifar_stem else ""
    assert caplog.messages == [line + but]
    ours = model.enc.state_dict()
    stem = fresh.enc.state_dict() if cifar_stem else theirs
    assert torch.equal(ours["conv1.weight"], stem["conv1.weight"])
    rest = {key for key in theirs if not key.startswith(("fc.", "conv1."))}
    assert len(rest) > 20 and rest <= same(ours, theirs)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "enc.", "module.enc.", "_orig_mod.module.enc."]
)
def test_keys_of_a_wrapped_model_are_taken(tmp_path, prefix):
    """As DistributedDataParallel, torch.compile and the published repository save them."""
    theirs, model = new_model().enc.state_dict(), SimCLR("resnet18")
    weights = {f"{prefix}{key}": value for key, value in theirs.items()}
    if "enc." in prefix:
        weights[prefix.replace("enc.", "projector.0.bias")] = torch.ones(3)
    torch.save(weights, tmp_path / "x.pt")
    load_init(model.enc, str(tmp_path / "x.pt"))
    assert same(model.enc.state_dict(), theirs) == {*theirs}


WRONG = {
    "missing": (lambda w: [w.pop(f"layer1.0.bn2.{key}") for key in ("weight", "bias")],
                r"missing: \['layer1\.0\.bn2\.weight', 'layer1\.0\.bn2\.bias'\], .*backbone=NAME"),
    "unexpected": (lambda w: w.update({f"layer9.{i}": torch.ones(1) for i in range(5)}),
                   r"unexpected: \['layer9\.0', 'layer9\.1'\]\): .*backbone=NAME"),
    "both": (lambda w: w.update({"stem.weight": w.pop("conv1.weight")}),
             r"missing: \['conv1\.weight'\], unexpected: \['stem\.weight'\]"),
    "shape": (lambda w: w.update({"bn1.bias": torch.ones(3)}), r"size mismatch for bn1\.bias"),
    "not finite": (lambda w: w["layer2.0.bn1.running_var"].fill_(torch.nan),
                   r"layer2\.0\.bn1\.running_var has values that are not finite, or neg"),
    "a number": (lambda w: w.update(epoch=3), "must hold a checkpoint of simclr.py or a ResNet's"),
    "no weights": (lambda w: w.clear(), r"missing: \['conv1\.weight', 'bn1\.weight'\]"),
    "a number as key": (lambda w: w.update({7: torch.ones(1)}), r"unexpected: \['7'\]"),
    "no dict": (lambda w: w.update(model=torch.ones(2)), "must hold a checkpoint of simclr.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_with_the_first_keys(tmp_path, case):
    change, message = WRONG[case]
    weights = new_model().enc.state_dict()
    change(weights)
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"^init={tmp_path}/x\.pth.*{message}") as error:
        load_init(new_model().enc, str(tmp_path / "x.pth"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_every_rank_loads_the_file_itself(toy, trained, tmp_path, monkeypatch):
    """DistributedDataParallel has sent the weights of rank 0 before."""
    monkeypatch.setattr(training.run, "rank", lambda: 1)
    cfg = toy(f"init={trained}")
    learner = simclr.make_learner(cfg, torch.device("cpu"))
    simclr.Run(tmp_path, cfg, learner, images="", steps=1).start(None)
    theirs = load_checkpoint(trained / CHECKPOINT)["model"]
    encoder = {key for key in theirs if key.startswith("enc.")}
    assert encoder <= same(learner.ddp_model.state_dict(), theirs)


@pytest.fixture
def run(toy, trained, tmp_path, monkeypatch):
    """run(overrides, stop=k): pretrain in `run`, from start.pt, whose bn1 has biases of 3."""
    saved = torch.load(trained / CHECKPOINT, weights_only=True)
    saved["model"]["enc.bn1.bias"].fill_(3)
    (tmp_path / "start.pt").write_bytes(to_bytes(saved))
    (tmp_path / "run").mkdir()

    def pretrain(*overrides, stop=None, init=tmp_path / "start.pt"):
        stop_in_step(monkeypatch, stop)
        simclr.pretrain(toy(f"init={init}", "knn_interval=0", *overrides), tmp_path / "run")
        return load_checkpoint(tmp_path / "run" / CHECKPOINT)

    return pretrain


def test_a_run_from_a_file_says_so_and_does_not_read_it_again_when_resumed(run, tmp_path, caplog):
    caplog.set_level("INFO")
    with pytest.raises(Stopped):
        run(stop=4)
    assert caplog.messages[0].startswith(f"init: the encoder starts from {tmp_path}/start.pt")
    (tmp_path / "start.pt").unlink()
    saved = run()
    assert caplog.text.count("init: ") == 1 and "1 epochs and 1 steps are done" in caplog.text
    assert saved["model"]["enc.bn1.bias"].mean() == pytest.approx(3, abs=0.3)
    assert saved["config"]["init"] == str(tmp_path / "start.pt")
    for other in ("null", "y.pt"):
        now = "None" if other == "null" else other
        with pytest.raises(ConfigError, match=rf"init={now} \(was .*start\.pt\): must be as in"):
            run(init=other)


def test_a_run_may_start_over_from_its_own_checkpoint(run, tmp_path):
    run()
    run("resume=false", init=tmp_path / "run")
    assert (tmp_path / "run" / "old-1" / CHECKPOINT).is_file()


def test_an_init_that_does_not_fit_leaves_the_run_that_is_there(run, tmp_path):
    run()
    shutil.copy(tmp_path / "run" / "metrics.jsonl", tmp_path / "x.pt")
    with pytest.raises(UserError, match="is damaged, or holds more than plain data"):
        run("resume=false", init=tmp_path / "x.pt")
    assert (tmp_path / "run" / CHECKPOINT).is_file() and not (tmp_path / "run" / "old-1").exists()
