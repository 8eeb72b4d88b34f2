"""What real pictures and directories are like: metadata, bits, transparency, litter, failures.

Each test runs a command on several such files at once, and looks at the pixels that it reads.
"""

import ast
import csv
import errno
import io
import json
import os
import re
import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import PRODUCT, REPOSITORY
from PIL import Image, ImageFile, ImageOps
from test_bad_input import RUN, TOY, TRAIN, refuse  # noqa: F401

from images.folder import load_images

LIN = [*TOY, "finetune_epochs=1"]
RNG = np.random.default_rng(0)
# Blocks of 8×8 pixels, which JPEG keeps; the first two have the whole range.
BLOCKS = RNG.integers(0, 256, (2, 2, 3), dtype=np.uint8)
BLOCKS[0] = [[255] * 3, [0] * 3]
PIXELS = np.kron(BLOCKS, np.ones((8, 8, 1), np.uint8))
GREY = PIXELS[..., :1]
TURNED = np.rot90(PIXELS, -1)  # by orientation 6: seen with the first row at the right


def save(name, content, folder="images/train/a"):
    """Write a file, from bytes or an array of 8 bits."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        path.write_bytes(content)


def encoded(kind, image=None, **options):
    stream = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(stream, kind, **options)
    return stream.getvalue()


def chunk(name, content, crc=None):
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(values, *chunks, colour=2, bits=16):
    """A PNG of values (16, 16, channels) with further chunks; colour: 0, 2, 4 or 6."""
    dtype = ">u2" if bits == 16 else "u1"
    rows = b"".join(b"\0" + row.astype(dtype).tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, bits, colour, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def jpeg(*segments):
    """A JPEG with further segments (marker, content)."""
    content = encoded("JPEG", quality=95, subsampling=0)
    parts = (struct.pack(">BBH", 255, mark, len(text) + 2) + text for mark, text in segments)
    return content[:2] + b"".join(parts) + content[2:]


def exif(*entries):
    """EXIF data: entries of tag, type, count and four bytes, and orientation 6."""
    entries = [*entries, (0x112, 3, 1, b"\6\0\0\0")]
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + b"\0\0\0\0"


def tiff(values, *entries, photometric=2, sample=1, order="<", compression=1, planar=1, extra=()):
    """A TIFF of values (16, 16, channels); sample: 1 unsigned, 2 signed, 3 float."""
    channels, bits = values.shape[2], 8 * values.dtype.itemsize
    planes = values if planar == 1 else values.transpose(2, 0, 1)
    pixels = np.ascontiguousarray(planes).astype(values.dtype.newbyteorder(order)).tobytes()
    pixels = zlib.compress(pixels) if compression == 8 else pixels
    strips = channels if planar == 2 else 1
    lists = {
        256: [16], 257: [16], 258: [bits] * channels, 259: [compression], 262: [photometric],
        273: [0] * strips, 277: [channels], 278: [16], 279: [len(pixels) // strips] * strips,
        284: [planar], 338: list(extra), 339: [sample] * channels,
    }  # fmt: skip
    entries = [*entries]
    first = 8 + 2 + 12 * (len(entries) + 11 + bool(extra)) + 4
    place, tail = first + len(pixels), b""
    lists[273] = [first + n * (len(pixels) // strips) for n in range(strips)]
    for tag, numbers in lists.items():
        if numbers:
            content = struct.pack(f"{order}{len(numbers)}I", *numbers)
            if len(content) > 4:
                tail, content = tail + content, struct.pack(order + "I", place + len(tail))
            entries.append((tag, 4, len(numbers), content))
    packed = b"".join(struct.pack(order + "HHI", *e[:3]) + e[3] for e in sorted(entries))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + packed + bytes(4) + pixels + tail


def loaded(folder="images/train/a"):
    """The images of a folder by their file names, (16, 16, 3)."""
    files, images = load_images(Path(folder), 16, 2)[:2]
    return {
        file.name: image.permute(1, 2, 0).numpy() for file, image in zip(files, images, strict=True)
    }


@pytest.fixture
def train(call, thin):
    """train(): pretraining on images/ with nothing on stderr but the progress; its output."""

    def train(*overrides):
        code, error = call("simclr.py", *TRAIN, "batch_size=2", *overrides)
        assert code == 0 and "arning" not in error and "error" not in error, error
        return call.stdout

    return train


BOMB = b"key\0\0" + zlib.compress(b"x" * 3_000_000)
ODD_EXIF = {
    "width as text": exif((0x100, 2, 4, b"abc\0")),
    "unit as text": exif((0x11A, 2, 4, b"ab\0\0"), (0x128, 2, 4, b"ab\0\0")),
    "pointer to nowhere": exif((0x8769, 4, 1, b"\xff\xff\xff\xff")),
}
METADATA = {  # and what is seen
    **{f"{name}.jpg": (jpeg((0xE1, b"Exif\0\0" + data)), TURNED)
       for name, data in ODD_EXIF.items()},
    **{f"{name}.png": (png(PIXELS, chunk(b"eXIf", data), bits=8), TURNED)
       for name, data in ODD_EXIF.items()},
    "no exif.png": (png(PIXELS, chunk(b"eXIf", b"no exif"), bits=8), PIXELS),
    "crc of exif.png": (png(PIXELS, chunk(b"eXIf", exif(), crc=1), bits=8), PIXELS),
    "crc of text, turned.png": (
        png(PIXELS, chunk(b"tEXt", b"a\0b", crc=1), chunk(b"eXIf", exif()), bits=8), TURNED),
    "long text.png": (png(PIXELS, chunk(b"zTXt", BOMB), bits=8), PIXELS),
    "profile.png": (png(PIXELS, chunk(b"iCCP", b"no profile"), bits=8), PIXELS),
    "gamma.png": (png(PIXELS, chunk(b"gAMA", b""), bits=8), PIXELS),
    "density.png": (png(PIXELS, chunk(b"pHYs", b"\0"), bits=8), PIXELS),
    "jfif.jpg": (jpeg((0xE0, b"JFIF\0")), PIXELS),
    "profile.jpg": (jpeg((0xE2, b"ICC_PROFILE\0")), PIXELS),
    "profile, turned.jpg": (jpeg((0xE2, b"ICC_PROFILE\0"), (0xE1, b"Exif\0\0" + exif())), TURNED),
    "adobe.jpg": (jpeg((0xEE, b"Adobe")), PIXELS),
    "photoshop.jpg": (jpeg((0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0")), PIXELS),
    "mpf.jpg": (jpeg((0xE2, b"MPF\0II*\0\x08\0\0\0")), PIXELS),
    "exif.webp": (encoded("WEBP", lossless=True, exif=b"no exif"), PIXELS),
}  # fmt: skip


def test_metadata_that_cannot_be_read_leaves_the_pixels(train, recwarn):
    for name, (content, _) in METADATA.items():
        save(name, content)
    out = train()
    assert f"{len(METADATA)} images of folder" in out
    assert not [warning for warning in recwarn if "PIL" in warning.filename]
    for name, found in loaded().items():
        tolerance = 3 if name.endswith("jpg") else 0
        assert np.abs(found - METADATA[name][1].astype(int)).max() <= tolerance, name


def test_damaged_pixels_and_frames_are_refused_below_damaged_metadata(refuse):  # noqa: F811
    text = chunk(b"tEXt", b"a\0b", crc=1)
    frames = encoded("PNG", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    noise = Image.fromarray(RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8))
    cut = {
        "a.png": png(PIXELS, text, bits=8)[:-40],
        "b.jpg": (lambda all: all[:2] + b"\xff\xe0\0\7JFIF\0" + all[2 : len(all) // 2])(
            encoded("JPEG", noise)),
        "c.png": frames[:33] + text + frames[33:],
        "d.jpg": b"\xff\xd8\xff\xe1",
        "e.png": b"\x89PNG\r\n\x1a\n\0\0",
    }  # fmt: skip
    for name, content in cut.items():
        save(name, content)
    refuse(1, "error: 5 files or folders: images/train/a/a.png cannot be read as an", "simclr.py",
           *TRAIN)  # fmt: skip


FULL = PIXELS * np.uint16(257)
TWELVE = np.rint(PIXELS / 255 * 4095).astype(np.uint16)
OPAQUE = np.full_like(FULL[..., :1], 65535)
FLOAT = (GREY / 255).astype(np.float32)


def deep():
    """Files with more than 8 bits, and what they are in 8."""
    for bits, values in (("16", FULL), ("12", TWELVE)):
        grey, rgba = values[..., :1], np.dstack([values, OPAQUE])
        yield f"{bits} grey.png", png(grey, colour=0), GREY
        for order, compression in (("<", 1), (">", 1), ("<", 8), (">", 8)):
            options = {"order": order, "compression": compression}
            name = f"{bits} {'little' if order == '<' else 'big'} {compression}"
            yield f"{name} grey.tif", tiff(grey, photometric=1, **options), GREY
            if bits == "16":
                yield f"{name} rgb.tif", tiff(values, **options), PIXELS
                yield f"{name} rgba.tif", tiff(rgba, extra=[2], **options), PIXELS
    yield "rgb.png", png(FULL), PIXELS
    yield "rgba.png", png(np.dstack([FULL, OPAQUE]), colour=6), PIXELS
    yield "grey alpha.png", png(np.dstack([FULL[..., :1], OPAQUE]), colour=4), GREY
    yield "cmyk.tif", tiff(np.dstack([FULL, 0 * OPAQUE]), photometric=5), 255 - PIXELS
    signed = TWELVE[..., :1].astype("i2")
    yield "signed 16.tif", tiff(signed, photometric=1, sample=2), GREY
    yield "float.tif", tiff(FLOAT, photometric=1, sample=3), GREY
    yield "float.pfm", b"Pf\n16 16\n-1.0\n" + FLOAT[::-1].astype("<f4").tobytes(), GREY
    yield "32 bits.tif", tiff(TWELVE[..., :1].astype("u4"), photometric=1), GREY
    yield "black.png", png(0 * FULL[..., :1], colour=0), 0 * PIXELS
    yield "one grey.tif", tiff(0 * FLOAT + 1, photometric=1, sample=3), 0 * PIXELS + 255


def test_more_than_8_bits_keep_their_contrast(train):
    expected = {}
    for name, content, pixels in deep():
        save(name, content)
        expected[name] = pixels.astype(int)
    assert f"{len(expected)} images of folder" in train()
    for name, found in loaded().items():
        assert np.abs(found - expected[name]).max() <= 1, name


def test_values_out_of_range_are_refused_with_the_range_found(refuse):  # noqa: F811
    grey = {"photometric": 1}
    bad = {
        "-1 to 1": tiff(2 * FLOAT - 1, sample=3, **grey),
        "0 to 255": tiff(FLOAT * 255, sample=3, **grey),
        "nan to nan": tiff(np.where(BLOCKS[1, 1, 0] == GREY, np.nan, FLOAT).astype("f4"),
                           sample=3, **grey),
        "0 to 0.001": tiff(FLOAT / 1000, sample=3, **grey),
        "-2000 to 2095": tiff((TWELVE[..., :1].astype(int) - 2000).astype("i2"), sample=2, **grey),
        "0 to 409500": tiff(TWELVE[..., :1].astype("u4") * 100, **grey),
        "40000 to 40255": png(40000 + GREY.astype(int), colour=0),
        "0 to 4095: stretch": png(TWELVE),
        "0 to 4095: stretch them": tiff(np.dstack([TWELVE, OPAQUE]), extra=[2]),
        "0 to 4095: stretch them to": png(np.dstack([TWELVE[..., :1], OPAQUE]), colour=4),
    }  # fmt: skip
    for n, content in enumerate(bad.values()):
        save(f"{n}.tif", content)
    line = refuse(1, "error: 10 files or folders: images/train/a/0", "simclr.py", *TRAIN)
    for n, found in enumerate(bad):
        assert f"a/{n}.tif cannot be read as an image (its values reach from {found}" in line


def test_bytes_that_pillow_mistakes_are_refused(refuse):  # noqa: F811
    save("planes.tif", tiff(FULL, planar=2))
    save("big planes.tif", tiff(TWELVE, planar=2, order=">"))
    save("white is 0.tif", tiff(FULL[..., :1], photometric=0))
    save("signed.tif", tiff(GREY.astype("i1"), photometric=1, sample=2))
    line = refuse(1, "error: 4 files or folders", "simclr.py", *TRAIN)
    for name in ("big planes.tif", "planes.tif", "signed.tif", "white is 0.tif"):
        assert re.search(f"{name} cannot be read as an image [^;]*: save it as PNG", line), name


def drawing(colour):
    """A disc of one colour, the rest transparent."""
    rows, columns = np.indices((16, 16))
    alpha = np.uint8(255 * ((rows - 8) ** 2 + (columns - 8) ** 2 < 36))[..., None]
    return Image.fromarray(np.dstack([np.broadcast_to(np.uint8(colour), (16, 16, 3)), alpha]))


def test_what_is_transparent_is_white(train):
    black = drawing(0)
    alpha = np.asarray(black)[..., 3:].astype("u2")
    clear = 100 * (255 - alpha)  # 25,500, which is the colour that is transparent
    files = {
        "a.png": encoded("PNG", black),
        "b.png": encoded("PNG", black.convert("LA")),
        "c.png": encoded("PNG", black.quantize(4)),
        "d.gif": encoded("GIF", black),
        "e.webp": encoded("WEBP", black, lossless=True),
        "f.tif": encoded("TIFF", black),
        "g.png": png(clear // 200, chunk(b"tRNS", struct.pack(">H", 127)), colour=0, bits=8),
        "h.png": png(clear, chunk(b"tRNS", struct.pack(">H", 25500)), colour=0),
        "i.png": png(np.dstack([257 * (255 - alpha)] * 3 + [257 * alpha]), colour=6),
    }  # fmt: skip
    for name, content in files.items():
        save(name, content)
    train()
    for name, found in loaded().items():
        assert found[0, 0].tolist() == [255] * 3 and found[8, 8].max() < 2, name
    save("opaque.png", encoded("PNG", Image.fromarray(PIXELS).convert("RGBA")))
    assert np.array_equal(loaded()["opaque.png"], PIXELS)


def test_what_cannot_be_seen_on_white_and_pages_are_refused(refuse):  # noqa: F811
    save("white.png", encoded("PNG", drawing(255)))
    save("nearly.png", encoded("PNG", drawing(252)))
    save("clear.webp", encoded("WEBP", Image.fromarray(np.dstack([PIXELS, 0 * GREY])), exact=True,
                               lossless=True))  # fmt: skip
    pages = encoded("TIFF", save_all=True, append_images=[Image.new("RGB", (16, 16))] * 2)
    save("pages.tif", pages)
    line = refuse(1, "a/pages.tif cannot be read as an image (it has 3", "simclr.py", *TRAIN)
    for name in ("white.png", "nearly.png", "clear.webp"):
        assert f"a/{name} cannot be read as an image (what it shows cannot be seen on wh" in line


def failing(error):
    def fail(*args, **options):
        raise error

    return fail


FAILURES = {  # what the system raises, and what is said
    "memory": (MemoryError(), "0.png cannot be read (not enough memory); images/train/class0/1"),
    "decoder's memory": (OSError("out of memory error when reading image file"), "lower workers"),
    "libtiff's memory": (OSError("decoder error -9"), "lower workers, which is 3, or"),
    "files": (OSError(errno.EMFILE, "Too many open files"), "(Too many open files): lower workers"),
    "all files": (
        OSError(errno.ENFILE, "Too many in system"),
        "system): lower workers",
    ),
    "disk": (OSError(errno.EIO, "Input/output error"), "(Input/output error); images/train/class0"),
    "server": (OSError(errno.ESTALE, "Stale file handle"), "0.png cannot be read (Stale file"),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file"), "0.png cannot be read (No such"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_the_system_refuses_is_not_called_damage(
    refuse, write_images, monkeypatch, case  # noqa: F811
):  # fmt: skip
    write_images(Path("images"), classes=1, train=2)
    error, message = FAILURES[case]
    monkeypatch.setattr(ImageFile.ImageFile, "load", failing(error))
    refuse(1, message, "simclr.py", *TRAIN, "workers=3")
    monkeypatch.undo()


def test_an_array_that_memory_cannot_hold_or_threads_that_cannot_start(
    refuse, write_images, monkeypatch  # noqa: F811
):  # fmt: skip
    write_images(Path("images"), classes=1, train=2)
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", failing(MemoryError("Unable to allocate 150. GiB")))
        message = "error: Unable to allocate 150. GiB: take a smaller image_size, or fewer images"
        refuse(1, message, "simclr.py", *TRAIN)
    monkeypatch.setattr(threading.Thread, "start", failing(RuntimeError("can't start new thread")))
    refuse(1, "can't start new thread: lower workers, which is 4", "simclr.py",
           *TRAIN, "workers=4")  # fmt: skip


@pytest.mark.parametrize("bug", [TypeError("ours"), AttributeError("ours"), KeyError("ours")])
def test_a_bug_of_ours_keeps_its_traceback(call, write_images, monkeypatch, bug):
    write_images(Path("images"), classes=1, train=2)
    monkeypatch.setattr(ImageOps, "fit", failing(bug))
    with pytest.raises(type(bug), match="ours"):
        call("simclr.py", *TRAIN)


def test_every_package_that_is_imported_has_a_floor():
    """Pillow: Image.Resampling since 9.1, has_transparency_data since 10.1, _Tile since 11.0."""
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


def litter(folder):
    """What systems and archives put into a folder, each with a picture where it may have one."""
    for name in ("@eaDir/x.jpg/SYNOPHOTO_THUMB_M.png", "__MACOSX/._x.png", "#recycle/old.png",
                 "$RECYCLE.BIN/old.png", "System Volume Information/x.png", "lost+found/x.png",
                 "__MACOSX/x.png"):  # fmt: skip
        save(name, 0 * PIXELS, folder)
    for name in ("Thumbs.db", "ehthumbs.db", "desktop.ini", "notes.txt", "labels.h5", ".DS_Store",
                 "._x.png"):  # fmt: skip
        save(name, b"\xd0\xcf\x11\xe0", folder)


def test_litter_is_left_out_everywhere_and_said(call, thin, write_images):
    write_images(Path("images"), train=8, test=3)
    write_images(Path("."), classes=1, new=4)
    assert call("simclr.py", *TRAIN, "knn_interval=1")[0] == 0 and "left out" not in call.stdout
    clean = Path(RUN, "metrics.jsonl").read_text()
    for folder in ("images/train", "images/test", "images/train/class1", "images/test/class2/deep",
                   "new", "new/class0"):  # fmt: skip
        litter(Path(folder))
    code, error = call("simclr.py", *TRAIN, "knn_interval=1", "resume=false")
    assert code == 0, error
    number = re.compile(r'"(seconds|views_per_second)": [^,}]*')
    assert number.sub("", Path(RUN, "metrics.jsonl").read_text()) == number.sub("", clean)
    files = "#recycle, $RECYCLE.BIN, @eaDir and 19 more"
    reason = "no images by their extension or of other programs"
    said = [f"left out of images/train, {reason}: {files}"]
    assert [line for line in call.stdout.splitlines() if "left out" in line] == said
    said += [f"left out of images/test, {reason}: {files}"]
    code, error = call("simclr_lin.py", *LIN)
    assert code == 0 and all(line in call.stdout for line in said), error
    assert json.loads(Path(RUN, "results.json").read_text())["test_images"] == 9
    code, error = call("simclr_lin.py", *LIN, "predict=new")
    assert code == 0 and said[0] in call.stdout, error
    assert f"left out of new, {reason}: {files}" in call.stdout
    with Path(RUN, "predictions.csv").open(newline="") as file:
        assert [Path(row["file"]).name for row in csv.DictReader(file)] == [
            f"{n}.png" for n in range(4)
        ]


def test_a_class_of_nothing_but_litter_and_a_set_of_nothing_else_are_refused(
    refuse, write_images  # noqa: F811
):  # fmt: skip
    write_images(Path("images"), train=2)
    for name in ("empty", "litter", "empty/deep"):
        Path("images/train", name).mkdir()
    litter(Path("images/train/litter"))
    message = "2 files or folders: images/train/empty has no image; images/train/litter has no im"
    line = refuse(1, message, "simclr.py", *TRAIN)
    assert "litter has no image but #recycle, $RECYCLE.BIN, @eaDir and 8 more: add some, or" in line
    litter(Path("other/train"))
    refuse(1, "other/train has no image but #recycle, $RECYCLE.BIN, @eaDir and 8 more: add some,",
           "simclr.py", *TRAIN, "data_dir=other")  # fmt: skip


def test_pictures_beside_classes_and_links_are_named_together(refuse, call, write_images, thin):  # noqa: F811
    write_images(Path("images"), train=4)
    for n in range(12):
        Path(f"images/train/class1/link{n}.png").symlink_to(REPOSITORY / "README.md")
    Path("images/train/class0/folder").symlink_to(Path("images/train/class2").absolute())
    message = "13 files or folders: images/train/class0/folder is a link to a folder"
    assert refuse(1, message, "simclr.py", *TRAIN).endswith("; and 3 more: copy what is meant")
    for path in Path("images").rglob("*"):
        if path.is_symlink():
            path.unlink()
    save("loose.png", PIXELS, "images/train")
    assert call("simclr.py", *TRAIN)[0] == 0
    assert "images/train has images in no class folder (loose.png): all below" in call.stdout


def test_all_unreadable_files_are_reported_together(refuse, write_images):  # noqa: F811
    write_images(Path("images"), train=6)
    for n in range(6):
        save(f"{n}.png", b"", "images/train/class0")
        save(f"{n}.png", encoded("PNG")[:-60], "images/train/class1")
    line = refuse(1, "error: 12 files or folders: images/train/class0/0.png", "simclr.py", *TRAIN)
    assert line.endswith("; and 2 more: mend or remove it") and line.count("cannot be read") == 10
    for name in [f"class0/{n}" for n in range(6)] + [f"class1/{n}" for n in range(4)]:
        assert f"images/train/{name}.png cannot be read as an image (" in line


def test_names_that_are_not_utf8_are_said_and_written(call, thin, write_images):
    write_images(Path("images"), train=4, test=2)
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        Path("images", split, "class1").rename(Path("images", split, name))
        save(f"{name}.txt", b"", Path("images", split, name))
    code, error = call("simclr.py", *TRAIN)
    assert code == 0 and "programs: caf\\udce9/caf\\udce9.txt" in call.stdout, error
    code, error = call("simclr_lin.py", *LIN)
    assert code == 0 and call.stdout.count("caf\\udce9/caf\\udce9.txt") == 2, error
    results = json.loads(Path(RUN, "results.json").read_text())
    assert name in results["classes"] and name in results["per_class_accuracy"]
    Path("images/test", name, "1.png").rename(Path("images/test", name, f"{name}.png"))
    code, error = call("simclr_lin.py", *LIN, f"predict='images/test/{name}'")
    if code == 0:  # Hydra writes no such name into config.yaml
        assert b"caf\xe9.png" in Path(RUN, "predictions.csv").read_bytes()
    code, error = call("simclr_lin.py", *LIN, "predict=images/test")
    assert code == 0 and b"caf\xe9/caf\xe9.png" in Path(RUN, "predictions.csv").read_bytes(), error
    save(f"{name}.png", b"", Path("images/train", name))
    code, error = call("simclr.py", *TRAIN, "resume=false")
    assert code == 1 and len(error.splitlines()) == 1 and "/caf" in error
    for path in Path("images/train", name).iterdir():
        path.unlink()
    code, error = call("simclr.py", *TRAIN, "resume=false")
    assert code == 1 and error.startswith("error: images/train/caf") and "no image" in error
