"""results.json and results.md: what an evaluation found, for programs and for people."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluation import accuracy, top_k_accuracy
from files import replacing
from protocols import Found


class Outcome(NamedTuple):
    """One protocol on one encoder with one seed."""

    accuracy: float  # share of the test images
    top5: float | None  # the same; None with fewer than ten classes, and for kNN
    confusion: Tensor  # (C, C), int64: row, the true class; column, the predicted one
    seconds: float  # alone, with the features that it needs
    settings: dict[str, Any]
    selection: dict[str, Any] | None  # where a hyperparameter was chosen: among what, on what


def score(found: Found, labels: Tensor, seconds: float) -> Outcome:
    """Score what a protocol found by the labels (N,) of the test set."""
    scores, settings, selection = found
    classes = scores.shape[1]
    confusion = torch.bincount(labels * classes + scores.argmax(dim=1), minlength=classes**2)
    confusion = confusion.view(classes, classes).cpu()
    top5 = top_k_accuracy(scores, labels, 5) if classes >= 10 and "k" not in settings else None
    return Outcome(accuracy(scores, labels), top5, confusion, seconds, settings, selection)


def summarise(encoder: str, protocol: str, runs: list[Outcome]) -> dict[str, Any]:
    """One row of results.json: mean and standard deviation (n - 1) over the runs."""
    values = [run.accuracy for run in runs]
    top5 = [run.top5 for run in runs if run.top5 is not None]
    return {
        "encoder": encoder,
        "protocol": protocol,
        "accuracy": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "accuracies": values,
        "top5": mean(top5) if top5 else None,
        "seconds": sum(run.seconds for run in runs),
        "settings": runs[0].settings,
        "selections": [run.selection for run in runs if run.selection],
    }


def per_class(runs: list[Outcome], classes: list[str]) -> dict[str, Any]:
    """The confusion matrix, summed over the runs, and each class's share of right answers."""
    if not runs:
        return {}
    confusion = sum(run.confusion for run in runs)
    shares = (confusion.diagonal() / confusion.sum(dim=1)).tolist()
    return {
        "classes": classes,
        "per_class_accuracy": dict(zip(classes, shares, strict=True)),
        "confusion": confusion.tolist(),
    }


def table(rows: list[dict[str, Any]], settings: bool) -> str:
    """The rows as a Markdown table, padded so that it reads on a terminal; accuracies in %."""
    head = ["encoder", "protocol", "accuracy", "n", "top-5", "seconds"]
    lines = [head + ["settings"] * settings]
    for row in rows:
        spread = f" ± {100 * row['std']:.2f}" if row["std"] is not None else ""
        cells = [
            row["encoder"],
            row["protocol"].replace("_", " "),
            f"{100 * row['accuracy']:.2f}{spread}",
            str(row["n"]),
            f"{100 * row['top5']:.2f}" if row["top5"] is not None else "",
            f"{row['seconds']:.0f}",
        ]
        lines.append(cells + [_settings(row)] * settings)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _settings(row: dict[str, Any]) -> str:
    if not row["selections"]:
        return _words(row["settings"])
    first = row["selections"][0]
    fixed = _words({k: v for k, v in row["settings"].items() if k not in first["chosen"]})
    chosen = dict.fromkeys(_words(selection["chosen"]) for selection in row["selections"])
    return (
        f"{fixed}{'; ' * bool(fixed)}{' or '.join(chosen)}, the best of "
        f"{len(first['candidates'])} on {first['validation_images']:,} held-out training images"
    )


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in settings.items()
    ).replace("_", " ")


def write_results(out_dir: Path, results: dict[str, Any]) -> None:
    """Write results.json and results.md, each whole or not at all."""
    epoch, images = results["epoch"], results["training_images"]
    text = (
        f"{results['checkpoint']} (epoch {epoch}, SHA-256 {results['sha256']}): "
        f"{results['backbone']} on {results['dataset']}, {images:,} labelled training images, "
        f"{results['test_images']:,} test images, each scored once a run. Test accuracy in %, "
        f"mean ± standard deviation over n seeds.\n\n{table(results['protocols'], settings=True)}\n"
    )
    for name, content in (
        ("results.json", json.dumps(results, indent=2) + "\n"),
        ("results.md", text),
    ):
        with replacing(out_dir / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
