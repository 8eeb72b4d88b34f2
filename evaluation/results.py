"""The file of an evaluation, results.json, and tables. Without torch."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from config import BASELINES, Config, Execution, keys
from system.errors import UserError
from system.files import OTHER, read_results

# Keys of the config that change no row.
FREE = {*keys(Execution), "protocols", "baselines", "runs", "checkpoint", "load_epoch"}
SETTINGS = [key for key in keys(Config) if key not in FREE]


def open_results(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """`about` (checkpoint, data, config), with the rows that an earlier evaluation left of them."""
    earlier = read_results(path)
    if path.exists() and not earlier:
        raise UserError(f"{path} was not written by simclr_lin.py: move it away, or {OTHER}")
    if earlier and _identity(earlier) == _identity(about):
        return {**earlier, **about}
    return {**about, "protocols": []}


def _identity(results: dict[str, Any]) -> list[Any]:
    """What two evaluations have in common if their rows may stand in one table."""
    config = results.get("evaluation_config", {})
    data = [results.get(key) for key in ("sha256", "images_sha256", "classes")]
    return data + [config.get(key) for key in SETTINGS]


def add_row(
    results: dict[str, Any], encoder: str, protocol: str, runs: list[dict[str, Any]]
) -> None:
    """Add the row of a protocol, or replace it; runs: one `score` for each seed.

    std: of a sample (n - 1). The checkpoint's linear row brings the confusion matrix of all runs.
    """
    accuracies = [run["accuracy"] for run in runs]
    row = {
        "encoder": encoder,
        "protocol": protocol,
        "accuracy": mean(accuracies),
        "std": stdev(accuracies) if len(runs) > 1 else None,
        "n": len(runs),
        "accuracies": accuracies,
        "settings": runs[0]["settings"],
        "selections": [run["selection"] for run in runs if run["selection"]],
    }
    rows = {(row["encoder"], row["protocol"]): row for row in [*results["protocols"], row]}
    encoders = ["checkpoint", *BASELINES]
    results["protocols"] = sorted(rows.values(), key=lambda row: encoders.index(row["encoder"]))
    linear, knn = (rows.get(("checkpoint", name), {}) for name in ("linear", "knn"))
    results["linear_acc"], results["knn_acc"] = linear.get("accuracy"), knn.get("accuracy")
    if row is linear:
        results["confusion"] = sum(run["confusion"] for run in runs).tolist()


def table(results: dict[str, Any]) -> str:
    """The rows as a Markdown table, accuracies in %."""
    lines = [["encoder", "protocol", "accuracy", "n"]]
    for row in results["protocols"]:
        spread = "" if row["std"] is None else f" ± {percent(row['std'])}"
        accuracy, protocol = percent(row["accuracy"]) + spread, row["protocol"].replace("_", " ")
        lines.append([row["encoder"], protocol, accuracy, str(row["n"])])
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
