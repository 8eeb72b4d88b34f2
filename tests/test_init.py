"""init=PATH: pretraining starts from the encoder of a file, and is never taken for a resume."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import thin_resnet

import simclr
from evaluation.features import build_encoder
from models import SimCLR
from system.checkpoint import load_checkpoint, load_init, save_checkpoint, to_bytes
from system.errors import ConfigError, Stopped, UserError

pytestmark = pytest.mark.usefixtures("thin")
SMALL = "projection_dim=8", "hidden_dim=16"


@pytest.fixture
def start(toy):
    """start(init, overrides): the training at its start; None: random weights."""

    def start(init=None, *overrides):
        cfg = toy(*SMALL, *overrides, *([] if init is None else [f"init={init}"]))
        return simclr.start_training(cfg, torch.device("cpu"), 6)

    return start


def same(one, other):
    """The names of what is equal in two state dicts of the same keys."""
    assert one.keys() == other.keys()
    return {name for name in one if torch.equal(one[name], other[name])}


@pytest.mark.parametrize(("name", "epoch"), [("epoch1", 1), ("last", 2)])
def test_the_encoder_of_a_checkpoint_or_state_is_taken_and_the_head_starts_anew(
    start, toy, tmp_path, name, epoch
):
    run = tmp_path / "run"
    run.mkdir()
    simclr.pretrain(toy(*SMALL, "seed=7", "log_interval=1"), run)
    file = run / f"simclr_resnet18_{name}.pt"
    theirs = torch.load(file, weights_only=True)["model"]
    training, fresh = start(file), start()
    ours = training.model.state_dict()
    assert same(ours, theirs) == {name for name in theirs if name.startswith("enc.")}
    head = {name for name in theirs if name.startswith("projector.")}
    assert head <= same(ours, fresh.model.state_dict())
    line = f"init: the encoder starts from {file}, epoch {epoch}, without projector"
    assert training.init == line and fresh.init is None
    assert training.epoch == 0 and not training.optimizer.state and training.model.training
    assert torch.equal(training.rng.get_state(), fresh.rng.get_state())
    assert training.model.enc.layer1[0].conv1.weight.requires_grad


@pytest.mark.parametrize("as_in", ["today", "2017"])
@pytest.mark.parametrize("stem", ["same", "another"])
def test_a_torchvision_state_dict_is_taken_but_for_fc_and_a_stem_of_another_shape(
    start, tmp_path, as_in, stem
):
    """Before torch 1.6 files were no zip archives; torchvision's of then count no batches."""
    file, theirs = tmp_path / "resnet.pth", thin_resnet(None).state_dict()
    theirs["bn1.running_mean"] += 0.5  # of a trained network
    old = as_in == "2017"
    for name in [name for name in theirs if old and name.endswith("num_batches_tracked")]:
        del theirs[name]
    torch.save(theirs, file, _use_new_zipfile_serialization=not old)
    shape = [] if stem == "another" else ["cifar_stem=false", "image_size=32"]
    training, fresh = start(file, *shape), start(None, *shape)
    ours = training.model.enc.state_dict()
    assert torch.equal(ours.pop("conv1.weight"), (theirs if shape else fresh.model.enc.state_dict())
                       ["conv1.weight"])  # fmt: skip
    taken = {name for name in theirs if not name.startswith(("fc.", "conv1."))}
    assert len(taken) > 20 and all(torch.equal(ours[name], theirs[name]) for name in taken)
    line = f"init: the encoder starts from {file}, a state dict, without fc"
    other = "; conv1 has another shape, (64, 3, 7, 7) not (64, 3, 3, 3): stays random"
    assert training.init == line + ("" if shape else other)


def test_the_weights_of_the_published_repository_are_taken(start, tmp_path):
    """They are the model's state dict alone."""
    theirs = SimCLR().state_dict()
    torch.save(theirs, tmp_path / "theirs.pt")
    training = start(tmp_path / "theirs.pt")
    assert torch.equal(training.model.enc.bn1.weight, theirs["enc.bn1.weight"])
    assert training.init.endswith("theirs.pt, a state dict, without projector")


def changed(change):
    """The state dict of a ResNet as backbone=resnet18 has it here, after `change`."""
    weights = SimCLR(projection_dim=8, hidden_dim=16).enc.state_dict()
    change(weights)
    return weights


WRONG = {
    "a key is missing": (lambda w: w.pop("layer1.0.bn2.bias"), r'Missing key.*"layer1\.0\.bn2'),
    "one too many": (lambda w: w.update(layer9=torch.ones(1)), 'Unexpected key.*"layer9"'),
    "no stem": (lambda w: w.pop("conv1.weight"), r'Missing key.*"conv1\.weight"'),
    "another shape": (lambda w: w.update({"bn1.bias": torch.ones(3)}), r"size mismatch for bn1\.b"),
    "not finite": (
        lambda w: w["layer2.0.bn1.running_var"].fill_(float("nan")),
        r"layer2\.0\.bn1\.running_var has values that are not finite, or neg.*: take another file",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_whatever_else_does_not_fit_is_refused_with_its_name(start, tmp_path, case):
    change, message = WRONG[case]
    torch.save(changed(change), tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"init={tmp_path}/x\.pth: .*{message}") as error:
        start(tmp_path / "x.pth")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert "backbone=NAME" in str(error.value) or case == "not finite"


def test_every_rank_gets_the_weights_of_rank_zero(start, tmp_path, monkeypatch):
    """DistributedDataParallel sends them when it wraps the model: it has to have them by then."""
    torch.save(changed(lambda w: w["bn1.bias"].fill_(3)), tmp_path / "x.pth")
    seen = []
    monkeypatch.setattr(
        simclr.distributed, "wrap_ddp", lambda model, _: seen.append(model.enc.bn1.bias[0].item())
    )
    start(tmp_path / "x.pth")
    assert seen == [3]


def test_a_file_before_torch_1_6_is_read_for_init_alone_and_nothing_in_it_is_executed(tmp_path):
    path, model = tmp_path / "x.pt", SimCLR("resnet18", 8, 16)
    content = {"model": model.state_dict(), "config": {}, "epoch": 1}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert "epoch 1" in load_init(model.enc, str(path))
    with pytest.raises(UserError, match="not a zip file"):
        load_checkpoint(path)
    torch.save(model, path, _use_new_zipfile_serialization=False)  # a pickled module
    with pytest.raises(UserError, match="it is not the plain data of simclr"):
        load_init(model.enc, str(path))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"x\.pt is damaged or no checkpoint"):
        load_init(model.enc, str(path))


@pytest.fixture
def run(call, write_images, tmp_path, monkeypatch):
    """run(overrides): the command, which must succeed; it finds ~/start.pt, all of whose batch-norm
    biases are 3. Returns the lines of its log."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "images", train=8, test=3)
    model = SimCLR("resnet18", 8, 16)
    for name, weight in model.state_dict().items():
        weight.fill_(3) if name.endswith("bn1.bias") else None
    config = {"backbone": "resnet18", "projection_dim": 8, "hidden_dim": 16, "cifar_stem": True,
              "image_size": 8}  # fmt: skip
    save_checkpoint(tmp_path / "start.pt", model.state_dict(), config, 12)
    toy = ["dataset=folder", "data_dir=images", "image_size=8", "batch_size=8", "device=cpu",
           "epochs=2", "log_interval=1", "knn_interval=0", "hydra.run.dir=run", *SMALL]  # fmt: skip

    def run(*overrides):
        code, error = call("simclr.py", *toy, *overrides)
        assert code == 0, error
        return Path("run/simclr.log").read_text().splitlines()

    return run


def bias(path="run/simclr_resnet18_epoch1.pt"):
    return load_checkpoint(Path(path))["model"]["enc.bn1.bias"].mean().item()


def test_a_run_starts_from_a_checkpoint_says_so_and_records_it(run):
    log = run("init='~/start.pt'")
    assert log[0] == "init: the encoder starts from ~/start.pt, epoch 12, without projector"
    assert bias() == pytest.approx(3, abs=0.3)
    saved = load_checkpoint(Path("run/simclr_resnet18_epoch2.pt"))
    assert saved["config"]["init"] == "~/start.pt" and saved["epoch"] == 2


def test_a_run_that_starts_over_from_its_own_checkpoint_has_the_line_in_its_own_log(run):
    run()
    own = "run/simclr_resnet18_epoch2.pt"
    before = bias(own)
    log = run(f"init={own}", "resume=false")
    assert log[0].startswith("moved the files") and log[1].startswith("init: the encoder starts")
    assert "init:" not in Path("run/old-1/simclr.log").read_text()
    assert bias("run/old-1/simclr_resnet18_epoch2.pt") == before


def test_a_checkpoint_of_the_run_itself_is_not_taken_for_a_resume(run, call):
    run()
    with pytest.raises(AssertionError, match=r"init=run/.*epoch1\.pt \(was None\): must be as in"):
        run("init=run/simclr_resnet18_epoch1.pt")


@pytest.fixture
def stopped(toy, tmp_path, monkeypatch):
    """The directory and the config of a run with init=x.pth, stopped in its second epoch."""
    torch.save(changed(lambda w: w["bn1.bias"].fill_(3)), tmp_path / "x.pth")
    step, count = simclr.train_step, iter(range(9))

    def counted(*args):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # until the thread that listens has noted it
        return step(*args)

    (tmp_path / "run").mkdir()
    cfg = toy(*SMALL, f"init={tmp_path}/x.pth", "knn_interval=0")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(simclr, "train_step", counted)
        simclr.pretrain(cfg, tmp_path / "run")
    return tmp_path / "run", cfg


def test_a_resumed_run_does_not_read_the_file_again(stopped, caplog):
    folder, cfg = stopped
    Path(cfg.init).unlink()
    with caplog.at_level("INFO"):
        simclr.pretrain(cfg, folder)
    assert "1 epochs and 1 steps are done" in caplog.text and "init:" not in caplog.text
    assert bias(folder / "simclr_resnet18_epoch2.pt") == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("other", ["null", "y.pth"])
def test_another_init_is_refused_when_a_run_is_resumed(stopped, toy, other):
    folder, _ = stopped
    now = "None" if other == "null" else other
    with pytest.raises(ConfigError, match=rf"init={now} \(was .*x\.pth\): must be as in"):
        simclr.pretrain(toy(*SMALL, "knn_interval=0", f"init={other}"), folder)


def test_a_state_of_before_the_key_was_there_started_from_random_weights(stopped, toy):
    folder, _ = stopped
    path = folder / "simclr_resnet18_last.pt"
    saved = torch.load(path, weights_only=True)
    del saved["config"]["init"]
    path.write_bytes(to_bytes(saved))
    with pytest.raises(ConfigError, match=r"init=x\.pth \(was None\)"):
        simclr.pretrain(toy(*SMALL, "knn_interval=0", "init=x.pth"), folder)
    simclr.pretrain(toy(*SMALL, "knn_interval=0"), folder)
    assert (folder / "simclr_resnet18_epoch2.pt").is_file()


def test_the_untrained_baseline_of_such_a_run_is_random(stopped):
    folder, cfg = stopped
    simclr.pretrain(cfg, folder)
    path = folder / "simclr_resnet18_epoch2.pt"
    enc, _ = build_encoder(load_checkpoint(path), path, "random", seed=0)
    assert enc.bn1.bias.abs().max() == 0
