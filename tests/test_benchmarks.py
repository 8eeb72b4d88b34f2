"""Each benchmark is a command that ends with one JSON object; here as small as it goes."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

COMMANDS = {
    "augment.py --batch 8 --repeats 1 --no-compile": "augment_eager_vs_torchvision",
    "step.py --batch 4 --repeats 1": "step_eager_vs_plain",
    "linear_eval.py --epochs 2 --images 1": "linear_eval_vs_every_epoch",
    "memory.py --backbone resnet18 --batch 4": "resnet18_4_bf16_checkpointed",
    "memory.py --backbone resnet18 --batch 4 --micro 2": "resnet18_4_bf16",
    "scaling.py --processes 2 --batch 8 --repeats 1": "speed_2",
    "start.py --repeats 1": "start_vs_imports",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs_and_its_last_line_is_json(command, tmp_path):
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / script), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result[COMMANDS[command]] > 0


def test_memory_of_resnet50_at_batch_512_fits_11_gigabytes():
    """The targets of benchmarks/memory.py: an estimate that needs neither a GPU nor the memory."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "memory.py"), "--batch", "512"],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    gib = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < gib["resnet18_512_bf16"] <= 2.5
    assert 0.5 < gib["resnet50_512_bf16_checkpointed"] <= 4.5
    assert 0.5 < gib["resnet50_512_fp32_checkpointed"] <= 8.5
    assert gib["resnet50_512_fp32"] > 20  # so that an estimate of nothing is seen
