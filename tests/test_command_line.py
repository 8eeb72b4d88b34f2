"""The command line: paths as they are typed, ~, Hydra's own options, and copies of a script."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

import images.datasets

PRETRAIN, LIN = "simclr.py", "simclr_lin.py"
SMALL = ["batch_size=8", "hidden_dim=8", "projection_dim=8", "knn_interval=0", "epochs=1"]
FOLDER = ["dataset=folder", "image_size=8", "device=cpu"]
TRAIN = [*FOLDER, "data_dir=images", *SMALL]


@pytest.fixture
def train(thin, write_images, call, tmp_path):
    """train(overrides, script=…): pretrain for an epoch on 24 images; exit code and stderr."""
    write_images(tmp_path / "images", train=8, test=3)

    def train(*overrides, script=PRETRAIN):
        return call(script, *TRAIN, *overrides)

    return train


def names(folder: Path) -> set[str]:
    """The names of the files there, without the time in that of TensorBoard's."""
    return {re.sub(r"tfevents.*", "tfevents", path.name) for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    ["Bilder grün (1)", "it's [a,b]={c}", "a,b(\\", 'say "日本" #1; $x `&` co', "back\\'slash\\ "],
)
def test_a_refused_path_is_shown_in_a_spelling_that_works_when_typed(call, name):
    code, error = call(PRETRAIN, *FOLDER, *SMALL, f"data_dir={name}")
    assert code == 2 and error.count("\n") == 1
    typed = error.strip().split("a text with such characters is ")[1]
    argument = subprocess.check_output(["sh", "-c", f"printf %s {typed}"], text=True)
    code, error = call(PRETRAIN, *FOLDER, *SMALL, argument)
    assert code == 1 and error == f"error: {name}/train: No such file or directory\n"


def test_a_run_directory_may_have_any_name(train):
    name = "it's (ä) [1] 日本"
    assert train("hydra.run.dir='it\\'s (ä) [1] 日本'")[0] == 0
    assert Path(name, "simclr_resnet18_epoch1.pt").is_file() and Path(name, "simclr.log").is_file()


def test_a_tilde_is_the_home_directory_in_every_path(train, call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = "~/x/simclr_resnet18_epoch1.pt"
    for script, overrides in (
        (PRETRAIN, [*TRAIN, "hydra.run.dir=~/x", "data_dir=~/images"]),
        (PRETRAIN, [*TRAIN, "hydra.run.dir='~/y'", "data_dir='~/images'", f"init={weights}"]),
        (PRETRAIN, ["-m", *TRAIN, "seed=1,2", "hydra.sweep.dir=~/z", f'init="{weights}"']),
        (LIN, [*TRAIN, "hydra.run.dir=~/y", f"checkpoint={weights}", "protocols=[knn]"]),
    ):
        code, error = call(script, *overrides)
        assert code == 0, error
    for path in ("y/results.json", "z/multirun.yaml"):
        assert (tmp_path / path).is_file()
    assert len([*tmp_path.glob("z/*/simclr_resnet18_epoch1.pt")]) == 2
    assert not [*tmp_path.rglob("*~*")]


@pytest.mark.parametrize("choice", ["disabled", "stdout", "none", "default"])
def test_hydra_s_own_choices_of_logging_train(train, choice):
    code, error = train(f"hydra/job_logging={choice}", "hydra.run.dir=run")
    assert code == 0 and Path("run/simclr_resnet18_epoch1.pt").is_file(), error
    assert Path("run/simclr.log").exists() == (choice == "default")


def test_hydra_s_options_print_the_config_and_make_nothing(call, tmp_path):
    code, error = call(PRETRAIN, "--help")
    assert code == 0 and "SimCLR on CIFAR-10. Change a key with key=value" in call.stdout, error
    assert "temperature: 0.5\n" in call.stdout
    code, error = call(LIN, "--cfg", "job", "--resolve", "batch_size=256")
    assert code == 0 and "\nlearning_rate: 0.3\n" in call.stdout, error
    code, error = call(PRETRAIN, "--info")
    assert code == 0 and "simclr_config" in call.stdout, error
    assert not [*tmp_path.iterdir()]


def test_a_copy_of_the_script_behaves_as_the_script(train, tmp_path):
    copy = shutil.copy(REPOSITORY / PRETRAIN, tmp_path / "my_simclr.py")
    for override in ("min_learning_rate=9", "batchsize=8", "checkpoint=x.pt"):
        assert not Path("logs").exists()
        code, error = train(override, script=copy)
        assert (code, error) == train(override) and code == 2
    for script, folder in ((PRETRAIN, "a"), (copy, "b")):
        assert train(f"hydra.run.dir={folder}", script=script)[0] == 0
    assert names(Path("b")) == names(Path("a")) - {"simclr.log"} | {"my_simclr.log"}
    assert train("hydra.run.dir=b", "temperature=0.1", script=copy)[0] == 2
    code, error = train("hydra.run.dir=b")  # either continues the run of the other
    assert code == 0 and "complete" in Path("b/simclr.log").read_text(), error


def test_a_bug_keeps_its_traceback(train, monkeypatch):
    def bug(*arguments):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(images.datasets, "load_pretraining", bug)
    with pytest.raises(ValueError, match="a bug of ours"):
        train()
