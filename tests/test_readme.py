"""The Python of the README, run as it stands there but for the paths."""

import re
import shutil

import pytest
import torch
from conftest import REPOSITORY

import simclr
from system.checkpoint import load_encoder
from system.errors import UserError

PATH = "logs/SimCLR/cifar10/resnet18/simclr_resnet18_epoch1000.pt"


def blocks():
    """The Python blocks of the section "Use the encoder", by their first comment."""
    section = re.search(r"\n## Use the encoder\n(.*?)\n## ", (REPOSITORY / "README.md").read_text(),
                        re.DOTALL)[1]  # fmt: skip
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def place(toy, tmp_path, monkeypatch, write_images):
    """A folder with the checkpoint and the images that the README speaks of."""
    run = (tmp_path / PATH).parent
    run.mkdir(parents=True)
    simclr.pretrain(toy("epochs=1", "image_size=32"), run)
    shutil.copy(run / "simclr_resnet18_epoch1.pt", tmp_path / PATH)
    write_images(tmp_path / "my", classes=1, images=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_use_the_encoder_runs_and_they_agree(place):
    """Extraction, torchvision's own ResNet and the exported program give the same h."""
    features, resnet, exported = blocks()
    names = {}
    for block in (features, resnet, exported):
        exec(compile(block, "README.md", "exec"), names)
    h, images = names["h"], names["images"]
    assert h.shape == (5, 512) == (len(names["files"]), names["feature_dim"])
    assert not h.requires_grad and not names["enc"].training
    with torch.no_grad():
        torch.testing.assert_close(names["net"](images / 255), h, atol=1e-5, rtol=1e-4)
    program = torch.export.load(place / "encoder.pt2").module()
    for n in (1, 3, 5):  # any batch
        torch.testing.assert_close(program(images[:n] / 255), h[:n], atol=1e-4, rtol=1e-3)


def test_load_encoder_refuses_what_is_no_checkpoint(place):
    with pytest.raises(UserError, match=r"no checkpoint nowhere\.pt"):
        load_encoder("nowhere.pt")
    (place / "text.pt").write_text("text")
    with pytest.raises(UserError, match=r"text\.pt is damaged or no checkpoint"):
        load_encoder(place / "text.pt")


def test_every_promise_names_a_test():
    """Section "When something goes wrong": each pattern for `pytest -k` selects something."""
    text = (REPOSITORY / "README.md").read_text()
    section = re.search(r"\n## When something goes wrong\n(.*?)\n## ", text, re.DOTALL)[1]
    patterns = re.findall(r"\| `([^|]*)` \|\n", section)
    files = [path for path in (REPOSITORY / "tests").glob("test_*.py")]
    names = [f"{path.name} {name}" for path in files
             for name in re.findall(r"\ndef (test_\w+)", path.read_text())]  # fmt: skip
    assert len(patterns) == 13
    for part in " or ".join(patterns).split(" or "):
        assert any(part in name for name in names), part
