"""Sweeps: each job has results of its own, and a job that fails ends no other."""

import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from hydra import compose, initialize
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from test_command_line import FOLDER, LIN, PRETRAIN, TRAIN, train  # noqa: F401

import images.augment
import training.metrics
from config import ConfigError
from system import commandline
from system.commandline import CheckConfig, directory_name
from system.errors import UserError

try:
    import cloudpickle
except ImportError:  # older joblib has its own
    from joblib.externals import cloudpickle

SWEEP_DIR = Path("logs/SimCLR/sweep")
RUN_DIR = Path("logs/SimCLR/folder/resnet18")
EVALUATE = [*FOLDER, "data_dir=images", "protocols=[knn]"]


@pytest.fixture
def sweep(train, call):  # noqa: F811
    """sweep(script, overrides): a multirun on small images; exit code, stderr."""

    def sweep(script, *overrides):
        given = {override.split("=")[0] for override in overrides}
        rest = [override for override in TRAIN if override.split("=")[0] not in given]
        return call(script, "-m", *overrides, *rest)

    return sweep


def made(pattern: str) -> list[str]:
    """The directories of jobs that have such a file, by the last of their overrides."""
    return sorted(path.parent.name.split("-8_")[-1] for path in SWEEP_DIR.glob(f"*/{pattern}"))


def test_each_job_has_a_directory_named_by_its_overrides_and_its_results_there(sweep, call):
    assert sweep(PRETRAIN, "seed=1,2", "workers=2")[0] == 0
    assert made("*_epoch1.pt") == ["seed-1", "seed-2"]
    lin = "seed=1,2", "workers=1", "protocols=[knn]"
    assert sweep(LIN, *lin)[0] == 0 and made("results.json") == ["seed-1", "seed-2"]
    assert sweep(LIN, *lin, "labels=2,4")[0] == 0
    assert made("results_labels4.json") == made("results_labels2.json") == ["seed-1", "seed-2"]
    assert sweep(LIN, "seed=1", "labels=3,5", "protocols=[knn]")[0] == 0  # of one of the jobs
    assert made("results_labels5.json") == ["seed-1"] and not RUN_DIR.exists()


def test_a_sweep_over_labels_evaluates_the_run_that_is_there(train, call):  # noqa: F811
    assert train()[0] == 0
    assert call(LIN, "-m", "labels=2,4", *EVALUATE)[0] == 0
    assert len([*RUN_DIR.glob("results_labels[24].json")]) == 2
    elsewhere = "hydra.run.dir=x", f"checkpoint={RUN_DIR}"
    assert call(LIN, "-m", "labels=2,4", *EVALUATE, *elsewhere)[0] == 0
    assert len([*Path("x").glob("results_labels[24].json")]) == 2
    assert [path.name for path in SWEEP_DIR.iterdir()] == ["multirun.yaml"]


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        (PRETRAIN, "workers=1,2", "would overwrite each other's results"),
        (PRETRAIN, "seed=1,2 compile=true,false", "would overwrite each other's results"),
        (PRETRAIN, "seed=1,2 hydra.sweep.subdir=one", "would overwrite each other's results"),
        (LIN, "protocols=[knn],[linear]", "would overwrite each other's results"),
        (LIN, "checkpoint=a.pt,b.pt", "would overwrite each other's results"),
        (LIN, "finetune_learning_rate=choice(0.01,0.2)", "would overwrite each other's results"),
        (PRETRAIN, "seed=1,2 batchsize=8", "batchsize: no such key; did you mean batch_size?"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_at_once(call, tmp_path, script, override, message):
    code, error = call(script, "-m", *override.split())
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error and not [*tmp_path.iterdir()]


def test_values_that_a_sweep_replaces_are_not_held_against_it():
    """Muon's rates are swept: without them learning_rate is that of SGD, 0.6."""
    commandline.register_config()
    with initialize(version_base="1.3", config_path=None):
        cfg = compose("simclr_config", ["optimizer=muon"], return_hydra_config=True)
    commandline.CheckConfig().on_multirun_start(cfg)
    with pytest.raises(SystemExit):
        commandline.CheckConfig().on_run_start(cfg)


def test_a_sweep_that_the_yaml_defines_is_checked_too(call, tmp_path, monkeypatch):
    text = commandline.CONFIG_FILE.read_text(encoding="utf-8")
    (tmp_path / "file.yml").write_text(f"{text}  sweeper:\n    params: {{runs: '1,2'}}\n")
    monkeypatch.setattr(commandline, "CONFIG_FILE", tmp_path / "file.yml")
    code, error = call(LIN, "-m")
    assert code == 2 and "would overwrite each other's results" in error


def test_a_failed_job_is_one_line_and_ends_no_other(sweep, call):
    """Of the values, of the data and of the loss; the exit code is that of the first."""
    code, error = sweep(PRETRAIN, "temperature=0.5,-1", "batch_size=999,8")
    assert code == 2 and "Traceback" not in error and made("*_epoch1.pt") == ["temperature-0.5"]
    said = [line for line in call.stdout.splitlines() if line.startswith("error: ")]
    assert said == ["error: batch_size=999: must be at most 24, the number of training images",
                    "error: temperature=-1.0: must be a number above 0",
                    "error: temperature=-1.0: must be a number above 0"]  # fmt: skip
    assert error.splitlines()[-1] == said[0]


def test_a_bug_in_a_job_ends_no_other_job_and_has_its_traceback(sweep, monkeypatch):
    write = training.metrics.to_lines

    def break_first(history):
        if not [*SWEEP_DIR.glob("*seed-2*")]:
            raise ZeroDivisionError("a bug of ours")
        return write(history)

    monkeypatch.setattr(training.metrics, "to_lines", break_first)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        sweep(PRETRAIN, "seed=1,2")
    assert made("*_epoch1.pt") == ["seed-2"]


def test_a_failed_job_keeps_no_tensor():
    """Hydra keeps its exception to the end of the sweep; on a GPU the next job needs the memory."""
    held = []

    def compute():
        activations = torch.zeros(1)
        held.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    def job():
        weights = torch.zeros(1)
        held.append(weakref.ref(weights))
        try:
            compute()
        except RuntimeError:
            raise UserError("too large") from None

    failed = JobReturn(status=JobStatus.FAILED)
    try:
        job()
    except UserError as error:
        failed.return_value = error
    assert len(held) == 2 and all(tensor() is not None for tensor in held)
    CheckConfig().on_job_end(OmegaConf.create({"hydra": {"mode": "MULTIRUN"}}), job_return=failed)
    assert all(tensor() is None for tensor in held)


def test_a_signal_ends_the_whole_sweep(sweep, monkeypatch):
    draw = images.augment.draw

    def terminate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args, **kwargs)

    monkeypatch.setattr(images.augment, "draw", terminate)
    code, error = sweep(PRETRAIN, "seed=1,2")
    assert code == 128 + signal.SIGTERM and "the state is saved" in error
    assert made("*_last.pt") == ["seed-1"] and len([*SWEEP_DIR.glob("*/")]) == 1


def test_names_of_directories_are_the_overrides_that_name_a_run():
    assert directory_name(["temperature=0.1", "seed=1"]) == "seed-1_temperature-0.1"
    assert directory_name(["workers=2", "labels=5", "+device=cpu"]) == ""
    assert directory_name(["recipe=fast", "init=a/b"]) == "init-a-b_recipe-fast"


def test_a_launcher_can_send_a_job_to_another_process():
    """cloudpickle takes what `main` refers to along, by value: the function is of __main__."""
    for script in (PRETRAIN, LIN):
        source = (REPOSITORY / script).read_text(encoding="utf-8")
        scope = {"__name__": "started", "__file__": str(REPOSITORY / script)}
        exec(compile(source, script, "exec"), scope)
        assert cloudpickle.loads(cloudpickle.dumps(scope["main"]))
    for error in (UserError("one line"), ConfigError("key: must be")):
        assert str(cloudpickle.loads(cloudpickle.dumps(error))) == str(error)
