"""The table of several runs."""

import json
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
    lines = compare(read_runs(runs, [])).splitlines()
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
    assert compare(read_runs(runs, [])).splitlines()[2].startswith("| run0.5 ")


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
