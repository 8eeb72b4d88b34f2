"""Device, precision and compilation: what auto takes, and what is refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor

from system import device
from system.device import (
    autocast,
    compile_static,
    select_compile,
    select_device,
    select_precision,
)
from system.errors import ConfigError

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device='cuda'.*cpu"):
        select_device("cuda")


def test_auto_prefers_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto").type == "cuda"
    assert select_device("cpu").type == "cpu"


def test_float32_products_are_float32_whatever_the_environment_asks():
    """NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which is this."""
    torch.set_float32_matmul_precision("high")
    select_device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"


def cpu_with(monkeypatch, *capabilities):
    there = dict.fromkeys(capabilities, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there, raising=False)


def test_auto_precision_is_bf16_where_the_hardware_has_it(monkeypatch):
    for capability in ("avx512_bf16", "amx_bf16"):
        cpu_with(monkeypatch, "avx512_f", capability)
        assert select_precision("auto", CPU) == torch.bfloat16
    cpu_with(monkeypatch, "avx512_f", "avx2")
    assert select_precision("auto", CPU) == torch.float32
    with monkeypatch.context() as older:  # torch before 2.13
        older.delattr(torch.cpu, "get_capabilities")
        assert select_precision("auto", CPU) == torch.float32
    assert select_precision("auto", MPS) == torch.float32
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, native=native: native or including_emulation,
        )
        assert select_precision("auto", CUDA) == expected


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_named_precision_is_taken_as_it_is(monkeypatch, name, dtype):
    cpu_with(monkeypatch)
    assert select_precision(name, CPU) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_precision(dtype):
    layer = torch.nn.Linear(2, 2)
    with autocast(CPU, dtype):
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.fixture
def trials(monkeypatch):
    """The devices on which a trivial function was compiled; trials.error, if set, is raised."""

    class Trials(list):
        error = None

    trials = Trials()

    def compile_function(f):
        def compiled(x):
            trials.append(x.device)
            if trials.error is not None:
                raise trials.error
            return f(x)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_function)
    return trials


META = torch.device("meta")


def test_auto_compiles_runs_that_earn_the_time_back(trials, monkeypatch):
    monkeypatch.setitem(device.COMPILE_PAYS, "meta", 20)
    for where, enough in ((CPU, 200_000), (META, 20)):
        assert select_compile("auto", where, enough) is True and trials.pop() == where
        assert select_compile("auto", where, enough - 1) is False
        assert select_compile("auto", where, enough, supported=False) is False
    assert device.COMPILE_PAYS["cuda"] == 7_000_000
    assert select_compile("auto", MPS, 10**12) is False
    assert select_compile(False, CPU, 10**12) is False
    assert not trials  # trying it takes seconds
    assert select_compile(True, CPU, 1) is True and trials == [CPU]


def test_where_compiling_fails_auto_warns_and_true_is_refused(trials, caplog):
    trials.error = RuntimeError("no\n  triton " + 500 * "x")
    assert select_compile("auto", CPU, 10**12) is False
    [record] = caplog.records
    said = record.getMessage()
    assert said.startswith(
        "warning: compile=auto does not compile on this machine (RuntimeError: no triton xx"
    )
    assert record.levelname == "WARNING" and len(said) < 300
    trials.error = ZeroDivisionError("division by zero")
    message = r"compile=true: must be false or auto on this machine \(ZeroDivisionError: division"
    with pytest.raises(ConfigError, match=message):
        select_compile(True, CPU, 1)


def test_no_trial_where_compiling_is_not_supported_warns_of_nothing(trials, caplog):
    """Several ranks or recomputed activations: nothing is wrong with the machine."""
    assert select_compile("auto", CPU, 10**12, supported=False) is False
    assert not trials and not caplog.records


TRAIN = [
    "dataset=digits", "image_size=8", "batch_size=256", "hidden_dim=8", "projection_dim=4",
    "knn_interval=0", "epochs=1", "device=cpu", "precision=fp32",
]  # fmt: skip


def failing_backend(monkeypatch, part):
    """torch.compile whose compiler fails on `part` of the graph: "forward" or "backward"."""

    def compiler(name):
        def compile_graph(graph, inputs):
            if name == part:
                raise OSError("failed to map segment from shared object")
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("part", "choice", "warm"),
    [("forward", "auto", False), ("forward", "true", False), ("forward", "true", True),
     ("backward", "auto", True)],
)  # fmt: skip
def test_what_cannot_be_compiled_is_one_line(call, thin, monkeypatch, part, choice, warm):
    """Wherever it fails, in the trial or later (warm: the trial passes): auto loses nothing."""
    monkeypatch.setitem(device.COMPILE_PAYS, "cpu", 0)
    if warm:
        monkeypatch.setattr(device, "select_compile", lambda *_: True)
    failing_backend(monkeypatch, part)
    code, error = call("simclr.py", *TRAIN, f"compile={choice}", "hydra.run.dir=run")
    torch._dynamo.reset()
    assert "Traceback" not in error
    if choice == "true":
        message = "error: compile=true: must be false or auto on this machine ("
        assert code == 2 and error.splitlines()[-1].startswith(message)
        return
    said = "warning: compile=auto does not compile on this machine (BackendCompilerFailed: backend="
    assert code == 0 and call.stdout.count(said) == 1 and "Error" not in error, error
    code, error = call("simclr.py", *TRAIN, "compile=false", "hydra.run.dir=eager")
    eager, auto = (Path(run, "metrics.jsonl").read_text() for run in ("eager", "run"))
    assert without_times(auto) == without_times(eager)


def without_times(metrics):
    """A line of metrics.jsonl without what differs between any two runs."""
    return {
        k: v for k, v in json.loads(metrics).items() if k not in ("seconds", "views_per_second")
    }


def test_a_compiler_that_has_ceased_to_work_is_found_though_a_cache_is_warm(tmp_path):
    script = tmp_path / "c++"
    script.write_text('#!/bin/sh\nexec c++ "$@"\n')
    script.chmod(0o755)
    with inductor.patch({"cpp.cxx": (None, str(script))}):
        torch._dynamo.reset()
        assert select_compile(True, CPU, 1)
        for broken in ("echo an internal error >&2; exit 1", "exit 0", "kill -9 $$"):
            script.write_text(f"#!/bin/sh\n{broken}\n")
            torch._dynamo.reset()
            with pytest.raises(ConfigError, match="compile=true: must be false or auto") as error:
                select_compile(True, CPU, 1)
            said = str(error.value)
            assert "\n" not in said and "TORCHDYNAMO_VERBOSE" not in said and len(said) < 300
            assert "internal error" in said or "exit 1" not in broken
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["", "false", "/nowhere/c++"])
def test_no_compiler_at_all_is_one_line(compiler):
    torch._dynamo.reset()
    refused = pytest.raises(ConfigError, match="compile=true: must be false or auto")
    with inductor.patch({"cpp.cxx": (None, compiler)}), refused as error:
        select_compile(True, CPU, 1)
    assert "\n" not in str(error.value) and "TORCHDYNAMO_VERBOSE" not in str(error.value)
    torch._dynamo.reset()


def test_every_run_of_a_process_is_compiled(monkeypatch):
    """After eight forms of a function torch would go on with it as it is."""
    graphs = []

    def double(x):
        return 2 * x

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for size in range(2, 12):
        assert select_compile(True, CPU, 1)
        compile_static(double, True)(torch.zeros(size))
    assert len(graphs) == 2 * 10
    torch._dynamo.reset()
