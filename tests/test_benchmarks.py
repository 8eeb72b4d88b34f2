"""Each benchmark is a command that ends with one JSON object; here as small as it goes."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY

import simclr
from images.augment import draw
from images.datasets import Split
from system.checkpoint import load_encoder
from training.optim import set_learning_rate

FP32 = "precision=fp32"  # bfloat16 takes longer for images as small as these
COMMANDS = {
    "augment.py --batch 8 --repeats 1 --no-compile": "augment_eager_vs_torchvision",
    "step.py --batch 4 --repeats 1": "step_eager_vs_plain",
    "linear_eval.py --epochs 2 --images 1 --repeats 1": "linear_eval_vs_every_epoch",
    "linear_eval.py --epochs 2 --images 1 --dkobak": "dkobak_clean",
    "placement.py --size 32 --batch 4 --images 8 --repeats 1": "host_vs_device",
    "scaling.py --processes 2 --batch 8 --repeats 1": "speed_2",
}


@pytest.fixture
def module(monkeypatch):
    """module("race"): a benchmark, imported."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module


@pytest.fixture
def benchmark(call, module):
    """benchmark("step.py", options): run it in this process; returns its last line."""

    def benchmark(script, *options):
        threads = torch.get_num_threads()
        code, error = call(f"benchmarks/{script}", *options)
        torch.set_num_threads(threads)
        assert code == 0, error
        return json.loads(call.stdout.splitlines()[-1])

    return benchmark


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs_and_its_last_line_is_json(benchmark, thin, command):
    assert benchmark(*command.split())[COMMANDS[command]] > 0


def lines(text):
    """What each line of JSON says, by its "what"."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {line.pop("what"): line for line in found if "what" in line}


def test_the_hour_with_a_gpu_runs_on_a_cpu_too(benchmark, call, write_images, tmp_path):
    """Every part, with the scripts and the tests as they are started there."""
    data = write_images(tmp_path / "images", train=8, test=3)
    small = "--batch 8 --backbones resnet18 --sizes 8 --steps 2 --plain-epochs 1 --workers 1"
    short = "--seeds 3 --epochs 1 --length 2 --target 0 --out out --levers fast-t0.2"
    tests = "--tests", "tests/test_models.py::test_nt_xent_is_algorithm_1"
    run = "image_size=8", "view_sizes=[[8,1]]", "finetune_epochs=1", FP32
    benchmark("gpu.py", str(data), *small.split(), *short.split(), *tests, "--run", *run)
    said = lines(call.stdout)
    assert said == lines(Path("out/gpu.jsonl").read_text())
    assert not [what for what in said if "failed" in what], said
    assert said["tests"]["code"] == 0 and "15 passed" in said["tests"]["summary"]
    assert said["a graph is bit for bit the eager step"]["same"]
    assert said["resnet18, 8 pixels, eager"]["epoch_seconds"] > 0
    assert {*said} > {"plain pipeline, 1 epochs", "simclr.py, 1 epochs", "plain took", "fast-t0.2"}
    found = said["simsiam-3"]
    assert {"seed=3", "recipe=simsiam"} < {*found["overrides"]} and found["linear_clean"] >= 0
    assert found["last"]["epoch"] == 1 and found["seconds"] > 0
    runs = [line for line in said.values() if "last" in line]
    best, won = max(line["last"]["knn_acc"] for line in runs), said["race to kNN 0"]
    best = [{*line["overrides"]} for line in runs if line["last"]["knn_acc"] == best]
    assert any(run < {*won["overrides"]} for run in best) and won["seconds_and_knn"][0] > 0
    parts = [Path(f"out/race/encoder.pt.{i}").read_bytes() for i in range(2)]
    Path("encoder.pt").write_bytes(b"".join(parts))
    assert load_encoder("encoder.pt")[1] == 512
    benchmark("gpu.py", str(data), *short.split(), "--parts", "question")  # nothing is resumed
    assert "FileExistsError" in lines(call.stdout)["simsiam-3 failed"]["error"]


def test_the_race_looks_at_every_checkpoint_from_the_last(benchmark, call, write_images):
    data = write_images(Path("images"), train=8, test=3)
    run = ["image_size=8", "view_sizes=[[8,1]]", "batch_size=8", "epochs=3", "log_interval=1", FP32]
    small = "--seed", "0", "--batch", "8", "--repeats", "1", "--run", *run
    found = benchmark("race.py", str(data), "--target", "0", *small)
    assert 0 < found["seconds"] < 100 and found["plain_steps"] > 0
    times = [line for line in call.stdout.splitlines() if ": kNN" in line]
    assert [line.split("_epoch")[1][0] for line in times] == ["3", "2", "1"]


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
    monkeypatch.setattr(timed, "knn", lambda enc, cfg, train, test: enc)

    def run(name, seconds, accuracies):
        for accuracy in accuracies:
            clock[0] += seconds
            order.append(name)
            yield SimpleNamespace(enc=accuracy)

    runs = {"plain": run("plain", 10, [0.1, 0.3, 0.5, 0.4]), "fast": run("fast", 1, [0.2, 0.45])}
    trace = timed.race(runs, {"plain": 4, "fast": 2}, None, [None, None])
    assert order == ["plain", "fast", "plain", "plain", "fast", "plain"]
    assert trace["plain"] == [(0, 0, 0), (10, 1, 0), (20, 2, 0), (30, 3, 0.5), (40, 4, 0.4)]
    assert trace["fast"] == [(0, 0, 0), (1, 1, 0), (2, 2, 0.45)]
    assert timed.speedups(trace["plain"], trace["fast"]) == {"end": 20, "first_time": 15}
    assert timed.speedups(trace["fast"], trace["plain"]) == {"end": 2 / 30, "first_time": 2 / 30}
    assert timed.speedups(trace["plain"], trace["fast"][:2]) is None


def test_what_takes_less_memory_by_the_estimate(module, thin, monkeypatch, capsys):
    """It needs neither a GPU nor the memory."""
    memory = module("memory")
    monkeypatch.setattr(sys, "argv", ["memory.py", "--backbone", "resnet18", "--batch", "512"])
    memory.main()
    gib = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1 < gib["resnet18_512_bf16"] < 1.5 and 2 < gib["resnet18_512_fp32"] < 3
    for precision in ("bf16", "fp32"):
        recomputed = gib[f"resnet18_512_{precision}_checkpointed"]
        assert 0.5 < recomputed < 0.9 * gib[f"resnet18_512_{precision}"]
    parts = memory.step_memory("resnet18", 512, "precision=bf16", "micro_batch_size=128")
    assert 0.1 < parts < 0.5 * gib["resnet18_512_bf16"]
    assert 1.9 < gib["loss_matrices_at_4096"] < 2.1  # of all pairs, forward and backward


def test_both_runs_train_in_train_mode_and_are_judged_in_eval_mode(module, thin, toy):
    timed, cfg = module("time_to_accuracy"), toy("precision=fp32")
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(24) % 3, ["a", "b", "c"])
    for run in (timed.our_run(cfg, images), timed.plain_run(cfg, images, workers=1)):
        counted = []
        for model in run:
            timed.knn(model.enc, cfg, split, split)
            counted.append(model.enc.bn1.num_batches_tracked.item())
        assert counted == [3, 6]  # of the steps, none of kNN


def test_the_plain_pipeline_has_two_views_and_the_step_of_simclr(module, thin, toy):
    plain, cpu = module("plain"), torch.device("cpu")
    options = "batch_size=6", "temperature=0.3", "learning_rate=0.01", "weight_decay=0.01"
    cfg = toy("precision=fp32", *options)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    assert not torch.equal(*plain.TwoViews(images, plain.plain_transform(cfg, 8))[0])
    ours, theirs = (simclr.make_learner(cfg, cpu) for _ in range(2))  # the same weights
    pipeline = plain.Plain(theirs.model, cfg, cfg.weight_decay)
    set_learning_rate(ours.optimizer, 0.01)
    for step in range(2):  # nothing of the first step's gradient is left
        noise = draw(12, seed=0, step=step)
        simclr.train_step(cfg, ours, images, noise, 8)
        pipeline.step(ours.make_views(images.repeat(2, 1, 1, 1), noise, 8, cfg).chunk(2))
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, theirs.model.state_dict()[name])


def test_time_to_accuracy_is_null_where_one_seed_does_not_reach_it(
    module, thin, write_images, tmp_path, monkeypatch, capsys
):
    timed, data = module("time_to_accuracy"), write_images(tmp_path / "images", train=8, test=3)
    scores = iter([0.5, 0.6, 0.5, 0.4])  # plain and fast of each seed
    monkeypatch.setattr(timed, "knn", lambda *args, **splits: next(scores))
    small = "--images 4 --epochs 1 --fast-epochs 1 --seed 0 1 --fast recipe=fast batch_size=8"
    command = ["time_to_accuracy.py", str(data), *small.split(), "view_sizes=[[8,1]]"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(timed, "RECIPE", [*timed.RECIPE, "batch_size=8", "image_size=8"])
    timed.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["knn_plain"], found["knn_fast"]) == (0.5, 0.5)
    assert found["time_fast_vs_end_of_plain"] is None


def test_a_subset_is_the_first_images_of_each_class(module):
    split = Split(torch.arange(6), torch.tensor([1, 0, 1, 0, 0, 1]), ["a", "b"])
    found = module("harness").subset(split, 2)
    assert (found.images.tolist(), found.labels.tolist()) == ([1, 3, 0, 2], [0, 0, 1, 1])


def test_functions_are_timed_in_turn_after_one_call_of_each(module, monkeypatch):
    harness, clock, calls = module("harness"), [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def takes(name, seconds):
        def function():
            clock[0] += seconds if name in calls else 100  # the first compiles
            calls.append(name)

        return function

    found = harness.alternate({"a": takes("a", 1), "b": takes("b", 2)}, 3)
    assert found == {"a": [1] * 3, "b": [2] * 3} and calls == ["a", "b"] * 4
