"""Sweeps: every job has a directory of its own, and a failed job does not end the others."""

import json
import os
import re
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from omegaconf import OmegaConf
from test_commands import SWEEP, command

import config
import training.record
from system.errors import ConfigError, UserError
from system.sweeps import LONGEST, directory_name, note_failure

try:
    import cloudpickle
except ImportError:  # older joblib has its own
    from joblib.externals import cloudpickle

SWEEP_DIR = Path("logs/SimCLR/sweep")
JOB = ["batch_size=8", "hidden_dim=8", "projection_dim=8", "compile=false", "knn_interval=0"]
FOLDER = ["dataset=folder", "data_dir=images", "image_size=8", "device=cpu"]
TRAIN = [*FOLDER, *JOB, "epochs=1"]
PRETRAIN, LIN = "simclr.py", "simclr_lin.py"


@pytest.fixture
def sweep(thin, write_images, tmp_path, call):
    """sweep(script, overrides): a multirun on small images; exit code, stderr."""
    write_images(tmp_path / "images", train=8, test=3)

    def sweep(script, *overrides):
        given = {override.split("=")[0] for override in overrides}
        rest = [override for override in TRAIN if override.split("=")[0] not in given]
        return call(script, "-m", *overrides, *rest)

    return sweep


def directories() -> list[str]:
    return sorted(path.name for path in SWEEP_DIR.iterdir() if path.is_dir())


def complete() -> int:
    return len(list(SWEEP_DIR.glob("*/simclr_resnet18_epoch1.pt")))


def test_failed_jobs_end_no_other_job_and_are_listed(sweep, call):
    """A bad value, a batch larger than the dataset and a loss that is not finite."""
    code, error = sweep(
        PRETRAIN, "temperature=0.5,-1", "batch_size=8,999", "learning_rate=0.1,1e30"
    )
    assert code == 1  # of the first that failed, whose loss is not finite
    failed = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 7 and complete() == 1
    assert sum("temperature=-1: must be a number above 0" in line for line in failed) == 4
    assert sum("batch_size=999: must be an integer from 2 to 24" in line for line in failed) == 2
    assert sum("precision=fp32" in line for line in failed) == 1
    assert (
        error.strip().splitlines()[-1].startswith("error: 7 of the sweep's jobs failed; the same")
    )
    for line in failed:
        directory, reason = line.removeprefix("failed: ").split(": ", 1)
        assert f"error: {reason}" in call.stdout
        assert Path(directory).is_dir()
    code, error = sweep(PRETRAIN, "temperature=0.5,-1", "batch_size=8", "learning_rate=0.1")
    assert code == 2 and error.count("failed: ") == 1  # none of the sweep before


def test_a_bug_in_a_job_ends_no_other_job_and_has_its_traceback(sweep, call, monkeypatch):
    write = training.record.write_metrics
    jobs = []

    def break_second(run_dir, history):
        jobs.append(run_dir)
        if "seed-2" in str(run_dir):
            raise ZeroDivisionError("a bug of ours")
        write(run_dir, history)

    monkeypatch.setattr(training.record, "write_metrics", break_second)
    code, error = sweep(PRETRAIN, "seed=1,2,3")
    assert code == 1 and complete() == 2 and len(jobs) == 3
    assert "seed-2: ZeroDivisionError: a bug of ours" in error
    assert "in break_second" in call.stdout  # the traceback


def test_a_failed_job_keeps_no_tensor(tmp_path):
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

    with pytest.raises(UserError) as error:
        job()
    assert all(tensor() is not None for tensor in held)
    paths = {"sweep": {"dir": str(tmp_path)}, "runtime": {"output_dir": str(tmp_path)}}
    note_failure(OmegaConf.create(paths), error.value)
    assert len(held) == 2 and all(tensor() is None for tensor in held)


def test_a_signal_ends_a_sweep(sweep, monkeypatch):
    is_finite = training.record.is_finite

    def terminate(metrics, scaled):
        os.kill(os.getpid(), signal.SIGTERM)
        return is_finite(metrics, scaled)

    monkeypatch.setattr(training.record, "is_finite", terminate)
    code, error = sweep(PRETRAIN, "seed=1,2")
    assert code == 128 + signal.SIGTERM and "the state is saved" in error
    assert len(directories()) == 1


def test_evaluations_in_a_sweep_fail_like_pretraining(sweep):
    assert sweep(PRETRAIN, "seed=1,2")[0] == 0
    shorter = ["protocols=[knn]", "finetune_epochs=1"]
    code, error = sweep(LIN, "seed=1,2,3", *shorter)
    assert code == 1 and len(list(SWEEP_DIR.glob("*/results.json"))) == 2
    assert "no checkpoint of resnet18 in" in error and "error: 1 of the sweep's jobs" in error


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        (LIN, "finetune_learning_rate=0.01,0.2", "a list, finetune_learning_rate=[0.01,0.2]"),
        (LIN, "finetune_weight_decay=choice(0,1e-4)", "choice(0,1e-4): must not vary"),
        (LIN, "protocols=[knn],[linear]", "protocols=[knn],[linear]: must not vary in a sweep"),
        (LIN, "load_epoch=range(1,3)", "load_epoch=range(1,3): must not vary in a sweep"),
        (LIN, "checkpoint=a.pt,b.pt", "start one command for each value"),
        (LIN, "runs=1,5", "runs=1,5: must not vary in a sweep"),
        (PRETRAIN, "compile=true,false", "compile=true,false: must not vary in a sweep"),
        (PRETRAIN, "seed=1,2,1", "seed=1,2,1: must not have a value twice"),
        (PRETRAIN, "temperature=0.5,-1 hydra.sweep.subdir=one", "subdir=one: must differ"),
        (PRETRAIN, "seed=1,2 batch_size=1", "batch_size=1: must be an integer from 2"),
        (PRETRAIN, "seed=1,2 batchsize=8", "batchsize: no such key; did you mean batch_size?"),
    ],
)  # fmt: skip
def test_jobs_that_would_share_a_directory_are_refused(call, tmp_path, script, override, message):
    code, error = call(script, "-m", *override.split())
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error and not list(tmp_path.iterdir())


def test_a_sweep_that_the_yaml_defines_is_checked_too(call, tmp_path, monkeypatch):
    yaml = tmp_path / "file.yml"
    text = config.CONFIG_FILE.read_text(encoding="utf-8")
    yaml.write_text(text + "  sweeper:\n    params: {finetune_views: '1,2'}\n", encoding="utf-8")
    monkeypatch.setattr(config, "CONFIG_FILE", yaml)
    code, error = call(LIN, "-m", "seed=1,2")
    assert code == 2 and error.startswith("error: finetune_views: must not vary in a sweep")


def test_a_sweep_over_labels_has_a_result_for_each(sweep):
    assert sweep(PRETRAIN, "seed=1")[0] == 0
    code, error = sweep(LIN, "seed=1", "labels=2,4", "protocols=[knn]")
    assert code == 0, error
    [directory] = SWEEP_DIR.glob("*seed-1*")
    assert len(list(directory.glob("results_labels*.json"))) == 2


def test_directories_have_short_names_that_every_command_takes(sweep, call):
    """Lists, many overrides and long ones; evaluated and compared by these names."""
    scales = "crop_scale=[0.2,1.0],[0.5,1.0]"
    views = "view_sizes=" + str([[8, 0.125]] * 8).replace(" ", "")
    rest = ["color_strength=0.25", "flip_probability=0.25", "grayscale_probability=0.125", views]
    assert sweep(PRETRAIN, scales, *rest)[0] == 0
    names = directories()
    assert len(names) == 2 and complete() == 2
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", name) and len(name) <= LONGEST
    assert sweep(LIN, scales, *rest, "protocols=[knn]")[0] == 0
    assert directories() == names
    assert len(list(SWEEP_DIR.glob("*/results.json"))) == 2
    checkpoint = next(SWEEP_DIR.glob("*/*_epoch1.pt"))
    code, error = call(LIN, f"checkpoint={checkpoint}", "protocols=[knn]", *FOLDER)
    assert code == 0, error
    code, error = call("compare.py", *(str(SWEEP_DIR / name) for name in names))
    assert code == 0 and "[0.2, 1.0]" in call.stdout


def test_different_overrides_have_different_names():
    assert directory_name("seed-1_temperature-0.1") == "seed-1_temperature-0.1"
    long = "_".join(f"key{n}-{n}" for n in range(99))
    names = {directory_name(f"init-{path}") for path in ("a/b", "a_b", "a b", "a[b", "ä", long)}
    assert len(names) == 6 and not any({*"/[]= ä"} & {*name} for name in names)
    assert len(directory_name(long)) == len(directory_name(long + "x")) == LONGEST
    assert directory_name(long) != directory_name(long + "x")


def test_an_init_with_slashes_is_one_directory(sweep):
    code, error = sweep(PRETRAIN, "init=weights/none.pt", "seed=1,2")
    assert code == 1 and error.count("there is no such file") == 2
    assert len(directories()) == 2  # none below another


def test_a_launcher_can_send_a_job_to_another_process():
    """cloudpickle takes what `main` refers to along, by value: the function is of __main__."""
    for script in (PRETRAIN, LIN):
        source = (REPOSITORY / script).read_text(encoding="utf-8")
        scope = {"__name__": "started", "__file__": str(REPOSITORY / script)}
        exec(compile(source, script, "exec"), scope)
        assert cloudpickle.loads(cloudpickle.dumps(scope["main"]))
    for error in (UserError("one line"), ConfigError("key: must be")):
        assert str(cloudpickle.loads(cloudpickle.dumps(error))) == str(error)


def test_joblib_runs_the_other_jobs(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install …-launcher")
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = command(tmp_path, PRETRAIN, "-m", *joblib, "temperature=-1,0.5", *SWEEP)
    assert done.returncode == 2 and "failed: " in done.stderr and "must be a number" in done.stderr
    assert len(list(tmp_path.rglob("*_epoch1.pt"))) == 1


def test_optuna_goes_on_after_failed_trials(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install …-sweeper")
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"]
    optuna += ["hydra.sweeper.direction=maximize", "seed=choice(-1,1)"]
    search = "hydra/sweeper/sampler=grid"
    done = command(tmp_path, PRETRAIN, "-m", *optuna, search, *SWEEP)
    assert done.returncode == 2 and "error: 1 of the sweep's jobs failed" in done.stderr
    allowed = "hydra.sweeper.max_failure_rate=0.5"
    done = command(tmp_path, PRETRAIN, "-m", *optuna, search, allowed, *SWEEP, "temperature=0.4")
    assert done.returncode == 0 and "failed: " in done.stderr
    assert OmegaConf.load(next(tmp_path.rglob("optimization_results.yaml")))["best_value"] > 0


def test_results_of_a_sweep_belong_to_their_job(sweep):
    recipes = ["recipe=published,simsiam", "learning_rate=0.1"]
    assert sweep(PRETRAIN, *recipes)[0] == 0
    assert sweep(LIN, *recipes, "protocols=[knn]")[0] == 0
    for recipe in ("published", "simsiam"):
        [file] = SWEEP_DIR.glob(f"*recipe-{recipe}*/results.json")
        assert json.loads(file.read_text())["config"]["recipe"] == recipe
