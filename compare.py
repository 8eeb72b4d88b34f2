"""A table of several runs: the settings in which they differ, and their accuracies in %.

    python compare.py logs/SimCLR/sweep/*

Sorted by the final kNN accuracy of simclr.py on held-out training images, so that choosing by this
order does not choose on the test set. Test accuracies of simclr_lin.py stand beside it.
"""

import argparse
from pathlib import Path

from evaluation.results import differing_keys, markdown, percent, read_results, read_runs
from system.errors import UserError, error_boundary


def compare(runs: list[Path]) -> str:
    """A Markdown table, best run first; runs without a kNN accuracy last.

    Raises UserError if no run can be read.
    """
    found = read_runs([run for run in runs if run.is_dir()])  # Hydra leaves a file beside them
    if not found:
        raise UserError(f"no run directory among {', '.join(map(str, runs))}")
    keys = differing_keys(found)
    unique = len({run.name for run in found}) == len(found)
    lines = []
    for run, (config, metrics) in found.items():
        last = metrics[-1] if metrics else {"epoch": 0, "knn_acc": None}
        tested = read_results(run / "results.json")
        accuracies = [percent(tested.get(key)) for key in ("linear_acc", "knn_acc")]
        if tested.get("epoch", last["epoch"]) != last["epoch"]:  # of the checkpoint
            accuracies = [text and f"{text} (epoch {tested['epoch']})" for text in accuracies]
        name, settings = run.name if unique else str(run), [str(config.get(key)) for key in keys]
        epochs, knn = f"{last['epoch']} of {config['epochs']}", last["knn_acc"]
        lines.append((knn or -1, [name, *settings, epochs, percent(knn), *accuracies]))
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
