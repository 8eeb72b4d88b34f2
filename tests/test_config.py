"""The config: types, ranges and groups of its keys, and the values in simclr_config.yml."""

import argparse
import ast
import os
import re
from dataclasses import asdict, replace

import pytest
from conftest import PRODUCT, REPOSITORY
from hydra import compose, initialize
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import config as config_module
import models
from config import (
    Architecture,
    Config,
    ConfigError,
    Evaluation,
    Execution,
    Pretraining,
    Views,
    as_list,
    keys,
    may_change,
)
from system.commandline import CONFIG_FILE, register_config, to_config
from system.errors import describe

YAML = OmegaConf.load(CONFIG_FILE)
KEYS = ["recipe", *(key for key in YAML if key not in ("hydra", "defaults", "recipes"))]


@pytest.fixture(scope="module")
def composed():
    """The config that Hydra composes of the YAML and the types, which takes it 0.1 s."""
    register_config()
    with initialize(version_base="1.3", config_path=None):
        return compose("simclr_config")


def update(composed, *overrides):
    """A copy of the composed config with these values, of the types that the keys have."""
    cfg = composed.copy()
    for override in OverridesParser.create().parse_overrides([*overrides]):
        OmegaConf.update(cfg, override.key_or_group, override.value())  # as Hydra does
    return cfg


@pytest.fixture
def change(composed):
    """change("key=value", …): the checked config, without composing it again."""
    return lambda *overrides: to_config(update(composed, *overrides))


def test_defaults_are_those_of_the_documentation(config):
    assert asdict(config()) == {
        "dataset": "cifar10", "data_dir": "data", "backbone": "resnet18", "projection_dim": 128,
        "seed": 42, "batch_size": 512, "workers": 16, "epochs": 1000, "log_interval": 50,
        "optimizer": "sgd", "learning_rate": 0.6, "momentum": 0.9, "weight_decay": 1e-6,
        "temperature": 0.5, "finetune_epochs": 100, "load_epoch": None, "device": "auto",
        "image_size": 32, "min_learning_rate": 1e-3, "finetune_learning_rate": None,
        "crop_scale": [0.08, 1.0], "color_strength": 0.5, "grayscale_probability": 0.2,
        "flip_probability": 0.5, "blur_probability": 0.0, "checkpoint": None,
        "precision": "auto", "compile": "auto",
        "activation_checkpointing": False, "view_sizes": None, "recipe": "published",
        "hidden_dim": 2048, "cifar_stem": True, "init": None, "sync_batchnorm": True,
        "micro_batch_size": None, "knn_interval": 10, "save_minutes": 10, "resume": True,
        "warmup_epochs": 0, "protocols": ["knn", "linear"], "baselines": [], "labels": None,
        "runs": 1, "finetune_views": 5, "finetune_weight_decay": 0.0, "views": 2,
    }  # fmt: skip


def keys_read(node):
    """The keys that cfg.key reads below this node, messages left out."""
    if isinstance(node, ast.JoinedStr):
        return
    value = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
    if re.fullmatch(r"(\w+\.)?(run_)?cfg|checked", value):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from keys_read(child)


def test_every_key_is_typed_has_a_value_a_reason_and_a_reader():
    assert sorted(KEYS) == sorted(keys(Config))
    others = "config.py", "plot.py", "compare.py"  # a key that they alone read does nothing
    trees = [ast.parse(path.read_text()) for path in PRODUCT if path.name not in others]
    read = {key for tree in trees for key in keys_read(tree)}
    read.add("recipe")  # whose values are what counts; a message names it
    assert set(KEYS) - read == set()
    lines = CONFIG_FILE.read_text().split("hydra:")[0].splitlines()
    bare = [line for line in lines if re.match(r"\w+:", line) and "#" not in line]
    assert [line.split(":")[0] for line in bare] == ["defaults", "recipes"]


def test_the_groups_are_the_config_and_say_what_may_change():
    groups = Architecture, Views, Pretraining, Execution, Evaluation
    assert [key for group in groups for key in keys(group)] == keys(Config)
    assert set(config_module.BACKBONES) == set(models.BACKBONES)
    assert {"recipe", "device", "compile", "labels"} <= set(may_change())
    fixed = keys(Architecture) + keys(Views) + keys(Pretraining)
    assert set(may_change()) == set(KEYS) - set(fixed)


def test_recipes_state_known_keys_and_only_those_differ(config):
    default = asdict(config())
    assert set(YAML.recipes) == {"published", "simsiam", "fast", "paper", "digits"}
    for name, values in YAML.recipes.items():
        cfg = asdict(config(f"recipe={name}"))
        assert cfg["recipe"] == name and set(values or {}) < set(KEYS) - {"recipe"}
        changed = {key for key in KEYS if cfg[key] != default[key]}
        assert changed - {"recipe"} <= set(values or {})
        stated = OmegaConf.to_container(YAML.recipes)[name] or {}
        assert all(cfg[key] == v for key, v in stated.items() if "${" not in str(v))


def test_learning_rates_follow_the_batch_size_that_is_composed_in_the_end(config):
    for overrides, rate in (
        (["batch_size=128"], 0.15),
        (["batch_size=128", "learning_rate=0.5"], 0.5),
        (["recipe=simsiam"], 0.06),
        (["recipe=simsiam", "batch_size=256"], 0.03),
        (["recipe=paper"], 4),  # with its own batch size, 1024
        (["recipe=fast"], 0.0031 * 512**0.5),
        (["recipe=fast", "views=2", "batch_size=64"], 0.0031 * 128**0.5),
        (["batch_size=1024", "learning_rate='${times_root:0.075,${batch_size}}'"], 2.4),
    ):
        assert config(*overrides).learning_rate == pytest.approx(rate), overrides


def test_the_command_line_wins_over_a_recipe(config):
    cfg = config("hidden_dim=64", "recipe=simsiam", "weight_decay=0")
    assert (cfg.hidden_dim, cfg.weight_decay, cfg.crop_scale) == (64, 0, [0.2, 1.0])


INTEGER, NUMBER, TRUTH = "converted to Integer", "converted to Float", "not a valid bool"
BAD = [
    ("batch_size", "abc", INTEGER),
    ("batch_size", "1.5", INTEGER),
    ("batch_size", "null", "is not Optional"),
    ("batch_size", "1", "a number from 2"),
    ("views", "1", "a number from 2"),
    ("temperature", "0", "a number above 0"),
    ("temperature", "nan", "a number above 0"),
    ("temperature", "inf", "a number above 0"),
    ("temperature", "abc", NUMBER),
    ("backbone", "resnet19", "one of resnet18, resnet34, resnet50, resnet101, resnet152, wide"),
    ("dataset", "imagenet", "one of cifar10, cifar100, stl10, digits, folder"),
    ("device", "tpu", "one of auto, cuda, mps, cpu"),
    ("optimizer", "adam", "one of sgd, lars, muon"),
    ("precision", "fp8", "one of auto, fp32, bf16, fp16"),
    ("crop_scale", "[0,1]", "a number above 0 to 1"),
    ("crop_scale", "[0.8,0.2]", "[smallest,largest]"),
    ("crop_scale", "0.5", "not a ListConfig, list or tuple"),
    ("epochs", "0", "a number from 1"),
    ("finetune_epochs", "0", "a number from 1"),
    ("finetune_views", "0", "a number from 1"),
    ("log_interval", "0", "a number from 1"),
    ("runs", "0", "a number from 1"),
    ("knn_interval", "-1", "a number from 0"),
    ("save_minutes", "-1", "a number from 0"),
    ("warmup_epochs", "-1", "a number from 0"),
    ("workers", "0", "a number from 1 to 1,024"),
    ("workers", "2000", "a number from 1 to 1,024"),
    ("image_size", "4", "a number from 8 to 1,024"),
    ("micro_batch_size", "0", "a number from 1"),
    ("load_epoch", "0", "a number from 1"),
    ("projection_dim", "0", "a number from 1 to 65,536"),
    ("hidden_dim", "99999999999999999999", "a number from 1 to 65,536"),
    ("seed", "-1", "a number from 0 to 4,294,967,295"),
    ("seed", "{a: 1}", INTEGER),
    ("resume", "never", TRUTH),
    ("cifar_stem", "maybe", TRUTH),
    ("sync_batchnorm", "2.5", TRUTH),
    ("activation_checkpointing", "auto", TRUTH),
    ("blur_probability", "2", "a number from 0 to 1"),
    ("flip_probability", "1.1", "a number from 0 to 1"),
    ("grayscale_probability", "-0.1", "a number from 0 to 1"),
    ("color_strength", "3", "a number from 0 to 2.5"),
    ("learning_rate", "0", "a number above 0"),
    ("min_learning_rate", "-1", "a number from 0"),
    ("momentum", "1", "below 1"),
    ("weight_decay", "-1e-6", "a number from 0"),
    ("data_dir", "' '", "a path"),
    ("init", "''", "a path"),  # as of a shell's unset variable, which would start at random
    ("checkpoint", "''", "a path"),
    ("protocols", "knn", "not a ListConfig, list or tuple"),
    ("protocols", "[]", "knn, linear, linear_clean, logistic, finetune"),
    ("protocols", "[knn,knn]", "one of knn, linear"),
    ("baselines", "[supervised]", "one of random, pixels"),
    ("labels", "0", "null, a fraction above 0 and below 1, or a number of images of each class"),
    ("labels", "true", "null, a fraction above 0 and below 1"),
    ("finetune_learning_rate", "[]", "a number above 0"),
    ("finetune_learning_rate", "[0.1,0]", "a number above 0"),
    ("finetune_weight_decay", "-1", "a number from 0"),
    ("compile", "fast", "auto, true or false"),
    ("view_sizes", "16", "null or [[pixels,fraction],...]"),
    ("view_sizes", f"[{','.join(['[16,0.111]'] * 9)}]", "null or [[pixels,fraction],...]"),
    ("view_sizes", "[[16,0.5],[32,0.4]]", "sum to 1"),
    ("view_sizes", "[[4,0.5],[32,0.5]]", "8 to 1024 pixels"),
    ("view_sizes", "[[16,1.5],[32,-0.5]]", "fractions that sum to 1"),
    ("view_sizes", "[[16.5,1]]", "8 to 1024 pixels"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "allowed"), BAD)
def test_an_impossible_value_is_refused_with_key_value_and_what_is_allowed(
    composed, key, value, allowed
):
    with pytest.raises((ConfigError, OmegaConfBaseException)) as error:
        cfg = update(composed, f"{key}={value}")
        to_config(cfg)
    line, code = describe(error.value)
    assert code == 2 and "\n" not in line and key in line and allowed in line
    if isinstance(error.value, ConfigError):
        assert line.startswith(f"{key}={cfg[key]}: must be ")


def test_every_key_is_among_the_refusals():
    assert {key for key, _, _ in BAD} == set(KEYS) - {"recipe"}  # which Hydra refuses


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        (["learning_rate=1e-4"], ["learning_rate=1e-3"],
         "min_learning_rate=0.001: must be at most learning_rate, 0.0001"),
        (["epochs=10", "warmup_epochs=10"], ["epochs=11", "warmup_epochs=10"],
         "warmup_epochs=10: must be less than epochs"),
        (["optimizer=muon"], ["optimizer=muon", "learning_rate=0.25"],
         "learning_rate=0.6: must be at most 0.25 for muon"),
        (["cifar_stem=false", "image_size=31"], ["cifar_stem=false"],
         "cifar_stem=False: must be true for views of 31 pixels"),
        (["cifar_stem=false", "view_sizes=[[16,0.5],[32,0.5]]"],
         ["cifar_stem=false", "view_sizes=[[32,1]]"], "must be true for views of 16 pixels"),
        (["blur_probability=0.5", "image_size=19"], ["blur_probability=0.5", "image_size=20"],
         "blur_probability=0.5: must be 0 for views of 19 pixels"),
        (["compile=true", "micro_batch_size=8"], ["compile=auto", "micro_batch_size=8"],
         "compile=True: must be false or auto"),
        (["compile=true", "activation_checkpointing=true"], ["compile=true"],
         "compile=True: must be false or auto"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_each_other_are_refused(change, wrong, right, message):
    change(*right)
    with pytest.raises(ConfigError, match=re.escape(message)):
        change(*wrong)


def test_values_of_any_form_that_are_allowed(change):
    cfg = change("labels=0.1", "view_sizes=[[16,0.78],[24,0.17],[32,0.05]]", "compile=false",
                 "finetune_learning_rate=[0.1,1]", "finetune_weight_decay=0")  # fmt: skip
    assert (cfg.labels, cfg.compile, cfg.finetune_learning_rate) == (0.1, False, [0.1, 1])
    assert cfg.view_sizes == [[16, 0.78], [24, 0.17], [32, 0.05]]
    assert as_list(cfg.finetune_weight_decay) == [0] and change("labels=25").labels == 25
    assert change("init='~/a.pt'").init == os.path.expanduser("~/a.pt")
    with pytest.raises(ConfigError, match="temperature=-1: must be"):
        replace(cfg, temperature=-1)  # a changed copy is checked too


def check_help_at_once(parser, action):
    """What Python 3.14's argparse does with each help text as it is registered."""
    if action.help is not None:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("badly formed help string") from error


def test_the_entry_points_start_where_argparse_checks_help_texts(call, monkeypatch):
    """Python 3.14; Hydra up to 1.3.8 registers a help text that is none (hydra issue 3121)."""
    add_argument = argparse.ArgumentParser.add_argument
    helps = [action.help for action in get_args_parser()._actions]

    def checked(parser, *names, **options):
        action = add_argument(parser, *names, **options)
        parser._check_help(action)
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help_at_once, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", checked)
    for script in ("simclr.py", "simclr_lin.py"):
        code, error = call(script, "--help")
        assert code == 0 and "recipe: digits, fast, paper, published, simsiam" in call.stdout, error
    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help_at_once)
    if not all(isinstance(text, str) for text in helps):  # Hydra needs the workaround
        with pytest.raises(ValueError, match="badly formed help string"):
            get_args_parser()


def test_no_module_evaluates_text_or_unpickles():
    """Pitfall 24: no eval, exec or pickle.load; torch.load with weights_only=True."""
    rooms = {path.parent.name for path in PRODUCT}
    assert rooms >= {REPOSITORY.name, "images", "training", "evaluation", "system"}
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node)
                assert not re.match(r"(eval|exec|pickle\.loads?)\(", call), (path, call)
                assert not call.startswith("torch.load(") or "weights_only=True" in call
