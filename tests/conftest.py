"""What the tests share: a checked config with overrides, and folders of small images."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize
from omegaconf import DictConfig
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import check_config, register_config
from models import BACKBONES

REPOSITORY = Path(__file__).parent.parent


def obey_permissions() -> None:
    """In a child process before its program starts: root too may only do what permissions say."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.fixture
def config() -> Callable[..., DictConfig]:
    """config("epochs=2", …): the checked config, as a script would see it."""

    def make(*overrides: str, peak: str = "learning_rate") -> DictConfig:
        register_config()
        with initialize(version_base="1.3", config_path=None):
            return check_config(compose("simclr_config", overrides=list(overrides)), peak)

    return make


@pytest.fixture
def write_images() -> Callable[..., Path]:
    """write_images(root, train=8, test=4): root/<split>/<class>/<n>.png, noise of 12×12 pixels."""

    def write(root: Path, classes: int = 3, **splits: int) -> Path:
        rng = np.random.default_rng(0)
        for split, count in splits.items():
            for label in range(classes):
                folder = root / split / f"class{label}"
                folder.mkdir(parents=True)
                for n in range(count):
                    pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{n}.png")
        return root

    return write


@pytest.fixture
def toy(config, write_images, tmp_path) -> Callable[..., DictConfig]:
    """A config for runs of a second: 24 training and 9 test images of 3 classes, 8×8 pixels."""
    data = write_images(tmp_path / "images", train=8, test=3)

    def make(*overrides: str, peak: str = "learning_rate") -> DictConfig:
        size = ["image_size=8", "batch_size=8", "epochs=2", "finetune_epochs=2", "device=cpu"]
        return config("dataset=folder", f"data_dir={data}", *size, *overrides, peak=peak)

    return make


def thin_resnet(weights: None) -> ResNet:
    """The first two of ResNet-18's four layers, a block each: 1 MB, for tests that save often."""
    encoder = ResNet(BasicBlock, [1, 1, 1, 1])
    encoder.layer3 = encoder.layer4 = nn.Identity()
    encoder.fc = nn.Linear(128, 1)
    return encoder


@pytest.fixture
def thin(monkeypatch) -> None:
    """backbone=resnet18 is thin_resnet."""
    monkeypatch.setitem(BACKBONES, "resnet18", thin_resnet)
