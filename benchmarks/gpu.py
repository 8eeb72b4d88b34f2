"""All that a GPU can tell about this repository, in 25 minutes, as lines of JSON.

    python benchmarks/gpu.py data/cifar10-jpeg               # IMAGES; appends to gpu.jsonl
    python benchmarks/gpu.py IMAGES --parts tests steps      # five minutes

IMAGES are CIFAR-10 as files (docs/results.md). In this order, so that each part is worth having if
the rest is cut off; a part that fails is a line with its error, and the next one runs. It also runs
on a CPU with small numbers (tests/test_benchmarks.py has them).

tests   the tests that ask for a device, on this one (pytest --device=cuda)
steps   milliseconds a step and seconds an epoch, eager, as a CUDA graph and compiled; peak memory
        beside the estimate of memory.py; the share of a step in which the GPU has nothing to do;
        bit for bit the same with a graph and without; the views after which compiling has paid
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import EpochEnd, NoRecord, config, describe_machine, parser, synchronize
from memory import step_memory
from plain import plain_loader, plain_step, plain_transform
from time_to_accuracy import knn, our_run, plain_run

import simclr
from images.datasets import Split, load_split
from models import SimCLR
from system.device import select_device, select_precision
from training.state import Training

REPOSITORY = Path(__file__).parent.parent
FIRST = 10  # steps in which cuDNN chooses, the graph is recorded, or torch compiles
MODES = GRAPHED, EAGER, COMPILED = "graph", "eager", "compiled"  # compiled: as a graph too


class Record(NoRecord):
    """Keeps copies of the metrics, since a graph overwrites them, and the time of some steps."""

    def __init__(self, steps: int, profiled: int) -> None:
        super().__init__()
        self.steps, self.profiled, self.times = steps, profiled, {}
        self.first = min(FIRST, steps // 2)
        self.profiler = profile(activities=[ProfilerActivity.CUDA])

    def log_step(self, training: Training, metrics: dict[str, Tensor], rate: float) -> None:
        """Ends simclr.train after the last step."""
        self.step_metrics.append(torch.stack(list(metrics.values())))
        done = len(self.step_metrics)
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

    def end_epoch(self, training: Training, *line: object) -> None:
        """Go on with the next epoch."""
        training.end_epoch({})


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
    training = simclr.start_training(cfg, images.device, steps)
    training.graphed = graphed and images.is_cuda
    record = Record(steps, profiled)
    with suppress(EpochEnd):
        simclr.train(cfg, training, images, None, record)
    after = record.times.get(record.first, start)
    ms = 1e3 * (record.times[steps] - after) / (steps - record.first)
    costs = {"ms": ms, "first_seconds": after - start}
    if images.is_cuda:
        costs["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    if profiled:
        costs["idle_share"] = 1 - record.kernel_ms() / ms
    return torch.stack(record.step_metrics).cpu(), training.model.state_dict(), costs


class Session:
    """The images, the options, and the file to which each line goes."""

    def __init__(self, args, train: Split, test: Split) -> None:
        self.args, self.train, self.test = args, train, test
        self.batch, self.device = f"batch_size={args.batch}", train.images.device
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
        """Time and memory of steps; the same with a graph; when compiling pays."""
        images, cuda = self.train.images, self.device.type == "cuda"
        sizes = sorted(self.args.sizes)
        phases = f"view_sizes=[[{sizes[0]},0.4],[{sizes[-1]},0.6]]", "epochs=4", self.batch
        steps, few = min(28, self.args.steps), images[: 7 * self.args.batch]  # both sizes
        (a, weights, _), (b, others, _) = (
            train_steps(few, steps, graphed, *phases, profiled=0) for graphed in (True, False)
        )
        same = torch.equal(a, b) and all(torch.equal(w, others[k]) for k, w in weights.items())
        self.say("a graph is bit for bit the eager step", same=same)
        del weights, others
        for backbone in self.args.backbones:
            for size in sizes[::-1] if backbone == self.args.backbones[0] else sizes[-1:]:
                found, warm = {}, ("compile=false", self.batch, f"backbone={backbone}")
                train_steps(images, 2, False, *warm, f"view_sizes=[[{size},1]]", profiled=0)
                for how in self.args.modes if cuda else (EAGER,):
                    compiled = "compile=" + str(how == COMPILED).lower()
                    options = self.batch, f"backbone={backbone}", f"view_sizes=[[{size},1]]"
                    graphed = how != EAGER
                    costs = train_steps(images, self.args.steps, graphed, *options, compiled)[2]
                    found[how] = costs
                    dtype = select_precision("auto", self.device)
                    self.say(
                        f"{backbone}, {size} pixels, {how}", **costs,
                        epoch_seconds=costs["ms"] / 1e3 * (len(images) // self.args.batch),
                        estimated_gib=step_memory(backbone, self.args.batch, dtype, False, size),
                    )  # fmt: skip
                if {GRAPHED, COMPILED} <= found.keys():
                    graph, fast = found[GRAPHED], found[COMPILED]
                    seconds = fast["first_seconds"] - graph["first_seconds"]
                    pays = 1e3 * seconds / max(1e-9, graph["ms"] - fast["ms"])
                    views = 2 * self.args.batch * pays
                    self.say(f"compiling pays, {backbone}, {size} pixels", steps=pays, views=views)

    def plain(self) -> None:
        """A step of the plain pipeline; then kNN of both after the same training."""
        images, workers = self.train.images, self.args.workers
        model = SimCLR("resnet18").to(self.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        transform = plain_transform(images.shape[-1], (0.2, 1.0), 0.5, 0.1)
        loader = plain_loader(images.cpu(), self.args.batch, transform, workers=workers)
        filled = min(2 * workers, len(loader) // 2)  # steps until the loader runs at its own pace
        for done, pair in enumerate(loader):
            if done == filled:
                synchronize()
                start = time.perf_counter()
            plain_step(model, optimizer, torch.cat(pair).to(self.device), 0.5)
        synchronize()
        ms = 1e3 * (time.perf_counter() - start) / (len(loader) - filled)
        self.say(f"plain pipeline, {workers} workers", ms=ms)
        rate = f"learning_rate={0.06 * self.args.batch / 256}"  # twice simsiam's: a short run
        cfg = config("recipe=simsiam", rate, self.batch, f"epochs={self.args.epochs}")
        for name, run in (
            ("simclr.py", our_run(cfg, images)),
            ("plain pipeline", plain_run(cfg, images.cpu(), workers)),
        ):
            start = time.perf_counter()
            *_, model = run
            seconds = time.perf_counter() - start
            found = 100 * knn(model, self.train, self.test)
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
                data = "dataset=folder", f"data_dir={self.args.data}", f"hydra.run.dir={run_dir}"
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
    args.data = args.data.resolve()
    describe_machine()
    device = select_device("auto")
    parts = (load_split("folder", str(args.data), part, 32, 4) for part in ("train", "test"))
    session = Session(args, *(part.to(device) for part in parts))
    for name in args.parts:
        start = time.monotonic()
        try:
            PARTS[name](session)
        except Exception as error:  # the next part may work, and time on a GPU is dear
            session.say(f"{name} failed", error=f"{type(error).__name__}: {error}")
        session.say(f"{name} took", minutes=(time.monotonic() - start) / 60)


if __name__ == "__main__":
    main()
