"""The table of several runs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import REPOSITORY
from omegaconf import OmegaConf

from compare import compare


def write_results(run, **values):
    """results.json of a run, as far as compare.py reads it."""
    results = {"sha256": "", "protocols": [], "epoch": 2, **values}
    (run / "results.json").write_text(json.dumps(results))


@pytest.fixture
def runs(config, tmp_path):
    """Three runs: two of temperature 0.1 and 0.5 with kNN, one of 0.2 that has no epoch yet."""
    for temperature, knn in ((0.1, 0.4), (0.5, 0.6), (0.2, None)):
        folder = tmp_path / f"run{temperature}"
        folder.mkdir()
        cfg = config(
            f"temperature={temperature}", "epochs=9", f"workers={int(9 * temperature) + 1}"
        )
        OmegaConf.save(OmegaConf.create(asdict(cfg)), folder / "config.yaml")
        if knn is not None:
            lines = [{"epoch": 1, "knn_acc": 0.9}, {"epoch": 2, "knn_acc": knn}]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)
    write_results(tmp_path / "run0.5", linear_acc=0.7123, knn_acc=0.61)
    return [tmp_path / f"run{temperature}" for temperature in (0.1, 0.2, 0.5)]


def cells_of(table):
    """The cells of a Markdown table, without its second line; of each run's path the name."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    head, *rows = [[cell.strip() for cell in line] for line in (lines[0], *lines[2:])]
    return [head, *([os.path.basename(path), *others] for path, *others in rows)]


def test_runs_stand_in_the_order_of_their_knn_at_the_end_with_what_differs(runs):
    assert cells_of(compare(runs)) == [
        ["run", "temperature", "epochs", "kNN, training", "linear, test", "kNN, test"],
        ["run0.5", "0.5", "2 of 9", "60.00", "71.23", "61.00"],
        ["run0.1", "0.1", "2 of 9", "40.00", "", ""],
        ["run0.2", "0.2", "0 of 9", "", "", ""],
    ]
    assert f"| {runs[0]} | 0.1 " in compare(runs)  # the path as it is given


def test_the_order_does_not_ask_the_test_set(runs):
    write_results(runs[0], linear_acc=0.99, knn_acc=0.99)
    assert cells_of(compare(runs))[1][0] == "run0.5"


def test_results_of_another_epoch_say_which_and_those_of_others_are_left_out(runs):
    write_results(runs[2], epoch=1, linear_acc=0.7, knn_acc=None)
    assert cells_of(compare(runs))[1][4:] == ["70.00 (epoch 1)", ""]
    (runs[2] / "results.json").write_text('{"linear_acc": 0.9}')
    assert cells_of(compare(runs))[1][4:] == ["", ""]


def test_names_do_not_break_the_table(runs, tmp_path):
    nasty = ["a|b", "two\nlines", os.fsdecode(b"caf\xe9")]
    moved = [run.rename(tmp_path / name) for run, name in zip(runs, nasty, strict=True)]
    cells = cells_of(compare(moved))
    assert {len(row) for row in cells} == {6}
    assert [row[0] for row in cells[1:]] == ["caf�", r"a\|b", "two�lines"]


def test_a_directory_that_cannot_be_read_is_named_and_left_out(runs, tmp_path, call):
    (tmp_path / "multirun.yaml").write_text("")  # Hydra's
    (tmp_path / "refused").mkdir()
    (runs[0] / "config.yaml").write_text("a: [")
    (runs[1] / "metrics.jsonl").write_text("{\n")
    code, error = call("compare.py", *map(str, sorted(tmp_path.iterdir())))
    assert code == 0 and [row[0] for row in cells_of(call.stdout)[1:]] == ["run0.5"]
    assert sorted(line.split(":")[0] for line in error.splitlines()) == [
        f"left out {tmp_path / name}" for name in ("refused", "run0.1", "run0.2")
    ]
    code, error = call("compare.py", str(tmp_path / "multirun.yaml"))
    assert code == 1 and error.startswith("error: no run directory among ")
    assert call("compare.py")[0] == 2


def test_neither_torch_nor_the_training_is_imported():
    names = "import sys, compare; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", names], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"torch", "tensorboard", "training"} & {*done.stdout.split()}
