"""kill -9 at any moment leaves a run that goes on, and ends bit-identical.

pytest tests/test_kill.py                          # 8 kills, and one at each operation of a save
KILLS=200 pytest -n 0 -s tests/test_kill.py        # more kills
"""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY, make_images
from test_resume import differences, lines, outcome

KILLS = int(os.environ.get("KILLS", "8"))
EPOCHS, STATE = 3, "simclr_resnet18_last.pt"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the runs are."""
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def ask(directory):
    """ask(run=name, …): a run as killed_run.py describes; returns what it answers."""
    data = make_images(directory / "images", train=8, test=3)
    config = ["dataset=folder", f"data_dir={data}", "image_size=8", "batch_size=8", "device=cpu",
              f"epochs={EPOCHS}", "projection_dim=8", "hidden_dim=16", "save_minutes=0",
              "knn_interval=2", "log_interval=1"]  # fmt: skip
    with open(directory / "stderr", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "killed_run.py"), str(directory), *config],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
        )  # fmt: skip

    def ask(**wanted):
        process.stdin.write(json.dumps(wanted) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, (directory / "stderr").read_text()
        return json.loads(answer)

    yield ask
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def whole(ask, directory):
    """The outcome of the run that is not killed."""
    assert ask(run="whole")["status"] == 0
    return outcome(directory / "whole")


def test_kills_at_any_moment_leave_a_run_that_ends_bit_identical(ask, directory, whole):
    """Each is followed by a resume."""
    rng, killed, ended = random.Random(0), 0, 0
    while killed < KILLS or ended == 0:
        wanted = {"seconds": rng.uniform(0, 1)} if killed < KILLS else {}
        answer = ask(run=f"killed{ended}", **wanted)
        if answer["status"] == 0:
            folder = directory / f"killed{ended}"
            assert differences(outcome(folder), whole) == []
            assert [line["epoch"] for line in lines(folder)] == list(range(1, EPOCHS + 1))
            ended += 1
        else:
            assert answer["status"] == -signal.SIGKILL, (directory / "stderr").read_text()
            killed += 1
    print(f"\n{killed} kills; {ended} runs of {EPOCHS} epochs ended identical")


def test_every_operation_of_a_save_can_be_the_last(ask, directory, whole):
    """Each in turn, until the run is complete: none of them leaves what can't be gone on from."""
    seen, answer, k = [], {"status": -signal.SIGKILL}, 0
    while answer["status"] == -signal.SIGKILL:
        k = 1 if seen[-1:] == [f"after rename to {STATE}"] else k + 1  # which is not repeated
        answer = ask(run="each", operation=k)
        seen.append(answer["last"])
    assert answer["status"] == 0, (directory / "stderr").read_text()
    assert differences(outcome(directory / "each"), whole) == []
    for name in ("config.yaml", "metrics.jsonl", "simclr_resnet18_epoch1.pt", STATE):
        assert {f"before rename to {name}", f"after rename to {name}"} <= {*seen}
