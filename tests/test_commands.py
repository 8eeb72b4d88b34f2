"""The command lines, as a user types them, each in a process of its own at toy size."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from omegaconf import OmegaConf
from PIL import Image

TOY = ["dataset=digits", "image_size=8", "batch_size=256", "device=cpu"]


def command(folder, script, *overrides):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / script), *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def succeed(folder, script, *overrides):
    done = command(folder, script, *overrides)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done


def refuse(folder, code, script, *overrides):
    """One line on stderr, no traceback, nothing left behind; returns the line."""
    before = set(folder.rglob("*"))
    done = command(folder, script, *overrides)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    if code == 2:  # before Hydra makes the run folder
        assert set(folder.rglob("*")) == before
    made = [path for path in set(folder.rglob("*")) - before if path.is_file()]
    assert {path.name for path in made} <= {".simclr.lock", ".simclr_lin.lock"}
    return lines[0]


def test_pretraining_and_linear_evaluation_by_name(tmp_path):
    run = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18"
    line = refuse(tmp_path, 1, "simclr_lin.py", "backbone=resnet18", *TOY)
    assert "no checkpoint of resnet18" in line and "there is none" in line

    succeed(tmp_path, "simclr.py", "backbone=resnet18", "epochs=2", "log_interval=1", *TOY)
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {
        "config.yaml", "metrics.jsonl", "simclr.log",
        "simclr_resnet18_epoch1.pt", "simclr_resnet18_epoch2.pt", ".simclr.lock",
        "simclr_resnet18_last.pt", "simclr_resnet18_previous.pt",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}

    lin = ["simclr_lin.py", "backbone=resnet18", "dataset=digits", "batch_size=256"]
    done = succeed(tmp_path, *lin, "finetune_epochs=1")
    results = json.loads((run / "results.json").read_text())
    assert results["epoch"] == 2 and results["dataset"] == "digits"
    assert 0 <= results["linear_acc"] <= results["linear_top5"] <= 1
    said = [f"| {results[key]:.2%}"[:-1] for key in ("linear_acc", "linear_top5", "knn_acc")]
    for text in (done.stdout, (run / "simclr_lin.log").read_text()):
        assert all(number in text for number in said), text
    assert (run / "results.md").is_file()

    (tmp_path / "images").mkdir()
    Image.new("L", (20, 30)).save(tmp_path / "images" / "black.png")
    succeed(tmp_path, *lin, "finetune_epochs=1", "predict=images")
    head, line = (run / "predictions.csv").read_text().splitlines()
    assert head == "file,class,probability" and line.startswith("images/black.png,")
    assert "predict=nowhere: there is no such" in refuse(tmp_path, 1, *lin, "predict=nowhere")
    done = succeed(tmp_path, "plot.py", str(run.relative_to(tmp_path)))
    names = {path.stem for path in run.glob("*.png")}
    assert names == {"views", "curves", "embedding", "neighbours", "confusion"}, done.stdout

    succeed(tmp_path, *lin, "finetune_epochs=1", "load_epoch=1")
    assert json.loads((run / "results.json").read_text())["epoch"] == 1
    line = refuse(tmp_path, 1, *lin, "load_epoch=7")
    assert "simclr_resnet18_epoch1.pt, simclr_resnet18_epoch2.pt" in line
    line = refuse(tmp_path, 2, *lin, "image_size=16")
    assert "image_size=16: must be 8" in line


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("temperature=-1", 2, "temperature=-1: must be a number above 0"),
        ("backbone=${nosuch}", 2, "backbone: must be one of resnet18"),
        ("~dataset", 2, "dataset: must be one of cifar10"),
        ("temperature=???", 2, "temperature: must be a number above 0"),
        ("dataset=folder", 1, "train cannot be read (No such file or directory)"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(tmp_path, override, code, message):
    assert message in refuse(tmp_path, code, "simclr.py", *TOY, override)


def test_an_unknown_key_is_hydras_to_refuse(tmp_path):
    done = command(tmp_path, "simclr.py", "batchsize=3")
    assert done.returncode == 1 and "Key 'batchsize' is not in struct" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_cfg_and_help_print_the_config_and_run_nothing(tmp_path):
    for script in ("simclr.py", "simclr_lin.py"):
        shown = succeed(tmp_path, script, "--cfg", "job", "--resolve", "batch_size=256").stdout
        assert "learning_rate: 0.3\n" in shown and "backbone: resnet18\n" in shown
    shown = succeed(tmp_path, "simclr.py", "--help").stdout
    assert "temperature: 0.5" in shown and "simclr_config.yml" in shown
    assert not list(tmp_path.iterdir())


def test_a_sweep_gives_each_job_a_folder_named_after_its_overrides(tmp_path):
    succeed(tmp_path, "simclr.py", "-m", "temperature=0.1,0.5", "epochs=1", *TOY)
    found = sorted((tmp_path / "logs").rglob("metrics.jsonl"))
    assert len(found) == 2
    for path, temperature in zip(found, ("0.1", "0.5"), strict=True):
        assert f"temperature-{temperature}" in path.parent.name
        assert f"temperature: {temperature}\n" in (path.parent / "config.yaml").read_text()
    succeed(tmp_path, "simclr_lin.py", f"hydra.run.dir={found[0].parent}", "dataset=digits",
            "baselines=[pixels]", "finetune_epochs=1")  # fmt: skip
    results = json.loads((found[0].parent / "results.json").read_text())
    assert [row["encoder"] for row in results["protocols"]] == ["checkpoint"] * 3 + ["pixels"] * 3


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_with_growing_views_is_evaluated_like_any_other(tmp_path):
    """One real compilation of model and views, for each of two sizes."""
    run = tmp_path / "run"
    sizes = "view_sizes=[[8,0.5],[12,0.5]]"
    succeed(tmp_path, "simclr.py", "compile=true", sizes, "epochs=2", f"hydra.run.dir={run}", *TOY,
            "image_size=12", "hidden_dim=16", "projection_dim=8")  # fmt: skip
    assert "compiled" in (run / "simclr.log").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["view_size"] for line in lines] == [8, 12]
    succeed(tmp_path, "simclr_lin.py", f"hydra.run.dir={run}", "dataset=digits", "image_size=12",
            "finetune_epochs=1")  # fmt: skip
    assert json.loads((run / "results.json").read_text())["knn_acc"] > 0.5


SWEEP = [*TOY, "compile=false", "epochs=1", "hidden_dim=8", "projection_dim=8"]


def test_a_sweep_runs_through_ray(tmp_path):
    """What `main` refers to must be found by another process."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="pip install hydra-ray-launcher")
    succeed(tmp_path, "simclr.py", "-m", "hydra/launcher=ray", "temperature=0.1,0.5", *SWEEP)
    done = succeed(tmp_path, "compare.py", *map(str, (tmp_path / "logs").rglob("*temperature-0*")))
    rows = [line.split("|")[2].strip() for line in done.stdout.splitlines()[2:]]
    assert sorted(rows) == ["0.1", "0.5"]


def test_optuna_is_given_the_knn_accuracy(tmp_path):
    plugin = "hydra_plugins.hydra_optuna_sweeper"
    pytest.importorskip(plugin, reason="pip install hydra-optuna-sweeper")
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    succeed(tmp_path, "simclr.py", "-m", *optuna, "hydra.sweeper.direction=maximize",
            "temperature=interval(0.1,1.0)", *SWEEP)  # fmt: skip
    lines = [path.read_text().splitlines()[-1] for path in tmp_path.rglob("metrics.jsonl")]
    best = OmegaConf.load(next(tmp_path.rglob("optimization_results.yaml")))["best_value"]
    assert len(lines) == 3 and best == max(json.loads(line)["knn_acc"] for line in lines)
