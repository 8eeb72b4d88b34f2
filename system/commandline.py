"""The command line, which Hydra reads: the config, run directories, sweeps and refusals."""

import difflib
import logging
import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import ConfigCompositionException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write

from config import Config, ConfigError, keys, may_change
from system.errors import describe, error_boundary

log = logging.getLogger("simclr")

CONFIG_FILE = Path(__file__).parents[1] / "simclr_config.yml"


def register_config() -> None:
    """Register simclr_config.yml with Hydra under the name `simclr_config`; `Config` has the types.

    Each of its `recipes` becomes a choice of the group `recipe`; the command line comes last.
    `per_256` and `times_root` are the scaling rules of the learning rate (App. B.1).
    """
    resolvers = {
        "per_256": lambda base, batch_size: base * batch_size / 256,
        "times_root": lambda base, batch_size, views=1: base * (batch_size * views) ** 0.5,
        "directory_name": directory_name,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    with open(CONFIG_FILE, encoding="utf-8", errors="replace") as file:  # a comment in Latin-1
        config = OmegaConf.load(file)
    store = ConfigStore.instance()
    for name, values in (config.pop("recipes") or {}).items():
        # merge does not resolve: a learning rate follows the batch size that is composed in the end
        node = OmegaConf.merge({"recipe": name}, OmegaConf.create(values or {}))
        store.store(group="recipe", name=str(name), node=node, package="_global_")
    store.store(group="hydra/job_logging", name="simclr", node=config.hydra.pop("job_logging"))
    store.store(name="schema", node=Config)
    store.store(name="simclr_config", node=config)
    # Python 3.14 would check help texts as they are registered: one of Hydra's, up to 1.3.8 at
    # least, is no string but is made when printed (hydra issue 3121).
    ArgumentParser._check_help = lambda parser, action: None


def to_config(cfg: DictConfig) -> Config:
    """The composed config with every value resolved and checked. Raises ConfigError."""
    for key in cfg:  # Hydra refuses an unknown key itself, unless it is added with +key=value
        if key not in keys(Config) and key != "hydra":
            raise ConfigError(_no_such_key(str(key)))
    values = OmegaConf.masked_copy(cfg, keys(Config))  # without Hydra's own
    if missing := [key for key in keys(Config) if key not in values]:  # such as by ~key
        raise ConfigError(f"{missing[0]}: must have a value")
    return Config(**OmegaConf.to_container(values, resolve=True, throw_on_missing=True))


def run_command(main: Callable[[], Any]) -> None:
    """Run a script's main function under Hydra, with each error of the user in one line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, where it would print several lines
    logging.raiseExceptions = False  # a line that cannot be written is dropped
    with error_boundary():
        for n, argument in enumerate(sys.argv[1:], 1):
            home = re.match(r"([^=]+=['\"]?)(~[^/'\"]*)", argument)  # to Hydra ~ is a letter
            if home:
                sys.argv[n] = home[1] + os.path.expanduser(home[2]) + argument[home.end() :]
            if argument.startswith("recipe=["):  # Hydra would mix them under the name of the last
                raise ConfigError(f"{argument}: must be the name of one recipe")
        register_config()
        try:
            main()
        except ConfigCompositionException as error:
            key = re.match(r"Could not override '([^']+)'", str(error))
            if key is None:
                raise
            raise ConfigError(_no_such_key(key[1])) from None


def _no_such_key(key: str) -> str:
    near = difflib.get_close_matches(key, keys(Config), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key}: no such key; {hint}there are {', '.join(keys(Config))}"


class CheckConfig(Callback):
    """What Hydra calls before a run or a sweep, and after each job; it catches Exception there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the config before Hydra makes the run directory."""
        with error_boundary():
            to_config(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check where each job has its results; its values are checked when it runs."""
        with error_boundary():
            check_sweep(config.hydra)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """End a run that failed with one line, as the script; log why the job of a sweep failed."""
        error = job_return._return_value  # its property prints the overrides
        if job_return.status != JobStatus.FAILED or (known := describe(error)) is None:
            return
        if config.hydra.mode == RunMode.RUN:
            with error_boundary():
                raise error
        log.error(f"error: {known[0]}")
        while error is not None:  # Hydra keeps it until the sweep ends: not with the job's tensors
            error.__traceback__, error = None, error.__context__


def directory_name(overrides: ListConfig | list[str]) -> str:
    """The directory of a sweep's job: its overrides, but those that name no run: `may_change`,
    without recipe. Empty if none is left."""
    unnamed = {*may_change()} - {"recipe"}
    naming = sorted(override for override in overrides if _key(override) not in unnamed)
    return re.sub(r"[=/\\]+", "-", "_".join(naming))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def check_sweep(hydra: DictConfig) -> None:
    """Raise ConfigError for a sweep over a key that names no directory, but for labels.

    A sweep over labels evaluates one run: in its directory, unless that of the sweep has one.
    """
    params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *hydra.overrides.task])
    swept = [o.key_or_group for o in overrides if o.is_sweep_override()]
    unnamed = [key for key in swept if key != "labels" and directory_name([key]) == ""]
    if unnamed or (swept and "${" not in OmegaConf.to_container(hydra.sweep)["subdir"]):
        key = [*unnamed, "hydra.sweep.subdir"][0]
        raise ConfigError(f"{key}: the jobs of this sweep would overwrite each other's results")
    name = directory_name([text for text in hydra.overrides.task if _key(text) not in swept])
    one_run = swept == ["labels"] or (not swept and name == "")
    if one_run and not any(Path(hydra.sweep.dir, name).glob("simclr_*.pt")):
        with read_write(hydra):
            hydra.overrides.hydra += ["hydra.sweep.dir=${hydra.run.dir}", "hydra.sweep.subdir=."]


def run_directory() -> Path:
    """The run directory of this job, relative to the working directory where it lies below it."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    return run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
