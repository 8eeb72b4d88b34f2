"""Seconds from the command to the first training step, against importing the libraries alone.

    python benchmarks/start.py

`python simclr.py dataset=digits` in a new folder, ended where its first step would begin, and a
process that imports torch, torchvision and hydra and ends: in turn, whole processes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import alternate, finish, parser, report

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORTS = "import os, torch, torchvision, hydra; os._exit(0)"
FIRST_STEP = f"""
import os, runpy, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from system import device
device.autocast = lambda *args: os._exit(0)  # the first thing that the first step does
sys.argv = ["simclr.py", "dataset=digits", "compile=false"]
runpy.run_path({str(REPOSITORY / "simclr.py")!r}, run_name="__main__")
"""


def python(code: str) -> None:
    """Run this code in a process of its own, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)


def main() -> None:
    """Time both in turn; the last line is one JSON object."""
    args = parser(__doc__)
    args.add_argument("--repeats", type=int, default=5)
    args = args.parse_args()
    functions = {
        "import torch, torchvision, hydra": lambda: python(IMPORTS),
        "simclr.py to its first step": lambda: python(FIRST_STEP),
    }
    seconds = alternate(functions, args.repeats)
    report(seconds, 1, "starts")
    imports, first_step = (median(times) for times in seconds.values())
    finish({"start_vs_imports": first_step / imports})


if __name__ == "__main__":
    main()
