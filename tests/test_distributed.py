"""Several ranks (torchrun, gloo) compute what one process computes, and stop together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import simclr
from config import ConfigError
from training import distributed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def start(*command: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [str(part) for part in command], env=ENV, stderr=subprocess.PIPE, text=True, **options
    )


def distance(one: dict, other: dict) -> float:
    """Distance of two lists of tensors as a share of the second's length."""
    a, b = (torch.cat([t.flatten().double() for t in tensors.values()]) for tensors in (one, other))
    return ((a - b).norm() / b.norm()).item()


def test_two_ranks_compute_what_one_process_computes(tmp_path):
    """Order, views, loss, negatives and gradients, with the weights of the steps before."""
    files = tmp_path / "one.pt", tmp_path / "two.pt"
    script, starts = REPOSITORY / "tests/parallel_steps.py", ([sys.executable], TORCHRUN)
    processes = [
        start(*how, script, file, cwd=tmp_path) for how, file in zip(starts, files, strict=True)
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
    one, two = (torch.load(file, weights_only=True) for file in files)
    for case in ("whole batch", "statistics of 8 images", "lars"):
        assert len(one[case]) == len(two[case]) == 4
        for ours, single in zip(two[case], one[case], strict=True):
            assert ours["loss"].item() == pytest.approx(single["loss"].item(), rel=1e-11), case
            assert ours["accuracy"].item() == pytest.approx(single["accuracy"].item()), case
            assert distance(ours["gradients"], single["gradients"]) < 1e-10, case
    assert one["same"] is one["different"] is two["same"] is None
    assert two["different"] == (
        "the ranks see different training states in run: it must be on a disk that all share"
    )


def epochs(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["epoch"] for line in lines]


def test_a_signal_to_one_rank_stops_both_at_one_step_and_one_process_goes_on(
    thin, write_images, config, tmp_path
):
    data, run = write_images(tmp_path / "images", train=16, test=3), tmp_path / "run"
    keys = [
        "dataset=folder", f"data_dir={data}", "image_size=8", "batch_size=16", "epochs=30",
        "device=cpu", "precision=fp32", "knn_interval=0", "hidden_dim=16", "projection_dim=8",
        "save_minutes=100", "sync_batchnorm=false",
    ]  # fmt: skip
    script = REPOSITORY / "tests/thin_simclr.py"
    two = start(*TORCHRUN, script, *keys, f"hydra.run.dir={run}")
    while len(epochs(run)) < 2 and two.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text()
    os.kill(int(children.split()[1]), signal.SIGUSR1)  # the second rank
    try:
        _, error = two.communicate(timeout=90)
    finally:
        two.terminate()  # and its ranks, if they go on
    assert two.returncode != 0 and "the state is saved: the same command resumes" in error
    step = torch.load(run / "simclr_resnet18_last.pt", weights_only=True)["step"]
    assert 6 <= step < 90
    log = (run / "simclr.log").read_text()
    assert log.count("48 images of folder") == 1  # rank 0 alone logs
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    simclr.pretrain(config(*keys), run)
    assert epochs(run) == list(range(1, 31))


def test_an_empty_world_size_is_a_single_process(thin, toy, monkeypatch, tmp_path):
    for value in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", value)
        with distributed.process_group(CPU):
            assert (distributed.world_size(), distributed.rank()) == (1, 0)
    monkeypatch.setenv("WORLD_SIZE", "")
    simclr.pretrain(toy("epochs=1"), tmp_path)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(ValueError, match="RANK expected"), distributed.process_group(CUDA):
        pass
    assert chosen == [2]


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        (1, ["batch_size=6", "compile=true", "sync_batchnorm=true"], None),
        (1, ["batch_size=6", "micro_batch_size=4"], "micro_batch_size=4: .*divisor of the 6 imag"),
        (4, ["batch_size=32", "micro_batch_size=2", "sync_batchnorm=false"], None),
        (4, ["batch_size=24"], "batch_size=24: must be a multiple of 16, for 4 ranks"),
        (
            4,
            ["batch_size=32", "micro_batch_size=3", "sync_batchnorm=false"],
            "divisor of the 8 imag",
        ),
        (2, ["batch_size=32"], "sync_batchnorm=.*: must be false for 2 ranks on cpu"),
        (
            2,
            ["batch_size=32", "sync_batchnorm=false", "compile=true"],
            "compile=.*: must be false or aut",
        ),
    ],
)
def test_what_does_not_fit_the_number_of_ranks_is_refused(
    config, monkeypatch, ranks, overrides, message
):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    cfg = config(*overrides)
    if message is None:
        distributed.check_ranks(cfg, CPU)
        return
    with pytest.raises(ConfigError, match=message):
        distributed.check_ranks(cfg, CPU)
    if "sync" in message:
        distributed.check_ranks(cfg, CUDA)


def test_on_gpus_batch_norm_is_torchs_synchronised_one(monkeypatch, thin, toy):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **options: model)
    for sync in (True, False):
        learner = simclr.make_learner(toy(f"sync_batchnorm={sync}"), CPU)
        layers = [m for m in learner.ddp_model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        assert len(layers) == (6 if sync else 0)
