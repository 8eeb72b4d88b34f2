"""A table of several runs: the settings in which they differ, and their accuracies in %.

    python compare.py logs/SimCLR/sweep/*

Sorted by the final kNN accuracy of simclr.py on held-out training images, so that choosing by this
order does not choose on the test set. Test accuracies of simclr_lin.py stand beside it.
"""

import system.environment  # noqa: F401, first
import argparse
import sys
from pathlib import Path
from typing import Any

from config import MAY_CHANGE
from evaluation.results import markdown
from evaluation.runs import Failed, noted, run_config, run_results
from system.errors import UserError, one_line_errors
from training.metrics import read_metrics


def read_runs(runs: list[Path], failed: Failed) -> list[dict[str, Any]]:
    """Config, last metrics and results of each run directory in one dict.

    A run with a damaged config or metrics is left out, results that are damaged or of another run
    are: both are noted in `failed`.
    """
    found = []
    for run in runs:
        with noted(failed, str(run)):
            last = (read_metrics(run) or [{"epoch": 0}])[-1]
            found.append({"run": run, "config": run_config(run), **last, "results": {}})
            with noted(failed, str(run)):
                found[-1]["results"] = run_results(run, MAY_CHANGE)
    return found


def compare(runs: list[dict[str, Any]]) -> str:
    """A Markdown table, best run first; runs without a kNN accuracy last."""
    configs = [run["config"] for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in MAY_CHANGE)
    differing = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    lines = [["run", *differing, "epochs", "kNN, training", "linear, test", "kNN, test"]]
    short = {run["run"].name for run in runs}
    for run in sorted(runs, key=lambda run: -(run.get("knn_acc") or -1)):
        results = run["results"]
        values = run.get("knn_acc"), results.get("linear_acc"), results.get("knn_acc")
        accuracies = ["" if value is None else f"{value:.2%}"[:-1] for value in values]
        if (epoch := results.get("epoch", run["epoch"])) != run["epoch"]:  # of the checkpoint
            accuracies[1:] = [text and f"{text} (epoch {epoch})" for text in accuracies[1:]]
        epochs = f"{run['epoch']} of {run['config']['epochs']}"
        settings = [str(run["config"].get(key)) for key in differing]
        name = run["run"].name if len(short) == len(runs) else str(run["run"])
        lines.append([name, *settings, epochs, *accuracies])
    return markdown(lines)


@one_line_errors()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    args = parser.parse_args()
    runs = [run for run in args.runs if (run / "config.yaml").is_file()]
    for run in args.runs:
        if run.is_dir() and run not in runs:  # Hydra leaves a file beside them
            print(f"left out {run}, which has no config.yaml", file=sys.stderr)
    if not runs:
        raise UserError(f"no run directory among {', '.join(map(str, args.runs))}")
    failed: Failed = {}
    if found := read_runs(runs, failed):
        print(compare(found))
    for line, _ in failed:
        print(f"error: {line}", file=sys.stderr)
    if failed:
        sys.exit(max(code for _, code in failed))


if __name__ == "__main__":
    main()
