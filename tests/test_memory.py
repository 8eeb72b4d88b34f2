"""Sizes that surely do not fit are refused before they are computed; advice that helps there."""

import re
import shutil

import pytest
import torch

import models
from evaluation import classifiers, features, protocols
from images import datasets
from system import memory

CPU = torch.device("cpu")
DATA = ["dataset=folder", "data_dir=images", "device=cpu"]
LIN = ["simclr_lin.py", *DATA, "checkpoint=w.pt", "hydra.run.dir=out"]
TRAIN = ["simclr.py", *DATA, "image_size=8", "epochs=1", "hydra.run.dir=run", "compile=false"]


@pytest.fixture
def images(thin, trained, write_images, tmp_path):
    """24 training and 9 test images of three classes, and a checkpoint with 128 features."""
    write_images(tmp_path / "images", train=8, test=3)
    shutil.copy(trained / "simclr_resnet18_epoch2.pt", tmp_path / "w.pt")


@pytest.fixture
def computed(monkeypatch):
    """The batches that an encoder of thin_resnet has seen."""
    seen = []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *a: seen.append(1) or forward(*a))
    return seen


ROW, PIXELS = 4 * 128, 4 * 192  # bytes of the features of an image in float32
M, N = 1437, 360  # training and test images of digits, in ten classes
# What is given and the free memory; the key, and its largest value that fits.
TOO_LARGE = {
    "crops": (["finetune_views=99"], ROW * (M + N + 5 * M), "finetune_views", 5),
    "crops of pixels": (
        ["finetune_views=99", "baselines=[pixels]", "protocols=[linear]"],
        PIXELS * (M + N + 6 * M), "finetune_views", 6,
    ),
    "features": ([], ROW * (N + 2 * 1000), "labels", 100),
    "features of pixels": (
        ["baselines=[pixels]", "protocols=[linear_clean]"], PIXELS * (N + 1200), "labels", 120,
    ),
    "features to predict with": (["predict=images/test"], ROW * (9 + 2 * 900), "labels", 90),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_surely_does_not_fit_is_refused_before_anything_is_computed(
    images, computed, call, monkeypatch, case, tmp_path
):
    """With the key, its bytes and the largest value that fits; which then is not refused."""
    given, free, key, largest = TOO_LARGE[case]
    overrides = "dataset=digits", "batch_size=8", "precision=fp32", *given
    above = f"{key}={largest + 1}"
    for bytes_free, allowed, *more in (
        (free, largest),
        (free, largest, above),
        (free - 1, largest - 1),
    ):
        monkeypatch.setattr(memory, "free_memory", lambda device, n=bytes_free: n)
        code, error = call(*LIN, *overrides, "finetune_epochs=9999", *more)
        assert code == 2 and error.count("\n") == 1 and error.startswith(f"error: {key}"), error
        assert f": must be at most {allowed} here: " in error and "MB are free on cpu" in error
        assert not computed and not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    code, error = call(*LIN, *overrides, "finetune_epochs=1", f"{key}={largest}")
    assert code == 0 and computed, error


@pytest.mark.parametrize(
    ("key", "overrides", "copies"),
    [
        ("hidden_dim", ["hidden_dim=65000", "projection_dim=1000", "batch_size=2"], 5),
        ("hidden_dim", ["hidden_dim=5000", "projection_dim=10000", "batch_size=8"], 5),
    ],
)
def test_pretraining_that_surely_does_not_fit_is_refused(
    images, computed, call, monkeypatch, key, overrides, copies
):
    small = models.SimCLR(hidden_dim=8, projection_dim=8)
    free = copies * sum(weight.nbytes for weight in small.parameters())
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    code, error = call(*TRAIN, *overrides)
    assert code == 2 and error.count("\n") == 1 and not computed, error
    found = re.fullmatch(rf"error: {key}=.*: must be at most (\d+) here: .*\n", error)
    assert found and int(found[1]) > 1, error
    largest = int(found[1])
    code, error = call(*TRAIN, *overrides, f"{key}={largest + 1}")
    assert code == 2 and not computed, error
    code, error = call(*TRAIN, *overrides, f"{key}={largest}")
    assert code == 0 and computed, error


def test_what_no_machine_holds_is_refused_on_this_one_too(images, call):
    """Nothing is replaced here: what the system says about its memory is read."""
    for command, overrides, key in (
        (LIN, ["finetune_views=1000000000", "finetune_epochs=1000000000"], "finetune_views"),
        (
            LIN,
            ["finetune_views=99999999", "finetune_epochs=99999999", "predict=images"],
            "finetune_v",
        ),
    ):
        code, error = call(*command, *overrides)
        assert code == 2 and error.count("\n") == 1 and error.startswith(f"error: {key}"), error


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write files of /proc and /sys/fs/cgroup, by their path; all others are missing."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cg")
    monkeypatch.setattr("os.sysconf", lambda name: 2**20, raising=False)  # 1 TiB

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return memory.free_memory(CPU)

    return write


def test_free_memory_is_what_the_machine_the_container_and_the_job_leave(system, monkeypatch):
    assert system() == 2**40  # no Linux
    info = "MemTotal:   900 kB\nMemAvailable:   800 kB\nSwapFree:  0 kB\nHugePages_Free: 0\n"
    assert system(proc__meminfo=info) == 800 * 1024
    assert system(proc__self__cgroup="0::/job/step\n") == 800 * 1024
    assert system(cg__memory_DOT_max="max\n") == 800 * 1024  # a limit of its own has none
    assert system(cg__job__memory_DOT_max="500000\n") == 500_000  # of a cgroup above
    stat = "anon 100000\nfile 399000\n"  # cached files make room
    assert system(cg__job__memory_DOT_stat=stat) == 400_000
    assert system(cg__job__step__memory_DOT_max="70000") == 70_000
    version_1 = "9:name=systemd:/\n4:cpu,memory:/host/docker/1\n0::/\n"  # seen in a container
    assert system(proc__self__cgroup=version_1) == 800 * 1024
    limit = {"cg__memory__memory_DOT_limit_in_bytes": "600000"}
    assert system(**limit, cg__memory__memory_DOT_stat="total_rss 1000\nrss 0\n") == 599_000
    assert system(proc__meminfo=info.replace("SwapFree:  0", "SwapFree:  1")) == 600_024
    system(proc__meminfo="", proc__self__cgroup="")
    monkeypatch.delattr("os.sysconf")  # Windows
    assert memory.free_memory(CPU) == float("inf")


def test_of_a_gpu_what_torch_keeps_for_reuse_is_free_too(monkeypatch):
    for name, value in (
        ("mem_get_info", (100, 0)),
        ("memory_reserved", 30),
        ("memory_allocated", 10),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(torch.device("cuda")) == 120


def exhausted(*args, **options):
    raise RuntimeError(
        "[enforce fail] . DefaultCPUAllocator: can't allocate memory: 9 GB. And so on"
    )


def test_where_memory_is_used_up_the_advice_is_for_that_place(images, call, monkeypatch):
    """And names no key that the command does not have."""
    for module, name, command, advice in (
        (features, "autocast", [*LIN, "protocols=[logistic]"], "take a smaller batch_size"),
        (protocols, "knn_scores", LIN, "take a smaller labels"),
        (protocols, "crop_features", LIN, "take a smaller finetune_views or batch_size"),
        (
            classifiers,
            "make_optimizer",
            [*LIN, "protocols=[finetune]"],
            "take a smaller batch_size",
        ),
        (datasets, "decode", LIN, "this machine has too little for it"),
        (models, "nt_xent", TRAIN, memory.PRETRAINING),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, exhausted)
            code, error = call(*command, "batch_size=8", "finetune_epochs=1")
        said = error.splitlines()[-1]
        assert code == 1 and said.startswith("error: ") and said.endswith(f": {advice}"), error
        assert "out of memory (DefaultCPUAllocator: can't allocate memory: 9 GB): " in said
    for way in ("activation_checkpointing=true", "smaller batch_size", "a micro_batch_size"):
        assert way in memory.PRETRAINING
