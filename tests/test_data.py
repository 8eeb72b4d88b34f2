"""Every dataset: splits, labels, what is refused; CIFAR from a small archive in its own format."""

import errno
import hashlib
import io
import pickle
import re
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
import urllib.response
from concurrent.futures import ThreadPoolExecutor
from email.message import Message

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from images.datasets import draw_stratified, hold_out, load_split, resize
from images.folder import list_folder, load_images
from system import files
from system.errors import UserError


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    train, test = (load_split("digits", "unused", split, 32) for split in ("train", "test"))
    assert train.images.shape == (1437, 3, 8, 8) and test.images.shape == (360, 3, 8, 8)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    rows = torch.cat([train.images, test.images])[:, 0].flatten(1)
    source = (torch.from_numpy(load_digits().images) * 255 / 16).round().flatten(1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, source.int().tolist()))
    share = test.labels.bincount() / torch.cat([train.labels, test.labels]).bincount()
    assert (share - 0.2).abs().max() < 0.01
    again = load_split("digits", "unused", "pretrain", 32)
    assert torch.equal(again.images, train.images)


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
        found = load_split(name, str(tmp_path), split, 32)
        pixels = np.concatenate([batches[part]["data"] for part, _ in parts])
        assert np.array_equal(found.images.numpy(), pixels.reshape(-1, 3, 32, 32))
        key = "labels" if dataset is CIFAR10 else "fine_labels"
        labels = [label for part, _ in parts for label in batches[part][key]]
        assert found.labels.tolist() == labels
        assert found.classes == [f"name{n}" for n in range(10)]
    pretrain = load_split(name, str(tmp_path), "pretrain", 32)
    assert len(pretrain.images) == 5 * len(dataset.train_list)


class Trap:
    """Unpickled, it would create the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_damaged_archive_is_refused_and_not_unpacked(monkeypatch, tmp_path):
    write_cifar(monkeypatch, tmp_path, damage=True)
    before = (tmp_path / CIFAR10.filename).read_bytes()
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is damaged.*MD5.*delete it"):
        load_split("cifar10", str(tmp_path), "train", 32)
    assert [path.name for path in tmp_path.glob("[!.]*")] == [CIFAR10.filename]
    assert (tmp_path / CIFAR10.filename).read_bytes() == before


def test_a_batch_with_another_checksum_is_replaced_not_unpickled(monkeypatch, tmp_path):
    write_cifar(monkeypatch, tmp_path)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    (folder / "data_batch_1").write_bytes(trap)
    assert len(load_split("cifar10", str(tmp_path), "train", 32).images) == 25
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
    path = Cold.root / CIFAR10.filename
    Cold.archive = path.read_bytes()
    shutil.rmtree(Cold.root)
    monkeypatch.setattr(urllib.request, "urlopen", fetch)
    return Cold


TRAIN = [
    "dataset=cifar10", "data_dir=data", "image_size=8", "batch_size=8", "hidden_dim=8",
    "projection_dim=8", "knn_interval=0", "epochs=1", "device=cpu",
]  # fmt: skip
HALF = {  # what the process that holds the lock has on disk, at its start
    "nothing": lambda root, archive: None,
    "half a download": lambda root, archive: (root / f".{CIFAR10.filename}.part").write_bytes(
        archive[:-50]
    ),
    "half an archive": lambda root, archive: (root / CIFAR10.filename).write_bytes(archive[:-50]),
    "half of it unpacked": lambda root, archive: (
        (root / CIFAR10.base_folder).mkdir(),
        (root / CIFAR10.base_folder / "data_batch_1").write_bytes(b"half"),
        (root / CIFAR10.filename).write_bytes(archive),
    ),
}


@pytest.mark.parametrize("half", HALF)
def test_one_downloads_and_the_other_waits_for_it(call, thin, cold, half, monkeypatch):
    cold.root.mkdir()
    HALF[half](cold.root, cold.archive)
    held, said, warning = threading.Event(), threading.Event(), files.log.warning
    monkeypatch.setattr(files.log, "warning", lambda text: (warning(text), said.set()))

    def download():
        with FileLock(cold.root / ".download.lock"):
            held.set()
            assert said.wait(30)
            (cold.root / CIFAR10.filename).write_bytes(cold.archive)

    other = threading.Thread(target=download)
    other.start()
    held.wait()
    code, error = call("simclr.py", *TRAIN, "hydra.run.dir=run")
    other.join()
    assert code == 0 and cold.requests == 0, error
    waits = f"waits for another process, which fetches {CIFAR10.filename} into data"
    assert call.stdout.count(waits) == 1
    assert (cold.root / CIFAR10.filename).read_bytes() == cold.archive


def test_what_a_killed_download_left_is_replaced(call, thin, cold):
    """Its own name is that of no archive, and nobody holds the lock."""
    cold.root.mkdir()
    HALF["half a download"](cold.root, cold.archive)
    code, error = call("simclr.py", *TRAIN)
    assert code == 0 and cold.requests == 2, error
    assert (cold.root / CIFAR10.filename).read_bytes() == cold.archive
    assert not list(cold.root.glob("*.part"))
    code, error = call("simclr.py", *TRAIN, "hydra.run.dir=other")
    assert code == 0 and cold.requests == 2, error


def test_two_cold_starts_download_once(cold):
    with ThreadPoolExecutor(3) as pool:
        splits = list(pool.map(lambda _: load_split("cifar10", str(cold.root), "train", 8), "123"))
    assert [len(split.images) for split in splits] == 3 * [25] and cold.requests == 2


def test_complete_data_need_no_lock(cold, monkeypatch):
    """A data_dir that others share is often read-only; and a file system may have no locks."""
    errors = [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "read-only")]
    errors += [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")]
    load_split("cifar10", str(cold.root), "train", 8)
    for error in errors:

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(FileLock, "_acquire", fail)
        assert len(load_split("cifar10", str(cold.root), "test", 8).images) == 5
    assert cold.requests == 2


def test_without_locks_a_download_warns_and_goes_on(cold, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "_acquire", fail)
    assert len(load_split("cifar10", str(cold.root), "train", 8).images) == 25
    assert "is on a file system without locks: let one process end its download" in caplog.text


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_no_data_and_no_network_says_what_to_put_where(monkeypatch, tmp_path, name):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as error:
        load_split(name, str(tmp_path / "data"), "pretrain", 32)
    for part in ("could not fetch http", "no network", ".tar.gz", "data", "dataset=digits"):
        assert part in str(error.value)


def test_stl10_pretrains_on_its_unlabelled_split_and_never_swaps_train_and_test(
    monkeypatch, tmp_path
):
    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    sizes = {"train": 2, "unlabeled": 4, "test": 3}
    value = {"train": 10, "unlabeled": 20, "test": 30}
    lists = {"train_list": [], "test_list": []}
    for split, n in sizes.items():
        parts = {f"{split}_X.bin": np.full((n, 3, 96, 96), value[split], np.uint8)}
        if split != "unlabeled":
            parts[f"{split}_y.bin"] = np.arange(1, n + 1, dtype=np.uint8)
        for file, content in parts.items():
            (folder / file).write_bytes(content.tobytes())
            kind = "test_list" if split == "test" else "train_list"
            lists[kind].append([file, digest(content.tobytes())])
    (folder / STL10.class_names_file).write_text("\n".join(f"name{n}" for n in range(10)))
    monkeypatch.setattr(STL10, "train_list", [lists["train_list"][i] for i in (0, 1, 2)])
    monkeypatch.setattr(STL10, "test_list", lists["test_list"])
    found = {name: load_split("stl10", str(tmp_path), name, 96) for name in ("train", "test")}
    pretrain = load_split("stl10", str(tmp_path), "pretrain", 96)
    assert (len(pretrain.images), pretrain.images.unique().tolist()) == (4, [20])
    assert pretrain.labels.unique().tolist() == [-1]
    assert (len(found["train"].images), found["train"].images.unique().tolist()) == (2, [10])
    assert (len(found["test"].images), found["test"].images.unique().tolist()) == (3, [30])
    assert found["test"].labels.tolist() == [0, 1, 2]


def snapshot(root):
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_folder_reads_any_size_and_mode_and_writes_nothing(tmp_path):
    sizes = {"wide": (40, 20), "tall": (20, 40), "dot": (1, 1), "exact": (16, 16)}
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "P", "1", "CMYK", "LA")
    for name, (width, height) in sizes.items():
        folder = tmp_path / "train" / f"{name} ä"
        folder.mkdir(parents=True)
        for mode in modes:
            pixels = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            file = folder / f"{mode} ü.{'jpg' if mode == 'CMYK' else 'png'}"
            pixels.convert("L" if mode == "LA" else "RGB").convert(mode).save(file)
    before = snapshot(tmp_path)
    found = load_split("folder", str(tmp_path), "train", 16, workers=4)
    assert found.images.shape == (28, 3, 16, 16) and found.images.dtype == torch.uint8
    assert found.classes == sorted(f"{name} ä" for name in sizes)
    assert found.labels.tolist() == sorted([0, 1, 2, 3] * len(modes))
    assert snapshot(tmp_path) == before


def test_folder_keeps_images_of_the_right_size_and_does_not_distort_others(write_images, tmp_path):
    write_images(tmp_path, classes=1, train=2)
    file = tmp_path / "train" / "class0" / "0.png"
    found = load_split("folder", str(tmp_path), "train", 12)
    assert np.array_equal(found.images[0].permute(1, 2, 0), np.asarray(Image.open(file)))
    stripes = np.zeros((32, 96, 3), np.uint8)
    stripes[:, 32:64] = 255  # a white square in the middle of a wide black image
    Image.fromarray(stripes).save(file)
    assert load_split("folder", str(tmp_path), "train", 16).images[0].min() > 200


@pytest.mark.parametrize(("name", "order"), [("x.png", "<"), ("x.tif", "<"), ("x.tif", ">")])
def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path, name, order):
    ramp = np.linspace(0, 65535, 256).astype(f"{order}u2").reshape(16, 16)
    mode = "I;16" if order == "<" else "I;16B"
    Image.frombytes(mode, (16, 16), ramp.tobytes()).save(tmp_path / name)
    with Image.open(tmp_path / name) as file:
        assert file.mode == mode
    [image] = load_images(tmp_path, 16, 1)[1]
    for channel in image:
        assert (channel.flatten().float() - torch.arange(256)).abs().max() <= 1


def noise(height, width):
    """An RGB image (height, width, 3), uint8."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# By the EXIF standard (JEITA CP-3451, tag 0x0112): the sides at which the stored image's first
# row and first column are seen.
ORIENTATIONS = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("suffix", "error"), [("png", 0), ("tif", 0), ("jpg", 2)])
def test_a_photo_that_was_stored_turned_is_loaded_upright(tmp_path, orientation, suffix, error):
    """From the files of cameras that write the orientation instead of turning the pixels."""
    seen = np.zeros((32, 32, 3), np.uint8)  # a different colour in each quarter
    seen[:16, :16, 0] = seen[:16, 16:, 1] = seen[16:, :16, 2] = seen[16:, 16:] = 200
    sides = ORIENTATIONS[orientation]
    stored = seen if sides[0] in ("top", "bottom") else seen.swapaxes(0, 1)
    stored = stored[::-1] if sides[0] in ("bottom", "right") else stored
    stored = stored[:, ::-1] if sides[1] in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"photo.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(file, exif=exif)
    with Image.open(file) as photo:
        assert photo.getexif()[0x0112] == orientation
    [found] = load_images(tmp_path, 32, 1)[1]
    centres = slice(8, None, 16)  # JPEG blurs colours where two quarters meet
    found = found.permute(1, 2, 0)[centres, centres].numpy().astype(int)
    assert abs(found - seen[centres, centres]).max() <= error


def test_a_turned_photo_is_cropped_as_it_is_seen(tmp_path):
    """Seen 20 wide and 40 high; stored lying, with its first row at the right."""
    seen = noise(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(seen.swapaxes(0, 1)[::-1].copy()).save(tmp_path / "photo.png", exif=exif)
    [found] = load_images(tmp_path, 20, 1)[1]
    assert np.array_equal(found.permute(1, 2, 0), seen[10:30])


@pytest.mark.parametrize(("height", "width"), [(32, 96), (96, 32), (32, 32)])
def test_the_shorter_side_is_resized_and_the_centre_cropped(tmp_path, height, width):
    pixels = noise(height, width)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    top, left = (height - 32) // 2, (width - 32) // 2
    centre = torch.from_numpy(pixels[top : top + 32, left : left + 32]).permute(2, 0, 1)
    for size in (32, 16):
        [found] = load_images(tmp_path, size, 1)[1]
        expected = (255 * resize(centre[None], size)[0]).round()
        difference = (found - expected)[:, 1:-1, 1:-1]  # at the edge Pillow looks beyond the crop
        assert difference.abs().max() <= (0 if size == 32 else 1)


def test_a_small_image_is_enlarged(tmp_path):
    Image.fromarray(np.full((2, 3, 3), (10, 20, 30), np.uint8)).save(tmp_path / "x.png")
    [found] = load_images(tmp_path, 8, 1)[1]
    assert found.flatten(1).T.unique(dim=0).tolist() == [[10, 20, 30]]


def test_of_a_photo_with_a_preview_the_photo_is_loaded(tmp_path):
    """Some cameras write MPO files, which have several images: not an animation."""
    photo, preview = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    photo.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "x.jpg") as file:
        assert file.format == "MPO" and file.n_frames == 2
    [found] = load_images(tmp_path, 16, 1)[1]
    assert (found.flatten(1).float().mean(dim=1) - torch.tensor([255.0, 0, 0])).abs().max() < 3


@pytest.mark.parametrize("workers", [1, 3])
def test_images_of_nested_folders_come_in_the_order_of_their_sorted_paths(tmp_path, workers):
    names = ["b.png", "a/z.png", "a/b/c.png", "c/a.png", "a.png", "a/.hidden.png", ".a/b.png"]
    for n, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + 40 * n, 4 + 40 * n), (n, 0, 0)).save(tmp_path / name)
    files, found, _ = load_images(tmp_path, 8, workers)
    visible = [tmp_path / name for name in names[:5]]
    assert files == sorted(visible)
    assert found[:, 0].float().mean(dim=(1, 2)).tolist() == [visible.index(f) for f in files]


def test_a_link_is_followed_only_within_the_folder_or_where_it_may_lead(tmp_path):
    folder = tmp_path / "all" / "some"
    (folder / "a").mkdir(parents=True)
    Image.new("L", (8, 8), 7).save(folder / "x.png")
    (folder / "a" / "link.png").symlink_to(folder / "x.png")
    files, found, _ = load_images(folder, 8, 1)
    assert len(files) == 2 and found.unique().tolist() == [7]
    Image.new("L", (8, 8), 9).save(tmp_path / "all" / "y.png")
    (folder / "out.png").symlink_to(tmp_path / "all" / "y.png")
    with pytest.raises(UserError, match=r"out\.png is a link out of .*some, or to nothing"):
        load_images(folder, 8, 1)
    assert len(load_images(folder, 8, 1, within=tmp_path / "all")[0]) == 3
    (folder / "loop").symlink_to(folder)
    with pytest.raises(UserError, match="loop is a link to a folder, not followed"):
        load_images(folder, 8, 1, within=tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30], ids=["empty", "text", "cut"]
)
def test_an_unreadable_file_is_named(write_images, tmp_path, content):
    write_images(tmp_path, train=2)
    bad = tmp_path / "train" / "class1" / "bad.png"
    bad.write_bytes(content)
    with pytest.raises(UserError, match=r"class1/bad.png cannot be read as an image"):
        load_split("folder", str(tmp_path), "train", 8, workers=2)


def test_whatever_a_decoder_raises_the_file_is_named(write_images, tmp_path, monkeypatch):
    write_images(tmp_path, classes=1, train=1)
    monkeypatch.setattr(Image.Image, "convert", lambda *args: 1 / 0)
    with pytest.raises(UserError, match=r"class0/0\.png cannot be read.*division"):
        load_split("folder", str(tmp_path), "train", 8)


def test_hidden_files_and_folders_are_no_images_and_no_classes(write_images, tmp_path):
    write_images(tmp_path, classes=1, train=2)
    for hidden in (".cache/a.png", "class0/.thumbs/a.png", "class0/.DS_Store"):
        (tmp_path / "train" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / hidden).write_bytes(b"no image")
    found = load_split("folder", str(tmp_path), "train", 8)
    assert found.classes == ["class0"] and len(found.images) == 2


def test_a_truncated_jpeg_is_named(tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "x.jpg")
    content = (folder / "x.jpg").read_bytes()
    (folder / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"x\.jpg cannot be read"):
        load_split("folder", str(tmp_path), "train", 8)


def test_missing_and_empty_folders_are_named(write_images, tmp_path):
    with pytest.raises(UserError, match=r"train cannot be read \(No such file"):
        load_split("folder", str(tmp_path), "train", 8)
    (tmp_path / "train").mkdir()
    for split in ("pretrain", "train"):
        with pytest.raises(UserError, match=r"train has no image: add some, .*train/<class>/"):
            load_split("folder", str(tmp_path), split, 8)
    for name in ("README", "a.csv", "b.csv", "c.csv", ".hidden.png"):
        (tmp_path / "train" / name).write_text("")
    message = re.escape("train has no image but README, a.csv, b.csv and 1 more: add")
    with pytest.raises(UserError, match=message):
        load_split("folder", str(tmp_path), "pretrain", 8)
    (tmp_path / "train" / "cats").mkdir()
    for split in ("pretrain", "train"):
        with pytest.raises(UserError, match="cats has no image"):
            load_split("folder", str(tmp_path), split, 8)


def write_loose(root, *names):
    """Images at root/train/<name>, each of its own shade, that of its place in sorted order."""
    for shade, path in enumerate(sorted(root / "train" / name for name in names)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(path)


def test_images_in_no_class_folder_are_all_pretrained_on_without_labels(tmp_path):
    names = ["b.png", "a/x.png", "a/deep/er/y.png", "c/z.png", "d.JPG", ".hidden.png", ".a/b.png"]
    write_loose(tmp_path, *names[:5])
    (tmp_path / "train" / "notes.txt").write_text("")
    (tmp_path / "train" / "empty").mkdir()
    found = load_split("folder", str(tmp_path), "pretrain", 8, workers=2)
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and found.images.shape[1] == 3
    assert found.labels.tolist() == [-1] * 5 and found.labels.dtype == torch.int64
    assert found.classes == []
    train = tmp_path / "train"
    assert found.remarks == (
        f"left out of {train}, no images by their extension or of other programs: notes.txt",
        f"{train} has images in no class folder (b.png, d.JPG): all below it are taken without "
        "labels, so there is no kNN",
    )
    assert found.to(torch.device("cpu")).remarks == found.remarks


@pytest.mark.parametrize("spoiled", ["train", "test"])
def test_an_image_beside_class_folders_is_refused_where_labels_are_needed(
    write_images, tmp_path, spoiled
):
    write_images(tmp_path, train=2, test=2)
    for n in range(5):
        Image.new("L", (8, 8)).save(tmp_path / spoiled / f"{n}.png")
    message = f"{spoiled} has images in no class folder (0.png, 1.png, 2.png and 2 more): labels"
    with pytest.raises(UserError, match=re.escape(message)):
        load_split("folder", str(tmp_path), spoiled, 8)
    pretrain = load_split("folder", str(tmp_path), "pretrain", 8)
    assert len(pretrain.images) == (11 if spoiled == "train" else 6)
    assert (pretrain.labels.min() < 0) == (spoiled == "train")


def test_other_files_beside_class_folders_are_named_and_left_out(write_images, tmp_path):
    write_images(tmp_path, classes=2, train=2, test=1)
    clean = load_split("folder", str(tmp_path), "train", 8)
    assert clean.remarks == ()
    for name in ("Thumbs.db", "labels.csv", "paper.pdf", ".DS_Store"):
        (tmp_path / "train" / name).write_text("")
    (tmp_path / "test" / "README").write_text("")
    left_out = {
        "test": "README",
        **dict.fromkeys(("train", "pretrain"), "Thumbs.db, labels.csv, p"),
    }
    for split, names in left_out.items():
        found = load_split("folder", str(tmp_path), split, 8)
        [remark] = found.remarks
        folder = tmp_path / ("test" if split == "test" else "train")
        reason = "no images by their extension or of other programs"
        assert remark.startswith(f"left out of {folder}, {reason}: {names}")
        assert found.classes == ["class0", "class1"]
        assert split == "test" or torch.equal(found.images, clean.images)


def test_one_class_is_labelled_and_says_that_there_is_no_knn(write_images, tmp_path):
    write_images(tmp_path, classes=1, train=3)
    found = load_split("folder", str(tmp_path), "pretrain", 8)
    assert found.labels.tolist() == [0, 0, 0] and found.classes == ["class0"]
    assert found.remarks == (f"{tmp_path / 'train'} has one class, class0, so there is no kNN",)
    assert load_split("folder", str(tmp_path), "train", 8).remarks == ()


def test_an_image_is_told_by_an_extension_that_pillow_reads(tmp_path):
    images = ["a.png", "b.JPG", "c.jpeg", "d.tif", "e.webp", "f.gif", "g.bmp", "h.mpo"]
    others = ["i.pdf", "j.txt", "k", "l.csv", "m.db", "n.png.bak"]  # PDF: Pillow only writes it
    for name in images + others:
        (tmp_path / name).write_text("")
    (tmp_path / "o.png").mkdir()
    found = list_folder(tmp_path, tmp_path)
    assert [path.name for path in found.images] == images
    assert [path.name for path in found.others] == others and found.classes == ["o.png"]


def test_train_and_test_must_have_the_same_classes(write_images, tmp_path):
    write_images(tmp_path, classes=3, train=1)
    write_images(tmp_path, classes=2, test=1)
    assert load_split("folder", str(tmp_path), "train", 8).classes == [
        f"class{n}" for n in range(3)
    ]
    with pytest.raises(UserError, match=r"must have the classes of .*train.*class2"):
        load_split("folder", str(tmp_path), "test", 8)


def test_resize_leaves_the_right_size_alone_and_antialiases():
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(resize(x, 32), x.float() / 255)
    checkers = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 255
    small = resize(checkers.to(torch.uint8).expand(1, 3, 32, 32), 8)
    assert (small - 0.5).abs().max() < 0.1 and small.shape == (1, 3, 8, 8)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="pretrain, train, test"):
        load_split("digits", "", "valid", 8)


def test_a_stratified_part_has_its_share_of_each_class_and_depends_on_the_seed_alone():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2])[torch.randperm(61)]
    part = draw_stratified(labels, 0.1, seed=3)
    assert labels[part].bincount().tolist() == [4, 2, 1] and part.unique().tolist() == part.tolist()
    assert torch.equal(part, draw_stratified(labels, 0.1, seed=3))
    assert not torch.equal(part, draw_stratified(labels, 0.1, seed=4))
    assert labels[draw_stratified(labels[:0].new_tensor([0, 0, 1, 1]), 2, 0)].numel() == 4
    with pytest.raises(
        UserError, match="5 images of each class are too many: class number 2 has 1 train"
    ):
        draw_stratified(labels, 5, seed=0)


def test_what_is_held_out_is_not_in_the_rest():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2])
    rest, part = hold_out(labels, 0.1, seed=0, remedy="")
    assert sorted(rest.tolist() + part.tolist()) == list(range(61))
    assert labels[part].bincount().tolist() == [4, 2]  # the only image of class 2 stays
    with pytest.raises(UserError, match=r"no class has two images, so .*: take more"):
        hold_out(torch.arange(5), 0.1, seed=0, remedy="take more")
