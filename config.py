"""The config: its keys with their types and ranges. simclr_config.yml has the values, with reasons.

The keys lie in groups, which say what a key is for: a checkpoint must name the `Architecture`, a
resumed run may change `Execution` and `Evaluation`, and nothing else. A function takes the whole
`Config` or the group that it needs; `Config` is each of them.
"""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

BACKBONES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
    "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
)  # fmt: skip
DATASETS = ("cifar10", "cifar100", "stl10", "digits", "folder")
OPTIMIZERS = ("sgd", "lars", "muon")
DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PROTOCOLS = ("knn", "linear", "linear_clean", "logistic", "finetune")
BASELINES = ("random", "pixels")


class ConfigError(ValueError):
    """A config value that is not allowed."""

    exit_code = 2


def between(low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A key for a finite number from `low`, or `above` it, to `high`; or for a list of such."""
    return field(metadata={"low": low, "high": high, "above": above})


def one_of(names: tuple[str, ...]) -> Any:
    """A key for one of the names, or for a list with each of them once at most."""
    return field(metadata={"names": names})


@dataclass
class Architecture:
    """The network and the size of its input: what a checkpoint must name to be loaded."""

    backbone: str = one_of(BACKBONES)
    projection_dim: int = between(1, 65536)
    hidden_dim: int = between(1, 65536)
    cifar_stem: bool
    image_size: int = between(8, 1024)


@dataclass
class Views:
    """The random views of an image (App. A)."""

    crop_scale: list[float] = between(0, 1, above=True)
    flip_probability: float = between(0, 1)
    color_strength: float = between(0, 2.5)  # above, the hue shifts by more than half a turn
    grayscale_probability: float = between(0, 1)
    blur_probability: float = between(0, 1)
    view_sizes: Any  # None or [[pixels, fraction of the steps], …]


@dataclass
class Pretraining:
    """What a run computes, beside `Architecture` and `Views`."""

    dataset: str = one_of(DATASETS)
    init: str | None
    seed: int = between(0, 2**32 - 1)
    precision: str = one_of(PRECISIONS)
    sync_batchnorm: bool
    batch_size: int = between(2)  # a batch of one has no negatives
    views: int = between(2)
    micro_batch_size: int | None = between(1)
    epochs: int = between(1)
    temperature: float = between(0, above=True)
    optimizer: str = one_of(OPTIMIZERS)
    learning_rate: float = between(0, above=True)
    warmup_epochs: int = between(0)
    min_learning_rate: float = between(0)
    momentum: float = between(0, 1)
    weight_decay: float = between(0)


@dataclass
class Execution:
    """Where and how a run is computed, not what: may change when it is resumed."""

    recipe: str
    data_dir: str
    workers: int = between(1, 1024)
    device: str = one_of(DEVICES)
    compile: Any  # "auto", True or False
    activation_checkpointing: bool
    log_interval: int = between(1)
    knn_interval: int = between(0)
    save_minutes: float = between(0)
    resume: bool


@dataclass
class Evaluation:
    """What simclr_lin.py does with a checkpoint; pretraining reads none of it."""

    checkpoint: str | None
    load_epoch: int | None = between(1)
    protocols: list[str] = one_of(PROTOCOLS)
    baselines: list[str] = one_of(BASELINES)
    labels: Any  # None, a fraction of the training images, or a number of each class
    runs: int = between(1)
    finetune_epochs: int = between(1)
    finetune_views: int = between(1)
    finetune_learning_rate: Any = between(0, above=True)  # None, a number, or a list to choose from
    finetune_weight_decay: Any = between(0)  # a number, or such a list


# In reverse: a dataclass takes the fields of its last base first.
@dataclass
class Config(Evaluation, Execution, Pretraining, Views, Architecture):
    """All keys. Raises ConfigError for a value that is not allowed, alone or beside the others."""

    def __post_init__(self) -> None:
        for key in fields(self):
            value, names = getattr(self, key.name), key.metadata.get("names")
            if value is None:  # OmegaConf refuses it where it may not be
                continue
            if names is not None:
                given = as_list(value)
                known = set(given) <= set(names) and len(set(given)) == len(given)
                self.require(key.name, known, f"one of {', '.join(names)}")
            elif "low" in key.metadata:
                self._check_range(key.name, **key.metadata)
        for key in ("data_dir", "init", "checkpoint"):
            if (path := getattr(self, key)) is not None:
                named = isinstance(path, str) and path.strip() != ""  # an unset variable of a shell
                self.require(key, named, "a path")
                setattr(self, key, os.path.expanduser(path))
        self._check_forms()
        self._check_together()

    def require(self, key: str, condition: bool, allowed: str) -> None:
        """Raise ConfigError with the key and its value, which must be `allowed`, or condition."""
        if not condition:
            raise ConfigError(f"{key}={getattr(self, key)}: must be {allowed}")

    def _check_range(self, key: str, *, low: float, high: float, above: bool) -> None:
        allowed = f"a number {'above' if above else 'from'} {low:g}"
        if high < math.inf:
            allowed += f" to {high:,}"
        for value in as_list(getattr(self, key)) or [None]:  # an empty list is none
            number = type(value) in (int, float) and math.isfinite(value)
            self.require(key, number and low <= value <= high, allowed)
            self.require(key, not (above and value == low), allowed)

    def _check_forms(self) -> None:
        scale, labels, sizes = self.crop_scale, self.labels, self.view_sizes
        allowed = "two fractions of the image's area, [smallest,largest]"
        self.require("crop_scale", len(scale) == 2 and scale[0] <= scale[1], allowed)
        allowed = "null or [[pixels,fraction],...], 8 to 1024 pixels, fractions that sum to 1"
        self.require("view_sizes", sizes is None or are_view_sizes(sizes), allowed)
        fraction = type(labels) is float and 0 < labels < 1
        number = type(labels) is int and labels >= 1
        allowed = "null, a fraction above 0 and below 1, or a number of images of each class"
        self.require("labels", labels is None or fraction or number, allowed)
        choice = isinstance(self.compile, bool) or self.compile == "auto"
        self.require("compile", choice, "auto, true or false")
        self.require("protocols", len(self.protocols) > 0, f"some of {', '.join(PROTOCOLS)}")
        self.require("momentum", self.momentum < 1, "below 1")
        self.require("finetune_weight_decay", self.finetune_weight_decay is not None, "a number")

    def _check_together(self) -> None:
        rate, floor = self.learning_rate, self.min_learning_rate
        self.require("warmup_epochs", self.warmup_epochs < self.epochs, "less than epochs")
        self.require("min_learning_rate", floor <= rate, f"at most learning_rate, {rate:g}")
        small = self.optimizer != "muon" or rate <= 0.25
        self.require("learning_rate", small, "at most 0.25 for muon: it is the angle of a step")
        smallest = min([self.image_size, *(pixels for pixels, _ in self.view_sizes or [])])
        # Below 32 the last stage sees 1×1, of which torch 2.14.1 on a CPU computes no gradient in
        # bfloat16: that of a 3×3 convolution of stride 2 is uninitialised memory.
        allowed = f"true for views of {smallest} pixels, below 32: the other network divides by 32"
        self.require("cifar_stem", self.cifar_stem or smallest >= 32, allowed)
        allowed = f"0 for views of {smallest} pixels: below 20 the kernel, a tenth, is one pixel"
        self.require("blur_probability", self.blur_probability == 0 or smallest >= 20, allowed)
        # torch.compile does not trace their batch-norm bookkeeping
        recomputes = self.activation_checkpointing or self.micro_batch_size is not None
        allowed = "false or auto with activation_checkpointing or micro_batch_size"
        self.require("compile", self.compile is not True or not recomputes, allowed)


def are_view_sizes(value: Any) -> bool:
    """Whether it is [[pixels, fraction], …], 1 to 8: torch.compile makes no more forms."""
    try:
        pixels, fractions = zip(*value, strict=True)
    except (TypeError, ValueError):  # no list of pairs
        return False
    whole = all(type(size) is int and 8 <= size <= 1024 for size in pixels)
    positive = all(type(part) in (int, float) and part > 0 for part in fractions)
    return len(value) <= 8 and whole and positive and math.isclose(sum(fractions), 1, abs_tol=0.01)


def keys(group: type) -> list[str]:
    """The keys of a group."""
    return [key.name for key in fields(group)]


def may_change() -> list[str]:
    """The keys that a resumed run may change, and by which a sweep names no run directory."""
    return keys(Execution) + keys(Evaluation)


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else a list of it."""
    return value if isinstance(value, list) else [value]
