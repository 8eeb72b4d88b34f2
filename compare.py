"""A table of several runs: the settings in which they differ, and their accuracies in %.

    python compare.py logs/SimCLR/sweep/*

Sorted by the final kNN accuracy of simclr.py on held-out training images, so that choosing by this
order does not choose on the test set. Test accuracies of simclr_lin.py stand beside it.
"""

import system.environment  # noqa: F401, first
import argparse
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from config import MAY_CHANGE
from evaluation.results import markdown
from system.errors import UserError, one_line_errors
from training.metrics import read_metrics


def read_run(run: Path) -> dict[str, Any]:
    """Config, last metrics and results of a run directory in one dict.

    Raises UserError if it is not a run directory or has a damaged file.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run directory: it has no config.yaml")
    try:
        lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
        last = lines[-1] if lines else {"epoch": 0, "knn_acc": None}  # in its first epoch
        file = run / "results.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        config = OmegaConf.to_container(OmegaConf.load(path))
        return {"run": str(run), "config": config, **last, "results": results}
    except (ValueError, YAMLError) as error:
        raise UserError(f"{run} has a damaged file ({error})") from None


def compare(runs: list[dict[str, Any]]) -> str:
    """A Markdown table, best run first; runs without a kNN accuracy last."""
    configs = [run["config"] for run in runs]
    keys = [key for key in configs[0] if key not in MAY_CHANGE]
    differing = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    lines = [["run", *differing, "epochs", "kNN, training", "linear, test", "kNN, test"]]
    short = {Path(run["run"]).name for run in runs}
    for run in sorted(runs, key=lambda run: -(run["knn_acc"] or -1)):
        values = run["knn_acc"], run["results"].get("linear_acc"), run["results"].get("knn_acc")
        epochs = f"{run['epoch']} of {run['config']['epochs']}"
        settings = [str(run["config"].get(key)) for key in differing]
        accuracies = ["" if value is None else f"{value:.2%}"[:-1] for value in values]
        name = Path(run["run"]).name if len(short) == len(runs) else run["run"]
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
    with one_line_errors():
        directories = [run for run in args.runs if run.is_dir()]  # Hydra leaves a file beside them
        runs = [run for run in directories if (run / "config.yaml").is_file()] or directories
        for run in set(directories) - set(runs):
            print(f"left out {run}, which has no config.yaml", file=sys.stderr)
        if not runs:
            raise UserError(f"no run directory among {', '.join(map(str, args.runs))}")
        print(compare([read_run(run) for run in runs]))


if __name__ == "__main__":
    main()
