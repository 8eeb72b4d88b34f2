"""A run: its progress, what it writes, and how it ends."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from config import Config
from system.checkpoint import checkpoint_name, load_init, to_bytes
from system.errors import StopSignals, UserError, progress_bar
from system.files import check_ours, locked, move_aside, write_file
from training import metrics as diagnostics
from training.distributed import all_reduce_max, all_reduce_mean, check_same, rank
from training.optim import schedule
from training.state import START_OVER, Learner, find_state

log = logging.getLogger("simclr")


@contextmanager
def open_run(run_dir: Path, cfg: Config) -> Iterator[dict[str, Any] | None]:
    """Hold the run directory's lock in the block, which gets the saved state; as `find_state`."""
    with locked(run_dir, "simclr") if rank() == 0 else nullcontext():
        check_ours(run_dir)
        saved = find_state(run_dir, cfg) if cfg.resume else None
        check_same(saved["step"] if saved else -1, f"training states in {run_dir}")
        yield saved


class Run:
    """Progress and files of a run. A write that fails warns, and the next save tries again."""

    def __init__(
        self, run_dir: Path, cfg: Config, learner: Learner, *, images: str, steps: int
    ) -> None:
        """images: fingerprint of the training images; steps: of an epoch."""
        self.run_dir, self.cfg, self.learner = run_dir, cfg, learner
        self.images, self.steps, self.total_steps = images, steps, cfg.epochs * steps
        self.history: list[dict[str, float | None]] = []  # of metrics.jsonl, a line an epoch
        self.step_metrics: list[dict[str, float]] = []  # of the current epoch
        self.pending: list[Tensor] = []  # the same of the last steps, still on the device
        self.seconds, self.clock = 0.0, time.perf_counter()  # that these steps took; since when
        self.saved, self.saved_at = (-1, 0), time.monotonic()  # step and epoch; when it was tried
        self.unwritten: dict[str, str] = {}  # what was not written, and why
        self.board, self.stop = diagnostics.TensorBoard(run_dir), StopSignals()
        self.untrained_rank: float | None = None
        self.tensors = [*learner.model.parameters(), *learner.model.buffers()]

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return len(self.history)

    @property
    def steps_done(self) -> int:
        """Completed steps of the current epoch."""
        return len(self.step_metrics) + len(self.pending)

    @property
    def step(self) -> int:
        """Completed steps of the run."""
        return self.epoch * self.steps + self.steps_done

    def start(self, saved: dict[str, Any] | None) -> None:
        """Resume from a state, or start. Raises UserError if state or init does not fit."""
        if saved is not None:
            self._restore(saved)
        else:
            if self.cfg.init:
                load_init(self.learner.model.enc, self.cfg.init)
            all_reduce_max(0)  # a barrier: init may be among what rank 0 moves
            if rank() == 0 and not self.cfg.resume:
                move_aside(self.run_dir)
            self.save()
        self.check_written()  # before config.yaml: without a state it would be refused
        if rank() == 0:
            write_file(self.run_dir / "metrics.jsonl", diagnostics.to_lines(self.history))
            write_file(self.run_dir / "config.yaml", OmegaConf.to_yaml(asdict(self.cfg)).encode())

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["images"] != self.images:
            raise UserError(f"{self.run_dir} was trained on other images: {START_OVER}")
        self.learner.restore(saved)
        self.history, self.step_metrics = saved["history"], saved["step_metrics"]
        self.seconds, self.saved = saved["seconds"], (self.step, self.epoch)
        line = f"{self.run_dir}: {self.epoch} epochs and {self.steps_done} steps are done"
        if self.epoch == self.cfg.epochs:
            line = f"{self.run_dir} holds this run, complete; resume=false starts over"
            if not self._checkpoint().exists():  # its save may have failed
                self._save_checkpoint()
        log.info(line)

    def _checkpoint(self) -> Path:
        return self.run_dir / checkpoint_name(self.cfg.backbone, self.epoch)

    def _save_checkpoint(self) -> None:
        if rank() == 0:
            weights = {name: w.cpu() for name, w in self.learner.model.state_dict().items()}
            content = {"model": weights, "config": asdict(self.cfg), "epoch": self.epoch}
            self._write("checkpoint", self._checkpoint(), to_bytes(content))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Train in the block. However that ends, the state of the last complete step is saved, but
        not after a step that is not finite or ended halfway. UserError as `check_written`."""
        bar = progress_bar(total=self.total_steps, initial=self.step, unit="step", delay=0.1)
        with self.stop, bar as self.bar:
            self.clock, self.between_steps = time.perf_counter(), self._position()
            try:
                yield
                self.check_signal()  # one that came during the last save
            finally:
                again = self.stop.received is not None  # a second signal, or its save has failed
                if self._position() != self.between_steps:
                    log.warning("warning: the last step was cut short or diverged: it is not saved")
                elif not again and (self.step, self.epoch) != self.saved:
                    self.save()
        self.check_written()
        line = diagnostics.summary(self.history[-1], self.cfg, self.untrained_rank)
        log.info(f"{line}; saved {self._checkpoint()}")

    def _position(self) -> tuple[int, int]:
        """Steps, and torch's count of writes to weights and statistics: these change together."""
        return self.step, sum(tensor._version for tensor in self.tensors)

    def log_step(self, metrics: dict[str, Tensor]) -> None:
        """Count a step; its metrics stay on the device for a second. Raises UserError, Stopped."""
        self.names = list(metrics)
        self.pending.append(all_reduce_mean(torch.stack(list(metrics.values()))))
        self.between_steps = self._position()
        if self.steps_done == self.steps or time.perf_counter() - self.clock > 1:
            self._read_metrics()
            if time.monotonic() - self.saved_at >= 60 * self.cfg.save_minutes:
                self.save()
                self.clock = time.perf_counter()
        self.check_signal()

    def _read_metrics(self) -> None:
        """Copy the pending metrics from the device, which waits for their steps."""
        rows = torch.stack(self.pending).tolist() if self.pending else []
        self.pending = []
        for row in rows:
            metrics = dict(zip(self.names, row, strict=True))
            loss, norm = metrics["loss"], metrics["gradient_norm"]
            scaled = self.learner.scaler.is_enabled()  # fp16: skips a step whose norm overflows
            if not (math.isfinite(loss) and (scaled or math.isfinite(norm))):  # and not counted
                step = f"loss {loss}, gradient norm {norm} in step {self.step + 1}, not saved"
                remedy = f"a lower learning_rate ({self.cfg.learning_rate:g}) or precision=fp32"
                raise UserError(f"{step}: {START_OVER}, with {remedy}")
            self.step_metrics.append(metrics)
            accuracy = f"{metrics['contrastive_accuracy']:.1%}"
            self.bar.set_postfix(loss=loss, contrastive=accuracy, refresh=False)
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.bar.update(len(rows))

    def check_signal(self) -> None:
        """After a signal: save the state, then raise Stopped, or let its own handler decide."""
        number = all_reduce_max(self.stop.received or 0)  # so that all ranks stop at one step
        if number == 0:
            return
        command = "the same command" if self.cfg.resume else "the same command without resume=false"
        ended = f"the state is saved: {command} resumes" if self.save() else self.unwritten["state"]
        all_reduce_max(0)  # a barrier: a rank that ends makes torchrun end the others
        where = f" after {self.epoch} epochs and {self.steps_done} of {self.steps} steps; {ended}"
        self.stop.act(number, where)

    def end_epoch(self, knn_acc: float | None, effective_rank: float | None) -> None:
        """Complete the epoch and write what is due: metrics, weights, at the end the state."""
        learning_rate, size = schedule(self.cfg, self.step - 1, self.total_steps)
        line = {
            "epoch": self.epoch + 1,
            "step": self.step,
            **diagnostics.epoch_means(self.step_metrics),
            "knn_acc": knn_acc,
            "effective_rank": effective_rank,
            "learning_rate": learning_rate,  # of the last step, as the view size
            "view_size": size,
            "views_per_second": self.cfg.views * self.cfg.batch_size * self.steps / self.seconds,
            "seconds": self.seconds,
        }
        self.history.append(line)
        self.step_metrics, self.seconds = [], 0.0
        diagnostics.warn_of_collapse(self.history, self.cfg)
        if knn_acc is not None:
            self.bar.set_description(f"kNN {knn_acc:.1%}")
        last = self.epoch == self.cfg.epochs
        if rank() == 0:
            metrics = diagnostics.to_lines(self.history)
            self._write("metrics", self.run_dir / "metrics.jsonl", metrics)
            self.board.write(line)
        if last or self.epoch % self.cfg.log_interval == 0:
            self._save_checkpoint()
        # after the weights: a complete state implies that they are on disk
        if last:
            self.save()
        self.clock = time.perf_counter()

    def save(self) -> bool:
        """Write the training state, 8 bytes a weight; returns whether it is on disk."""
        if self.pending:
            self._read_metrics()
        if rank() == 0:
            learner, path = self.learner, self.run_dir / f"simclr_{self.cfg.backbone}_last.pt"
            content = {
                "model": learner.model.state_dict(),
                "optimizer": learner.optimizer.state_dict(),
                "scaler": learner.scaler.state_dict(),
                "step": self.step,
                "step_metrics": self.step_metrics,
                "seconds": self.seconds,
                "history": self.history,
                "images": self.images,
                "config": asdict(self.cfg),
            }
            self._write("state", path, to_bytes(content))
        self.saved_at = time.monotonic()  # or tried: a full disk does not warn in every step
        if "state" in self.unwritten:
            return False
        self.saved = self.step, self.epoch
        return True

    def _write(self, what: str, path: Path, content: bytes) -> None:
        self.unwritten.pop(what, None)
        try:
            write_file(path, content)
        except UserError as error:
            self.unwritten[what] = str(error)
            log.warning(f"warning: {error}")

    def check_written(self) -> None:
        """Raise UserError, on every rank, if the last write of any file failed."""
        if all_reduce_max(len(self.unwritten)):
            raise UserError("; ".join(self.unwritten.values()) or "rank 0 could not write")
