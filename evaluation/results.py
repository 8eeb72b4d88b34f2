"""The files of an evaluation: results.json, results.md, predictions.csv; tables. Without torch."""

import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from config import BASELINES, Config, Execution, keys, may_change
from system.errors import UserError
from system.files import is_results, read_config, read_json, read_metrics, write_file

# Keys of the config that change no row.
FREE = {*keys(Execution), "protocols", "baselines", "runs", "checkpoint", "load_epoch", "predict"}
SETTINGS = [key for key in keys(Config) if key not in FREE]
COLUMNS = ["file", "class", "probability"]  # of predictions.csv
Run: TypeAlias = tuple[dict[str, Any], list[dict[str, Any]]]  # config, and metrics of each epoch


def results_path(out_dir: Path, labels: float | None) -> Path:
    """results.json, or with few labels results_labels<…>.json."""
    return out_dir / ("results.json" if labels is None else f"results_labels{labels}.json")


def read_results(path: Path) -> dict[str, Any]:
    """The content of results.json; empty if there is none, or a file of another program."""
    return read_json(path.read_bytes(), path) if path.exists() and is_results(path) else {}


def open_results(out_dir: Path, about: dict[str, Any]) -> dict[str, Any]:
    """`about` (checkpoint, data, config), with the rows that an earlier evaluation left of them.

    Raises UserError if a file that would be replaced was not written by simclr_lin.py.
    """
    path = results_path(out_dir, about["labels"])
    earlier = read_results(path)
    for file in (path, path.with_suffix(".md")):
        refuse_unless(bool(earlier), file)
    if earlier and _identity(earlier) == _identity(about):
        return {**earlier, **about}
    return {**about, "protocols": []}


def _identity(results: dict[str, Any]) -> list[Any]:
    """What two evaluations have in common if their rows may stand in one table."""
    config = results.get("evaluation_config", {})
    data = [results.get(key) for key in ("sha256", "images_sha256", "classes")]
    return data + [config.get(key) for key in SETTINGS]


def refuse_unless(ours: bool, path: Path) -> None:
    """Raise UserError if the file is there and of another program: it is never replaced."""
    if path.exists() and not ours:
        remedy = "move it away, or choose another run directory with hydra.run.dir=PATH"
        raise UserError(f"{path} was not written by simclr_lin.py: {remedy}")


def add_row(
    results: dict[str, Any], encoder: str, protocol: str, runs: list[dict[str, Any]]
) -> None:
    """Add the row of a protocol, or replace it; runs: one `score` for each seed.

    std is the deviation of a sample (n - 1), None for one run. The linear row of the checkpoint
    brings the confusion matrix, summed over the runs, a row of counts for each true class.
    """
    accuracies = [run["accuracy"] for run in runs]
    row = {
        "encoder": encoder,
        "protocol": protocol,
        "accuracy": mean(accuracies),
        "std": stdev(accuracies) if len(runs) > 1 else None,
        "n": len(runs),
        "accuracies": accuracies,
        "top5": None if runs[0]["top5"] is None else mean(run["top5"] for run in runs),
        "seconds": mean(run["seconds"] for run in runs),
        "settings": runs[0]["settings"],
        "selections": [run["selection"] for run in runs if run["selection"]],
    }
    rows = {(row["encoder"], row["protocol"]): row for row in [*results["protocols"], row]}
    encoders = ["checkpoint", *BASELINES]
    results["protocols"] = sorted(rows.values(), key=lambda row: encoders.index(row["encoder"]))
    linear, knn = (rows.get(("checkpoint", name), {}) for name in ("linear", "knn"))
    results["linear_acc"], results["knn_acc"] = linear.get("accuracy"), knn.get("accuracy")
    results["linear_top5"] = linear.get("top5")
    if row is linear:
        confusion = sum(run["confusion"] for run in runs)
        correct = (confusion.diagonal() / confusion.sum(dim=1)).tolist()
        results["per_class_accuracy"] = dict(zip(results["classes"], correct, strict=True))
        results["confusion"] = confusion.tolist()


def write_results(out_dir: Path, results: dict[str, Any]) -> None:
    """Write results.json and results.md, each atomically. Raises UserError if that fails."""
    path = results_path(out_dir, results["labels"])
    text = (
        f"{results['checkpoint']} (epoch {results['epoch']}, SHA-256 {results['sha256']}): "
        f"{results['backbone']} on {results['dataset']}, {results['training_images']:,} labelled "
        f"training images, {results['test_images']:,} test images. Test accuracy in %; mean ± "
        "standard deviation over n seeds of the evaluation, from "
        f"{results['evaluation_config']['seed']} up.\n\n{table(results)}\n"
    )
    write_file(path, (json.dumps(results, indent=2) + "\n").encode())
    write_file(path.with_suffix(".md"), text.encode(errors="replace"))


def table(results: dict[str, Any]) -> str:
    """The rows as a Markdown table, accuracies in %."""
    lines = [["encoder", "protocol", "accuracy", "n", "top-5", "seconds a run"]]
    for row in results["protocols"]:
        spread = "" if row["std"] is None else f" ± {percent(row['std'])}"
        accuracy, seconds = percent(row["accuracy"]) + spread, f"{row['seconds']:.0f}"
        protocol, top5 = row["protocol"].replace("_", " "), percent(row["top5"])
        lines.append([row["encoder"], protocol, accuracy, str(row["n"]), top5, seconds])
    return markdown(lines)


def percent(accuracy: float | None) -> str:
    """An accuracy in [0, 1] in %; nothing for None."""
    return "" if accuracy is None else f"{100 * accuracy:.2f}"


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table with its header first, padded so that it reads well on a terminal."""
    lines = [[printable(cell).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def printable(text: str) -> str:
    """Text of the user on one line: � for line breaks, control characters, undecodable bytes."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def open_predictions(out_dir: Path) -> Path:
    """The path of predictions.csv. Raises UserError if a file with other columns is there."""
    path = out_dir / "predictions.csv"
    ours = path.exists() and path.read_bytes().startswith(",".join(COLUMNS).encode())
    refuse_unless(ours, path)
    return path


def write_predictions(path: Path, rows: Iterable[tuple[Path, str, str]]) -> None:
    """Write predictions.csv: the path of each file, its predicted class and the probability."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *rows])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def read_runs(runs: list[Path]) -> dict[Path, Run]:
    """Config and metrics of run directories; one that cannot be read is named on stderr."""
    found = {}
    for run in runs:
        try:
            found[run] = read_config(run), read_metrics(run)
        except UserError as error:
            print(f"left out {run}: {error}", file=sys.stderr)
    return found


def differing_keys(runs: dict[Path, Run]) -> list[str]:
    """The keys in which the configs of runs differ, but those that may change within a run."""
    configs = [config for config, _ in runs.values()]
    every = dict.fromkeys(key for config in configs for key in config if key not in may_change())
    return [key for key in every if len({str(config.get(key)) for config in configs}) > 1]
