"""Scores and tables of an evaluation; results.json, results.md and predictions.csv."""

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from evaluation.classifiers import EvaluationTask
from evaluation.features import accuracy, top_k_accuracy
from evaluation.protocols import ProtocolResult
from system.files import write_file

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def score(result: ProtocolResult, labels: Tensor, seconds: float) -> dict[str, Any]:
    """Score one protocol on one encoder with one seed by the labels (N,) of the test set.

    Confusion: (C, C), a row of counts for each true class. Top-5 accuracy only from ten classes
    up, and not for kNN, whose votes rank few of them.
    """
    classes = result.scores.shape[1]
    confusion = torch.bincount(labels * classes + result.scores.argmax(dim=1), minlength=classes**2)
    ranked = classes >= 10 and "k" not in result.settings
    return {
        "accuracy": accuracy(result.scores, labels),
        "top5": top_k_accuracy(result.scores, labels, 5) if ranked else None,
        "confusion": confusion.view(classes, classes),
        "seconds": seconds,
        "settings": result.settings,
        "selection": result.selection,
    }


def summarise(encoder: str, protocol: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of results.json: mean and standard deviation (n - 1) of the runs (from `score`)."""
    values = [run["accuracy"] for run in runs]
    return {
        "encoder": encoder,
        "protocol": protocol,
        "accuracy": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "accuracies": values,
        "top5": None if runs[0]["top5"] is None else mean(run["top5"] for run in runs),
        "seconds": mean(run["seconds"] for run in runs),
        "settings": runs[0]["settings"],
        "selections": [run["selection"] for run in runs if run["selection"]],
    }


def per_class(runs: list[dict[str, Any]], classes: list[str]) -> dict[str, Any]:
    """The confusion matrix, summed over the runs, and the accuracy of each class in [0, 1]."""
    if not runs:
        return {}
    confusion = sum(run["confusion"] for run in runs)
    accuracies = (confusion.diagonal() / confusion.sum(dim=1)).tolist()
    return {
        "classes": classes,
        "per_class_accuracy": dict(zip(classes, accuracies, strict=True)),
        "confusion": confusion.tolist(),
    }


def headline(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The checkpoint's linear and kNN accuracy in [0, 1], from `summarise`; None: not evaluated."""
    rows_by_name = {row["protocol"]: row for row in rows if row["encoder"] == "checkpoint"}
    linear, knn = rows_by_name.get("linear", {}), rows_by_name.get("knn", {})
    return {
        "linear_acc": linear.get("accuracy"),
        "linear_top5": linear.get("top5"),
        "knn_acc": knn.get("accuracy"),
    }


def table(rows: list[dict[str, Any]], settings: bool) -> str:
    """The rows as a Markdown table, accuracies in %."""
    head = ["encoder", "protocol", "accuracy", "n", "top-5", "seconds a run"]
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
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table with its header first, padded so that it reads well on a terminal."""
    lines = [[printable(cell).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def printable(text: str) -> str:
    """Text of the user on one line, � for line breaks, control characters and undecodable bytes."""
    return UNPRINTABLE.sub("�", text)


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


def _words(settings: dict[str, float]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in settings.items())


def describe_source(
    cfg: DictConfig, saved: dict[str, Any], checkpoint: Path, task: EvaluationTask
) -> dict[str, Any]:
    """What was evaluated on what: checkpoint, data and settings, for results.json."""
    return {
        "checkpoint": str(checkpoint),
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "epoch": saved["epoch"],
        "backbone": saved["config"]["backbone"],
        "dataset": cfg.dataset,
        "labels": cfg.labels,
        "training_images": len(task.train.images),
        "test_images": len(task.test_images),
        "precision": str(task.dtype).removeprefix("torch."),
        "config": saved["config"],
        "evaluation_config": OmegaConf.to_container(cfg),
    }


def write_results(
    out_dir: Path,
    about: dict[str, Any],
    scored: dict[tuple[str, str], list[dict[str, Any]]],
    classes: list[str],
) -> dict[str, Any]:
    """Write what is scored so far to results.json and results.md; returns the content of the first.

    about: from `describe_source`; scored: the runs (from `score`) of each
    encoder and protocol. The names are results_labels<…> for few labels. Each file is replaced
    atomically. Raises UserError if that fails.
    """
    rows = [summarise(*key, runs) for key, runs in scored.items()]
    linear = per_class(scored.get(("checkpoint", "linear"), []), classes)
    results = {**headline(rows), **about, "protocols": rows, **linear}
    labels, cfg = results["labels"], results["evaluation_config"]
    text = (
        f"{results['checkpoint']} (epoch {results['epoch']}, SHA-256 {results['sha256']}): "
        f"{results['backbone']} on {results['dataset']}, {results['training_images']:,} labelled "
        f"training images, {results['test_images']:,} test images. Test accuracy in %; mean ± "
        f"standard deviation over n seeds of the evaluation, from {cfg['seed']} up.\n\n"
    )
    name = "results" if labels is None else f"results_labels{labels}"
    for suffix, content in (
        (".json", json.dumps(results, indent=2) + "\n"),
        (".md", text + table(rows, settings=True) + "\n"),
    ):
        write_file(out_dir / (name + suffix), content.encode(errors="replace"))
    return results


def write_predictions(
    out_dir: Path, files: list[Path], classes: list[str], probabilities: list[float]
) -> Path:
    """Write predictions.csv: path, predicted class and its probability; returns its path."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", "class", "probability"])
    for file, name, probability in zip(files, classes, probabilities, strict=True):
        writer.writerow([file, name, f"{probability:.4f}"])
    path = out_dir / "predictions.csv"
    write_file(path, text.getvalue().encode(errors="surrogateescape"))
    return path
