"""Pretraining on images without classes, or of one class: no kNN, and every command says so."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_images
from PIL import Image

import simclr
from training import metrics

RUN = "logs/SimCLR/folder/resnet18"
TOY = ["dataset=folder", "data_dir=images", "batch_size=8", "device=cpu"]
TRAIN = [*TOY, "image_size=8", "epochs=2", "hidden_dim=8", "projection_dim=8"]
LOOSE = (
    "images/train has images in no class folder (0.png, 1.png, 2.png and 5 more): all below it are "
    "taken without labels, so there is no kNN"
)
ONE = "images/train has one class, class0, so there is no kNN"


def loose(root: str = "images") -> None:
    """24 images: directly in root/train, and in two folders that might be classes, one deeper."""
    rng = np.random.default_rng(0)
    for place in ("", "more", "other/deep"):
        folder = Path(root, "train", place)
        folder.mkdir(parents=True)
        for n in range(8):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{n}.png")


def one_class(root: str = "images") -> None:
    """24 images of one class."""
    make_images(Path(root), classes=1, train=24)


KINDS = pytest.mark.parametrize(("write", "said"), [(loose, LOOSE), (one_class, ONE)])


@pytest.fixture
def run(call, thin):
    """run(script, overrides): the command, which must succeed without a warning; its output."""

    def run(script, *overrides):
        code, error = call(script, *overrides)
        assert code == 0 and "Warning" not in error, error
        return call.stdout

    return run


def epochs() -> list[dict]:
    """metrics.jsonl, without what a clock measured."""
    lines = map(json.loads, Path(RUN, "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "views_per_second")}
            for line in lines]  # fmt: skip


@KINDS
def test_pretraining_says_in_one_line_that_there_is_no_knn(run, write, said):
    write()
    out = run("simclr.py", *TRAIN, "knn_interval=1")
    assert out.splitlines().count(said) == 1
    assert "24 images of folder" in out and out.count("kNN") == 1  # not in the summary
    assert Path(RUN, "simclr.log").read_text().splitlines().count(said) == 1
    assert [line["knn_acc"] for line in epochs()] == [None, None]


@KINDS
def test_what_sweepers_are_given_is_none(thin, toy, tmp_path, write, said):
    write(tmp_path / "mine")
    cfg = toy(f"data_dir={tmp_path / 'mine'}", "epochs=1")
    assert simclr.pretrain(cfg, tmp_path)["knn_acc"] is None


@KINDS
def test_a_stopped_run_resumes_bit_for_bit_and_other_images_are_refused(
    run, call, monkeypatch, write, said
):
    write()
    run("simclr.py", *TRAIN)
    whole = epochs()
    alignment, steps = metrics.alignment, iter(range(1, 10**6))

    def stopping(*args):
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # until the thread that listens has noted it
        return alignment(*args)

    monkeypatch.setattr(metrics, "alignment", stopping)
    code, error = call("simclr.py", *TRAIN, "resume=false")
    assert code == 143 and "stopped by SIGTERM" in error
    Image.new("L", (9, 9)).save("images/train/x.png")
    code, error = call("simclr.py", *TRAIN)
    assert code == 1 and error.startswith("error: the training images are not those of"), error
    Path("images/train/x.png").unlink()
    assert said in run("simclr.py", *TRAIN).splitlines()
    assert epochs() == whole


@KINDS
def test_plot_draws_views_and_curves_and_says_what_the_others_need(run, write, said):
    write()
    run("simclr.py", *TRAIN)
    out = run("plot.py", RUN)
    assert {path.name for path in Path(RUN).glob("*.png")} == {"curves.png", "views.png"}
    lines = [line for line in out.splitlines() if not line.endswith(".png")]
    needs = {
        loose: "(0.png, 1.png, 2.png and 5 more): labels are needed, each image in data_dir/t",
        one_class: "images/test cannot be read (No such file or directory): dataset=folder n",
    }
    assert len(lines) == 2 and lines[0].startswith("not drawn: confusion: ")
    assert lines[1].startswith("not drawn: embedding, neighbours: ") and needs[write] in lines[1]


@KINDS
def test_compare_lists_the_run_without_an_accuracy(run, write, said):
    write()
    run("simclr.py", *TRAIN)
    cells = [cell.strip() for cell in run("compare.py", RUN).splitlines()[-1].split("|")]
    assert cells[1:-1] == ["resnet18", "2 of 2", "", "", ""]


def test_the_encoder_is_evaluated_on_images_with_classes(run, write_images):
    loose()
    run("simclr.py", *TRAIN)
    write_images(Path("labelled"), train=8, test=3)
    Path("labelled/train/notes.txt").write_text("")
    Path("labelled/test/a.csv").write_text("")
    labelled = [*TOY, "data_dir=labelled", "finetune_epochs=1"]
    out = run("simclr_lin.py", *labelled).splitlines()
    reason = "no images by their extension or of other programs"
    for line in (f"left out of labelled/train, {reason}: notes.txt",
                 f"left out of labelled/test, {reason}: a.csv"):  # fmt: skip
        assert out.count(line) == 1
    assert json.loads(Path(RUN, "results.json").read_text())["test_images"] == 9
    out = run("simclr_lin.py", *labelled, "predict=images/train").splitlines()
    assert out.count(f"left out of labelled/train, {reason}: notes.txt") == 1
    assert len(Path(RUN, "predictions.csv").read_text().splitlines()) == 25
