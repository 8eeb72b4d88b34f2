"""The table of several runs."""

import json
import os
import re
import sys

import pytest
from omegaconf import OmegaConf

from compare import compare, main, read_runs


@pytest.fixture
def runs(config, tmp_path):
    """Three runs: two of temperature 0.1 and 0.5 with kNN, one of 0.2 that has no epoch yet."""
    for temperature, knn in ((0.1, 0.4), (0.5, 0.6), (0.2, None)):
        folder = tmp_path / f"run{temperature}"
        folder.mkdir()
        cfg = config(
            f"temperature={temperature}", "epochs=9", f"workers={int(9 * temperature) + 1}"
        )
        OmegaConf.save(cfg, folder / "config.yaml")
        if knn is None:
            continue
        lines = [{"epoch": 1, "knn_acc": 0.9}, {"epoch": 2, "knn_acc": knn}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    results = {"linear_acc": 0.7123, "knn_acc": 0.61}
    (tmp_path / "run0.5" / "results.json").write_text(json.dumps(results))
    return [tmp_path / f"run{temperature}" for temperature in (0.1, 0.2, 0.5)]


def test_runs_stand_in_the_order_of_their_knn_at_the_end_with_what_differs(runs):
    lines = compare(read_runs(runs, {})).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "run",
        "temperature",
        "epochs",
        "kNN, training",
        "linear, test",
        "kNN, test",
    ]
    assert [line[1:] for line in cells[2:]] == [
        ["0.5", "2 of 9", "60.00", "71.23", "61.00"],
        ["0.1", "2 of 9", "40.00", "", ""],
        ["0.2", "0 of 9", "", "", ""],
    ]


def test_the_order_does_not_ask_the_test_set(runs):
    (runs[0] / "results.json").write_text(json.dumps({"linear_acc": 0.99, "knn_acc": 0.99}))
    assert compare(read_runs(runs, {})).splitlines()[2].startswith("| run0.5 ")


def test_what_a_sweep_leaves_beside_its_runs_is_no_run(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "multirun.yaml").write_text("")
    (tmp_path / "refused").mkdir()
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, tmp_path.iterdir())])
    main()
    said = capsys.readouterr()
    assert said.out.count("\n") == 5 and said.err.startswith("left out ")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "multirun.yaml")])
    with pytest.raises(SystemExit):
        main()
    assert "no run directory among" in capsys.readouterr().err


@pytest.fixture
def table(monkeypatch, capsys):
    """table(runs): exit code, the names in the table and the lines on stderr of compare.py."""

    def table(*runs):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, runs)])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        names = [line.split("|")[1].strip() for line in said.out.splitlines()[2:]]
        return code or 0, names, said.err.splitlines()

    return table


@pytest.mark.parametrize(
    ("name", "content", "code", "reason"),
    [
        ("config.yaml", b"epochs: 1\n\tseed: 1\n", 2, "config.yaml, line 2: "),
        ("config.yaml", b"epochs: 1\nepochs: 2\n", 2, "epochs"),
        ("config.yaml", "epochs: 1\n".encode("utf-16"), 2, "line 1: byte 0xff is not UTF-8"),
        ("config.yaml", b"a: [", 2, "config.yaml, line 1: "),
        ("config.yaml", b"model: vit\n", 2, "config.yaml is not of simclr.py: it has no epochs"),
        ("config.yaml", b"", 2, "config.yaml is not of simclr.py: it has no epochs"),
        ("metrics.jsonl", b"{\n", 1, "metrics.jsonl, line 1 is damaged or of another program ("),
        ("metrics.jsonl", b"\xe9\n", 1, "line 1 is damaged or of another program ('utf-8' codec"),
        ("metrics.jsonl", b'{"step": 1}\n', 1, "metrics.jsonl is not of simclr.py"),
    ],
)
def test_a_damaged_run_is_one_line_and_the_others_are_compared(
    runs, table, name, content, code, reason
):
    (runs[2] / name).write_bytes(content)
    found, names, [line] = table(*runs)
    assert (found, names) == (code, ["run0.1", "run0.2"])
    assert line.startswith(f"error: {runs[2]}/{name}") and reason in line


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ('{"linear_acc": 0.9', "is damaged or of another program"),
        ("[]", "is damaged or of another program (no keys with values)"),
        ('{"accuracy": 0.9}', "is not of simclr_lin.py, it has no linear_acc"),
        ('{"linear_acc": "high"}', "is not of simclr_lin.py, it has no linear_acc"),
        ('{"linear_acc": 0.9, "config": {"temperature": 0.1, "epochs": 9}}',
         "is of a run with temperature 0.1: evaluate this one"),
    ],
)  # fmt: skip
def test_results_that_are_damaged_or_of_another_run_are_left_out(runs, results, reason):
    (runs[2] / "results.json").write_text(results)
    failed = {}
    found = read_runs(runs, failed)
    [(line, code)] = failed
    assert code == 1 and reason in line and f"{runs[2]}/results.json" in line
    row = "| run0.5 | 0.5 | 2 of 9 | 60.00 | | |"
    assert compare(found).splitlines()[2].split() == row.split()


def test_two_damaged_runs_are_two_lines_and_no_table(runs, table):
    for run in runs[:2]:
        (run / "config.yaml").write_text("a: [")
    code, names, lines = table(*runs[:2])
    assert (code, names, len(lines)) == (2, [], 2) and all(x.startswith("error: ") for x in lines)


def test_results_of_another_epoch_say_which(runs):
    results = {"linear_acc": 0.7, "knn_acc": None, "epoch": 1, "config": {"temperature": 0.5}}
    (runs[2] / "results.json").write_text(json.dumps(results))
    assert "| 70.00 (epoch 1) |" in compare(read_runs(runs, {}))


def test_names_do_not_break_the_table(runs, table, tmp_path):
    nasty = ["a|b", "two\nlines", os.fsdecode(b"caf\xe9")]
    moved = [run.rename(tmp_path / name) for run, name in zip(runs, nasty, strict=True)]
    lines = compare(read_runs(moved, {})).splitlines()
    assert len(lines) == 5
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    assert {len(row) for row in cells} == {8}
    assert [row[1] for row in cells[2:]] == ["caf�", r"a\|b", "two�lines"]
