"""Images in host memory: when, and that they give the same numbers as images on the device.

Without a GPU the copies are those of a CPU to itself; tests that ask for `gpu` need --device=cuda.
"""

import time
from functools import partial

import pytest
import torch

import simclr
import simclr_lin
from evaluation import protocols
from images import datasets
from images.datasets import HostImages, move_images, select_images
from system.checkpoint import load_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def in_host_memory(monkeypatch):
    """Call it: from now on no images fit on the device; a list of the sizes of all batches."""
    sizes = []
    read = HostImages.__getitem__

    def noted(self, index):
        sizes.append(len(index))
        return read(self, index)

    def force():
        monkeypatch.setattr(datasets, "move_images", HostImages)
        monkeypatch.setattr(HostImages, "__getitem__", noted)
        return sizes

    return force


def pixels(n=10):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 4, 5), dtype=torch.uint8, generator=rng)


class Sized:
    """Images of 600 bytes that no machine needs a GPU for."""

    shape, nbytes = (10, 3, 4, 5), 600

    def to(self, device):
        return f"on {device}"


def test_images_are_on_a_gpu_if_they_leave_half_of_its_free_memory(monkeypatch, caplog):
    caplog.set_level("INFO")
    cuda, free, reserved, allocated = torch.device("cuda", 1), {}, {}, {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.__getitem__)
    for numbers in ((1200, 0, 0), (1000, 500, 300), (0, 1200, 0)):
        free[cuda], reserved[cuda], allocated[cuda] = numbers
        assert move_images(Sized(), cuda) == "on cuda:1", numbers
    for numbers in ((1199, 0, 0), (1000, 499, 300), (1199, 500, 500)):
        free[cuda], reserved[cuda], allocated[cuda] = numbers
        assert isinstance(move_images(Sized(), cuda), HostImages), numbers
    assert caplog.messages == ["0 MB of images stay in host memory"] * 3
    images = pixels()
    assert move_images(images, CPU) is images


def test_images_in_host_memory_are_read_like_a_tensor(in_host_memory):
    images = pixels()
    in_host_memory()
    found = HostImages(images, CPU)
    assert found.images is images  # no second copy
    assert len(found) == 10
    index = torch.tensor([7, 0, 7])
    assert torch.equal(found[index], images[index]) and found[index].device == found.device == CPU
    parts = list(found.split(4))
    assert [len(part) for part in parts] == [4, 4, 2] and torch.equal(torch.cat(parts), images)
    for given in (images, found):
        part = select_images(given, index)
        assert type(part) is type(given) and torch.equal(part[torch.arange(3)], images[index])


def test_a_run_from_host_memory_is_the_same_run_bit_for_bit(thin, toy, tmp_path, in_host_memory):
    cfg = toy("projection_dim=8", "hidden_dim=16", "knn_interval=1", "precision=fp32")

    def run(name):
        (tmp_path / name).mkdir()
        metrics = simclr.pretrain(cfg, tmp_path / name)
        model = load_checkpoint(tmp_path / name / "simclr_resnet18_epoch2.pt")["model"]
        weights = {key: value.numpy().tobytes() for key, value in model.items()}
        timed = ("seconds", "views_per_second")
        return weights, {key: value for key, value in metrics.items() if key not in timed}

    weights, metrics = run("device")
    sizes = in_host_memory()
    host_weights, host_metrics = run("host")
    assert host_metrics == metrics and list(host_weights) == list(weights)
    assert [key for key in weights if host_weights[key] != weights[key]] == []
    # The untrained rank; then the steps of an epoch, its rank and its kNN.
    assert sizes == [8, 8, 8] * 7


def test_evaluation_from_host_memory_gives_the_same_results(
    thin, toy, trained, tmp_path, in_host_memory, monkeypatch
):
    cfg = toy(
        "protocols=[knn,linear,linear_clean,logistic,finetune]", "baselines=[pixels]", "labels=6",
        "precision=fp32", "batch_size=4", "finetune_learning_rate=[0.01,0.1]",
    )  # fmt: skip
    scored = []
    score = simclr_lin.score

    def noted(result, labels):
        scored.append(result.scores)
        return score(result, labels)

    monkeypatch.setattr(simclr_lin, "score", noted)
    half = partial(datasets.hold_out, fraction=0.5)
    monkeypatch.setattr(protocols, "hold_out", lambda labels, _, seed: half(labels, seed=seed))
    for place in ("device", "host"):
        if place == "host":
            sizes = in_host_memory()
        (tmp_path / place).mkdir()
        simclr_lin.evaluate(cfg, trained / "simclr_resnet18_epoch2.pt", tmp_path / place)
    expected, found = scored[: len(scored) // 2], scored[len(scored) // 2 :]
    assert len(found) >= 9
    assert max(sizes) == 4  # batches alone, never the 9 held-out images at once
    for pair in zip(expected, found, strict=True):
        assert torch.equal(*pair)


def test_batches_are_complete_and_not_overwritten_while_the_gpu_is_behind(gpu):
    """The GPU sleeps before it reads a batch: the next ones are gathered and copied meanwhile."""
    images = torch.randint(0, 256, (512, 3, 224, 224), dtype=torch.uint8)
    rows = torch.stack([torch.randperm(512)[:128] for _ in range(12)])
    host, sums = HostImages(images, gpu), []
    for row in rows:
        batch = host[row]
        assert batch.device.type == "cuda"
        torch.cuda._sleep(50_000_000)  # clock cycles: about 30 ms
        sums.append(batch.flatten(1).sum(dim=1, dtype=torch.int64))
        del batch  # its memory is free for the next copy, once the sum is computed
    expected = images.flatten(1).sum(dim=1, dtype=torch.int64)[rows]
    assert torch.equal(torch.stack(sums).cpu(), expected)


def test_a_batch_does_not_wait_for_the_gpu(gpu):
    images = HostImages(torch.zeros(64, 3, 224, 224, dtype=torch.uint8), gpu)
    list(images.split(16))  # allocates
    torch.cuda.synchronize()
    torch.cuda._sleep(3_000_000_000)  # more than a second
    start = time.perf_counter()
    list(images.split(16))
    assert time.perf_counter() - start < 0.5
    assert not torch.cuda.current_stream().query()  # the GPU is still busy
