"""Steps of simclr.train, with their time and memory: for gpu.py."""

import gc
import time
from contextlib import suppress

import torch
from harness import EpochEnd, Recorder, config, synchronize
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import simclr

FIRST = 10  # steps in which cuDNN chooses, the graph is recorded, or torch compiles


class StepRecorder(Recorder):
    """Ends simclr.train after some steps, and has the times of the first and the last."""

    def __init__(self, steps: int, profiled: int) -> None:
        super().__init__()
        self.steps, self.profiled, self.times = steps, profiled, {}
        self.first = min(FIRST, steps // 2)
        self.profiler = profile(activities=[ProfilerActivity.CUDA])

    def log_step(self, metrics: dict[str, Tensor]) -> None:
        """Keep the metrics; raises EpochEnd after the last step."""
        super().log_step(metrics)
        done = len(self.metrics)
        if done in (self.first, self.steps, self.steps + self.profiled):
            synchronize()
            self.times[done] = time.perf_counter()
        if done == self.steps and self.profiled:
            self.profiler.start()
        if done == self.steps + self.profiled:
            if self.profiled:
                self.profiler.stop()
            raise EpochEnd

    def kernel_ms(self) -> float:
        """Milliseconds of a step in which kernels ran; overlapping ones count twice."""
        events = self.profiler.key_averages()
        return sum(event.self_device_time_total for event in events) / 1e3 / self.profiled

    def end_epoch(self, *measured: None) -> None:
        """Go on with the next epoch."""
        self.epoch += 1


def train_steps(
    images: Tensor, steps: int, graphed: bool, *overrides: str, profiled: int = 10
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """The metrics of each step, the weights at the end, and times and memory.

    On a GPU `profiled` more steps follow, in which torch's profiler counts the time of kernels.
    """
    profiled = profiled if images.is_cuda else 0
    cfg = config("recipe=simsiam", "epochs=100", "compile=false", "min_learning_rate=0", *overrides)
    if images.is_cuda:
        gc.collect()  # a compiled model refers to itself
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # the images
    start = time.perf_counter()
    learner, recorder = simclr.make_learner(cfg, images.device), StepRecorder(steps, profiled)
    learner.graphed = graphed and images.is_cuda
    with suppress(EpochEnd):
        simclr.train(cfg, learner, images, None, recorder)
    after = recorder.times.get(recorder.first, start)
    ms = 1e3 * (recorder.times[steps] - after) / (steps - recorder.first)
    costs = {"ms": ms, "first_seconds": after - start}
    if images.is_cuda:
        costs["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    if profiled:
        costs["idle_share"] = 1 - recorder.kernel_ms() / ms
    return torch.stack(recorder.metrics).cpu(), learner.model.state_dict(), costs
