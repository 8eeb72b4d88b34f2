"""python signalled_run.py SIGNALS,… KEY=VALUE …: simclr.py again and again in this process.

Each of SIGNALS comes in the second step of one call: SIGHUP, or SIGUSR1+SIGTERM one after the
other, so far apart that they do not count as one. nohup is a SIGHUP that is ignored from the start.
Prints the exit codes. In a process of its own, since a signal that is not caught ends it.
"""

import os
import runpy
import signal
import sys
import time

from conftest import REPOSITORY, thin_resnet

from models import BACKBONES
from system import errors
from training.record import RunRecord

BACKBONES["resnet18"] = thin_resnet
errors.TWICE = 0.05
log_step = RunRecord.log_step
names, sys.argv = sys.argv[1], [str(REPOSITORY / "simclr.py"), *sys.argv[2:]]
for name in names.split(","):
    numbers = [getattr(signal, part) for part in name.replace("nohup", "SIGHUP").split("+")]
    for number in numbers:
        signal.signal(number, signal.SIG_IGN if name == "nohup" else signal.SIG_DFL)
    steps = iter(range(10**6))

    def signalled(*args, numbers=numbers, steps=steps):
        for number in numbers if next(steps) == 1 else ():
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # until the thread that listens has noted it
        log_step(*args)

    RunRecord.log_step = signalled
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    print(f"{name}: {code}", flush=True)
