"""Image files as they are found: metadata, transparency, bits, frames, other files, damage."""

import ast
import io
import struct
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from conftest import PRODUCT, REPOSITORY, make_config
from PIL import Image

from images import folder
from images.datasets import load_split
from images.folder import decode_file, decode_files, find_images
from system.errors import UserError

RNG = np.random.default_rng(0)
# Blocks of 8×8 pixels, which JPEG keeps; the first two have the whole range.
BLOCKS = RNG.integers(0, 256, (2, 2, 3), dtype=np.uint8)
BLOCKS[0] = [[255] * 3, [0] * 3]
PIXELS = np.kron(BLOCKS, np.ones((8, 8, 1), np.uint8))
DEEP = PIXELS[..., 0] * np.uint16(257)


def encoded(kind, image=None, **options):
    stream = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(stream, kind, **options)
    return stream.getvalue()


def png_16(mode):
    """A PNG whose header says 16 bits a channel."""
    content = encoded("PNG", Image.fromarray(PIXELS).convert(mode))
    header = content[12:24] + b"\x10" + content[25:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def tiff_16(planar=False):
    """A TIFF whose fields say 16 bits a channel, and a plane for each."""
    content = encoded("TIFF").replace(b"\x08\0" * 3, b"\x10\0" * 3)
    interleaved, planes = (struct.pack("<HHII", 284, 3, 1, number) for number in (1, 2))
    assert b"\x10\0" * 3 in content and interleaved in content
    return content.replace(interleaved, planes) if planar else content


def load_images(root, size, workers):
    files = find_images(root)
    return files, decode_files(files, size, workers)


def write(root, **files):
    """Write files {name, in which __ is a dot: bytes} into a folder."""
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name.replace("__", ".")).write_bytes(content)
    return root


def test_any_size_and_mode_is_read_and_the_right_size_is_not_changed(tmp_path):
    for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "LA"):
        for width, height in ((40, 20), (20, 40), (1, 1), (16, 16)):
            pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert("L" if mode == "LA" else "RGB").convert(mode)
            kind = "jpg" if mode == "CMYK" else "png"
            image.save(tmp_path / f"{mode} ü {width}x{height}.{kind}")
    files, images = load_images(tmp_path, 16, 4)
    assert files == sorted(tmp_path.iterdir())
    assert images.shape == (28, 3, 16, 16) and str(images.dtype) == "torch.uint8"
    exact = images[files.index(tmp_path / "P ü 16x16.png")].permute(1, 2, 0).numpy()
    expected = np.asarray(Image.open(tmp_path / "P ü 16x16.png").convert("RGB"))
    assert np.array_equal(exact, expected)


def test_the_centre_is_cropped_without_distortion(tmp_path):
    stripes = np.zeros((16, 48, 3), np.uint8)  # red, green and blue squares
    for n in range(3):
        stripes[:, 16 * n : 16 * (n + 1), n] = 255
    for number, pixels in enumerate((stripes, stripes.transpose(1, 0, 2))):
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        assert np.array_equal(decode_file(path, 16)[1], np.full((16, 16), 255, np.uint8))
        assert decode_file(path, 8)[1, 4, 4] == 255 and decode_file(path, 8)[::2, 4, 4].max() == 0


def test_downsizing_averages_all_pixels(tmp_path):
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    Image.fromarray(checkers.astype(np.uint8)).save(tmp_path / "a.png")
    assert np.abs(decode_file(tmp_path / "a.png", 8).astype(int) - 127).max() < 10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_by_its_exif_orientation(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1]}
    flipped = PIXELS.transpose(1, 0, 2)  # 5 to 8: rows and columns are swapped
    turns |= {5: flipped, 6: flipped[:, ::-1], 7: flipped[::-1, ::-1], 8: flipped[::-1]}
    lossless = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    content = encoded(kind, exif=exif, **lossless.get(kind, {}))
    write(tmp_path, **{f"a__{kind.lower()}": content})
    found = decode_file(tmp_path / f"a.{kind.lower()}", 16).transpose(1, 2, 0)
    assert np.abs(found - turns[orientation].astype(int)).max() <= 3


def test_what_is_transparent_is_white(tmp_path):
    rows, columns = np.indices((16, 16))
    alpha = np.uint8(255 * ((rows - 8) ** 2 + (columns - 8) ** 2 < 36))[..., None]
    disc = Image.fromarray(np.dstack([np.zeros((16, 16, 3), np.uint8), alpha]))  # black
    half = Image.fromarray(np.dstack([np.zeros((16, 16, 3), np.uint8), alpha // 2]))
    clear = {"transparency": 255}
    write(
        tmp_path, rgba__png=encoded("PNG", disc), la__png=encoded("PNG", disc.convert("LA")),
        palette__png=encoded("PNG", disc.quantize(4)), gif__gif=encoded("GIF", disc),
        webp__webp=encoded("WEBP", disc, lossless=True), tiff__tif=encoded("TIFF", disc),
        grey__png=encoded("PNG", Image.fromarray(255 - alpha[..., 0]), **clear),
        half__png=encoded("PNG", half),
    )  # fmt: skip
    files, images = load_images(tmp_path, 16, 1)
    for file, image in zip(files, images, strict=True):
        assert image[:, 0, 0].tolist() == [255] * 3, file
        assert image[:, 8, 8].tolist() == [128 if file.stem == "half" else 0] * 3, file
    opaque = Image.fromarray(PIXELS).convert("RGBA")
    write(tmp_path, opaque__png=encoded("PNG", opaque))
    assert np.array_equal(decode_file(tmp_path / "opaque.png", 16).transpose(1, 2, 0), PIXELS)


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))] * 2}
NOISE = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
GREY_16, FLOAT = Image.fromarray(DEEP), Image.fromarray(np.float32(DEEP))
REFUSED = {
    "animation.gif": (encoded("GIF", **FRAMES), "frames"),
    "animation.png": (encoded("PNG", **FRAMES), "3 frames"),
    "animation.webp": (encoded("WEBP", **FRAMES), "frames"),
    "pages.tif": (encoded("TIFF", **FRAMES), "3 frames"),
    "grey 16.png": (encoded("PNG", GREY_16), "8 bits"),
    "rgb 16.png": (png_16("RGB"), "8 bits"),
    "grey alpha 16.png": (png_16("LA"), "8 bits"),
    "rgba 16.png": (png_16("RGBA"), "8 bits"),
    "grey 16.tif": (encoded("TIFF", GREY_16), "8 bits"),
    "rgb 16.tif": (tiff_16(), "8 bits"),
    "planes 16.tif": (tiff_16(planar=True), "8 bits"),
    "grey 32.tif": (encoded("TIFF", Image.fromarray(np.int32(DEEP))), "8 bits"),
    "float.tif": (encoded("TIFF", FLOAT), "8 bits"),
    "float.pfm": (encoded("PPM", FLOAT), "8 bits"),
    "grey 16.pgm": (encoded("PPM", GREY_16), "8 bits"),
    "rgb 16.ppm": (b"P6 16 16 65535\n" + bytes(1536), "8 bits"),
    "rgb 16.sgi": (encoded("SGI", bpc=2), "8 bits"),
    "grey 16.jp2": (encoded("JPEG2000", GREY_16), "8 bits"),
    "empty.png": (b"", "cannot identify"),
    "text.png": (b"no image", "cannot identify"),
    "header.png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "cannot identify|broken"),
    "half.jpg": (encoded("JPEG", NOISE)[:2000], "truncated"),
    "half.png": (encoded("PNG")[:-40], "truncated|broken|Truncated"),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_not_one_image_of_8_bits_are_refused_by_name(tmp_path, name):
    content, reason = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^1 images cannot be read.*{path.name} \(.*({reason})"):
        load_images(tmp_path, 8, 1)


def test_a_photo_with_previews_is_its_first_frame_and_5_bits_are_no_16(tmp_path):
    frames = {"save_all": True, "append_images": [Image.new("RGB", (4, 4))]}
    photo = encoded("MPO", quality=95, subsampling=0, **frames)
    header = b"BM" + struct.pack("<IIIIiiHHII", 66 + 512, 0, 66, 40, 16, 16, 1, 16, 3, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)  # 5, 6 and 5 bits
    bmp = header + bytes(16) + masks + b"\xff\xff" * 256  # white
    write(tmp_path, a__jpg=photo, b__mpo=photo, c__bmp=bmp)
    _, images = load_images(tmp_path, 16, 1)
    for image in images[:2]:
        assert np.abs(image.permute(1, 2, 0).numpy() - PIXELS.astype(int)).max() <= 3
    assert images[2].min() == 255


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    write(tmp_path, a__png=encoded("PNG", Image.new("1", (400, 400))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # the image has 1.6 times as many
    with pytest.raises(UserError, match=r"a\.png \(Image size .* could be decompression bomb"):
        load_images(tmp_path, 8, 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_all_unreadable_files_are_in_one_error(write_images, tmp_path, workers):
    root = write_images(tmp_path, classes=1, train=30) / "train" / "class0"
    for n in range(12):
        (root / f"{n:02}.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_images(root, 8, workers)
    line = str(error.value)
    assert line.startswith("12 images cannot be read, mend or remove them: ")
    assert [f"{n:02}.jpg (" in line for n in range(12)] == [True] * 10 + [False] * 2


def test_other_files_are_left_out_and_counted(tmp_path, caplog):
    images = ["a.png", "b.JPG", "c.jpeg", "d.tif", "e.webp", "f.gif", "g.bmp", "h.mpo", "i.jfif"]
    for name in images:
        Image.fromarray(PIXELS).save(tmp_path / name, "JPEG" if name == "h.mpo" else None)
    others = [".hidden.png", "._a.png", "@eaDir", "#recycle", "__MACOSX", ".cache", "inner/.x.png",
              "notes.txt", "k", "a.png.bak", "labels.h5", "report.pdf", "figure.eps"]  # fmt: skip
    for name in others:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if "." in name[1:]:
            path.write_bytes(encoded("PNG"))
        else:
            path.mkdir()
            (path / "x.png").write_bytes(encoded("PNG"))
    (tmp_path / "inner" / "o.png").mkdir()  # a folder
    (tmp_path / "inner" / "o.png" / "z.png").write_bytes(encoded("PNG"))
    caplog.set_level("INFO")
    files, [remark] = find_images(tmp_path), caplog.messages
    inside = tmp_path / "inner" / "o.png" / "z.png"
    visible = [tmp_path / name for name in images] + [inside, tmp_path / "k" / "x.png"]
    assert files == sorted(visible)
    assert remark.startswith(f"left out of {tmp_path}: 12 files or folders (hidden, @…")


def test_a_folder_without_images_or_that_is_missing_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path} has no image"):
        load_images(tmp_path, 8, 1)
    with pytest.raises(FileNotFoundError):
        load_images(tmp_path / "missing", 8, 1)


def test_links_are_followed_but_to_folders_below_a_class(write_images, tmp_path, caplog):
    elsewhere = write_images(tmp_path / "elsewhere", classes=2, all=3) / "all"
    train = tmp_path / "images" / "train"
    (train / "b").mkdir(parents=True)
    (train / "a").symlink_to(elsewhere / "class0")  # a class
    (train / "b" / "0.png").symlink_to(elsewhere / "class1" / "0.png")  # an image
    (train / "b" / "loop").symlink_to(train)
    cfg = make_config("dataset=folder", f"data_dir={tmp_path / 'images'}", "image_size=8")
    caplog.set_level("INFO")
    split = load_split(cfg, "train")
    assert split.labels.tolist() == [0, 0, 0, 1] and split.classes == ["a", "b"]
    assert caplog.messages[0].startswith(f"left out of {train}: 1 files or folders")
    (train / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png \(.*No such file"):
        load_split(cfg, "train")


def test_images_are_decoded_into_one_array(write_images, tmp_path):
    root = write_images(tmp_path / "images", train=20)
    load_images(root, 8, 1)  # imports
    tracemalloc.start()
    images = load_images(root, 192, 2)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == 60 and peak < 1.2 * images.nbytes


def test_workers_decode_at_the_same_time(write_images, tmp_path, monkeypatch):
    root = write_images(tmp_path, classes=1, train=8)

    def slow(path, size):
        time.sleep(0.1)
        return decode_file(path, size)

    monkeypatch.setattr(folder, "decode_file", slow)
    start = time.perf_counter()
    load_images(root, 8, 8)
    assert time.perf_counter() - start < 0.5


def test_every_package_that_is_imported_has_a_floor():
    """Pillow: Image.Resampling since 9.1, has_transparency_data since 10.1."""
    lines = (REPOSITORY / "requirements.txt").read_text().lower().split()
    floors = dict(line.split(",")[0].split(">=") for line in lines)
    own = {path.stem for path in PRODUCT} | {path.parent.name for path in PRODUCT}
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "hydra": "hydra-core", "yaml": "pyyaml"}
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            found = [node.module] if isinstance(node, ast.ImportFrom) else []
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else found
            for name in {name.split(".")[0] for name in found} - own - sys.stdlib_module_names:
                assert names.get(name, name) in floors, name
    assert int(floors["pillow"].split(".")[0]) >= 11
