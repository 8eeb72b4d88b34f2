"""The config: how simclr_config.yml reaches Hydra, and which values each key may have."""

import math
import os
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from images.datasets import DATASETS
from models import BACKBONES
from system.commandline import no_such_key, skip_check_of_lazy_help
from system.device import DEVICES, PRECISIONS
from system.errors import ConfigError, UserError, describe, one_line_errors
from system.files import read_yaml
from system.rules import AUTO, NULL, PATH, YES_OR_NO, Rule, either, integer, list_of, number, one_of
from system.sweeps import directory_name, note_failure, start_sweep
from training.optim import OPTIMIZERS

CONFIG_FILE = Path(__file__).with_name("simclr_config.yml")
PROTOCOLS = ("knn", "linear", "linear_clean", "logistic", "finetune")
SCHEDULED = ("linear", "linear_clean", "finetune")  # trained with a cosine schedule
BASELINES = ("random", "pixels")
PEAKS = {"simclr": "learning_rate", "simclr_lin": "finetune_learning_rate"}  # of each script


def register_config() -> None:
    """Register simclr_config.yml with Hydra under the name `simclr_config`.

    Hydra 1.2 and later look for `.yaml` only; a node in the ConfigStore is found whatever its
    file is called. Each of its `recipes` becomes a choice of the config group `recipe`, whose
    values replace those of the file; the command line comes last. `per_256` and `times_root` are
    the linear and the square-root scaling rule of the learning rate (App. B.1), which OmegaConf,
    having no arithmetic, cannot write itself.
    """
    rules = {"per_256": lambda base, n: base * n / 256, "times_root": lambda base, n: base * n**0.5}
    for name, rule in {**rules, "directory_name": directory_name}.items():
        OmegaConf.register_new_resolver(name, rule, replace=True)
    with one_line_errors():
        config, store = read_yaml(CONFIG_FILE), ConfigStore.instance()
        for name, values in _pop_recipes(config).items():
            node = {"recipe": name, **values}
            store.store(group="recipe", name=name, node=node, package="_global_")
    store.store(name="simclr_config", node=config)
    skip_check_of_lazy_help()


def _pop_recipes(config: DictConfig) -> dict[str, dict[str, Any]]:
    recipes = OmegaConf.to_container(config).get("recipes")
    values = recipes.values() if isinstance(recipes, dict) else [recipes]
    if not all(isinstance(value, dict) or (value is None and recipes) for value in values):
        raise ConfigError(f"{CONFIG_FILE}: recipes must be names, each with its keys and values")
    del config["recipes"]
    return {str(name): value or {} for name, value in recipes.items()}


def _is_pair(value: Any, first: Rule, second: Rule) -> bool:
    two = isinstance(value, list) and len(value) == 2
    return two and first[0](value[0]) and second[0](value[1])


def _are_view_sizes(value: Any) -> bool:
    pairs = isinstance(value, list) and all(_is_pair(pair, PIXELS, FRACTION) for pair in value)
    few = pairs and 1 <= len(value) <= 8  # torch.compile takes no more
    return few and math.isclose(sum(fraction for _, fraction in value), 1, abs_tol=0.01)


PIXELS, PROBABILITY, FRACTION = integer(8, 1024), number(0, 1), number(0, 1, above=True)
RATE, DECAY = number(0, above=True), number(0)

CROP_SCALE: Rule = (
    lambda value: _is_pair(value, FRACTION, FRACTION) and value[0] <= value[1],
    "two fractions of the image's area, [smallest,largest], above 0 and at most 1",
)
VIEW_SIZES: Rule = (
    _are_view_sizes,
    "[[pixels,fraction],...]: 1 to 8 pairs, pixels from 8 to 1024, fractions that sum to 1",
)

RULES: dict[str, Rule] = {
    "recipe": (lambda value: isinstance(value, str), "the name of a recipe"),  # Hydra knows which
    "dataset": one_of(DATASETS),
    "data_dir": PATH,
    "image_size": PIXELS,
    "workers": integer(1, 1024),
    "backbone": one_of(tuple(BACKBONES)),
    "projection_dim": integer(1, 65536),
    "hidden_dim": integer(1, 65536),
    "cifar_stem": YES_OR_NO,
    "init": either(NULL, PATH),
    "crop_scale": CROP_SCALE,
    "flip_probability": PROBABILITY,
    "color_strength": number(0, 2.5),  # a hue shift of more than half a turn means nothing
    "grayscale_probability": PROBABILITY,
    "blur_probability": PROBABILITY,
    "view_sizes": either(NULL, VIEW_SIZES),
    "seed": integer(0, 2**32 - 1),
    "device": one_of(DEVICES),
    "precision": one_of(("auto", *PRECISIONS)),
    "compile": either(AUTO, YES_OR_NO),
    "activation_checkpointing": YES_OR_NO,
    "sync_batchnorm": YES_OR_NO,
    "batch_size": integer(2),  # a batch of one has no negatives
    "micro_batch_size": either(NULL, integer(1)),
    "epochs": integer(1),
    "log_interval": integer(1),
    "knn_interval": integer(0),
    "save_minutes": number(0),
    "resume": YES_OR_NO,
    "temperature": number(0, above=True),
    "optimizer": one_of(OPTIMIZERS),
    "learning_rate": RATE,
    "warmup_epochs": integer(0),
    "min_learning_rate": number(0),
    "momentum": number(0, 1, below=True),
    "weight_decay": DECAY,
    "checkpoint": either(NULL, PATH),
    "load_epoch": either(NULL, integer(1)),
    "protocols": list_of(one_of(PROTOCOLS)),
    "baselines": list_of(one_of(BASELINES), least=0),
    "labels": either(NULL, number(0, 1, above=True, below=True), integer(1)),
    "runs": integer(1, 1000),
    "finetune_epochs": integer(1),
    "finetune_views": integer(1),
    "finetune_learning_rate": either(RATE, list_of(RATE)),
    "finetune_weight_decay": either(DECAY, list_of(DECAY)),
    "predict": either(NULL, PATH),
}
KEYS = tuple(RULES)
# Keys that may change when a run is resumed: where and how it is computed, not what. Instead of
# data_dir a checksum of the images is compared, of precision what `auto` stands for, of a recipe
# its values.
MAY_CHANGE = (
    "recipe", "data_dir", "workers", "device", "compile", "activation_checkpointing",
    "log_interval", "knn_interval", "save_minutes", "resume", *KEYS[KEYS.index("checkpoint") :],
)  # fmt: skip


class CheckConfig(Callback):
    """What Hydra calls before a run or a sweep, and after each job of one."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check what is the same in all jobs, and that each has a directory of its own."""
        with one_line_errors():
            check_values(config)
            start_sweep(config.hydra)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """End a run that failed with one line; note the failure of a sweep's job, which goes on."""
        error = job_return._return_value  # its property prints the overrides
        if job_return.status == JobStatus.FAILED and config.hydra.mode == RunMode.MULTIRUN:
            note_failure(config.hydra, error)
        elif job_return.status == JobStatus.FAILED and describe(error) is not None:
            with one_line_errors():
                raise error

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the config, then make the run directory; on an error nothing is left behind."""
        with one_line_errors():
            if (peak := PEAKS.get(config.hydra.job.name)) is not None:
                check_config(config, peak)
            try:  # before Hydra does, with a traceback
                run_dir = Path(config.hydra.run.dir)
                str(run_dir).encode()  # TensorBoard takes nothing but UTF-8
                run_dir.mkdir(parents=True, exist_ok=True)
            except OmegaConfBaseException as error:
                raise ConfigError(f"hydra.run.dir: {str(error).splitlines()[0]}") from None
            except (OSError, UnicodeError) as error:
                raise UserError(
                    f"{run_dir} cannot be made ({getattr(error, 'strerror', 'it is not UTF-8')}): "
                    "choose another run directory with hydra.run.dir=PATH"
                ) from None


def check_values(cfg: DictConfig) -> DictConfig:
    """The same config without Hydra's own block, with every value resolved.

    Raises ConfigError: the key, its value and what is allowed.
    """
    for key in cfg:  # Hydra refuses an unknown key itself, unless it is added with +key=value
        if key not in RULES and key != "hydra":
            raise ConfigError(no_such_key(key, RULES))
    return OmegaConf.create({key: _checked(cfg, key) for key in RULES})


def _checked(cfg: DictConfig, key: str) -> Any:
    ok, allowed = RULES[key]
    try:
        value = OmegaConf.to_container(OmegaConf.create({key: cfg[key]}), resolve=True)[key]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: must be {allowed}; {str(error).splitlines()[0]}") from None
    if not ok(value):
        raise ConfigError(f"{key}={value!r}: must be {allowed}")
    return value


def check_config(cfg: DictConfig, peak: str) -> DictConfig:
    """`check_values`, and the rules between keys for one of the two scripts.

    peak: the key where its cosine schedule starts, "learning_rate" for simclr.py and
    "finetune_learning_rate" for simclr_lin.py. Raises ConfigError.
    """
    cfg = check_values(cfg)
    pretraining = peak == "learning_rate"
    for key in ("checkpoint", "load_epoch", "labels", "predict") if pretraining else ():
        if cfg[key] is not None:  # would be ignored, and looks like a resume
            _refuse(
                cfg, key, "null for simclr.py, which trains on no label; simclr_lin.py evaluates a "
                "checkpoint, and init=PATH starts pretraining from one",
            )  # fmt: skip
    smallest = min([cfg.image_size, *(pixels for pixels, _ in cfg.view_sizes or [])])
    if not cfg.cifar_stem and smallest < 32:
        # at 16 the last stage sees 1×1, of which torch 2.14.1 on a CPU computes no gradient in
        # bfloat16: that of a 3×3 convolution of stride 2 is uninitialised memory
        allowed = f"true for views of {smallest} pixels, below 32: the other network divides by 32"
        _refuse(cfg, "cifar_stem", allowed)
    if cfg.blur_probability > 0 and smallest < 20:
        allowed = f"0 for views of {smallest} pixels: below 20 the kernel, a tenth, is one pixel"
        _refuse(cfg, "blur_probability", allowed)
    if pretraining and cfg.warmup_epochs >= cfg.epochs:
        _refuse(cfg, "warmup_epochs", f"less than epochs, which is {cfg.epochs}; 0 leaves it out")
    if pretraining and cfg.optimizer == "muon" and cfg.learning_rate > 0.25:
        _refuse(cfg, "learning_rate", "at most 0.25 for muon, the angle of a step; 0.05 is usual")
    lowest = min(cfg[peak]) if isinstance(cfg[peak], ListConfig) else cfg[peak]
    scheduled = pretraining or cfg.predict is not None or {*SCHEDULED} & {*cfg.protocols}
    if scheduled and cfg.min_learning_rate > lowest:
        reason = f"at most {peak}, which is {lowest:g} (it follows batch_size unless set)"
        _refuse(cfg, "min_learning_rate", reason)
    named = cfg.checkpoint is not None and not os.path.isdir(os.path.expanduser(cfg.checkpoint))
    if named and cfg.load_epoch is not None:
        allowed = f"null beside checkpoint={cfg.checkpoint}, which is no run directory"
        _refuse(cfg, "load_epoch", allowed)
    if cfg.compile is True and (cfg.activation_checkpointing or cfg.micro_batch_size is not None):
        # whose batch-norm bookkeeping torch.compile does not trace
        _refuse(cfg, "compile", "false or auto with activation_checkpointing or micro_batch_size")
    return cfg


def _refuse(cfg: DictConfig, key: str, allowed: str) -> NoReturn:
    value = str(cfg[key]).lower() if isinstance(cfg[key], bool) else cfg[key]
    raise ConfigError(f"{key}={value}: must be {allowed}")
