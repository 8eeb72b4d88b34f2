"""What a run leaves on disk while it goes on: metrics, weights, and the state to go on from."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from checkpoint import checkpoint_name, save_checkpoint
from distributed import wait_for_all
from errors import Stopped, UserError
from files import move_aside, write_file
from metrics import collapsed
from state import Found, Training, commit, restore, save_state, versions

log = logging.getLogger("simclr")

COLLAPSED = (
    "warning: in epoch %d all images have nearly the same embedding. A collapsed encoder stays so: "
    "lower learning_rate (%g), or wait if this is one of the first epochs"
)


class Record:
    """The files of a run. A write that fails is said and tried again; the run goes on."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        images: str,
        log_interval: int,
        save_minutes: float,
        writes: bool = True,
    ) -> None:
        """config: what is kept with weights and state, plain data; images: their fingerprint.

        Of several processes one `writes`; for the others all is done.
        """
        self.writes = writes
        self.folder, self.config, self.images = folder, config, images
        self.log_interval, self.save_minutes = log_interval, save_minutes
        self.board = Board(folder)
        self.commit = commit()
        self.keep = True  # the state that is there, as the previous one
        self.saved_at = time.monotonic()
        self.unwritten: dict[str, str] = {}  # what could not be written the last time, and why

    def begin(self, training: Training, found: Found | None, start_over: bool) -> None:
        """Put `training` where the state that was found left it, or begin a new record.

        Raises UserError if the state does not fit, or the first one cannot be written.
        """
        if found is not None:
            restore(training, found.path, found.content, self.images)
            self.keep = not found.problems  # a damaged state does not take a good one's place
            log.info(_where(training, found))
            self._write("metrics", write_metrics, self.folder, training.history)
        elif self.writes:
            if start_over and (aside := move_aside(self.folder)) is not None:
                log.info(f"moved the files of the run that was here to {aside}")
            self.write_state(training)
            self.check()
        if self.writes:
            write_file(self.folder / "config.yaml", OmegaConf.to_yaml(self.config).encode())

    def end_epoch(self, training: Training) -> None:
        """Write what is due after an epoch."""
        shape = self.config["batch_size"], self.config["projection_dim"]
        before, now = training.history[:-1], training.history[-1]
        if collapsed(now, *shape) and not any(collapsed(line, *shape) for line in before):
            log.warning(COLLAPSED, training.epoch, self.config["learning_rate"])
        if self._write("metrics", write_metrics, self.folder, training.history):
            self._write("board", self.board.write, training.history)
        last = training.epoch == self.config["epochs"]
        if last or training.epoch % self.log_interval == 0:
            path = self.folder / checkpoint_name(self.config["backbone"], training.epoch)
            what = training.model.state_dict(), self.config, training.epoch
            self._write("weights", save_checkpoint, path, *what)
        # after the weights: where the state is complete, they are there
        if last or time.monotonic() - self.saved_at >= 60 * self.save_minutes:
            self.write_state(training)

    def write_state(self, training: Training) -> bool:
        """The state to go on from; returns whether it is on disk."""
        what = training, self.images, self.config, self.commit, self.keep
        written = self._write("state", save_state, self.folder, *what)
        if written:
            self.keep, self.saved_at = True, time.monotonic()
        return written

    def stopped(self, training: Training, number: int, steps: int) -> Stopped:
        """Save the state after a signal; returns what to say."""
        where = f" in epoch {training.epoch + 1} after {len(training.found)} of {steps} steps"
        written = self.write_state(training)
        wait_for_all()  # one that has ended makes torchrun end the others
        if not written:
            return Stopped(number, f"{where}; {self.unwritten['state']}; the state before is kept")
        command = "same command" + ("" if self.config["resume"] else ", without resume=false,")
        return Stopped(number, f"{where}, which is saved: the {command} goes on from there")

    def failed(
        self, training: Training, values: dict[str, float], step: int, learning_rate: float
    ) -> UserError:
        """Write failure.json for a step (from 0) that was not finite; returns what to say."""
        i, n = len(training.found), self.config["batch_size"]
        content = {
            "epoch": training.epoch + 1,
            "step": step + 1,
            "loss": str(values["loss"]),  # JSON has no nan
            "gradient_norm": str(values["gradient_norm"]),
            "learning_rate": learning_rate,
            "batch": training.order[i * n : (i + 1) * n].tolist(),
        }
        path = self.folder / "failure.json"
        self._write("failure", write_file, path, json.dumps(content).encode())
        wait_for_all()  # one that has ended makes torchrun end the others
        return UserError(
            f"loss {values['loss']}, gradient norm {values['gradient_norm']} in step {step + 1} of "
            f"epoch {training.epoch + 1} (see {path}), of which nothing is saved: start over with "
            f"resume=false and a lower learning_rate ({self.config['learning_rate']:g}), a higher "
            f"temperature ({self.config['temperature']:g}) or precision=fp32"
        )

    def check(self) -> None:
        """Raise UserError if something is not on disk now."""
        if self.unwritten:
            raise UserError("; ".join(self.unwritten.values()))

    def close(self) -> None:
        """End TensorBoard's file."""
        self.board.close()

    def _write(self, name: str, write: Callable[..., object], *arguments: Any) -> bool:
        self.unwritten.pop(name, None)
        if not self.writes:
            return True
        try:
            write(*arguments)
        except UserError as error:
            self.unwritten[name] = str(error)
            log.warning(f"warning: {error}")
        return name not in self.unwritten


def _where(training: Training, found: Found) -> str:
    instead = f" ({'; '.join(found.problems)})" if found.problems else ""
    then = {**found.content["versions"], "device": found.content["random"]["device"]}
    now = {**versions(), "device": training.rng.device.type}
    other = [f"{name} {then.get(name)}" for name in now if then.get(name) != now[name]]
    change = f"; saved with {', '.join(other)}: the same only up to rounding" if other else ""
    if "device" in change:
        change += ", and with other views"
    done = f"{training.epoch} epochs and {len(training.found)} steps are done"
    return f"goes on from {found.path}{instead}: {done}{change}"


def complete(folder: Path, found: Found, writes: bool = True) -> dict[str, float | None]:
    """Say that the run in `folder` is complete; if `writes`, its weights again if they are missing.

    Returns the metrics of its last epoch. Raises UserError where something can't be written.
    """
    saved = found.content
    path = folder / checkpoint_name(saved["config"]["backbone"], saved["epoch"])
    if writes and not path.exists():
        save_checkpoint(path, saved["model"], saved["config"], saved["epoch"])
    if writes:
        write_metrics(folder, saved["history"])
    log.info(
        f"{folder} holds this run, complete with {saved['epoch']} epochs: simclr_lin.py evaluates "
        "it, resume=false starts over"
    )
    say_end(saved["history"][-1], path)
    return saved["history"][-1]


def say_end(line: dict[str, float | None], path: Path) -> None:
    """The last line of metrics.jsonl in words; path: of the weights."""
    knn = "" if line["knn_acc"] is None else f", kNN {line['knn_acc']:.1%} (training images)"
    log.info(
        f"epoch {line['epoch']}: loss {line['loss']:.4f}, contrastive accuracy "
        f"{line['contrastive_accuracy']:.1%}{knn}; saved {path}"
    )


def write_metrics(folder: Path, history: list[dict[str, float | None]]) -> None:
    """Write `folder`/metrics.jsonl, all of it, so that no crash cuts a line: 400 B each."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    write_file(folder / "metrics.jsonl", lines.encode())


class Board:
    """The lines of metrics.jsonl for TensorBoard, each under its epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.writer, self.epoch = folder, None, 0

    def write(self, history: list[dict[str, float | None]]) -> None:
        """Add what is new. Raises UserError if that can't be; the next call tries again."""
        try:
            if self.writer is None:  # takes the place of files that an earlier process left
                self.writer = SummaryWriter(self.folder, purge_step=self.epoch + 1)
            for line in history[self.epoch :]:
                for name, value in line.items():
                    if name != "epoch" and value is not None:
                        self.writer.add_scalar(name, value, line["epoch"])
            self.writer.flush()
        except OSError as error:
            self.writer = None  # its thread has ended
            raise UserError(f"TensorBoard's file in {self.folder}: {error.strerror}") from None
        self.epoch = len(history)

    def close(self) -> None:
        """End the file, if there is one."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()
