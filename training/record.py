"""Run logging and checkpointing: metrics, progress, weights, training state, failures."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from system.checkpoint import checkpoint_name, save_checkpoint
from system.device import start_copy
from system.errors import Stopped, StopSignals, UserError
from system.files import move_aside, write_file
from training.distributed import all_reduce_max, barrier, rank
from training.metrics import TensorBoard, collapsed, epoch_means, is_finite, write_metrics
from training.state import SavedState, Training, describe_resume, restore, save_state

log = logging.getLogger("simclr")

COLLAPSED = (
    "warning: in epoch %d all images have nearly the same embedding. A collapsed encoder stays so: "
    "lower learning_rate (%g), or wait if this is one of the first epochs"
)


class RunRecord:
    """Writes the files of a run. A failed write is reported and retried; training goes on."""

    def __init__(self, run_dir: Path, config: dict[str, Any], images: str, steps: int) -> None:
        """config: saved with weights and state, plain data; images: fingerprint of the training
        images; steps: of an epoch. Only rank 0 writes."""
        self.run_dir, self.config, self.images = run_dir, config, images
        self.steps, self.writes = steps, rank() == 0
        self.board = TensorBoard(run_dir)
        self.stop = StopSignals(all_reduce_max)
        self.pending: list[tuple[Callable[[], dict[str, float]], float]] = []  # not read yet
        self.keep = True  # the state on disk as the previous one
        self.saved_at = time.monotonic()
        self.unwritten: dict[str, str] = {}  # files whose last write failed, and why

    @contextmanager
    def recording(
        self, training: Training, saved: SavedState | None, start_over: bool
    ) -> Iterator[None]:
        """Resume or start the run, and save or report however the block ends.

        Raises UserError if the saved state does not fit, a step is not finite, or a file is not
        on disk in the end; Stopped after a signal, with the state saved if that was possible.
        """
        with self.stop:
            self._resume_or_start(training, saved, start_over)
            del saved  # frees a second copy of the weights, with the caller's
            done = training.epoch * self.steps + training.steps_done
            total = self.config["epochs"] * self.steps
            self.bar = tqdm(total=total, initial=done, unit="step", mininterval=1, delay=0.1)
            self.clock = time.perf_counter()
            try:
                with self.bar:
                    self.stop.check()
                    yield
                self.check_written()
            except Stopped as stopped:
                raise self._save_on_signal(training, stopped.number) from None
            finally:
                self.board.close()

    def log_step(self, training: Training, metrics: dict[str, Tensor], rate: float) -> None:
        """Record the metrics of a step; stop on a signal or a step that is not finite.

        They are read one step later, or at the end of the epoch, so that a GPU never waits for the
        CPU. Raises UserError for a step that was not; Stopped after a signal.
        """
        self.pending.append((start_copy(metrics), rate))
        self._read(training, leave=1)
        signal = self.stop.noted()
        if signal or training.steps_done == self.steps - 1:
            self._read(training, leave=0)
        now = time.perf_counter()
        training.seconds, self.clock = training.seconds + now - self.clock, now
        if signal:
            raise Stopped(signal)

    def _read(self, training: Training, leave: int) -> None:
        while len(self.pending) > leave:
            read, rate = self.pending.pop(0)
            metrics = read()
            if not is_finite(metrics, training.scaler.is_enabled()):
                raise self._write_failure_report(training, metrics, rate)
            training.step_metrics.append(metrics)
            if self.bar.update():  # true about once a second, when the bar is drawn
                accuracy = f"contrastive {metrics['contrastive_accuracy']:.1%}"
                progress = f"epoch {training.epoch + 1}, loss {metrics['loss']:.3f}, {accuracy}"
                self.bar.set_postfix_str(progress, refresh=False)

    def end_epoch(
        self, training: Training, knn_acc: float | None, rate: float, view_size: int
    ) -> None:
        """Complete the epoch and write what is due: metrics, weights, training state.

        rate, view_size: of the epoch's last step.
        """
        step = (training.epoch + 1) * self.steps
        line = {
            "epoch": training.epoch + 1,
            "step": step,
            **epoch_means(training.step_metrics),
            "knn_acc": knn_acc,
            "learning_rate": rate,
            "view_size": view_size,
            "views_per_second": 2 * self.config["batch_size"] * self.steps / training.seconds,
            "seconds": training.seconds,
        }
        training.end_epoch(line)
        if knn_acc is not None:
            self.bar.set_description(f"kNN {knn_acc:.1%}")
        shape = self.config["batch_size"], self.config["projection_dim"]
        flat = [epoch for epoch in training.history if collapsed(epoch, *shape)]
        if flat == [line]:  # the first of the run
            log.warning(COLLAPSED, training.epoch, self.config["learning_rate"])
        if self._write("metrics", write_metrics, self.run_dir, training.history):
            self._write("board", self.board.write, training.history)
        last = training.epoch == self.config["epochs"]
        if last or training.epoch % self.config["log_interval"] == 0:
            path = self.run_dir / checkpoint_name(self.config["backbone"], training.epoch)
            content = training.model.state_dict(), self.config, training.epoch
            self._write("weights", save_checkpoint, path, *content)
        # after the weights: a complete state implies that they are on disk
        if last or time.monotonic() - self.saved_at >= 60 * self.config["save_minutes"]:
            self._write_state(training)
        self.clock = time.perf_counter()

    def check_written(self) -> None:
        """Raise UserError if the last write of any file failed."""
        if self.unwritten:
            raise UserError("; ".join(self.unwritten.values()))

    def _resume_or_start(
        self, training: Training, saved: SavedState | None, start_over: bool
    ) -> None:
        if saved is not None:
            restore(training, saved, self.images)
            self.keep = not saved.problems  # a damaged state does not replace a good one
            log.info(describe_resume(training, saved))
            self._write("metrics", write_metrics, self.run_dir, training.history)
        elif self.writes:
            if start_over and (aside := move_aside(self.run_dir)) is not None:
                log.info(f"moved the files of the earlier run to {aside}")
            if training.init is not None:  # here, in the log of this run
                log.info(training.init)
            self._write_state(training)
            self.check_written()
        if self.writes:
            write_file(self.run_dir / "config.yaml", OmegaConf.to_yaml(self.config).encode())

    def _write_state(self, training: Training) -> bool:
        written = self._write(
            "state", save_state, self.run_dir, training, self.images, self.config, self.keep
        )
        if written:
            self.keep, self.saved_at = True, time.monotonic()
        return written

    def _save_on_signal(self, training: Training, signal: int) -> Stopped:
        done = f"{training.steps_done} of {self.steps} steps"
        where = f" in epoch {training.epoch + 1} after {done}"
        written = self._write_state(training)
        barrier()  # a rank that ends makes torchrun end the others
        if not written:
            return Stopped(signal, f"{where}; {self.unwritten['state']}; the old state is kept")
        command = "same command" + ("" if self.config["resume"] else ", without resume=false,")
        return Stopped(signal, f"{where}; the state is saved: the {command} resumes the run")

    def _write_failure_report(
        self, training: Training, metrics: dict[str, float], rate: float
    ) -> UserError:
        i, n = training.steps_done, self.config["batch_size"]
        loss, norm = (str(metrics[name]) for name in ("loss", "gradient_norm"))
        report = {
            "epoch": training.epoch + 1,
            "step": training.epoch * self.steps + i + 1,
            "loss": loss,  # as text: JSON has no nan
            "gradient_norm": norm,
            "learning_rate": rate,
            "batch": training.order[i * n : (i + 1) * n].tolist(),
        }
        path = self.run_dir / "failure.json"
        self._write("failure", write_file, path, json.dumps(report).encode())
        barrier()  # a rank that ends makes torchrun end the others
        return UserError(
            f"loss {loss}, gradient norm {norm} in step {report['step']} of epoch "
            f"{report['epoch']} (see {path}); this step is not saved: start over with resume=false "
            f"and a lower learning_rate ({self.config['learning_rate']:g}), a higher temperature "
            f"({self.config['temperature']:g}) or precision=fp32"
        )

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


def report_complete(run_dir: Path, saved: SavedState) -> dict[str, float | None]:
    """Log that the run in `run_dir` is complete, and restore weights and metrics if missing.

    Returns the metrics of its last epoch. Raises UserError if a file cannot be written.
    """
    content = saved.content
    path = run_dir / checkpoint_name(content["config"]["backbone"], content["epoch"])
    if rank() == 0:
        if not path.exists():
            save_checkpoint(path, content["model"], content["config"], content["epoch"])
        write_metrics(run_dir, content["history"])
    log.info(
        f"{run_dir} holds this run, complete with {content['epoch']} epochs: simclr_lin.py "
        "evaluates it, resume=false starts over"
    )
    return log_summary(run_dir, content["config"], content["history"])


def log_summary(
    run_dir: Path, config: dict[str, Any], history: list[dict[str, float | None]]
) -> dict[str, float | None]:
    """Log the last line of metrics.jsonl in words, and return it.

    Beside loss and contrastive accuracy stand those of an encoder that maps all images to a point.
    """
    line, others = history[-1], 2 * config["batch_size"] - 1
    knn = "" if line["knn_acc"] is None else f", kNN {line['knn_acc']:.1%} (training images)"
    log.info(
        f"epoch {line['epoch']}: loss {line['loss']:.4f} (collapsed: {math.log(others):.4f}), "
        f"contrastive accuracy {line['contrastive_accuracy']:.1%} (collapsed: {1 / others:.1%})"
        f"{knn}; saved {run_dir / checkpoint_name(config['backbone'], line['epoch'])}"
    )
    return line
