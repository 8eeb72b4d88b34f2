"""Environment variables: set but empty is unset; what cannot be used is named in one line."""

import ast
import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import PRODUCT, REPOSITORY
from test_distributed import ENV

from system import environment, errors
from training import distributed

TRAIN = [
    "dataset=digits", "image_size=8", "batch_size=256", "hidden_dim=8", "projection_dim=4",
    "knn_interval=0", "epochs=1", "device=cpu", "compile=false", "sync_batchnorm=false",
]  # fmt: skip
OURS = {
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE",
}  # fmt: skip
# Each of them, empty, was a traceback: of int() or float(), or of a package's own check. Most are
# read as a package is imported, so that this process cannot try them.
EMPTY = {
    "CXX", "TORCH_LOGS", "TORCH_DISTRIBUTED_DEBUG", "TORCHINDUCTOR_MIN_NUM_SPLIT",
    "JOBLIB_MULTIPROCESSING", "TQDM_MININTERVAL", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(errors, "rank", None)


def start(folder, *command, **variables):
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env={**ENV, **variables},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_one_place_reads_the_environment():
    reads = r"environ\.get|environ\.pop|getenv|in os\.environ|[=(] ?os\.environ\["
    texts = {path.name: ast.unparse(ast.parse(path.read_text("utf-8"))) for path in PRODUCT}
    found = {name for name, text in texts.items() if re.search(reads, text)}
    assert found == {"environment.py", "errors.py"}  # the second: whether there is an agent
    assert {name for name in OURS if f"'{name}'" in texts["environment.py"]} == OURS


@pytest.mark.parametrize("script", ["simclr.py", "simclr_lin.py", "plot.py", "compare.py"])
def test_each_command_imports_it_before_all_else(script):
    nodes = ast.parse((REPOSITORY / script).read_text(encoding="utf-8")).body
    first = next(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "import system.environment"


def test_set_but_empty_is_unset(tmp_path, write_images):
    few = "dataset=folder", f"data_dir={write_images(tmp_path / 'images', train=2)}", "batch_size=6"
    blank = {name: " " if name == "RANK" else "" for name in EMPTY | OURS}
    done = start(tmp_path, str(REPOSITORY / "simclr.py"), *TRAIN, *few, **blank)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Error" not in done.stderr
    assert (tmp_path / "logs/SimCLR/folder/resnet18/metrics.jsonl").exists()


def test_where_empty_says_something_it_stays(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "TZ", "https_proxy", "CXX", "HOME"):
        monkeypatch.setenv(name, "")
    environment.drop_empty()
    there = {name for name in ("CUDA_VISIBLE_DEVICES", "TZ", "https_proxy") if name in os.environ}
    assert len(there) == 3 and "CXX" not in os.environ and "HOME" not in os.environ


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("simclr.py", "TORCH_DISTRIBUTED_DEBUG"),
        ("simclr_lin.py", "TQDM_MININTERVAL"),
        ("plot.py", "JOBLIB_MULTIPROCESSING"),
    ],
)
def test_what_stops_an_import_is_named(tmp_path, script, name):
    done = start(tmp_path, str(REPOSITORY / script), **{name: "abc"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the environment variable {name}=abc: ")
    assert done.stderr.endswith(f"; unset {name}\n") and done.stderr.count("\n") == 1


def test_an_import_that_fails_for_another_reason_keeps_its_traceback(tmp_path):
    (tmp_path / "ours.py").write_text("int('no variable has this value')")
    code = "import system.environment, ours"
    done = start(tmp_path, "-c", code, PYTHONPATH=f"{REPOSITORY}:{tmp_path}")
    assert done.returncode == 1 and "Traceback" in done.stderr


ALONE = "env -u WORLD_SIZE -u RANK"
COMPLETE = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE=2, but not set: LOCAL_RANK, MASTER_ADDR, MASTER_PORT; "),
        ({"RANK": "1", "LOCAL_RANK": ""}, "WORLD_SIZE=2, but not set: LOCAL_RANK, MASTER_ADDR"),
        ({}, "WORLD_SIZE=2, but not set: RANK, LOCAL_RANK"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: must be an integer from 1"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: must be an integer from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be an integer from 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0: must be an integer from 1"),
        ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK=3: must be an integer from 0 to 0"),
        ({**COMPLETE, "RANK": "2"}, "RANK=2: must be an integer from 0 to 1"),
        ({**COMPLETE, "LOCAL_RANK": "x"}, "LOCAL_RANK=x: must be an integer from 0 to 1"),
        ({**COMPLETE, "MASTER_PORT": "abc"}, "MASTER_PORT=abc: must be an integer from 1 to 65535"),
        ({**COMPLETE, "MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be an integer"),
        ({**COMPLETE, "MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR=no.such.host.invalid: "),
        ({**COMPLETE, "MASTER_ADDR": 70 * "a"}, "is no host known here"),
        ({**COMPLETE, "TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT=x: must be"),
    ],
)
def test_a_launchers_variable_that_cannot_be_used_is_named(call, monkeypatch, variables, message):
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    code, error = call("simclr.py", *TRAIN)
    assert code == 2 and error.count("\n") == 1, error
    assert error.startswith("error: ") and message in error and ALONE in error
    code, error = call("simclr_lin.py", "checkpoint=nowhere.pt")
    assert code in (1, 2) and error.count("\n") == 1 and error.startswith("error: ")


@pytest.mark.parametrize(
    "variables", [{"RANK": "3"}, {"LOCAL_RANK": "x"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1",
     "RANK": "0", "MASTER_PORT": ""}, {"TORCHELASTIC_RESTART_COUNT": "x"}]
)  # fmt: skip
def test_without_several_ranks_the_others_mean_nothing(call, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, error = call("simclr.py", "dataset=folder", "data_dir=nowhere", "device=cpu")
    assert code == 1 and error.startswith("error: nowhere/train"), error


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        number = free.getsockname()[1]
    return number


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_find_nobody_say_so_and_end(call, monkeypatch, port, rank):
    monkeypatch.setattr(distributed, "SILENT", 0)
    monkeypatch.setattr(distributed, "JOIN", 1)
    variables = {**COMPLETE, "WORLD_SIZE": "2", "RANK": rank, "MASTER_PORT": str(port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, error = call("simclr.py", *TRAIN)
    lines = [line for line in error.splitlines() if "[W" not in line]  # of torch's C++
    waits = f"rank {rank} of 2 waits for the others at localhost:{port}"
    assert code == 1 and len(lines) == 1 and "error: " + waits in lines[0] and ALONE in lines[0]
    assert f"{waits}, as MASTER_ADDR and MASTER_PORT say" in call.stdout


def test_a_port_in_use_is_named(call, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {**COMPLETE, "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        code, error = call("simclr.py", *TRAIN)
    assert code == 1 and f"error: MASTER_PORT={port}: no store there" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_ranks_that_no_torchrun_started_train_together(tmp_path, port):
    """A job script sets all that torchrun would."""
    script, runs = str(REPOSITORY / "tests/thin_simclr.py"), []
    for rank in "01":
        variables = {**COMPLETE, "WORLD_SIZE": "2", "RANK": rank, "MASTER_PORT": str(port)}
        command = [sys.executable, script, *TRAIN]
        runs.append(subprocess.Popen(command, cwd=tmp_path, env={**ENV, **variables}))
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert (tmp_path / "logs/SimCLR/digits/resnet18/metrics.jsonl").read_text().count("\n") == 1


def test_an_interface_that_is_not_there_is_one_line(call, monkeypatch):
    """GLOO_SOCKET_IFNAME is read by torch, as others are, when the group is set up."""
    monkeypatch.setattr(distributed, "_join", lambda here: distributed.dist.HashStore())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    for name, value in {**COMPLETE, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, error = call("simclr.py", *TRAIN)
    assert code == 1 and error.splitlines()[-1].startswith("error: the ranks cannot be connected")
    assert "Traceback" not in error
