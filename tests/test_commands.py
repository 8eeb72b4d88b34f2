"""The command lines, as a user types them, each in a process of its own at toy size."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, thin_resnet
from omegaconf import OmegaConf

from models import BACKBONES

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


@pytest.fixture
def run(call):
    """run(script, overrides): the command in this process, which must succeed; its output."""

    def run(script, *overrides):
        code, error = call(script, *overrides)
        assert code == 0 and "Warning" not in error, error
        return call.stdout

    return run


def test_pretraining_and_linear_evaluation_by_name(tmp_path):
    run = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18"
    succeed(tmp_path, "simclr.py", "backbone=resnet18", "epochs=1", *TOY)
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {
        "config.yaml", "metrics.jsonl", "simclr.log", "simclr_resnet18_epoch1.pt",
        "simclr_resnet18_last.pt", ".simclr.lock",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}
    lin = ["backbone=resnet18", "dataset=digits", "batch_size=256", "device=cpu"]
    done = succeed(tmp_path, "simclr_lin.py", *lin, "finetune_epochs=1")
    results = json.loads((run / "results.json").read_text())
    said = [f"| {results[key]:.2%}"[:-1] for key in ("linear_acc", "knn_acc")]
    for text in (done.stdout, (run / "simclr_lin.log").read_text()):
        assert all(number in text for number in said), text


def test_what_follows_a_run(run, thin, tmp_path, call):
    """Evaluation, pictures and an earlier epoch, by the defaults of each command."""
    lin = ["simclr_lin.py", "dataset=digits", "batch_size=256", "finetune_epochs=1"]
    folder = tmp_path / "logs" / "SimCLR" / "digits" / "resnet18"
    code, line = call(*lin)
    assert code == 1 and "no such checkpoint in logs/SimCLR/digits/resnet18" in line
    run("simclr.py", "epochs=2", "log_interval=1", *TOY)
    run(*lin)
    run("plot.py", str(folder.relative_to(tmp_path)))
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {"views", "curves", "embedding", "neighbours"}
    assert "/resnet18 | 2 of 2 " in run("compare.py", *map(str, folder.parent.iterdir()))
    run(*lin, "load_epoch=1", "protocols=[knn]")
    results = json.loads((folder / "results.json").read_text())
    assert results["epoch"] == 1 and results["linear_acc"] is None  # of epoch 2
    run(lin[0], "-m", *lin[1:], "labels=5,10", "protocols=[knn]")  # a sweep finds the run
    assert {path.name for path in folder.glob("results_labels*.json")} == {
        "results_labels5.json", "results_labels10.json",
    }  # fmt: skip


def test_a_backbone_with_a_longer_name_is_resumed_evaluated_and_moved_aside(
    run, tmp_path, monkeypatch
):
    name = "resnext50_32x4d"
    monkeypatch.setitem(BACKBONES, name, thin_resnet)
    lin = ["simclr_lin.py", f"backbone={name}", "dataset=digits", "protocols=[knn]"]
    folder = tmp_path / "logs" / "SimCLR" / "digits" / name
    pretrain = ["simclr.py", f"backbone={name}", "epochs=1", "knn_interval=0", *TOY]
    run(*pretrain)
    assert f"simclr_{name}_epoch1.pt" in run(*pretrain)  # it says that this run is complete
    run(*lin)
    assert json.loads((folder / "results.json").read_text())["backbone"] == name
    run(*pretrain, "resume=false")
    moved = {path.name for path in (folder / "old-1").glob("*.pt")}
    assert moved == {f"simclr_{name}_{part}.pt" for part in ("epoch1", "last")}


def test_a_checkpoint_is_evaluated_on_another_dataset(run, thin, tmp_path, write_images):
    """docs/evaluation.md: images of the size it was trained with; results beside that dataset."""
    run("simclr.py", "epochs=1", "knn_interval=0", "hidden_dim=8", *TOY)
    file = "logs/SimCLR/digits/resnet18/simclr_resnet18_epoch1.pt"
    before = {path: path.read_bytes() for path in (tmp_path / file).parent.glob("*")}
    write_images(tmp_path / "images", classes=4, train=6, test=2)  # of 12×12 pixels, not 8×8
    out = run("simclr_lin.py", "dataset=folder", "data_dir=images", f"checkpoint={file}",
              "finetune_epochs=1", "batch_size=8", "device=cpu")  # fmt: skip
    assert f"{file}, resnet18 at 8 px, folder, on cpu" in out
    results = json.loads((tmp_path / "logs/SimCLR/folder/resnet18/results.json").read_text())
    assert results["classes"] == [f"class{n}" for n in range(4)]
    assert (results["training_images"], results["test_images"]) == (24, 8)
    assert (results["dataset"], results["config"]["dataset"]) == ("folder", "digits")
    assert results["checkpoint"] == file and len(results["confusion"]) == 4
    assert {path: path.read_bytes() for path in (tmp_path / file).parent.glob("*")} == before


def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path):
    """The other mistakes are in test_bad_input.py."""
    done = command(tmp_path, "simclr.py", *TOY, "dataset=folder")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("error: data/train: No such file or directory")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".simclr.lock"}


def test_cfg_and_help_print_the_config_and_run_nothing(run, tmp_path):
    for script in ("simclr.py", "simclr_lin.py"):
        shown = run(script, "--cfg", "job", "--resolve", "batch_size=256")
        assert "learning_rate: 0.3\n" in shown and "backbone: resnet18\n" in shown
    shown = run("simclr.py", "--help")
    assert "temperature: 0.5" in shown and "simclr_config.yml" in shown
    assert not list(tmp_path.iterdir())


def test_recipes_in_a_sweep_and_in_the_other_commands(run, thin, tmp_path):
    recipes = "recipe=published,simsiam"
    run("simclr.py", "-m", recipes, "epochs=1", *TOY)
    found = sorted((tmp_path / "logs").rglob("metrics.jsonl"))
    configs = [OmegaConf.load(path.parent / "config.yaml") for path in found]
    for path, recipe in zip(found, ("published", "simsiam"), strict=True):
        assert f"recipe-{recipe}" in path.parent.name
    assert [cfg.recipe for cfg in configs] == ["published", "simsiam"]
    assert [cfg.weight_decay for cfg in configs] == [1e-6, 5e-4]
    run("simclr_lin.py", "-m", recipes, "epochs=1", *TOY, "finetune_epochs=1")
    assert all((path.parent / "results.json").is_file() for path in found)
    run("plot.py", "recipe=digits", "--out", "pictures")
    assert (tmp_path / "pictures" / "views.png").is_file()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("backend", "sizes"), [("inductor", [12]), ("eager", [8, 12])])
def test_a_compiled_run_is_evaluated_like_any_other(
    run, thin, tmp_path, monkeypatch, backend, sizes
):
    """One real compilation of model and views (half a minute for each size of the views), and
    their graphs alone for views that grow."""
    graphs = []
    compile_function = torch.compile

    def compile_graph(function, **options):  # also by nn.Module.compile
        graphs.append(options)
        return compile_function(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_graph)
    share = f"{1 / len(sizes)}"
    sizes = [[size, share] for size in sizes]
    views = "view_sizes=[" + ",".join(f"[{size},{share}]" for size, share in sizes) + "]"
    run("simclr.py", "compile=true", views, "epochs=2", "hydra.run.dir=run", *TOY, "image_size=12",
        "hidden_dim=16", "projection_dim=8", "knn_interval=0")  # fmt: skip
    assert graphs == [{"dynamic": False}] * 2
    assert ", compiled, in run" in (tmp_path / "run" / "simclr.log").read_text()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seen = [json.loads(line)["view_size"] for line in lines]
    assert seen == [sizes[0][0], sizes[-1][0]]
    run("simclr_lin.py", "hydra.run.dir=run", "dataset=digits", "protocols=[knn]")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["knn_acc"] > 0.5


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
