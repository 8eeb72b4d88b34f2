"""Runs of simclr.pretrain that are killed, for test_kill.py: one process, which forks each run.

    python tests/killed_run.py DIRECTORY key=value …

Reads a JSON object a line: {"run": name, "operation": k} kills the run (SIGKILL) at its k-th
operation on a file; {"run": name, "seconds": t} from outside, after t seconds; {"run": name} lets
it end. Answers each by a line of JSON: {"status": exit code, or minus the signal, "last": the
operation that came last}.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from conftest import make_config, thin_resnet

import simclr
from config import Config
from models import BACKBONES


class Operations:
    """Counts what is done to files, and ends the process at the k-th."""

    def __init__(self, k: int | None, report: int) -> None:
        self.k, self.report, self.count = k, report, 0
        fsync, replace = os.fsync, os.replace

        def sync(descriptor: int) -> None:
            self.at("fsync")
            fsync(descriptor)

        def rename(old: Path, new: Path) -> None:
            self.at(f"before rename to {new.name}")
            replace(old, new)
            self.at(f"after rename to {new.name}")

        os.fsync, os.replace = sync, rename

    def at(self, name: str) -> None:
        self.count += 1
        os.pwrite(self.report, name.ljust(100).encode(), 0)
        if self.count == self.k:
            os.kill(os.getpid(), signal.SIGKILL)


def run(cfg: Config, run_dir: Path, k: int | None, report: int) -> None:
    """In the child: pretrain, and end without what Python does at an exit."""
    code = 0
    try:
        Operations(k, report)
        simclr.pretrain(cfg, run_dir)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def main() -> None:
    """Fork a run for each line of stdin."""
    directory, *overrides = sys.argv[1:]
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    BACKBONES["resnet18"] = thin_resnet
    cfg = make_config(*overrides)
    report = os.open(Path(directory, "report"), os.O_RDWR | os.O_CREAT)
    for line in sys.stdin:
        wanted = json.loads(line)
        run_dir = Path(directory, wanted["run"])
        run_dir.mkdir(exist_ok=True)
        os.pwrite(report, b" " * 100, 0)
        child = os.fork()
        if child == 0:
            run(cfg, run_dir, wanted.get("operation"), report)
        if "seconds" in wanted:
            time.sleep(wanted["seconds"])
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        last = os.pread(report, 100, 0).decode().strip()
        print(json.dumps({"status": status, "last": last}), flush=True)


if __name__ == "__main__":
    main()
