"""Several processes (torchrun, gloo) compute what one computes, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY
from filelock import FileLock

import simclr
import simclr_lin
from models import SimCLR
from system import environment, errors
from system.errors import ConfigError, Stopped, StopSignals, UserError
from training import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PROCESSES = (2, 4)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def parallel_steps(folder):
    """A minute: 1, 2 and 4 processes, one after the other."""
    folder.mkdir(exist_ok=True)
    for n in (1, *PROCESSES):
        start = [sys.executable] if n == 1 else [*TORCHRUN, f"--nproc_per_node={n}"]
        script = str(REPOSITORY / "tests/parallel_steps.py")
        command = [*start, script, str(folder / str(n)), str(folder / "1")]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def steps(tmp_path_factory, worker_id):
    """steps(case, processes): what parallel_steps.py has written, once for all test workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "parallel_steps"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            parallel_steps(folder)
            (folder / "complete").touch()
    return lambda case, n: torch.load(folder / str(n) / f"{case}.pt", weights_only=True)


def apart(one: dict, other: dict) -> float:
    """Distance of two lists of tensors as a share of the second's length."""
    a, b = (torch.cat([t.flatten().double() for t in tensors.values()]) for tensors in (one, other))
    return ((a - b).norm() / b.norm()).item()


def same_steps(ours: list[dict], single: list[dict], count: int) -> None:
    """In float64 each step's loss and gradients agree, with the weights of the steps before."""
    assert len(ours) == len(single) == count
    for one, other in zip(ours, single, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-11)
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)
        assert apart(one["gradients"], other["gradients"]) < 1e-10


@pytest.mark.parametrize("n", PROCESSES)
@pytest.mark.parametrize("case", ["float64", "lars"])
def test_without_batch_norm_ranks_compute_what_one_process_computes(steps, case, n):
    same_steps(steps(case, n), steps(case, 1), 20 if case == "float64" else 3)


@pytest.mark.parametrize(("images", "n"), [(8, 2), (4, 2), (4, 4)])
def test_ranks_with_their_own_statistics_are_micro_batches(steps, images, n):
    """Statistics of a rank's images, or of a micro-batch: the same loss and gradients."""
    case = f"statistics of {images} images"
    same_steps(steps(case, n), steps(case, 1), 20)
    eight, four = (steps(f"statistics of {k} images", 1)[0]["loss"] for k in (8, 4))
    assert abs(eight - four) > 1e-4  # or all statistics would do


@pytest.mark.parametrize("n", PROCESSES)
def test_lars_recomputation_and_micro_batches_go_together_on_ranks(steps, n):
    same_steps(steps("lars with statistics", n), steps("lars with statistics", 1), 3)


@pytest.mark.parametrize("n", PROCESSES)
def test_in_float32_they_are_to_rounding(steps, n):
    """At each of 20 steps from the same weights: the loss to 1e-6, gradients to 2e-5, but where a
    unit is at the kink of a ReLU."""
    distances = []
    for one, other in zip(steps("float32", n), steps("float32", 1), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        distances.append(apart(one["gradients"], other["gradients"]))
    assert len(distances) == 20 and sorted(distances)[14] < 2e-5 and max(distances) < 0.03


@pytest.mark.parametrize(
    ("case", "least"),
    [
        ("no gradient through the gather", 0.1),
        ("gradient too small", 0.4),
        ("numbers of its own", 0.1),
    ],
)
@pytest.mark.parametrize("n", PROCESSES)
def test_known_mistakes_would_be_seen(steps, case, least, n):
    """Pitfall 23: the comparison above is not blind to what published code has got wrong."""
    assert apart(steps(case, n)[0]["gradients"], steps("float64", 1)[0]["gradients"]) > least


class Run:
    """simclr.py under torchrun, with a small network."""

    def __init__(
        self,
        n: int,
        *arguments: str,
        restarts: int = 0,
        machines: str = "",
        before: tuple[str, ...] = (),
    ) -> None:
        start = [*TORCHRUN, f"--nproc_per_node={n}", f"--max-restarts={restarts}"]
        start += machines.split()
        command = [*before, *start, str(REPOSITORY / "tests/thin_simclr.py"), *arguments]
        self.process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)

    def workers(self) -> list[int]:
        """Their process numbers, in the order of their ranks."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with open(path) as file:
            return [int(number) for number in file.read().split()]

    def wait(self) -> tuple[int, list[str]]:
        """Exit code, and what our code said on stderr."""
        _, self.stderr = self.process.communicate(timeout=120)  # ends with the last of the ranks
        lines = self.stderr.replace("\r", "\n").splitlines()
        return self.process.returncode, [line for line in lines if "error:" in line.split("(")[0]]


def epochs(folder) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["epoch"] for line in lines]


def wait_for(folder, count: int) -> None:
    """Until metrics.jsonl has so many lines."""
    for _ in range(1200):
        if len(epochs(folder)) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{count} epochs took longer than a minute")


@pytest.fixture
def job(write_images, tmp_path, config, thin):
    """job.folder, job.arguments for the command line, job.cfg and job.single for this process."""
    data = write_images(tmp_path / "images", train=16, test=3)
    keys = [
        "dataset=folder", f"data_dir={data}", "image_size=8", "batch_size=16", "epochs=60",
        "device=cpu", "precision=fp32", "knn_interval=20", "hidden_dim=16", "projection_dim=8",
        "save_minutes=0", "sync_batchnorm=false",
    ]  # fmt: skip

    class Job:
        folder = tmp_path / "run"
        arguments = (*keys, f"hydra.run.dir={folder}")
        cfg = config(*keys)
        single = config(*keys, "micro_batch_size=8")  # what two ranks compute, in one process

    return Job


def test_a_run_goes_on_after_a_kill_and_signals_with_other_numbers_of_processes(job, tmp_path):
    """Two processes, one of which is killed and started again; then four; then one."""
    two = Run(2, *job.arguments, "resume=false", restarts=1)  # a restart goes on all the same
    wait_for(job.folder, 3)
    os.kill(two.workers()[1], signal.SIGKILL)
    wait_for(job.folder, len(epochs(job.folder)) + 3)
    two.process.send_signal(signal.SIGTERM)
    assert two.wait()[0] == 1  # torchrun's code
    log = (job.folder / "simclr.log").read_text()
    assert log.count("resumes from") == 1 and log.count("images of") == 2  # by process 0 alone

    four = Run(4, *job.arguments)
    wait_for(job.folder, len(epochs(job.folder)) + 3)
    four.process.send_signal(signal.SIGUSR1)  # which torchrun does not pass on but ends of
    code, said = four.wait()
    assert (code, said) == (-signal.SIGUSR1, [])
    assert four.stderr.count("the state is saved: the same command resumes the run") == 4

    simclr.pretrain(job.cfg, job.folder)
    assert epochs(job.folder) == list(range(1, 61))
    boards = list(job.folder.glob("events.out.tfevents.*"))
    assert len(boards) == 4  # two processes, started twice; four; one: by process 0 alone
    single = tmp_path / "single"
    single.mkdir()
    simclr.pretrain(job.single, single)
    ours, whole = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (job.folder, single)
    )
    for name in ("loss", "alignment", "gradient_norm"):
        assert ours[0][name] == pytest.approx(whole[0][name], rel=0.02), name
    assert ours[-1]["learning_rate"] == whole[-1]["learning_rate"]


def test_a_closed_session_is_saved_under_nohup_too(job):
    """torchrun handles a SIGHUP that it was started to ignore."""
    two = Run(2, *job.arguments, "save_minutes=100", before=("nohup",))
    wait_for(job.folder, 1)
    two.process.send_signal(signal.SIGHUP)
    assert two.wait() == (1, [])
    assert two.stderr.count("stopped by SIGHUP in epoch") == 2
    assert two.stderr.count("the state is saved: the same command resumes the run") == 2


def test_a_restart_on_one_machine_restarts_the_others(job):
    """Two of them, played by two torchruns, which need not count the same restarts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"--rdzv_endpoint=localhost:{free.getsockname()[1]}"
    machines = f"--nnodes=2 --rdzv_backend=c10d {endpoint}"
    runs = [Run(1, *job.arguments, restarts=3, machines=machines) for _ in range(2)]
    wait_for(job.folder, 2)
    os.kill(runs[0].workers()[0], signal.SIGKILL)
    assert [run.wait()[0] for run in runs] == [0, 0]
    assert epochs(job.folder) == list(range(1, 61))


def test_one_process_that_ends_ends_all(job):
    run = Run(2, *job.arguments)
    wait_for(job.folder, 1)
    before = time.monotonic()
    os.kill(run.workers()[1], signal.SIGKILL)
    code, said = run.wait()
    assert code == 1 and time.monotonic() - before < 60
    assert len(said) <= 1 and all("another rank has ended" in line for line in said)


def test_a_mistake_of_the_user_is_said_once(job):
    run = Run(2, *job.arguments, "data_dir=nowhere")
    code, said = run.wait()
    said = [line for line in said if "another rank has ended" not in line]
    assert code == 1 and len(said) == 1 and said[0].startswith("error: nowhere/train")


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_batch_makes_equal_shards(monkeypatch):
    distributed.check_ranks(6, None, True, True, CPU)
    with pytest.raises(ConfigError, match="micro_batch_size=4: must divide the 6 images of each"):
        distributed.check_ranks(6, 4, True, False, CPU)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    distributed.check_ranks(32, 2, False, "auto", CPU)
    with pytest.raises(ConfigError, match="batch_size=24: must be a multiple of 16, four images"):
        distributed.check_ranks(24, None, False, False, CPU)
    with pytest.raises(ConfigError, match="micro_batch_size=3: must divide the 8 images"):
        distributed.check_ranks(32, 3, False, False, CPU)


def test_compile_true_is_refused_on_several_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="compile=true: must be false or auto with 2 ranks"):
        distributed.check_ranks(32, None, False, True, CPU)


def test_synchronised_batch_norm_is_refused_on_several_ranks_without_gpus(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    distributed.check_ranks(32, None, True, "auto", CUDA)
    with pytest.raises(ConfigError, match=r"sync_batchnorm=true: needs GPUs.*set sync_batchnorm=f"):
        distributed.check_ranks(32, None, True, False, CPU)


def test_on_gpus_batch_norm_is_torchs_synchronised_one(monkeypatch, thin):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **options: model)
    for sync in (True, False):
        model = distributed.wrap_ddp(SimCLR(), sync)
        layers = [m for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
        assert len(layers) == (6 if sync else 0)


def test_the_config_says_whether_batch_norm_is_synchronised(monkeypatch, thin, toy):
    seen = []
    monkeypatch.setattr(distributed, "wrap_ddp", lambda model, sync: seen.append(sync) or model)
    for choice in ("true", "false"):
        simclr.start_training(toy(f"sync_batchnorm={choice}"), CPU, 1)
    assert seen == [True, False]


def test_shards_of_the_columns(monkeypatch):
    x = torch.arange(16).view(1, 16)
    assert torch.equal(distributed.local_shard(x, views=2), x)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.local_shard(x, views=2).tolist() == [[4, 5, 6, 7, 12, 13, 14, 15]]
    assert distributed.local_shard(x[0]).tolist() == list(range(8, 16))


def test_ranks_that_see_different_states_do_not_go_on(monkeypatch):
    distributed.check_same((3, 4), "states")
    monkeypatch.setattr(distributed, "all_reduce_max", lambda number: max(number, 2))
    with pytest.raises(UserError, match="the ranks see different states in x: it must be on a"):
        distributed.check_same((1, 0), "states in x")


def test_a_signal_to_another_process_stops_this_one_too():
    with StopSignals(agree=lambda number: max(number, signal.SIGTERM)) as stop:
        assert stop.received is None
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    here = environment.Launch(world_size=4, rank=2, local_rank=2)
    monkeypatch.setattr(distributed, "launch", lambda: here)
    monkeypatch.setattr(errors, "rank", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused = pytest.raises(UserError, match=r"local rank 2 has no GPU .*at most 2")
    with refused, distributed.process_group(CUDA):
        pass
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "_join", lambda here: 1 / 0)
    with pytest.raises(ZeroDivisionError), distributed.process_group(CUDA):
        pass
    assert chosen == [2]


def test_the_evaluation_is_refused_under_torchrun(monkeypatch):
    here = environment.Launch(world_size=2)
    monkeypatch.setattr(distributed, "launch", lambda: here)
    with pytest.raises(ConfigError, match="start it with python, or env -u WORLD_SIZE python"):
        simclr_lin.main.__wrapped__(None)
