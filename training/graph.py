"""A training step as a CUDA graph: one launch a step instead of one for each of its kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], dict[str, Tensor]]  # batch, noise, view size -> metrics

EAGER_STEPS = 3  # before a recording: cuDNN chooses its algorithms, the optimizer makes its buffers


class GraphedStep:
    """Record a training step each time the view size changes, and replay it from then on.

    A step of ResNet-18 has 3,000 kernels; launching them one by one takes a fast GPU longer than
    running them (docs/gpu.md). The first steps of each size run eagerly. Numbers are part of a
    recording, so the learning rate must be a tensor; the next step overwrites the metrics.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.optimizer = step, optimizer
        self.size, self.eager_steps, self.graph = 0, 0, None

    def __call__(self, batch: Tensor, noise: Tensor, size: int) -> dict[str, Tensor]:
        """One step; batch: (N, 3, H, W), uint8; noise: as `train_step` takes it."""
        if size != self.size:
            self.size, self.eager_steps, self.graph = size, 0, None
        if self.eager_steps < EAGER_STEPS:
            self.eager_steps += 1
            return self.step(batch, noise, size)
        if self.graph is None:
            self.batch, self.noise = batch.clone(), noise.clone()
            self.optimizer.zero_grad()  # so that the gradients lie in the graph's memory
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.metrics = self.step(self.batch, self.noise, self.size)
        self.batch.copy_(batch)
        self.noise.copy_(noise)
        # a replay does not count as a write, by which an interrupted step is told (training.run)
        torch.autograd.graph.increment_version(self.optimizer.param_groups[0]["params"][0])
        self.graph.replay()
        return self.metrics
