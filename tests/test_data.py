"""Every dataset: splits, labels, what is refused; CIFAR from a small archive in its own format."""

import errno
import hashlib
import io
import pickle
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import urllib.response
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.message import Message

import numpy as np
import pytest
import torch
from conftest import make_config, make_images
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from config import ConfigError
from images.datasets import draw_stratified, hold_out, load_pretraining, load_split, resize
from system.errors import UserError

CPU = torch.device("cpu")
CONFIG = make_config("image_size=8", "workers=2")


def load(dataset, data_dir, split):
    return load_split(replace(CONFIG, dataset=dataset, data_dir=str(data_dir)), split)


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    train, test = (load("digits", "unused", split) for split in ("train", "test"))
    assert train.images.shape == (1437, 3, 8, 8) and test.images.shape == (360, 3, 8, 8)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    rows = torch.cat([train.images, test.images])[:, 0].flatten(1)
    source = (torch.from_numpy(load_digits().images) * 255 / 16).round().flatten(1)
    labels = torch.cat([train.labels, test.labels])
    assert labels.dtype == torch.int64
    found = zip(map(tuple, rows.tolist()), labels.tolist(), strict=True)
    expected = zip(map(tuple, source.int().tolist()), load_digits().target.tolist(), strict=True)
    assert sorted(found) == sorted(expected)
    assert (test.labels.bincount() / labels.bincount() - 0.2).abs().max() < 0.01
    assert torch.equal(load("digits", "unused", "pretrain").images, train.images)


def digest(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def write_cifar(monkeypatch, root, dataset=CIFAR10, damage=False):
    """A 30-image archive in CIFAR's format, and torchvision told its checksums."""
    rng = np.random.default_rng(0)
    names = [f"name{n}" for n in range(10)]
    label_key = "labels" if dataset is CIFAR10 else "fine_labels"
    batches = {}
    for part in [name for name, _ in dataset.train_list + dataset.test_list]:
        pixels = rng.integers(0, 256, (5, 3072), dtype=np.uint8)
        content = {"data": pixels, label_key: rng.integers(0, 10, 5).tolist()}
        batches[part] = pickle.dumps(content)
    meta = pickle.dumps({dataset.meta["key"]: names})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in [*batches.items(), (dataset.meta["filename"], meta)]:
            info = tarfile.TarInfo(f"{dataset.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for attribute in ("train_list", "test_list"):
        parts = [[name, digest(batches[name])] for name, _ in getattr(dataset, attribute)]
        monkeypatch.setattr(dataset, attribute, parts)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": digest(meta)})
    monkeypatch.setattr(dataset, "tgz_md5", digest(archive.getvalue()))
    root.mkdir(parents=True, exist_ok=True)
    (root / dataset.filename).write_bytes(archive.getvalue()[: -100 if damage else None])
    return {name: pickle.loads(content) for name, content in batches.items()}


@pytest.mark.parametrize(("name", "dataset"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_is_read_from_its_archive_and_train_is_not_test(monkeypatch, tmp_path, name, dataset):
    batches = write_cifar(monkeypatch, tmp_path, dataset)
    for split, parts in (("train", dataset.train_list), ("test", dataset.test_list)):
        found = load(name, tmp_path, split)
        pixels = np.concatenate([batches[part]["data"] for part, _ in parts])
        assert np.array_equal(found.images.numpy(), pixels.reshape(-1, 3, 32, 32))
        key = "labels" if dataset is CIFAR10 else "fine_labels"
        labels = [label for part, _ in parts for label in batches[part][key]]
        assert found.labels.tolist() == labels and found.labels.dtype == torch.int64
        assert found.classes == [f"name{n}" for n in range(10)]
    assert len(load(name, tmp_path, "pretrain").images) == 5 * len(dataset.train_list)


class Trap:
    """Unpickled, it would create the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_batch_with_another_checksum_is_replaced_not_unpickled(monkeypatch, tmp_path):
    write_cifar(monkeypatch, tmp_path)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert len(load("cifar10", tmp_path, "train").images) == 25
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """cold.archive: CIFAR-10's content, which only a download has; cold.requests: two for each."""

    class Cold:
        root = tmp_path / "data"
        requests = 0

    def fetch(request, **kwargs):
        Cold.requests += 1
        time.sleep(0.2)  # longer than it takes to look for the file
        found = urllib.response.addinfourl(io.BytesIO(Cold.archive), Message(), CIFAR10.url)
        found.length = len(Cold.archive)
        return found

    write_cifar(monkeypatch, Cold.root)
    Cold.archive = (Cold.root / CIFAR10.filename).read_bytes()
    shutil.rmtree(Cold.root)
    monkeypatch.setattr(urllib.request, "urlopen", fetch)
    return Cold


def test_first_starts_at_the_same_time_download_once(cold):
    with ThreadPoolExecutor(3) as pool:
        splits = list(pool.map(lambda _: load("cifar10", cold.root, "train"), range(3)))
    assert [len(split.images) for split in splits] == 3 * [25] and cold.requests == 2


@pytest.mark.parametrize("interrupted", ["the download", "unpacking"])
def test_the_next_start_completes_what_was_interrupted(cold, interrupted):
    cold.root.mkdir()
    (cold.root / CIFAR10.filename).write_bytes(cold.archive[:-50])
    if interrupted == "unpacking":
        (cold.root / CIFAR10.filename).write_bytes(cold.archive)
        (cold.root / CIFAR10.base_folder).mkdir()
        (cold.root / CIFAR10.base_folder / "data_batch_1").write_bytes(b"half")
    assert len(load("cifar10", cold.root, "train").images) == 25
    assert cold.requests == (2 if interrupted == "the download" else 0)
    assert (cold.root / CIFAR10.filename).read_bytes() == cold.archive


def test_complete_data_need_neither_lock_nor_download(cold, monkeypatch):
    """A data_dir that others share is often read-only."""
    load("cifar10", cold.root, "train")

    def fail(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "_acquire", fail)
    assert len(load("cifar10", cold.root, "test").images) == 5 and cold.requests == 2


@pytest.mark.parametrize("failure", ["no network", "another file"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_a_download_that_fails_says_what_to_put_where(monkeypatch, tmp_path, name, failure):
    def answer(*args, **kwargs):
        if failure == "no network":
            raise urllib.error.URLError("no network")
        found = urllib.response.addinfourl(io.BytesIO(b"<html>"), Message(), None)
        found.length = 6
        return found

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(UserError) as error:
        load(name, tmp_path / "data", "pretrain")
    reason = "no network" if failure == "no network" else "corrupted"
    for part in ("http", reason, ".tar.gz into", str(tmp_path / "data"), "dataset=digits"):
        assert part in str(error.value)


@pytest.fixture
def stl10(monkeypatch, tmp_path):
    """data_dir with the files of STL-10: 3 training images, 4 unlabelled ones and 2 for the test,
    filled with 10, 20 and 30."""
    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    labels = {"train": [2, 1, 2], "test": [1, 3]}
    lists = {"train_list": [], "test_list": []}
    for split, n, value in (("train", 3, 10), ("unlabeled", 4, 20), ("test", 2, 30)):
        parts = {f"{split}_X.bin": np.full((n, 3, 96, 96), value, np.uint8)}
        if split in labels:
            parts[f"{split}_y.bin"] = np.array(labels[split], dtype=np.uint8)
        for file, content in parts.items():
            (folder / file).write_bytes(content.tobytes())
            kind = "test_list" if split == "test" else "train_list"
            lists[kind].append([file, digest(content.tobytes())])
    (folder / STL10.class_names_file).write_text("\n".join(f"name{n}" for n in range(10)))
    for name, value in lists.items():
        monkeypatch.setattr(STL10, name, value)
    return tmp_path


def test_stl10_pretrains_on_its_unlabelled_split_and_never_swaps_train_and_test(stl10):
    for name, n, value, labels in (("pretrain", 4, 20, [-1] * 4), ("train", 3, 10, [1, 0, 1]),
                                   ("test", 2, 30, [0, 2])):  # fmt: skip
        found = load("stl10", stl10, name)
        assert (len(found.images), found.images.unique().tolist()) == (n, [value]), name
        assert found.labels.tolist() == labels and len(found.classes) == 10


def test_knn_on_stl10_is_of_its_labelled_training_images(stl10):
    cfg = replace(CONFIG, dataset="stl10", data_dir=str(stl10), batch_size=2, knn_interval=1)
    images, _, probe = load_pretraining(cfg, CPU)
    assert len(images) == 4 and probe.labelled.images.unique().tolist() == [10]
    assert len(probe.bank) == 2 and probe.labelled.labels[probe.queries].tolist() == [1]


def test_pretraining_loads_images_a_fingerprint_and_a_probe():
    cfg = replace(CONFIG, dataset="digits", knn_interval=1)
    images, fingerprint, probe = load_pretraining(cfg, CPU)
    assert images.shape == (1437, 3, 8, 8)
    sha256 = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert fingerprint == f"(1437, 3, 8, 8) {sha256}"
    assert len(probe.queries) == 142 and probe.labelled.images is images  # a tenth of each class
    assert sorted(torch.cat([probe.bank, probe.queries]).tolist()) == list(range(1437))
    other_seed = load_pretraining(replace(cfg, seed=7), CPU)[2]
    assert torch.equal(probe.queries, other_seed.queries)
    assert load_pretraining(replace(cfg, knn_interval=0), CPU)[2] is None


def test_a_batch_of_more_images_than_there_are_is_refused():
    cfg = replace(CONFIG, dataset="digits", batch_size=1437)
    assert len(load_pretraining(cfg, CPU)[0]) == 1437
    with pytest.raises(ConfigError, match=r"^batch_size=1438: must be at most 1437, the number"):
        load_pretraining(replace(cfg, batch_size=1438), CPU)


def test_classes_are_folders_sorted_by_name_and_files_are_not_written(write_images, tmp_path):
    write_images(tmp_path, classes=3, train=2, test=1)
    inner = tmp_path / "train" / "class1" / "inner"
    inner.mkdir()
    Image.new("RGB", (8, 8), "red").save(inner / "red.PNG")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train, test = (load("folder", tmp_path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["class0", "class1", "class2"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2] and test.labels.tolist() == [0, 1, 2]
    assert train.images[4, :, 0, 0].tolist() == [255, 0, 0]
    pretrain = load("folder", tmp_path, "pretrain")
    assert torch.equal(pretrain.images, train.images)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_train_and_test_must_have_the_same_classes(write_images, tmp_path):
    write_images(tmp_path, classes=3, train=1)
    write_images(tmp_path, classes=2, test=1)
    assert len(load("folder", tmp_path, "train").classes) == 3
    with pytest.raises(UserError, match=r"test must have the classes of .*train: .*'class2'"):
        load("folder", tmp_path, "test")


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="train"):
        load("folder", tmp_path, "train")
    (tmp_path / "train" / "empty").mkdir(parents=True)
    (tmp_path / "train" / "notes.txt").write_text("")
    for split in ("pretrain", "train"):
        with pytest.raises(UserError, match=r"train has no image"):
            load("folder", tmp_path, split)


def test_images_in_no_class_folder_are_pretrained_on_without_labels(tmp_path):
    names = ["b.png", "d.JPG", "a/deep/y.png", "a/x.png", "c/z.png"]
    for shade, name in enumerate(names):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(path)
    found = load("folder", tmp_path, "pretrain")
    assert sorted(found.images[:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4]
    assert found.labels.tolist() == [-1] * 5 and found.classes == []
    (tmp_path / "train").rename(tmp_path / "test")
    make_images(tmp_path, classes=2, train=1)
    (tmp_path / "train" / "x.png").write_bytes((tmp_path / "test" / "b.png").read_bytes())
    for split in ("train", "test"):
        with pytest.raises(UserError, match=rf"{split} has images without labels: put each into"):
            load("folder", tmp_path, split)
    cfg = replace(CONFIG, dataset="folder", data_dir=str(tmp_path), batch_size=2, knn_interval=1)
    probe = load_pretraining(cfg, CPU)[2]
    assert len(probe.sample) == 3 and probe.labelled is None


def test_one_class_is_labelled_and_has_no_knn(write_images, tmp_path):
    write_images(tmp_path, classes=1, train=3)
    found = load("folder", tmp_path, "pretrain")
    assert found.labels.tolist() == [0, 0, 0] and found.classes == ["class0"]
    cfg = replace(CONFIG, dataset="folder", data_dir=str(tmp_path), batch_size=2, knn_interval=1)
    assert load_pretraining(cfg, CPU)[2].labelled is None


def test_what_is_left_out_of_a_split_is_logged(write_images, tmp_path, caplog):
    write_images(tmp_path, classes=2, train=2, test=1)
    (tmp_path / "train" / ".hidden").mkdir()
    for name in ("train/labels.csv", "train/class0/notes.txt", "test/README"):
        (tmp_path / name).write_text("")
    caplog.set_level("INFO")
    for split, number in (("pretrain", 3), ("train", 3), ("test", 1)):
        caplog.clear()
        assert load("folder", tmp_path, split).classes == ["class0", "class1"]
        root = tmp_path / ("test" if split == "test" else "train")
        [line] = caplog.messages
        assert line.startswith(f"left out of {root}: {number} files or folders (hid")


@pytest.mark.parametrize("kind", ["loose", "one class"])
def test_without_labels_there_is_a_rank_and_no_knn_and_the_evaluation_is_refused(
    call, thin, tmp_path, kind
):
    make_images(tmp_path / "images", classes=1 if kind == "one class" else 2, train=8, test=2)
    if kind == "loose":
        Image.new("L", (9, 9)).save(tmp_path / "images" / "train" / "x.png")
    toy = ["dataset=folder", "data_dir=images", "batch_size=8", "device=cpu", "image_size=8"]
    small = ["hidden_dim=8", "projection_dim=8", "epochs=1", "knn_interval=1"]
    code, error = call("simclr.py", *toy, *small)
    assert code == 0 and "effective rank" in call.stdout and "kNN" not in call.stdout, error
    code, error = call("simclr_lin.py", *toy)
    needed = {"loose": "error: images/train has images without labels", "one class": "two classes"}
    assert code in (1, 2) and needed[kind] in error and len(error.splitlines()) == 1


def test_resize_leaves_the_right_size_alone_and_antialiases():
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(resize(x, 32), x.float() / 255)
    stripes = (torch.arange(32) % 4 == 0) * 255  # of which a fourth is bright
    small = resize(stripes.to(torch.uint8).expand(1, 3, 32, 32), 8)
    assert (small - 0.25).abs().max() < 0.1 and small.shape == (1, 3, 8, 8)


def test_a_stratified_part_has_its_share_of_each_class_and_depends_on_the_seed_alone():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2])[torch.randperm(61)]
    part = draw_stratified(labels, 0.1, seed=3)
    assert labels[part].bincount().tolist() == [4, 2, 1] and part.unique().tolist() == part.tolist()
    assert torch.equal(part, draw_stratified(labels, 0.1, seed=3))
    assert not torch.equal(part, draw_stratified(labels, 0.1, seed=4))
    assert len(draw_stratified(torch.tensor([0, 0, 1, 1]), 2, seed=0)) == 4
    message = "5 images of each class are too many: class number 2 has 1 train"
    with pytest.raises(UserError, match=message):
        draw_stratified(labels, 5, seed=0)


def test_what_is_held_out_is_not_in_the_rest():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2])
    rest, part = hold_out(labels, 0.1, seed=0)
    assert sorted(rest.tolist() + part.tolist()) == list(range(61))
    assert labels[part].bincount().tolist() == [4, 2]  # the only image of class 2 stays
    with pytest.raises(UserError, match="no class has two labelled images"):
        hold_out(torch.arange(5), 0.1, seed=0)
