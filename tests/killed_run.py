"""Runs of simclr.pretrain that are killed, for test_kill.py: one process, which forks each run.

    python tests/killed_run.py FOLDER key=value …

Reads a JSON object a line: {"run": name, "operation": k} kills the run (SIGKILL) at its k-th
operation on a file, which may be in the middle of a write or between two renames; {"run": name,
"seconds": t} from outside, after t seconds; {"run": name} lets it end. Answers each by a line of
JSON: {"status": exit code, or minus the signal, "last": the operation that came last}.
"""

import builtins
import json
import os
import signal
import stat
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from conftest import thin_resnet
from hydra import compose, initialize

import simclr
from config import check_config, register_config
from models import BACKBONES
from system import files


class Operations:
    """Counts what is done to files, and ends the process at the k-th."""

    def __init__(self, k: int | None, report: int) -> None:
        self.k, self.report, self.count = k, report, 0
        fsync, replace = os.fsync, os.replace
        files.open = self.open

        def sync(descriptor):
            of = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
            self.around(f"fsync of the {of}", fsync, descriptor)

        os.fsync = sync
        os.replace = lambda old, new: self.around(f"rename to {Path(new).name}", replace, old, new)

    def around(self, name, function, *args):
        self.at(f"before {name}")
        function(*args)
        self.at(f"after {name}")

    def at(self, name: str) -> None:
        self.count += 1
        os.pwrite(self.report, name.ljust(100).encode(), 0)
        if self.count == self.k:
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path, mode, **options):
        file = builtins.open(path, mode, **options)  # noqa: SIM115
        if mode != "wb":
            return file
        write = file.write

        class Halves:
            def __enter__(_):
                return _

            def __exit__(_, *error):
                file.close()

            def write(_, content):
                write(content[: len(content) // 2])
                file.flush()
                self.at(f"half of {Path(path).name}")
                write(content[len(content) // 2 :])

            flush, fileno = file.flush, file.fileno

        return Halves()


def run(cfg, folder: Path, k: int | None, report: int) -> None:
    """In the child: pretrain, and end without what Python does at an exit."""
    code = 0
    try:
        Operations(k, report)
        simclr.pretrain(cfg, folder)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def main() -> None:
    """Fork a run for each line of stdin."""
    folder, *overrides = sys.argv[1:]
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    BACKBONES["resnet18"] = thin_resnet
    register_config()
    with initialize(version_base="1.3", config_path=None):
        cfg = check_config(compose("simclr_config", overrides=overrides), "learning_rate")
    report = os.open(Path(folder, "report"), os.O_RDWR | os.O_CREAT)
    for line in sys.stdin:
        wanted = json.loads(line)
        out_dir = Path(folder, wanted["run"])
        out_dir.mkdir(exist_ok=True)
        os.pwrite(report, b" " * 100, 0)
        child = os.fork()
        if child == 0:
            run(cfg, out_dir, wanted.get("operation"), report)
        if "seconds" in wanted:
            time.sleep(wanted["seconds"])
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        last = os.pread(report, 100, 0).decode().strip()
        print(json.dumps({"status": status, "last": last}), flush=True)


if __name__ == "__main__":
    assert threading.active_count() == 1
    main()
