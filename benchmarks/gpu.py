"""All that a GPU can tell about this repository, in 25 minutes, as lines of JSON.

    python benchmarks/gpu.py data/cifar10-jpeg               # IMAGES; appends to gpu.jsonl
    python benchmarks/gpu.py IMAGES --parts tests steps      # five minutes

IMAGES are CIFAR-10 as files (docs/results.md). In this order, so that each part is worth having if
the rest is cut off; a part that fails is a line with its error, and the next one runs. It also runs
on a CPU with small numbers (tests/test_benchmarks.py has them).

tests   the tests that ask for a device, on this one (pytest --device=cuda)
steps   milliseconds a step and seconds an epoch, eager, as a CUDA graph and compiled; peak memory
        beside the estimate of memory.py; the share of a step in which the GPU has nothing to do;
        bit for bit the same with a graph and without
plain   kNN after --epochs epochs of the plain pipeline and of simclr.py, on the same images
runs    simclr.py with recipe=simsiam and with recipe=fast for at most ten minutes each, of what is
        left of --minutes, then kNN and linear evaluation
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer

import torch
from harness import EpochEnd, Recorder, config, describe_machine, folder, knn, parser, synchronize
from memory import step_memory
from plain import Plain, plain_loader, plain_transform
from time_to_accuracy import our_run, plain_run
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import simclr
from config import Config
from images.datasets import load_split
from models import SimCLR
from system.device import select_device

REPOSITORY = Path(__file__).parent.parent
FIRST = 10  # steps in which cuDNN chooses, the graph is recorded, or torch compiles
MODES = GRAPHED, EAGER, COMPILED = "graph", "eager", "compiled"  # compiled: as a graph too


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


class Session:
    """The images, the options, and the file to which each line goes."""

    def __init__(self, args: Namespace, cfg: Config, device: torch.device) -> None:
        """cfg: for kNN."""
        self.args, self.cfg, self.device = args, cfg, device
        self.train, self.test = (load_split(cfg, part).to(device) for part in ("train", "test"))
        self.batch = f"batch_size={args.batch}"
        self.deadline = time.monotonic() + 60 * args.minutes

    def say(self, what: str, **values: object) -> None:
        """One line of JSON, here and in the file."""
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"what": what, **rounded})
        print(line, flush=True)
        with self.args.out.open("a") as file:
            print(line, file=file)

    def tests(self) -> None:
        """The tests that ask for a device."""
        command = [sys.executable, "-m", "pytest", "-o", "addopts=-v", "-p", "no:cacheprovider"]
        where = [f"--device={self.device.type}", "--maxfail=20", *self.args.tests]
        with subprocess.Popen(
            [*command, *where], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        ) as process:
            timer = Timer(400, process.terminate)  # what it has printed until then is reported
            timer.start()
            lines = process.stdout.read().splitlines()
            timer.cancel()
        failed = [line for line in lines if "FAILED" in line or "ERROR" in line]
        summary = lines[-1] if lines else ""
        self.say("tests", code=process.returncode, summary=summary, failed=failed)

    def steps(self) -> None:
        """The same steps with a graph and without; time and memory of steps."""
        sizes = sorted(self.args.sizes, reverse=True)
        phases = f"view_sizes=[[{sizes[-1]},0.4],[{sizes[0]},0.6]]", "epochs=4", self.batch
        steps, few = min(28, self.args.steps), self.train.images[: 7 * self.args.batch]  # both
        (a, weights, _), (b, others, _) = (
            train_steps(few, steps, graphed, *phases, profiled=0) for graphed in (True, False)
        )
        same = torch.equal(a, b) and all(torch.equal(w, others[k]) for k, w in weights.items())
        self.say("a graph is bit for bit the eager step", same=same)
        del weights, others
        for size in sizes:
            self.time_modes(self.args.backbones[0], size)
        for backbone in self.args.backbones[1:]:
            self.time_modes(backbone, sizes[0])

    def time_modes(self, backbone: str, size: int) -> None:
        """Steps at one view size in each of the modes."""
        images, precision = self.train.images, f"precision={self.cfg.precision}"
        options = self.batch, f"backbone={backbone}", f"view_sizes=[[{size},1]]"
        train_steps(images, 2, False, *options, profiled=0)
        for how in self.args.modes if self.device.type == "cuda" else (EAGER,):
            compiled = f"compile={how == COMPILED}"
            costs = train_steps(images, self.args.steps, how != EAGER, *options, compiled)[2]
            self.say(
                f"{backbone}, {size} pixels, {how}", **costs,
                epoch_seconds=costs["ms"] / 1e3 * (len(images) // self.args.batch),
                estimated_gib=step_memory(backbone, self.args.batch, precision, size=size),
            )  # fmt: skip

    def plain(self) -> None:
        """A step of the plain pipeline; then kNN of both after the same training."""
        images, workers = self.train.images, self.args.workers
        rate = f"learning_rate={0.06 * self.args.batch / 256}"  # twice simsiam's: a short run
        cfg = config("recipe=simsiam", rate, self.batch, f"epochs={self.args.epochs}")
        plain, transform = Plain(SimCLR("resnet18"), cfg), plain_transform(cfg, images.shape[-1])
        loader = plain_loader(images.cpu(), self.args.batch, transform, workers=workers)
        filled = min(2 * workers, len(loader) // 2)  # steps until the loader runs at its own pace
        for done, pair in enumerate(loader):
            if done == filled:
                synchronize()
                start = time.perf_counter()
            plain.step(pair)
        synchronize()
        ms = 1e3 * (time.perf_counter() - start) / (len(loader) - filled)
        self.say(f"plain pipeline, {workers} workers", ms=ms)
        for name, run in (
            ("simclr.py", our_run(cfg, images)),
            ("plain pipeline", plain_run(cfg, images.cpu(), workers)),
        ):
            start = time.perf_counter()
            *_, model = run
            seconds = time.perf_counter() - start
            found = 100 * knn(model.enc, self.cfg, self.train, self.test)
            self.say(f"{name}, {cfg.epochs} epochs", knn=found, seconds=seconds)

    def runs(self) -> None:
        """Both recipes for as long as there is time, with the scripts as a user starts them."""
        for i, recipe in enumerate(("simsiam", "fast")):
            left = (self.deadline - time.monotonic()) / (2 - i) - 90  # for the evaluation
            cfg = config(f"recipe={recipe}", self.batch, *self.args.run)
            steps, seconds = len(self.train.images) // self.args.batch, 0.0
            for size, share in cfg.view_sizes or [[cfg.image_size, 1.0]]:
                rates = f"optimizer={cfg.optimizer}", f"learning_rate={cfg.learning_rate}"
                options = *rates, self.batch, f"view_sizes=[[{size},1]]", *self.args.run
                costs = train_steps(self.train.images, min(30, self.args.steps), True, *options)[2]
                seconds += share * steps * costs["ms"] / 1e3
            epochs = max(1, int(min(600.0, left) / seconds))
            with tempfile.TemporaryDirectory() as run_dir:
                data = folder(self.args.data, f"hydra.run.dir={run_dir}")
                common = *data, f"recipe={recipe}", self.batch
                often = f"knn_interval={max(1, epochs // 10)}"
                start = time.perf_counter()
                self.script("simclr.py", *common, f"epochs={epochs}", often)
                seconds = time.perf_counter() - start
                self.script("simclr_lin.py", *common, "protocols=[knn,linear,linear_clean]")
                metrics = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
                found = json.loads((Path(run_dir) / "results.json").read_text())
            scores = {row["protocol"]: row["accuracy"] for row in found["protocols"]}
            self.say(
                f"recipe={recipe}", epochs=epochs, seconds=seconds, scores=scores,
                knn=[json.loads(line)["knn_acc"] for line in metrics], last=json.loads(metrics[-1]),
            )  # fmt: skip

    def script(self, name: str, *overrides: str) -> None:
        """Run simclr.py or simclr_lin.py; raises RuntimeError with its last lines if it fails."""
        command = [sys.executable, REPOSITORY / name, *overrides, *self.args.run]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")


PARTS: dict[str, Callable[[Session], None]] = {
    name: getattr(Session, name) for name in ("tests", "steps", "plain", "runs")
}


def main() -> None:
    """The parts that were asked for, in their order."""
    args = parser(__doc__)
    args.add_argument("data", type=Path, help="folder with train/<class>/* and test/<class>/*")
    args.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    args.add_argument("--minutes", type=float, default=25)
    args.add_argument("--batch", type=int, default=512)
    args.add_argument("--backbones", nargs="+", default=["resnet18", "resnet34", "resnet50"])
    args.add_argument("--sizes", type=int, nargs="+", default=[32, 24, 16])
    args.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of `steps`")
    args.add_argument("--steps", type=int, default=60)
    args.add_argument("--epochs", type=int, default=20, help="of the comparison in `plain`")
    args.add_argument("--workers", type=int, default=16, help="of the plain pipeline")
    args.add_argument("--tests", nargs="+", default=["tests"], help="for pytest")
    args.add_argument("--run", nargs="+", default=[], help="more overrides for the scripts")
    args = args.parse_args()
    describe_machine()
    session = Session(args, config(*folder(args.data)), select_device("auto"))
    for name in args.parts:
        start = time.monotonic()
        try:
            PARTS[name](session)
        except Exception as error:  # the next part may work, and time on a GPU is dear
            session.say(f"{name} failed", error=f"{type(error).__name__}: {error}")
        session.say(f"{name} took", minutes=(time.monotonic() - start) / 60)


if __name__ == "__main__":
    main()
