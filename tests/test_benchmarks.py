"""Each benchmark is a command that ends with one JSON object; here as small as it goes."""

import json
import sys

import pytest
import torch
from conftest import REPOSITORY

COMMANDS = {
    "augment.py --batch 8 --repeats 1 --no-compile": "augment_eager_vs_torchvision",
    "step.py --batch 4 --repeats 1": "step_eager_vs_plain",
    "linear_eval.py --epochs 2 --images 1 --repeats 1": "linear_eval_vs_every_epoch",
    "gpu.py --batch 8 --images 16 --sizes 8 --steps 2 --workers 1": "ms",
    "memory.py --backbone resnet18 --batch 4": "resnet18_4_bf16_checkpointed",
    "memory.py --backbone resnet18 --batch 4 --micro 2": "resnet18_4_bf16",
    "placement.py --size 32 --batch 4 --images 8 --repeats 1": "host_vs_device",
    "scaling.py --processes 2 --batch 8 --repeats 1": "speed_2",
    "start.py --repeats 1": "start_vs_imports",
}


@pytest.fixture
def benchmark(call, monkeypatch):
    """benchmark("step.py", options): run it in this process; returns its last line."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")

    def benchmark(script, *options):
        modules, threads = set(sys.modules), torch.get_num_threads()
        code, error = call(f"benchmarks/{script}", *options)
        torch.set_num_threads(threads)
        for name in set(sys.modules) - modules:  # the next one's may have the same names
            del sys.modules[name]
        assert code == 0, error
        return json.loads(call.stdout.splitlines()[-1])

    return benchmark


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs_and_its_last_line_is_json(benchmark, command):
    assert benchmark(*command.split())[COMMANDS[command]] > 0


def test_memory_of_resnet50_at_batch_512_fits_11_gigabytes(benchmark):
    """The targets of benchmarks/memory.py: an estimate that needs neither a GPU nor the memory."""
    gib = benchmark("memory.py", "--backbone", "resnet18", "resnet50", "--batch", "512")
    assert 0.5 < gib["resnet18_512_bf16"] <= 2.5
    assert 0.5 < gib["resnet50_512_bf16_checkpointed"] <= 4.5
    assert 0.5 < gib["resnet50_512_fp32_checkpointed"] <= 8.5
    assert gib["resnet50_512_fp32"] > 20  # so that an estimate of nothing is seen
