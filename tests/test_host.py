"""Images in host memory: when, and that they give the same numbers as images on the device.

Without a GPU the copies are those of a CPU to itself; tests that ask for `gpu` need --device=cuda.
"""

import json
import time
import tracemalloc

import pytest
import torch
from conftest import stop_in_step

import plot
import simclr
import simclr_lin
from evaluation import features, figures, protocols
from images import host
from images.datasets import load_split
from images.host import HostImages, batches, describe, place, take
from system.checkpoint import load_checkpoint
from system.errors import Stopped

CPU = torch.device("cpu")
TIMED = "views_per_second", "seconds"


@pytest.fixture
def in_host_memory(monkeypatch):
    """Call it: from now on no images fit on the device; a list of the sizes of all batches."""
    sizes = []
    read = HostImages.__getitem__

    def noted(self, index):
        sizes.append(len(index))
        return read(self, index)

    def force():
        monkeypatch.setattr(host, "fits", lambda images, device: False)
        monkeypatch.setattr(HostImages, "__getitem__", noted)
        return sizes

    return force


def pixels(n=10):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 4, 5), dtype=torch.uint8, generator=rng)


def test_images_are_on_a_gpu_if_they_leave_half_of_its_free_memory(monkeypatch):
    images, cuda = pixels(10), torch.device("cuda", 1)  # 600 bytes
    free = {cuda: (1200, 10**6), CPU: (0, 0)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", free.__getitem__)
    assert host.fits(images, cuda) and host.fits(images, CPU)
    free[cuda] = (1199, 10**6)
    assert not host.fits(images, cuda) and host.fits(images, CPU)
    assert place(images, CPU) is images


def test_images_in_host_memory_are_read_like_a_tensor(in_host_memory):
    images = pixels()
    in_host_memory()
    found = place(images, CPU)
    assert isinstance(found, HostImages) and found.images is images  # no second copy
    assert (len(found), found.shape, found.device) == (10, images.shape, CPU)
    index = torch.tensor([7, 0, 7])
    assert torch.equal(found[index], images[index]) and torch.equal(found[[3]], images[[3]])
    parts = list(found.split(4))
    assert [len(part) for part in parts] == [4, 4, 2] and torch.equal(torch.cat(parts), images)
    rows = torch.tensor([[1, 5], [9, 2]])
    for given in (images, found):
        read = list(batches(given, rows))
        assert torch.equal(torch.stack(read), images[rows]) and read[0].device == CPU
        part = take(given, index)
        assert type(part) is type(given) and torch.equal(part[torch.arange(3)], images[index])


def test_bytes_and_place_are_said(monkeypatch):
    images = torch.empty(1, dtype=torch.uint8).expand(1_281_167, 3, 224, 224)
    monkeypatch.setattr(host, "fits", lambda images, device: False)
    assert describe(place(images, CPU), "folder") == (
        "1,281,167 images of folder (192.9 GB in host memory, copied batch by batch)"
    )
    digits = torch.empty(50_000, 3, 32, 32, dtype=torch.uint8, device="meta")
    assert describe(digits, "cifar10") == "50,000 images of cifar10 (153.6 MB on meta)"


def test_a_folder_is_loaded_with_no_second_copy(write_images, tmp_path):
    data = write_images(tmp_path / "images", train=20)
    load_split("folder", str(data), "train", 8)  # imports
    tracemalloc.start()
    images = load_split("folder", str(data), "train", 192).images
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == 60 and peak < 1.2 * images.nbytes


def test_the_bar_of_features_counts_the_batches(monkeypatch):
    counts = []
    monkeypatch.setattr(
        features, "tqdm", lambda parts, name, total, **style: counts.append(total) or parts
    )
    for images in (pixels(9), HostImages(pixels(9), CPU)):
        features.clean_features(torch.nn.Flatten(), images, 4, 4, torch.float32)
    assert counts == [3, 3]


def outcome(folder):
    """All that two equal runs have in common: metrics, and the training state as bytes."""
    state = load_checkpoint(folder / "simclr_resnet18_last.pt")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = {name: value.numpy().tobytes() for name, value in state["model"].items()}
    random = state["random"]["views"].numpy().tobytes()
    return weights, random, [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


@pytest.fixture
def run(thin, toy, tmp_path, monkeypatch):
    """run(name, stop=k): pretrain; a SIGTERM comes in the k-th step of this call."""

    def pretrain(name, stop=None):
        (tmp_path / name).mkdir(exist_ok=True)
        stop_in_step(monkeypatch, stop)
        cfg = toy("projection_dim=8", "hidden_dim=16", "knn_interval=1", "precision=fp32")
        simclr.pretrain(cfg, tmp_path / name)
        return outcome(tmp_path / name)

    return pretrain


def test_a_run_from_host_memory_is_the_same_run_bit_for_bit(run, in_host_memory, caplog):
    caplog.set_level("INFO")
    expected = run("device")
    settings = "resnet18, recipe published, on cpu in fp32, not compiled"
    assert f"24 images of folder (0.0 MB on cpu), {settings}, in " in caplog.text
    sizes = in_host_memory()
    assert run("host") == expected
    assert sizes == [8, 8, 8, 16, 8] * 2  # the steps of an epoch, then the batches of its kNN
    assert "24 images of folder (0.0 MB in host memory, copied batch by batch)" in caplog.text


def test_a_run_that_was_stopped_goes_on_from_host_memory(run, in_host_memory):
    expected = run("whole")
    sizes = in_host_memory()
    with pytest.raises(Stopped):
        run("part", stop=2)
    del sizes[:]
    assert run("part") == expected
    assert sizes[0] == 8 and sizes.count(8) == 1 + 1 + 3 + 1  # a step is left of the first epoch


def test_evaluation_from_host_memory_gives_the_same_results(
    thin, toy, trained, tmp_path, in_host_memory, monkeypatch
):
    file = trained / "simclr_resnet18_epoch2.pt"
    overrides = "protocols=[knn,linear,linear_clean,logistic,finetune]", "precision=fp32"
    chosen = "baselines=[pixels]", "labels=6", "batch_size=4", "finetune_learning_rate=[0.01,0.1]"
    cfg = toy(*overrides, *chosen, peak="finetune_learning_rate")
    scored = []
    score = simclr_lin.report.score

    def noted(result, labels, seconds):
        scored.append(result.scores)
        return score(result, labels, seconds)

    monkeypatch.setattr(simclr_lin.report, "score", noted)
    monkeypatch.setattr(protocols, "VALIDATION_FRACTION", 0.5)
    simclr_lin.evaluate(cfg, file, tmp_path)
    sizes = in_host_memory()
    simclr_lin.evaluate(cfg, file, tmp_path)
    expected, found = scored[: len(scored) // 2], scored[len(scored) // 2 :]
    assert len(found) == 11
    assert max(sizes) == 4  # batches alone, never the 9 held-out images at once
    for pair in zip(expected, found, strict=True):
        assert torch.equal(*pair)


def test_predictions_and_pictures_from_host_memory(thin, toy, trained, tmp_path, in_host_memory):
    cfg = toy(peak="finetune_learning_rate")
    cfg.predict = f"{cfg.data_dir}/test"
    sizes = in_host_memory()
    simclr_lin.predict(cfg, trained / "simclr_resnet18_epoch2.pt", tmp_path)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 9
    assert sizes.count(1) == 1  # of the 9 images, in batches of 8; there are 24 training images
    del sizes[:]
    for_embedding, for_neighbours = plot.represent(trained, cfg)
    assert figures.plot_embedding(*for_embedding) and figures.plot_neighbours(*for_neighbours)
    assert sizes


def test_batches_are_complete_and_not_overwritten_while_the_gpu_is_behind(gpu):
    """The GPU sleeps before it reads a batch: the next ones are gathered and copied meanwhile."""
    images = torch.randint(0, 256, (512, 3, 224, 224), dtype=torch.uint8)
    rows = torch.stack([torch.randperm(512)[:128] for _ in range(12)])
    sums = []
    for batch in batches(HostImages(images, gpu), rows.to(gpu)):
        assert batch.device.type == "cuda"
        torch.cuda._sleep(50_000_000)  # clock cycles: about 30 ms
        sums.append(batch.flatten(1).sum(dim=1, dtype=torch.int64))
        del batch  # its memory is free for the next copy, once the sum is computed
    expected = images.flatten(1).sum(dim=1, dtype=torch.int64)[rows]
    assert torch.equal(torch.stack(sums).cpu(), expected)


def test_a_batch_does_not_wait_for_the_gpu(gpu):
    images = HostImages(torch.zeros(64, 3, 224, 224, dtype=torch.uint8), gpu)
    rows = torch.arange(64).view(4, 16)
    list(batches(images, rows))  # allocates
    torch.cuda.synchronize()
    torch.cuda._sleep(3_000_000_000)  # more than a second
    start = time.perf_counter()
    list(batches(images, rows))
    assert time.perf_counter() - start < 0.5
    assert not torch.cuda.current_stream().query()  # the GPU is still busy


def test_training_on_a_gpu_is_the_same_from_host_memory(
    gpu, same_convolutions, toy, thin, tmp_path, monkeypatch
):
    weights = []
    for fits in (True, False):
        monkeypatch.setattr(host, "fits", lambda images, device, fits=fits: fits)
        run = tmp_path / str(fits)
        run.mkdir()
        simclr.pretrain(toy("compile=false"), run)
        weights.append(load_checkpoint(run / "simclr_resnet18_epoch2.pt")["model"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
