"""Each benchmark is a command that ends with one JSON object; here as small as it goes."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

COMMANDS = {
    "augment.py --batch 8 --repeats 1 --no-compile": "augment_eager_vs_torchvision",
    "step.py --batch 4 --repeats 1": "step_eager_vs_plain",
    "linear_eval.py --epochs 2 --images 1 --repeats 1": "linear_eval_vs_every_epoch",
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


def lines(text):
    """What each line of JSON says, by its "what"."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {line.pop("what"): line for line in found if "what" in line}


def test_the_hour_with_a_gpu_runs_on_a_cpu_too(benchmark, call, write_images, tmp_path):
    """Every part, with the scripts and the tests as they are started there."""
    data = write_images(tmp_path / "images", train=8, test=3)
    small = "--batch 8 --backbones resnet18 --sizes 8 --steps 2 --epochs 1 --workers 1 --minutes 0"
    tests = "--tests", "tests/test_models.py::test_nt_xent_is_algorithm_1"
    run = "image_size=8", "view_sizes=[[8,1]]", "finetune_epochs=1", "min_learning_rate=0"
    benchmark("gpu.py", str(data), *small.split(), *tests, "--run", *run)
    said = lines(call.stdout)
    assert said == lines((tmp_path / "gpu.jsonl").read_text())
    assert not [what for what in said if "failed" in what], said
    assert said["tests"]["code"] == 0 and "15 passed" in said["tests"]["summary"]
    assert said["a graph is bit for bit the eager step"]["same"]
    assert said["resnet18, 8 pixels, eager"]["epoch_seconds"] > 0
    assert {*said} > {"plain pipeline, 1 epochs", "simclr.py, 1 epochs", "runs took"}
    for recipe in ("simsiam", "fast"):
        found = said[f"recipe={recipe}"]
        assert found["epochs"] == len(found["knn"]) == 1 and found["scores"].keys() > {
            "knn",
            "linear",
        }


def test_the_race_looks_at_every_checkpoint_from_the_last(benchmark, call, write_images):
    data = write_images(Path("images"), train=8, test=3)
    run = ["image_size=8", "view_sizes=[[8,1]]", "batch_size=8", "epochs=3", "log_interval=1"]
    small = "--seed", "0", "1", "--batch", "8", "--repeats", "1", "--run", *run
    found = benchmark("race.py", str(data), "--target", "0", *small)
    assert 0 < found["seconds"] < 100 and found["plain_steps"] > 0
    times = [line for line in call.stdout.splitlines() if ": kNN" in line]
    assert [line.split("_epoch")[1][0] for line in times] == ["3", "2", "1"] * 2


@pytest.fixture
def module(monkeypatch):
    """module("race"): a benchmark, imported."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("found", "first"), [([70, 50, 65, 66], (3, 65)), ([61, 62], (1, 61)), ([70, 59], None)]
)
def test_a_race_is_won_where_accuracy_stays_above_the_target(module, found, first):
    checkpoints = [(i, Path(str(i))) for i in range(1, len(found) + 1)]
    won = module("race").first_that_stays(checkpoints, lambda path: found[int(path.name) - 1], 60)
    assert won == first


def test_the_runs_take_turns_and_each_has_its_own_clock(module, monkeypatch):
    timed = module("time_to_accuracy")
    clock, order = [0.0], []
    monkeypatch.setattr(timed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timed, "knn", lambda model, train, test: model)

    def run(name, seconds, accuracies):
        for accuracy in accuracies:
            clock[0] += seconds
            order.append(name)
            yield accuracy

    runs = {"plain": run("plain", 10, [0.1, 0.3, 0.5, 0.4]), "fast": run("fast", 1, [0.2, 0.45])}
    trace = timed.race(runs, {"plain": 4, "fast": 2}, None, None)
    assert order == ["plain", "fast", "plain", "plain", "fast", "plain"]
    assert trace["plain"] == [(0, 0, 0), (10, 1, 0), (20, 2, 0), (30, 3, 0.5), (40, 4, 0.4)]
    assert trace["fast"] == [(0, 0, 0), (1, 1, 0), (2, 2, 0.45)]
    assert timed.speedups(trace["plain"], trace["fast"]) == {"end": 20, "first_time": 15}
    assert timed.speedups(trace["fast"], trace["plain"]) == {"end": 2 / 30, "first_time": 2 / 30}
    assert timed.speedups(trace["plain"], trace["fast"][:2]) is None


def test_memory_of_resnet50_at_batch_512_fits_11_gigabytes(benchmark):
    """The targets of benchmarks/memory.py: an estimate that needs neither a GPU nor the memory."""
    gib = benchmark("memory.py", "--backbone", "resnet18", "resnet50", "--batch", "512")
    assert 0.5 < gib["resnet18_512_bf16"] <= 2.5
    assert 0.5 < gib["resnet50_512_bf16_checkpointed"] <= 4.5
    assert 0.5 < gib["resnet50_512_fp32_checkpointed"] <= 8.5
    assert gib["resnet50_512_fp32"] > 20  # so that an estimate of nothing is seen
