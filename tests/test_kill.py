"""kill -9 at any moment leaves a run that goes on, and ends bit-identical.

pytest tests/test_kill.py                          # 24 kills
KILLS=200 pytest -n 0 -s tests/test_kill.py        # the number in docs/reliability.md
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter

import pytest
from conftest import REPOSITORY
from test_resume import lines, outcome

KILLS = int(os.environ.get("KILLS", "24"))
EPOCHS = 12
BETWEEN = "", "after fsync of the folder"  # a save ends with that


@pytest.fixture
def ask(tmp_path, write_images):
    """ask(run=name, …): a run as killed_run.py describes; returns what it answers."""
    data = write_images(tmp_path / "images", train=8, test=3)
    config = ["dataset=folder", f"data_dir={data}", "image_size=8", "batch_size=8", "device=cpu",
              f"epochs={EPOCHS}", "projection_dim=8", "hidden_dim=16", "save_minutes=0",
              "knn_interval=3", "log_interval=2"]  # fmt: skip
    errors = open(tmp_path / "stderr", "w")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "killed_run.py"), str(tmp_path), *config],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
    )  # fmt: skip

    def ask(**wanted):
        process.stdin.write(json.dumps(wanted) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, (tmp_path / "stderr").read_text()
        return json.loads(answer)

    yield ask
    process.kill()
    process.communicate()
    errors.close()


def test_kills_at_any_moment_leave_a_run_that_ends_bit_identical(ask, tmp_path):
    """Three of four at an operation on a file: half of a write, before or after an fsync or a
    rename; the others after some time. Each is followed by a resume."""
    assert ask(run="whole")["status"] == 0
    rng, where, killed, ended = random.Random(0), Counter(), 0, 0
    while killed < KILLS or ended == 0:
        if killed == KILLS:
            wanted = {}
        elif killed % 4 < 3:  # a resume alone does some 14, an epoch 16 or more
            wanted = {"operation": rng.randint(1, 60)}
        else:
            wanted = {"seconds": rng.uniform(0, 0.5)}
        answer = ask(run=f"killed{ended}", **wanted)
        if answer["status"] == 0:
            folder = tmp_path / f"killed{ended}"
            assert outcome(folder, EPOCHS) == outcome(tmp_path / "whole", EPOCHS)
            assert [line["epoch"] for line in lines(folder)] == list(range(1, EPOCHS + 1))
            ended += 1
            continue
        assert answer["status"] == -signal.SIGKILL, answer
        killed += 1
        where["between saves" if answer["last"] in BETWEEN else "within a save"] += 1
    saves = where["within a save"]
    print(
        f"\n{killed} kills, {saves} within a save; {ended} runs of {EPOCHS} epochs ended identical"
    )
    assert saves >= KILLS / 2


def test_every_operation_of_a_save_can_be_the_last(ask, tmp_path):
    """Each in turn, until the run is complete: none of them leaves what can't be gone on from."""
    assert ask(run="whole")["status"] == 0
    seen, k = [], 0
    while True:
        k += 1
        answer = ask(run="killed", operation=k)
        if answer["status"] == 0:
            break
        assert answer["status"] == -signal.SIGKILL
        seen.append(answer["last"])
    assert outcome(tmp_path / "killed", EPOCHS) == outcome(tmp_path / "whole", EPOCHS)
    for name in ("half of simclr_resnet18_last.pt", "before rename to simclr_resnet18_previous.pt",
                 "after rename to simclr_resnet18_previous.pt", "half of metrics.jsonl",
                 "before fsync of the file",
                 "after rename to simclr_resnet18_last.pt"):  # fmt: skip
        assert any(name in operation for operation in seen), (name, seen)
