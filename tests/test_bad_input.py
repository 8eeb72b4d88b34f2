"""What a user types that cannot be: one line with what, where and what is allowed, and no file.

Through the scripts, in this process. The ranges of the keys are in test_config.py, damaged files
in the tests of what reads them.
"""

import re

import pytest

from system import commandline

PRETRAIN, LIN = "simclr.py", "simclr_lin.py"
YAML = commandline.CONFIG_FILE.read_text(encoding="utf-8")
RECIPES = re.search(r"recipes:\n(?:  .*\n)+", YAML)[0]


@pytest.fixture
def refuse(call, tmp_path):
    """refuse(code, script, overrides): the one line of stderr, after which no file is there."""

    def refuse(expected, script, *overrides):
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        code, error = call(script, *overrides)
        assert code == expected and error.startswith("error: ") and error.count("\n") == 1, error
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
        return error.removeprefix("error: ").rstrip("\n")

    return refuse


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=abc", "batch_size=abc: Value 'abc' of type 'str' could not be converted to"),
        ("batch_size=null", "batch_size=null: field 'batch_size' is not Optional"),
        ("temperature=nan", "temperature=nan: must be a number above 0"),
        ("min_learning_rate=9", "min_learning_rate=9.0: must be at most learning_rate, 0.6"),
        ("init=", "init=: must be a path"),  # a shell's unset variable
        ("batchsize=3", "batchsize: no such key; did you mean batch_size? there are backbone, "),
        ("+foo=1", "foo: no such key; there are backbone, projection_dim"),
        ("hydra.nosuch=3", "hydra.nosuch: no such key"),
        ("recipe=nope", "Could not find 'recipe/nope' Available options in 'recipe': digits fast"),
        ("recipe=[digits,simsiam]", "recipe=[digits,simsiam]: must be the name of one recipe"),
        ("recipe=null", "must be a string"),
        ("~recipe", "recipe"),
        ("hydra/launcher=nosuch", "Available options in 'hydra/launcher': basic"),
        ("~temperature", "temperature: must have a value"),
        ("temperature=???", "temperature: must have a value"),
        ("temperature=${nosuch}", "Interpolation key 'nosuch' not found full_key: temperature"),
        ("temperature=${temperature}", "Recursive interpolation detected full_key: temperature"),
        ("data_dir=${oc.env:NO_SUCH}/x", "Environment variable 'NO_SUCH' not found"),
        ("learning_rate=${per_256:a,b}", "TypeError raised while resolving"),
        ("hydra.run.dir=${nosuch}", "Interpolation key 'nosuch' not found full_key: hydra.run.dir"),
        ("data_dir=a,b", "Ambiguous value for argument 'data_dir=a,b'"),
        ("temperature", "Error parsing override 'temperature'"),
        ("seed=1=2", "seed=1=2: mismatched input '='"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(refuse, tmp_path, override, message):
    nowhere = "dataset=folder", "data_dir=nowhere"  # what is not refused does not train
    assert message in refuse(2, PRETRAIN, *nowhere, override)
    assert not [*tmp_path.iterdir()]


def test_what_is_checked_later_is_one_line_too(refuse):
    assert "checkpoint=x.pt: must be null for simclr.py" in refuse(2, PRETRAIN, "checkpoint=x.pt")
    loud = "hydra.job_logging.root.level=LOUD"
    assert refuse(2, PRETRAIN, loud) == "Unable to configure root logger: Unknown level: 'LOUD'"


def test_the_evaluation_refuses_in_the_same_way(refuse):
    assert "labels=0: must be null, a fraction" in refuse(2, LIN, "labels=0")
    assert "did you mean protocols?" in refuse(2, LIN, "protocol=[knn]")
    assert refuse(2, LIN, "checkpoint=''") == "checkpoint=: must be a path"


def test_a_path_that_cannot_be_is_one_line(refuse, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        assert refuse(1, PRETRAIN, f"hydra.run.dir={folder}") == f"{folder}: {reason}"
    long = "x" * 300
    assert refuse(1, PRETRAIN, f"hydra.run.dir={long}") == f"{long}: File name too long"


@pytest.fixture
def edit(monkeypatch, tmp_path):
    """edit(old, new): the scripts read a simclr_config.yml in which `new` stands for `old`."""

    def edit(old, new):
        assert old in YAML
        path = tmp_path / "file.yml"
        path.write_bytes(YAML.encode().replace(old.encode(), new))
        monkeypatch.setattr(commandline, "CONFIG_FILE", path)

    return edit


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 42", "seed:\t42", r"that cannot start any token in \S+, line \d+"),
        ("\nseed: 42", "\nseed: 42\nseed: 43", r"found duplicate key seed in \S+, line \d+"),
        ("[0.08, 1.0]", "[0.08, 1.0", r"line \d+, column 1$"),
        ("seed: 42", "seed: ${", r"no viable alternative at input '\${' full_key: seed"),
        ("seed: 42", "", "seed: must have a value"),
        ("seed: 42", "seed:", "Incompatible value 'None' for field of type 'int' full_key: seed"),
        ("seed: 42", "seed: abc", "Value 'abc' of type 'str' could not be .* full_key: seed"),
        ("seed: 42", "seed: -1", "seed=-1: must be a number from 0"),
        ("seed: 42", "seeed: 42", "Key 'seeed' not in 'Config'"),
        (
            "per_256:0.3",
            "per256:0.3",
            "Unsupported interpolation type per256 full_key: learning_rate",
        ),
        (YAML, "- seed: 42", "ListConfig"),
        (YAML, "", "Key not found: 'recipes'"),
        (RECIPES, "recipes: [published]\n", "ListConfig"),
        ("  published:  ", "  published: 3", "Object of unsupported type: 'int'"),
        ("  published:  ", "  published: {hiden_dim: 8}", "Key 'hiden_dim' not in 'Config'"),
        (
            "${dataset}/${backbone}",
            "${datset}",
            "Interpolation key 'datset' not found full_key: hydra.run.dir",
        ),
        ("%(message)s", "%(mesage)q", "Unable to configure formatter 'simple'"),
        ("commandline.CheckConfig", "commandline.Nosuch", "Error locating target 'system.comm"),
        ("  sweep:  ", "  sweeep:  ", "Key 'sweeep' not in 'HydraConf'"),
    ],
)
def test_a_mistake_in_the_yaml_is_one_line(call, edit, tmp_path, old, new, message):
    edit(old, new.encode())
    code, error = call(PRETRAIN, "data_dir=nowhere")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(message, error.rstrip()), error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "file.yml"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("\n", b"\r\n"), ("# Every", b"\xef\xbb\xbf# Every"), ("# Every", b"# Z\xe4hler every")],
)
def test_what_editors_do_to_the_yaml_is_fine(refuse, edit, old, new):
    edit(old, new)
    assert refuse(2, PRETRAIN, "seed=-1").startswith("seed=-1: must be a number from 0")
