"""All that a GPU can tell about this repository, in an hour, as lines of JSON.

    python benchmarks/gpu.py data/cifar10-png       # IMAGES; appends to logs/gpu/gpu.jsonl
    python benchmarks/gpu.py IMAGES --parts question --seeds 0    # four minutes

IMAGES are CIFAR-10 as files, train/<class>/* and test/<class>/*; `steps` needs a part of them. The
parts are run in the order given; a part or a run that fails is a line with its error, and the next
one runs. It also runs on a CPU with small numbers (tests/test_benchmarks.py has them).

question  recipe=simsiam at twice its rate, --epochs 100, for which dkobak/simclr-cifar10 published
          kNN 83.2 ± 0.2; linear 85.6 ± 0.2 on clean images, 85.0 ± 0.3 on crops (docs/gpu.md)
race      each of --levers for --epochs; then, for --length epochs, the best of all runs in --out by
          kNN of held-out training images: seconds from the command to the first checkpoint from
          which on kNN is --target, everything counted but kNN itself, as in race.py
tests     the tests that ask for a device, on this one (pytest --device=cuda)
steps     milliseconds a step and seconds an epoch, eager, as a CUDA graph and compiled; peak memory
          beside the estimate of memory.py; the share of a step in which the GPU has nothing to do;
          bit for bit the same with a graph and without
plain     kNN after --plain-epochs epochs of the plain pipeline and of simclr.py, on the same images

Each run of `question` and `race` leaves a new run directory in --out, and beside its checkpoint the
encoder in float16 (half_encoder.py) in parts of 15 MiB: cat encoder.pt.* > encoder.pt
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Timer

import torch
from half_encoder import half_encoder
from harness import config, describe_machine, folder, knn, parser, synchronize
from memory import step_memory
from plain import Plain, plain_loader, plain_transform
from race import first_that_stays, score, timed_run
from time_to_accuracy import our_run, plain_run
from timed_steps import train_steps

from config import Config
from images.datasets import load_split
from models import SimCLR
from system.checkpoint import find_checkpoint
from system.device import select_device

REPOSITORY = Path(__file__).parent.parent
SIMSIAM = ["recipe=simsiam", "learning_rate='${per_256:0.06,${batch_size}}'"]  # twice its own
FAST = ["recipe=fast", "views=2", "view_sizes=[[24,1]]"]  # four: measured for 1 to 4 epochs
LEVERS = {  # of the race, one run each
    "fast-t0.1": [*FAST, "temperature=0.1"],
    "fast-t0.2": [*FAST, "temperature=0.2"],
    "fast-t0.5": [*FAST, "temperature=0.5"],
    "fast-t0.2-at-32": ["recipe=fast", "views=2", "view_sizes=null", "temperature=0.2"],
}
PART = 15 * 2**20  # bytes
MODES = GRAPHED, EAGER, COMPILED = "graph", "eager", "compiled"  # compiled: as a graph too


class Session:
    """The images, the options, and the file to which each line goes."""

    def __init__(self, args: Namespace, cfg: Config, device: torch.device) -> None:
        """cfg: for kNN."""
        self.args, self.cfg, self.device = args, cfg, device
        self.train, self.test = (load_split(cfg, part).to(device) for part in ("train", "test"))
        self.batch = f"batch_size={args.batch}"
        self.log = args.out / "gpu.jsonl"

    def say(self, what: str, **values: object) -> None:
        """One line of JSON, here and in the file."""
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"what": what, **rounded})
        print(line, flush=True)
        with self.log.open("a") as file:
            print(line, file=file)

    def attempt(self, name: str, function: Callable[..., None], *args: object) -> None:
        """Call a part or a run; an error is a line: the next may work, and time here is dear."""
        start = time.monotonic()
        try:
            function(*args)
        except Exception as error:
            self.say(f"{name} failed", error=f"{type(error).__name__}: {error}")
        self.say(f"{name} took", minutes=(time.monotonic() - start) / 60)

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
        cfg = config(*SIMSIAM, self.batch, f"epochs={self.args.plain_epochs}")
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

    def question(self) -> None:
        """The published setting, for each seed."""
        for seed in self.args.seeds:
            name, overrides = f"simsiam-{seed}", [*SIMSIAM, f"seed={seed}"]
            self.attempt(name, self.pretrain, name, overrides, "knn,linear,linear_clean")

    def race(self) -> None:
        """The levers; then the best of all runs, from the command to the target."""
        for name in self.args.levers:
            self.attempt(name, self.pretrain, name, LEVERS[name])
        said = [json.loads(line) for line in self.log.read_text().splitlines()]
        runs = [line for line in said if "last" in line]  # chosen on training images
        best = max(runs, key=lambda run: run["last"]["knn_acc"])
        overrides = [*best["overrides"], f"epochs={self.args.length}", "log_interval=20"]
        run_dir = self.args.out / "race"
        run_dir.mkdir()
        checkpoints = timed_run([*folder(self.args.data), self.batch, *overrides], run_dir)
        judge = partial(score, cfg=self.cfg, train=self.train, test=self.test)
        won = first_that_stays(checkpoints, judge, self.args.target)
        self.keep_encoder(run_dir)
        self.say(f"race to kNN {self.args.target:g}", overrides=overrides, seconds_and_knn=won)

    def pretrain(self, name: str, overrides: list[str], protocols: str = "knn") -> None:
        """Pretrain and evaluate with the scripts as a user starts them; keeps what they leave."""
        run_dir = self.args.out / name
        run_dir.mkdir()  # fails where there is one: nothing is resumed, all is timed
        overrides = [*overrides, *self.args.run]
        where = *folder(self.args.data), self.batch, f"hydra.run.dir={run_dir}"
        length = f"epochs={self.args.epochs}", f"knn_interval={max(1, self.args.epochs // 5)}"
        start = time.perf_counter()
        self.script("simclr.py", *where, *overrides, *length)
        seconds = time.perf_counter() - start
        self.keep_encoder(run_dir)
        self.script("simclr_lin.py", *where, *overrides, f"protocols=[{protocols}]")
        rows = json.loads((run_dir / "results.json").read_text())["protocols"]
        scores = {row["protocol"]: 100 * row["accuracy"] for row in rows}
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        self.say(name, overrides=overrides, seconds=seconds, **scores, last=last)

    def keep_encoder(self, run_dir: Path) -> None:
        """Write the encoder of the newest checkpoint in float16, in parts."""
        content = half_encoder(find_checkpoint(run_dir))
        for i in range(0, len(content), PART):
            (run_dir / f"encoder.pt.{i // PART}").write_bytes(content[i : i + PART])

    def script(self, name: str, *overrides: str) -> None:
        """Run simclr.py or simclr_lin.py; raises RuntimeError with its last lines if it fails."""
        command = [sys.executable, REPOSITORY / name, *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")


PARTS: dict[str, Callable[[Session], None]] = {
    name: getattr(Session, name) for name in ("question", "race", "tests", "steps", "plain")
}


def main() -> None:
    """The parts that were asked for."""
    args = parser(__doc__)
    args.add_argument("data", type=Path, help="folder with train/<class>/* and test/<class>/*")
    args.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args.add_argument("--out", type=Path, default=Path("logs/gpu"), help="directory")
    args.add_argument("--commit", help="for the record")
    args.add_argument("--seeds", type=int, nargs="+", default=[0], help="of `question`")
    args.add_argument("--epochs", type=int, default=100, help="of `question` and the levers")
    args.add_argument("--levers", nargs="*", choices=LEVERS, default=list(LEVERS))
    args.add_argument("--length", type=int, default=300, help="epochs of the race's last run")
    args.add_argument("--target", type=float, default=90.0, help="kNN accuracy in %% of the race")
    args.add_argument("--batch", type=int, default=512)
    args.add_argument("--backbones", nargs="+", default=["resnet18", "resnet34", "resnet50"])
    args.add_argument("--sizes", type=int, nargs="+", default=[32, 24, 16])
    args.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of `steps`")
    args.add_argument("--steps", type=int, default=60)
    args.add_argument("--plain-epochs", type=int, default=20, help="of `plain`")
    args.add_argument("--workers", type=int, default=16, help="of the plain pipeline")
    args.add_argument("--tests", nargs="+", default=["tests"], help="for pytest")
    args.add_argument("--run", nargs="+", default=[], help="more overrides for the scripts")
    args = args.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(args, config(*folder(args.data)), select_device("auto"))
    session.say("machine", machine=describe_machine(), commit=args.commit)
    for name in args.parts:
        session.attempt(name, PARTS[name], session)


if __name__ == "__main__":
    main()
