"""The YAML: its defaults, that code reads every key, and what is refused."""

import argparse
import ast
import re

import pytest
from conftest import PRODUCT, REPOSITORY
from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from config import CONFIG_FILE, MAY_CHANGE, RULES
from system.errors import ConfigError, one_line_errors

YAML = OmegaConf.load(CONFIG_FILE)
KEYS = ["recipe", *(key for key in YAML if key not in ("hydra", "defaults", "recipes"))]


def test_defaults(config):
    cfg = config()
    given = {
        "dataset": "cifar10", "data_dir": "data", "backbone": "resnet18", "projection_dim": 128,
        "seed": 42, "batch_size": 512, "workers": 16, "epochs": 1000, "log_interval": 50,
        "optimizer": "sgd", "learning_rate": 0.6, "momentum": 0.9, "weight_decay": 1e-6,
        "temperature": 0.5, "finetune_epochs": 100, "load_epoch": None, "device": "auto",
        "image_size": 32, "min_learning_rate": 1e-3, "finetune_learning_rate": 0.2,
        "crop_scale": [0.08, 1.0], "color_strength": 0.5, "grayscale_probability": 0.2,
        "flip_probability": 0.5, "blur_probability": 0.0, "checkpoint": None,
        "precision": "auto", "compile": "auto",
        "activation_checkpointing": False, "view_sizes": None, "recipe": "published",
        "hidden_dim": 2048, "cifar_stem": True, "init": None, "sync_batchnorm": True,
        "micro_batch_size": None, "knn_interval": 10, "save_minutes": 10, "resume": True,
        "warmup_epochs": 0, "protocols": ["knn", "linear"], "baselines": [], "labels": None,
        "runs": 1, "finetune_views": 5, "finetune_weight_decay": 0.0, "predict": None,
    }  # fmt: skip
    assert cfg == given


def keys_read(node):
    """The keys that cfg.key and self.config["key"] read below this node, messages left out."""
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cfg":
        yield node.attr
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "self.config":
        yield ast.literal_eval(node.slice)
    for child in ast.iter_child_nodes(node):
        yield from keys_read(child)


def test_every_key_has_a_rule_a_reason_and_a_reader():
    others = "config.py", "plot.py", "compare.py"  # a key that they alone read does nothing
    trees = [ast.parse(path.read_text()) for path in PRODUCT if path.name not in others]
    read = {key for tree in trees for key in keys_read(tree)}
    assert set(KEYS) == set(RULES)
    read.add("recipe")  # whose values are what counts; a message names it
    assert set(KEYS) == read  # neither a key that nothing reads, nor one that is not there
    lines = CONFIG_FILE.read_text().split("hydra:")[0].splitlines()
    bare = [line for line in lines if re.match(r"\w+:", line) and "#" not in line]
    assert [line.split(":")[0] for line in bare] == ["defaults", "recipes"]


def test_the_default_recipe_changes_nothing_and_the_others_state_their_values(config):
    plain = {key: YAML[key] for key in KEYS if key != "recipe"}
    default = config()
    assert default == {**OmegaConf.to_container(OmegaConf.create(plain), resolve=True),
                       "recipe": "published"}  # fmt: skip
    assert set(YAML.recipes) == {"published", "simsiam", "fast", "paper", "digits"}
    for name, values in YAML.recipes.items():
        cfg = config(f"recipe={name}")
        assert cfg.recipe == name and set(values or {}) < set(KEYS) - {"recipe"}
        stated = OmegaConf.to_container(YAML.recipes)[name] or {}
        assert all(cfg[key] == v for key, v in stated.items() if "${" not in str(v))
        changed = {key for key in KEYS if cfg[key] != default[key]}
        assert changed - {"recipe"} - set(values or {}) <= {"finetune_learning_rate"}
    assert config("recipe=simsiam").learning_rate == pytest.approx(0.06)
    fast, paper = config("recipe=fast"), config("recipe=paper")
    assert (paper.learning_rate, paper.batch_size, paper.warmup_epochs) == (4, 1024, 10)
    assert (paper.backbone, paper.optimizer) == ("resnet50", "lars")
    assert (fast.optimizer, fast.temperature, fast.batch_size) == ("muon", 0.1, 256)
    assert fast.view_sizes == [[16, 0.85], [24, 0.15]] and fast.min_learning_rate == 0
    assert fast.learning_rate == pytest.approx(0.0704) and fast.crop_scale == [0.2, 1.0]


def test_the_command_line_wins_over_a_recipe(config):
    cfg = config("hidden_dim=64", "recipe=simsiam", "batch_size=256", "weight_decay=0")
    assert (cfg.hidden_dim, cfg.weight_decay) == (64, 0) and cfg.crop_scale == [0.2, 1.0]
    assert cfg.learning_rate == pytest.approx(0.03)  # its own rule, at the batch size given


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
    parser = argparse.ArgumentParser()
    with pytest.raises(ValueError, match="badly formed"):
        parser.add_argument("--rate", help="100 %")  # all other help texts are checked as before
    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help_at_once)
    if not all(isinstance(text, str) for text in helps):  # Hydra needs the workaround
        with pytest.raises(ValueError, match="badly formed help string"):
            get_args_parser()


def test_learning_rates_follow_the_batch_size_unless_set_by_hand(config):
    cfg = config("batch_size=128")
    assert (cfg.learning_rate, cfg.finetune_learning_rate) == pytest.approx((0.15, 0.05))
    cfg = config("batch_size=128", "learning_rate=0.5")
    assert (cfg.learning_rate, cfg.finetune_learning_rate) == pytest.approx((0.5, 0.05))


BAD = [
    ("batch_size", "0", "integer from 2"),
    ("batch_size", "-512", "integer from 2"),
    ("batch_size", "abc", "integer from 2"),
    ("batch_size", "1.5", "integer from 2"),
    ("batch_size", "true", "integer from 2"),
    ("batch_size", "null", "integer from 2"),
    ("batch_size", "1", "integer from 2"),
    ("temperature", "0", "above 0"),
    ("temperature", "-0.5", "above 0"),
    ("temperature", "nan", "above 0"),
    ("temperature", "inf", "above 0"),
    ("temperature", "'0.5'", "above 0"),
    ("backbone", "resnet19", "resnet18, resnet34, resnet50, resnet101, resnet152"),
    ("backbone", "''", "resnet18"),
    ("dataset", "imagenet", "cifar10, cifar100, stl10, digits, folder"),
    ("device", "tpu", "auto, cuda, mps, cpu"),
    ("optimizer", "adam", "sgd, lars"),
    ("crop_scale", "[0,1]", "above 0 and at most 1"),
    ("crop_scale", "[0.5,1.2]", "above 0 and at most 1"),
    ("crop_scale", "[0.8,0.2]", "[smallest,largest]"),
    ("crop_scale", "0.5", "two fractions"),
    ("epochs", "0", "integer from 1"),
    ("finetune_epochs", "0", "integer from 1"),
    ("log_interval", "0", "integer from 1"),
    ("knn_interval", "-1", "integer from 0"),
    ("save_minutes", "-1", "number from 0"),
    ("resume", "never", "true or false"),
    ("workers", "0", "integer from 1"),
    ("image_size", "4", "integer from 8"),
    ("micro_batch_size", "0", "null, or an integer from 1"),
    ("warmup_epochs", "-1", "integer from 0"),
    ("projection_dim", "0", "integer from 1"),
    ("hidden_dim", "x", "integer from 1"),
    ("hidden_dim", "99999999999999999999", "integer from 1 to 65536"),
    ("cifar_stem", "maybe", "true or false"),
    ("init", "''", "null, or a path"),
    ("blur_probability", "2", "from 0 to 1"),
    ("sync_batchnorm", "2", "true or false"),
    ("flip_probability", "1.1", "from 0 to 1"),
    ("grayscale_probability", "-0.1", "from 0 to 1"),
    ("color_strength", "3", "from 0 to 2.5"),
    ("seed", "-1", "integer from 0"),
    ("seed", "1e3", "integer from 0"),
    ("learning_rate", "0", "above 0"),
    ("min_learning_rate", "-1", "from 0"),
    ("momentum", "1", "from 0 and below 1"),
    ("weight_decay", "-1e-6", "from 0"),
    ("data_dir", "' '", "a path"),
    ("data_dir", "2024", "a path, in quotes of its own"),
    ("load_epoch", "0", "null, or an integer from 1"),
    ("checkpoint", "''", "null, or a path"),
    ("protocols", "knn", "a list, […], of one of knn, linear, linear_clean, logistic, finetune"),
    ("protocols", "[]", "a list, […], of one of knn"),
    ("protocols", "[knn,knn]", "a list, […], of one of knn"),
    ("protocols", "[supervised]", "one of knn, linear"),
    ("baselines", "[supervised]", "a list, [] or […], of one of random, pixels"),
    ("labels", "0", "null, or a number above 0 and below 1, or an integer from 1 to 1000000000"),
    ("labels", "1.0", "null, or a number above 0 and below 1"),
    ("labels", "2.5", "null, or a number above 0 and below 1"),
    ("runs", "0", "integer from 1"),
    ("predict", "''", "null, or a path"),
    ("finetune_learning_rate", "zero", "above 0"),
    ("finetune_learning_rate", "[]", "a number above 0, or a list, […], of a number above 0"),
    ("finetune_learning_rate", "[0.1,0]", "a number above 0, or a list, […], of a number above 0"),
    ("finetune_weight_decay", "-1", "a number from 0, or a list, […], of a number from 0"),
    ("finetune_views", "0", "integer from 1"),
    ("precision", "fp8", "auto, fp32, bf16, fp16"),
    ("compile", "fast", "auto, or true or false"),
    ("compile", "1", "auto, or true or false"),
    ("activation_checkpointing", "auto", "true or false"),
    ("view_sizes", "16", "null, or [[pixels,fraction],...]"),
    ("view_sizes", "[]", "[[pixels,fraction],...]"),
    ("view_sizes", f"[{','.join(['[16,0.11]'] * 9)}]", "1 to 8 pairs"),
    ("view_sizes", "[16,24]", "[[pixels,fraction],...]"),
    ("view_sizes", "[[16,0.5],[32,0.4]]", "sum to 1"),
    ("view_sizes", "[[4,0.5],[32,0.5]]", "pixels from 8 to 1024"),
    ("view_sizes", "[[16,1.5],[32,-0.5]]", "fractions that sum to 1"),
    ("view_sizes", "[[16.5,1]]", "pixels from 8"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD)
def test_an_impossible_value_is_refused_with_key_value_and_what_is_allowed(
    config, key, value, allowed
):
    with pytest.raises(ConfigError) as error:
        config(f"{key}={value}")
    message = str(error.value)
    typed = OmegaConf.from_dotlist([f"{key}={value}"])[key]
    unquoted = message.replace("'", "")
    assert unquoted.startswith(f"{key}={typed}: must be ".replace("'", "")) and allowed in message
    assert "\n" not in message


def test_every_rule_is_among_the_refusals():
    assert {key for key, _, _ in BAD} == set(RULES) - {"recipe"}  # which Hydra refuses


@pytest.mark.parametrize("value", ["${nosuch:1}", "${nosuch}", "${oc.env:NO_SUCH_VARIABLE}"])
def test_an_interpolation_that_leads_nowhere_is_refused(config, value):
    with pytest.raises(
        ConfigError, match=r"learning_rate: must be a number above 0; .*(?i:no_?such)"
    ):
        config(f"learning_rate={value}")


def test_the_cosine_may_not_climb(config):
    with pytest.raises(
        ConfigError, match=r"min_learning_rate=0\.001: must be at most learning_rate"
    ):
        config("learning_rate=1e-4")


def test_the_warm_up_ends_before_the_run(config):
    config("epochs=11", "warmup_epochs=10")
    with pytest.raises(ConfigError, match="warmup_epochs=10: must be less than epochs, which"):
        config("epochs=10", "warmup_epochs=10")


def test_a_rate_of_sgd_is_refused_for_muon(config):
    """The default of 0.6 would turn every weight by 30 degrees in each step."""
    config("optimizer=muon", "learning_rate=0.05")
    for rate, batch in (("0.6", "batch_size=512"), ("0.3", "batch_size=256")):
        with pytest.raises(ConfigError, match=f"^learning_rate={rate}: must be at most 0.25 for"):
            config("optimizer=muon", batch)
    config("optimizer=muon", peak="finetune_learning_rate")  # which does not read it


def test_small_views_take_the_stem_for_small_images(config):
    config("cifar_stem=false", "view_sizes=[[32,1]]")
    for size in ("image_size=31", "view_sizes=[[16,0.5],[32,0.5]]"):
        with pytest.raises(ConfigError, match="cifar_stem=false: must be true for views of "):
            config("cifar_stem=false", size)


def test_a_blur_of_one_pixel_is_refused(config):
    config("blur_probability=0.5", "image_size=20")
    for size in ("image_size=19", "view_sizes=[[16,0.5],[32,0.5]]"):
        config(size)
        with pytest.raises(
            ConfigError, match=r"blur_probability=0\.5: must be 0 for views of 1\d "
        ):
            config("blur_probability=0.5", size)


def test_a_sweep_finds_its_folders_again_when_what_may_change_has_changed():
    job = OmegaConf.load(CONFIG_FILE).hydra.job.config.override_dirname
    assert set(MAY_CHANGE) - {"recipe"} == set(job.exclude_keys)


def test_the_square_root_rule(config):
    cfg = config("batch_size=1024", "learning_rate='${times_root:0.075,${batch_size}}'")
    assert cfg.learning_rate == pytest.approx(2.4)


def test_an_unknown_key_is_refused(config):
    with pytest.raises(ConfigCompositionException, match="batchsize"):
        config("batchsize=3")
    with pytest.raises(
        ConfigError, match=r"batchsize: no such key; did you mean batch_size\? there are "
    ):
        config("+batchsize=3")
    with pytest.raises(ConfigError, match="temperature: must be a number above 0"):
        config("~temperature")


def test_checkpoint_and_load_epoch_exclude_each_other_but_for_a_run_directory(config, tmp_path):
    config(f"checkpoint={tmp_path}", "load_epoch=3", peak="finetune_learning_rate")
    with pytest.raises(ConfigError, match=r"load_epoch=3.*checkpoint=x\.pt"):
        config("checkpoint=x.pt", "load_epoch=3", peak="finetune_learning_rate")


def test_the_cosine_of_the_linear_layer_may_not_climb_either(config):
    config("finetune_learning_rate=1e-4")  # of no concern to pretraining
    with pytest.raises(ConfigError, match="at most finetune_learning_rate"):
        config("finetune_learning_rate=1e-4", peak="finetune_learning_rate")
    with pytest.raises(ConfigError, match=r"at most finetune_learning_rate, which is 0\.0001"):
        config("finetune_learning_rate=[0.1,1e-4]", peak="finetune_learning_rate")


def test_keys_of_the_evaluation_are_refused_in_pretraining(config):
    for override in ("checkpoint=x.pt", "load_epoch=3", "predict=images", "labels=0.1"):
        with pytest.raises(ConfigError, match=rf"{override}: must be null for simclr\.py"):
            config(override)
        config(override, peak="finetune_learning_rate")
    with pytest.raises(ConfigError, match="init=PATH starts pretraining from one"):
        config("checkpoint=x.pt")


def test_a_users_mistake_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise ConfigError("a=1: must be\n   2")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: a=1: must be 2\n"
    with pytest.raises(ZeroDivisionError), one_line_errors():
        1 / 0  # noqa: B018


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
