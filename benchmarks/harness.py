"""What the benchmarks share: functions timed in turn, a table, the config, a part of a dataset."""

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev

import torch
import torchvision
from hydra import compose, initialize
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import simclr
from config import Config
from evaluation.features import accuracy, clean_features, knn_scores
from images.datasets import Images, Split
from system.commandline import register_config, to_config
from system.device import select_device, select_precision
from training.distributed import all_reduce_max
from training.state import Learner


def synchronize() -> None:
    """Wait for a GPU to be done, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each function, A B C A B C …, after one call of each."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def describe_machine() -> str:
    """Print, and return, a line: the processor or GPU, and the versions."""
    machine, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    elif cpuinfo.exists() and (name := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        machine = name[1]
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(line := f"{machine}, {cores}, {versions}")
    return line


def report(seconds: dict[str, list[float]], views: int, unit: str = "views") -> None:
    """A table of medians and spreads; the first row is what the ratios refer to."""
    describe_machine()
    reference = median(next(iter(seconds.values())))
    print(f"{'':34}{unit + '/s':>10}{'median ms':>12}{'min to max':>20}{'ratio':>8}")
    for name, times in seconds.items():
        spread = f"{1e3 * min(times):.1f} to {1e3 * max(times):.1f}"
        middle = median(times)
        print(
            f"{name:34}{views / middle:10,.0f}{1e3 * middle:12.1f}{spread:>20}"
            f"{reference / middle:7.2f}×"
        )


def ratio(times: dict[str, list[float]], reference: str, name: str) -> float | None:
    """How many times as fast the second is by their medians; None where one was not timed."""
    rows = [times.get(row) for row in (reference, name)]
    return median(rows[0]) / median(rows[1]) if all(rows) else None


def finish(ratios: dict[str, float | None]) -> None:
    """The last line: one JSON object."""
    print(json.dumps({key: value and round(value, 3) for key, value in ratios.items()}))


def config(*overrides: str) -> Config:
    """The checked config with these overrides, and the precision that `auto` takes here."""
    register_config()
    with initialize(version_base="1.3", config_path=None):
        cfg = to_config(compose("simclr_config", overrides=list(overrides)))
    return replace(cfg, precision=select_precision(cfg.precision, select_device("auto")))


def folder(path: str | Path, *overrides: str) -> list[str]:
    """The overrides for images in a folder, train/<class>/* and test/<class>/*, and others."""
    return ["dataset=folder", f"data_dir={Path(path).resolve()}", *overrides]


def finish_seeds(results: dict[str, list[float]], seeds: int) -> None:
    """Mean ± deviation of each result, and the last line: means, null where a seed has none."""
    for name, values in results.items():
        spread = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
        print(f"{name:28} {mean(values):10.4g}{spread} (n = {len(values)})" if values else name)
    finish({name: mean(v) if len(v) == seeds else None for name, v in results.items()})


class EpochEnd(Exception):
    """Ends simclr.train after an epoch."""


class Recorder:
    """Stands in for training.run.Run: writes nothing, and leaves simclr.train after each epoch."""

    def __init__(self) -> None:
        self.epoch, self.steps_done = 0, 0
        self.metrics: list[Tensor] = []  # of all steps; copies, since a graph overwrites its own

    def log_step(self, metrics: dict[str, Tensor]) -> None:
        """Keep the metrics, on the device; ask the other ranks, as Run does for signals."""
        self.metrics.append(torch.stack(list(metrics.values())))
        all_reduce_max(0)

    def end_epoch(self, *measured: None) -> None:
        """Count the epoch and leave simclr.train."""
        self.epoch += 1
        raise EpochEnd


def train_epoch(cfg: Config, learner: Learner, images: Images, recorder: Recorder) -> None:
    """The next epoch of simclr.train, without files."""
    with suppress(EpochEnd):
        simclr.train(cfg, learner, images, None, recorder)
    synchronize()


def knn(enc: nn.Module, cfg: Config, train: Split, test: Split) -> float:
    """kNN accuracy of an encoder in eval mode as simclr_lin.py has it: k = 10, cosine, [0, 1]."""
    cfg = replace(cfg, batch_size=256)
    bank, queries = (clean_features(enc.eval(), split.images, cfg) for split in (train, test))
    return accuracy(knn_scores(bank, train.labels, queries, len(train.classes)), test.labels)


def subset(split: Split, per_class: int) -> Split:
    """The first images of each class."""
    classes = range(len(split.classes))
    index = torch.cat([(split.labels == c).nonzero()[:per_class, 0] for c in classes])
    return split._replace(images=split.images[index], labels=split.labels[index])


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that shows the benchmark's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
