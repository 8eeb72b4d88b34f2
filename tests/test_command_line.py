"""The YAML and the command line: a broken file is one line, and a path works as it is typed."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from test_sweeps import FOLDER, LIN, PRETRAIN, TRAIN

import config as config_module
from config import SCHEDULED
from system.commandline import quote_path
from system.errors import ConfigError

YAML = config_module.CONFIG_FILE.read_text(encoding="utf-8")
RECIPES = re.search(r"recipes:\n(?:  .*\n)+", YAML)[0]
SEED, CROPS = (YAML[: YAML.index(t)].count("\n") + 1 for t in ("seed: 42", "[0.08, 1.0]"))
NAMES = ("Bilder grün (1)", "it's [a,b]={c}", "2024", "~a,b\\", 'say "日本" #1; $x & co')


@pytest.mark.parametrize("script", [PRETRAIN, LIN, "plot.py"])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 42", "seed:\t42", f"file.yml, line {SEED}: found character '\\t' that"),
        ("seed: 42", b"seed: 42  # Z\xe4hler", f"file.yml, line {SEED}: byte 0xe4 is not UTF-8"),
        ("\nseed: 42", "\nseed: 42\nseed: 43", f"file.yml, line {SEED + 1}: found duplicate key"),
        ("[0.08, 1.0]", "[0.08, 1.0", f"file.yml, line {CROPS + 1}: expected ',' or ']'"),
        ("seed: 42", "seed: ${", "file.yml, seed: no viable alternative at input '${'"),
        (YAML, "- seed: 42", "file.yml: must hold lines of the form key: value"),
        (RECIPES, "recipes: [published]\n", "file.yml: recipes must be names, each with"),
        ("seed: 42", "", "seed: must be an integer from 0"),
        ("seed: 42", "seeed: 42", "seeed: no such key; did you mean seed?"),
    ],
)  # fmt: skip
def test_a_broken_yaml_is_one_line(call, tmp_path, monkeypatch, script, old, new, message):
    path = tmp_path / "file.yml"
    new = new if isinstance(new, bytes) else new.encode()
    path.write_bytes(YAML.encode().replace(old.encode(), new))
    monkeypatch.setattr(config_module, "CONFIG_FILE", path)
    code, error = call(script)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("script", [PRETRAIN, LIN])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("${dataset}/${backbone}", "${datset}", "hydra.run.dir: Interpolation key 'datset'"),
        ("%(message)s", "%(mesage)q", "hydra: Unable to configure formatter 'simple'"),
        ("config.CheckConfig", "config.Nosuch", "Error locating target 'config.Nosuch'"),
        ("  sweep:  ", "  sweeep:  ", "Key 'sweeep' not in 'HydraConf'"),
    ],
)  # fmt: skip
def test_a_broken_block_of_hydra_is_one_line(
    call, tmp_path, monkeypatch, script, old, new, message
):
    path = tmp_path / "file.yml"
    path.write_bytes(YAML.replace(old, new).encode())
    monkeypatch.setattr(config_module, "CONFIG_FILE", path)
    code, error = call(script)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error


def test_what_editors_do_to_a_file_is_fine(call, tmp_path, monkeypatch):
    path = tmp_path / "file.yml"
    path.write_bytes(b"\xef\xbb\xbf" + YAML.replace("\n", "\r\n").encode())
    monkeypatch.setattr(config_module, "CONFIG_FILE", path)
    code, error = call(PRETRAIN, "seed=-1")
    assert code == 2 and error.startswith("error: seed=-1: must be")


@pytest.mark.parametrize("name", NAMES)
def test_a_path_works_as_it_is_typed(thin, write_images, tmp_path, call, name):
    """As dataset, run directory, checkpoint, start of pretraining, and images to classify."""
    folder = tmp_path / name
    write_images(folder, train=8, test=3)
    data = [*FOLDER[:1], f"data_dir={name}", *FOLDER[2:]]
    train = [*data, *TRAIN[len(FOLDER) :]]
    code, error = call(PRETRAIN, *train, f"hydra.run.dir={name}/run {name}")
    assert code == 0, error
    weights = folder / f"run {name}" / "simclr_resnet18_epoch1.pt"
    assert weights.is_file()
    shutil.copy(weights, tmp_path / f"{name}.pt")
    code, error = call(LIN, *data, f"checkpoint={name}.pt", "protocols=[knn]")
    assert code == 0, error
    results = json.loads(Path("logs/SimCLR/folder/resnet18/results.json").read_text())
    assert results["checkpoint"] == f"{name}.pt"
    code, error = call(PRETRAIN, *train, f"init={name}.pt", "hydra.run.dir=two")
    assert code == 0 and "the encoder starts from" in call.stdout, error
    predict = [f"predict={name}/test", "finetune_epochs=1", f"hydra.run.dir={name}/run {name}"]
    code, error = call(LIN, *data, *predict)
    assert code == 0 and (folder / f"run {name}" / "predictions.csv").is_file(), error
    code, error = call("plot.py", *data, "--out", "pictures")
    assert code == 0 and Path("pictures/views.png").is_file(), error


def test_names_that_are_not_utf8(thin, write_images, tmp_path, call):
    name = os.fsdecode(b"Bild\xff")
    write_images(tmp_path / name, train=8, test=3)
    data = [*FOLDER[:1], f"data_dir={name}", *FOLDER[2:]]
    train = [*data, *TRAIN[len(FOLDER) :]]
    code, error = call(PRETRAIN, *train, f"hydra.run.dir={name}/run")
    assert code == 1 and "cannot be made (it is not UTF-8): choose another" in error
    assert not (tmp_path / name / "run").exists()
    code, error = call(PRETRAIN, *train, "hydra.run.dir=run")
    assert code == 0, error
    shutil.move("run/simclr_resnet18_epoch1.pt", f"{name}.pt")
    code, error = call(LIN, *data, f"checkpoint={name}.pt", "protocols=[knn]")
    assert code == 0 and next(Path("logs").rglob("results.md")).is_file(), error
    assert call("compare.py", "run")[0] == 0 and call("plot.py", "run")[0] == 0


def test_several_paths_are_a_sweep_only_where_one_is_asked_for():
    assert quote_path("data_dir=a,b") == "data_dir='a,b'"
    assert quote_path("data_dir=choice(a,b)") == "data_dir='choice(a,b)'"
    for kept in ("data_dir=a,b", "init=choice(a,b)", "checkpoint=glob(*)"):
        assert quote_path(kept, sweep=True) == kept
    assert quote_path("data_dir=a [b]", sweep=True) == "data_dir='a [b]'"
    assert quote_path("protocols=[knn") == "protocols=[knn"


def test_paths_in_a_sweep_and_in_hydra_s_own_spelling(thin, write_images, tmp_path, call):
    name = "Bilder grün (1)"
    write_images(tmp_path / name, train=8, test=3)
    train = [*FOLDER[:1], *FOLDER[2:], *TRAIN[len(FOLDER) :]]
    code, error = call(PRETRAIN, "-m", "seed=1,2", *train, f"data_dir={name}")
    assert code == 0, error
    for spelling in (f"data_dir='{name}'", f'data_dir="{name}"', f"++data_dir={name}"):
        code, error = call(PRETRAIN, *train, spelling, "resume=false")
        assert code == 0, error
    for nowhere in ("nowhere", "no (where)"):
        path = "data_dir=${oc.env:HOME}/" + nowhere
        code, error = call(PRETRAIN, *train, path, "resume=false")
        assert code == 1 and f"{os.environ['HOME']}/{nowhere}/train cannot be read" in error
    code, error = call(PRETRAIN, "data_dir=null")
    assert code == 2 and error.startswith("error: data_dir=None: must be a path")


@pytest.mark.parametrize("override", ["protocols=[knn", "backbone=a b (c", "resnet18", "seed=1=2"])
def test_what_cannot_be_read_is_one_line(call, tmp_path, override):
    for script in (PRETRAIN, LIN, "plot.py")[: 3 if "=" in override else 2]:
        code, error = call(script, override)
        assert code == 2 and error.count("\n") == 1 and not list(tmp_path.iterdir())
        assert error.startswith(f"error: {override}: must be key=value, such as seed=1 or")


def test_a_rule_of_one_protocol_does_not_refuse_the_others(config):
    low, lin = "finetune_learning_rate=1e-4", "finetune_learning_rate"
    for protocols in ("[knn]", "[logistic,knn]"):
        config(low, f"protocols={protocols}", peak=lin)
    for override in (*(f"protocols=[knn,{name}]" for name in SCHEDULED), "predict=images"):
        with pytest.raises(
            ConfigError, match=r"min_learning_rate=0\.001: must be at most finetune"
        ):
            config(low, "protocols=[knn]", override, peak=lin)


def test_rules_between_keys_are_checked_before_a_directory_is_made(call, tmp_path):
    for script, override in (
        (PRETRAIN, ["recipe=digits", "epochs=1"]),
        (PRETRAIN, ["cifar_stem=false", "image_size=16"]),
        (LIN, ["checkpoint=x.pt", "load_epoch=3"]),
    ):
        code, error = call(script, *override)
        assert code == 2 and error.startswith("error: ") and not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(thin, write_images, tmp_path, call, monkeypatch):
    def bug(*arguments):
        raise ValueError("a bug of ours")  # the type that Hydra's own mistakes have

    write_images(tmp_path / "images", train=8)
    monkeypatch.setattr("images.datasets.decode", bug)
    with pytest.raises(ValueError, match="a bug of ours"):
        call(PRETRAIN, *TRAIN)
