"""What the tests share: a checked config with overrides, small images, a trained toy run."""

import ctypes
import itertools
import logging
import os
import runpy
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Before torch is imported: one thread for each worker of pytest-xdist, and for child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hydra import compose, initialize
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

sys.path.insert(0, str(Path(__file__).parent.parent))

import simclr
from config import Config
from models import BACKBONES
from system.commandline import register_config, to_config

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
PRODUCT = sorted(  # all Python files but tests and benchmarks
    path
    for path in (*REPOSITORY.glob("*.py"), *REPOSITORY.glob("[a-z]*/*.py"))
    if path.parent.name not in ("tests", "benchmarks")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--device=cuda: those tests alone that ask for the device, on it (benchmarks/gpu.py)."""
    parser.addoption("--device", default="cpu", help="where tests that ask for a device run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On another device than the CPU, leave out the tests that do not ask for it."""
    if config.getoption("--device") != "cpu":
        others = [item for item in items if "device" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "device" in item.fixturenames]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test computes: the option --device."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def same_convolutions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, sums in one order and in float32, so that two runs can be compared."""
    for flag, value in (("deterministic", True), ("benchmark", False), ("allow_tf32", False)):
        monkeypatch.setattr(torch.backends.cudnn, flag, value)
    if (name := request.config.getoption("--device")) != "cpu":  # select_device sets benchmark
        monkeypatch.setattr(simclr, "select_device", lambda _: torch.device(name))


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The GPU; skips the test without --device=cuda."""
    if device.type != "cuda":
        pytest.skip("needs --device=cuda")
    return device


def obey_permissions() -> None:
    """In a child process before its program starts: root too may only do what permissions say."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def make_config(*overrides: str) -> Config:
    """The checked config with these overrides, as a script would see it."""
    register_config()
    with initialize(version_base="1.3", config_path=None):
        return to_config(compose("simclr_config", overrides=list(overrides)))


def make_images(root: Path, classes: int = 3, **splits: int) -> Path:
    """Write root/<split>/class<label>/<n>.png, noise of 12×12 pixels, `n` of each class."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    return root


def toy_config(data: Path, *overrides: str) -> Config:
    """A config for runs of a second on `data`, with images of 8×8 pixels."""
    size = ["image_size=8", "batch_size=8", "epochs=2", "finetune_epochs=2", "device=cpu"]
    fixed = "finetune_learning_rate=0.003125", "precision=fp32"  # no choice, on any machine
    return make_config("dataset=folder", f"data_dir={data}", *size, *fixed, *overrides)


@pytest.fixture
def config() -> Callable[..., Config]:
    """config("epochs=2", …): the checked config, as a script would see it."""
    return make_config


@pytest.fixture
def write_images() -> Callable[..., Path]:
    """write_images(root, train=8, test=4): root/<split>/<class>/<n>.png, noise of 12×12 pixels."""
    return make_images


@pytest.fixture
def toy(tmp_path, request) -> Callable[..., Config]:
    """A config for runs of a second: 24 training and 9 test images of 3 classes, 8×8 pixels."""
    data = make_images(tmp_path / "images", train=8, test=3)
    return partial(toy_config, data, f"device={request.config.getoption('--device')}")


def slowed(
    clock: list[float], seconds: float, function: Callable[..., object]
) -> Callable[..., object]:
    """`function`, which takes so many seconds more by the clock, a list of one number."""

    def slow(*args: object) -> object:
        clock[0] += seconds
        return function(*args)

    return slow


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    """SIGTERM comes while step `number` from here on is computed; None: no signal."""
    draw = getattr(simclr.draw, "whole", simclr.draw)  # a step draws once, on a GPU too
    count = itertools.count(1)

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args, **kwargs)

    counted.whole = draw
    monkeypatch.setattr(simclr, "draw", counted)


def thin_resnet(weights: None, **options: object) -> ResNet:
    """The first two of ResNet-18's four layers, a block each: 1 MB, for tests that save often."""
    encoder = ResNet(BasicBlock, [1, 1, 1, 1], **options)
    encoder.layer3 = encoder.layer4 = nn.Identity()
    encoder.fc = nn.Linear(128, 1)
    return encoder


@pytest.fixture
def thin(monkeypatch) -> None:
    """backbone=resnet18 is thin_resnet."""
    monkeypatch.setitem(BACKBONES, "resnet18", thin_resnet)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The run directory of a complete toy run of thin_resnet, of two epochs. Only to be read."""
    run = tmp_path_factory.mktemp("trained")
    data = make_images(tmp_path_factory.mktemp("toy") / "images", train=8, test=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", thin_resnet)
        simclr.pretrain(toy_config(data), run)
    return run


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """call(script, overrides): run it in this process, in tmp_path; returns exit code, stderr and,
    in call.stdout, what it printed."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    monkeypatch.chdir(tmp_path)

    def call(script, *overrides):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *overrides])
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        call.stdout, error = capfd.readouterr()
        return code, error

    yield call
    root.handlers[:] = handlers  # Hydra puts its own there
