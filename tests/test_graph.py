"""A training step as a CUDA graph: the same results as eagerly. On a GPU with the real graph."""

from contextlib import contextmanager

import pytest
import torch

import simclr
from training.graph import EAGER_STEPS, GraphedStep
from training.optim import set_learning_rate


class FakeGraph:
    """Replays by calling the step with the tensors of the recording."""

    def replay(self):
        runner = self.runner
        before = runner.optimizer.param_groups[0]["lr"]
        set_learning_rate(runner.optimizer, runner.learning_rate)
        metrics = runner.step(runner.batch, runner.noise, runner.size)
        set_learning_rate(runner.optimizer, before)
        for name, value in metrics.items():
            runner.metrics[name].copy_(value)


def test_a_replayed_step_gets_batch_noise_and_learning_rate_of_each_step(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(FakeGraph()) or made[-1])

    @contextmanager
    def recording(graph):  # what it reads anew in each replay must be the tensors
        assert optimizer.param_groups[0]["lr"] is FakeGraph.runner.learning_rate
        yield

    monkeypatch.setattr(torch.cuda, "graph", recording)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)

    def step(batch, noise, size):
        rate = torch.as_tensor(optimizer.param_groups[0]["lr"])
        return {"sum": batch.sum() + 10 * noise.sum() + 100 * size + 1000 * rate}

    def run(eager):
        FakeGraph.runner = runner = GraphedStep(step, optimizer, eager)
        found = []
        for i in range(20):
            batch, noise = torch.full((4, 2), float(i)), torch.full((3,), i / 7)
            metrics = runner(batch, noise, 16 if i < 9 else 24, learning_rate=0.1 * i)
            found.append(metrics["sum"].item())
        return found

    replayed = run(eager=False)
    rate = optimizer.state_dict()["param_groups"][0]["lr"]
    assert type(rate) is float and rate == 0.1 * 19  # as after an eager step
    assert len(made) == 2 and EAGER_STEPS < 9  # one for each size
    assert replayed == pytest.approx(run(eager=True))
    assert len(made) == 2


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "muon"])
def test_training_with_graphs_is_bit_for_bit_training_without(
    gpu, same_convolutions, toy, thin, optimizer
):
    sizes = "view_sizes=[[8,0.5],[16,0.5]]"
    cfg = toy("epochs=4", "knn_interval=0", f"optimizer={optimizer}", "learning_rate=0.1", sizes)
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, device=gpu)

    class Record:
        def __init__(self):
            self.metrics = []

        def log_step(self, training, metrics, rate):
            self.metrics.append(torch.stack(list(metrics.values())))

        def end_epoch(self, training, *line):
            training.end_epoch({})

    def run(graphed):
        training = simclr.start_training(cfg, gpu, 32)
        assert training.graphed
        training.graphed = graphed
        record = Record()
        simclr.train(cfg, training, images, None, record)
        return torch.stack(record.metrics), training.model.state_dict()

    (metrics, weights), (eager_metrics, eager_weights) = run(True), run(False)
    assert torch.equal(metrics, eager_metrics)
    assert all(torch.equal(weights[name], eager_weights[name]) for name in weights)
