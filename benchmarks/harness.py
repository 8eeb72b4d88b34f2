"""What the benchmarks share: functions timed in turn, a table, the config, a part of a dataset."""

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
import torchvision
from hydra import compose, initialize
from omegaconf import DictConfig
from torch import Tensor

import simclr
from config import check_config, register_config
from images.datasets import Split
from training.distributed import all_reduce_max
from training.state import Training


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


def describe_machine() -> None:
    """One line: the processor or GPU, and the versions."""
    machine = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    elif cpuinfo.exists() and (name := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        machine = name[1]
    print(
        f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}"
    )


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


def finish(ratios: dict[str, float | None]) -> None:
    """The last line: one JSON object."""
    print(json.dumps({key: value and round(value, 3) for key, value in ratios.items()}))


def config(*overrides: str, peak: str = "learning_rate") -> DictConfig:
    """The checked config of simclr_config.yml with these overrides."""
    register_config()
    with initialize(version_base="1.3", config_path=None):
        return check_config(compose("simclr_config", overrides=list(overrides)), peak)


class EpochEnd(Exception):
    """Ends simclr.train after an epoch."""


class NoRecord:
    """Stands in for training.record.RunRecord: writes nothing, and ends with the epoch."""

    def __init__(self) -> None:
        self.step_metrics: list[dict[str, Tensor]] = []

    def log_step(self, training: Training, metrics: dict[str, Tensor], rate: float) -> None:
        """Keep the metrics, on the device; ask the other ranks, as RunRecord does for signals."""
        self.step_metrics.append({name: value.clone() for name, value in metrics.items()})
        all_reduce_max(0)

    def end_epoch(self, training: Training, *line: object) -> None:
        """Complete the epoch and leave simclr.train."""
        training.end_epoch({})
        raise EpochEnd


def train_epoch(cfg: DictConfig, training: Training, images: Tensor) -> list[dict[str, Tensor]]:
    """The next epoch of simclr.train without files; returns the metrics of its steps."""
    record = NoRecord()
    with suppress(EpochEnd):
        simclr.train(cfg, training, images, None, record)
    synchronize()
    return record.step_metrics


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
