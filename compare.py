"""A table of several runs: the settings in which they differ, and their accuracies in %.

    python compare.py logs/SimCLR/sweep/*

Sorted by the final kNN accuracy on held-out training images: to choose by it is not to choose on
the test set. Test accuracies of simclr_lin.py stand beside it.
"""

import argparse
import sys
from pathlib import Path

from config import may_change
from evaluation.results import markdown, percent
from system.errors import UserError, error_boundary
from system.files import read_config, read_metrics, read_results


def compare(runs: list[Path]) -> str:
    """A Markdown table, best run first. Raises UserError if no run can be read.

    A run directory that cannot be read is named on stderr; a file among them is left out.
    """
    found = {}
    for run in filter(Path.is_dir, runs):
        try:
            found[run] = read_config(run), read_metrics(run)
        except UserError as error:
            print(f"left out {run}: {error}", file=sys.stderr)
    if not found:
        raise UserError(f"no run directory among {', '.join(map(str, runs))}")
    configs = [config for config, _ in found.values()]
    every = dict.fromkeys(key for config in configs for key in config if key not in may_change())
    keys = [key for key in every if len({str(config.get(key)) for config in configs}) > 1]
    lines = []
    for run, (config, metrics) in found.items():
        last = metrics[-1] if metrics else {"epoch": 0, "knn_acc": None}
        tested = read_results(run / "results.json")
        accuracies = [percent(tested.get(key)) for key in ("linear_acc", "knn_acc")]
        if tested.get("epoch", last["epoch"]) != last["epoch"]:  # of the checkpoint
            accuracies = [text and f"{text} (epoch {tested['epoch']})" for text in accuracies]
        settings, knn = [str(config.get(key)) for key in keys], last["knn_acc"]
        epochs = f"{last['epoch']} of {config['epochs']}"
        lines.append((knn or -1, [str(run), *settings, epochs, percent(knn), *accuracies]))
    lines.sort(key=lambda line: line[0], reverse=True)
    head = ["run", *keys, "epochs", "kNN, training", "linear, test", "kNN, test"]
    return markdown([head, *(cells for _, cells in lines)])


def main() -> None:
    """Print the table."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    args = parser.parse_args()
    with error_boundary():
        print(compare(args.runs))


if __name__ == "__main__":
    main()
