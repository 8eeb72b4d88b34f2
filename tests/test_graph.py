"""A training step as a CUDA graph: the same results as eagerly. On a GPU with the real graph."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import simclr
from training.graph import EAGER_STEPS, GraphedStep
from training.optim import set_learning_rate


class FakeGraph:
    """Replays by calling the step with the tensors, and the learning rate, of the recording."""

    made = 0

    def record(self, runner: GraphedStep) -> None:
        FakeGraph.made += 1
        self.runner, self.group = runner, runner.optimizer.param_groups[0]
        self.learning_rate = self.group["lr"]

    def replay(self) -> None:
        now, self.group["lr"] = self.group["lr"], self.learning_rate
        metrics = self.runner.step(self.runner.batch, self.runner.noise, self.runner.size)
        self.group["lr"] = now
        for name, value in metrics.items():
            self.runner.metrics[name].copy_(value)


def test_a_replayed_step_gets_batch_noise_and_learning_rate_of_each_step(monkeypatch):
    def step(batch: Tensor, noise: Tensor, size: int) -> dict[str, Tensor]:
        rate = optimizer.param_groups[0]["lr"]
        return {"sum": batch.sum() + 10 * noise.sum() + 100 * size + 1000 * rate}

    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=torch.zeros(()))
    graphed = GraphedStep(step, optimizer)

    @contextmanager
    def recording(graph: FakeGraph):
        graph.record(graphed)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    for i in range(20):
        set_learning_rate(optimizer, 0.1 * i)
        batch, noise = torch.full((4, 2), float(i)), torch.full((3,), i / 7)
        written = weight._version
        found = graphed(batch, noise, 16 if i < 9 else 24)["sum"].item()
        assert graphed.graph is None or weight._version > written  # a write, as Run counts them
        assert found == pytest.approx(step(batch, noise, 16 if i < 9 else 24)["sum"].item())
    assert FakeGraph.made == 2 and EAGER_STEPS < 9  # one for each size


class Recorder:
    """Stands in for training.run.Run: keeps copies of the metrics, which a graph overwrites."""

    def __init__(self) -> None:
        self.epoch, self.steps_done, self.metrics = 0, 0, []

    def log_step(self, metrics: dict[str, Tensor]) -> None:
        self.metrics.append(torch.stack(list(metrics.values())))

    def end_epoch(self, *measured: None) -> None:
        self.epoch += 1


@pytest.mark.usefixtures("same_convolutions", "thin")
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "muon"])
def test_training_with_graphs_is_bit_for_bit_training_without(gpu, toy, optimizer):
    sizes = "view_sizes=[[8,0.5],[16,0.5]]"
    cfg = toy("epochs=4", f"optimizer={optimizer}", "learning_rate=0.1", sizes, "precision=bf16")
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, device=gpu)
    found = []
    for graphed in (True, False):
        learner, run = simclr.make_learner(cfg, gpu), Recorder()
        assert learner.graphed
        learner.graphed = graphed
        simclr.train(cfg, learner, images, None, run)
        found.append((torch.stack(run.metrics), learner.model.state_dict()))
    (metrics, weights), (eager_metrics, eager_weights) = found
    assert len(metrics) == 32 and torch.equal(metrics, eager_metrics)
    assert all(torch.equal(weights[name], eager_weights[name]) for name in weights)
