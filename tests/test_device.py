"""Device, precision and compilation: what auto takes, and what is refused."""

import pytest
import torch
import torch._inductor.config

from system import device
from system.device import (
    autocast,
    compile_obstacle,
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


def cpu_with(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))


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
def obstacle(monkeypatch):
    """obstacle("without …"): what compile_obstacle finds from then on; returns what it is asked."""
    asked = []

    def make(reason):
        monkeypatch.setattr(
            device, "compile_obstacle", lambda *where: asked.append(where) or reason
        )
        return asked

    return make


def test_auto_compiles_runs_that_earn_the_time_back(obstacle):
    asked = obstacle(None)
    for where, enough in ((CPU, 200_000), (CUDA, 20_000_000)):
        assert select_compile("auto", where, enough, True, 3) is True
        assert asked.pop() == (where, True, 3)
        assert select_compile("auto", where, enough - 1, False, 1) is False
    assert select_compile("auto", MPS, 10**12, False, 1) is False
    assert select_compile(False, CPU, 10**12, False, 1) is False
    assert not asked  # trying it takes seconds
    assert select_compile(True, CPU, 1, False, 1) is True and asked == [(CPU, False, 1)]


def test_where_compiling_is_not_possible_auto_warns_and_true_is_refused(obstacle, caplog):
    obstacle("without a compiler")
    assert select_compile("auto", CPU, 1, False, 1) is False and not caplog.records
    assert select_compile("auto", CPU, 10**12, False, 1) is False
    [record] = caplog.records
    assert record.getMessage() == "warning: compile=auto does not compile without a compiler"
    assert record.levelname == "WARNING"
    with pytest.raises(ConfigError, match="compile=true: must be false or auto without a compiler"):
        select_compile(True, CPU, 10**12, False, 1)


def test_what_stands_against_compiling_is_named_without_trying_it(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: pytest.fail("tried"))
    for world_size in (1, 2):
        found = compile_obstacle(CPU, recompute=True, world_size=world_size)
        assert found.startswith("with activation_checkpointing=true or micro_batch_size")
    assert compile_obstacle(CPU, False, world_size=2).startswith("with 2 ranks")


def test_compiling_is_tried_on_the_device_and_whatever_fails_is_named(monkeypatch):
    tried = []
    monkeypatch.setattr(torch, "compile", lambda f: lambda x: tried.append(x.device) or f(x))
    for where in (CPU, torch.device("meta")):
        assert compile_obstacle(where, recompute=False, world_size=1) is None
        assert tried.pop() == where
    monkeypatch.setattr(torch, "compile", lambda f: lambda x: 1 / 0)  # when it runs
    found = compile_obstacle(CPU, False, 1)
    assert found == "on this machine (ZeroDivisionError: division by zero)"
    monkeypatch.setattr(torch, "compile", lambda f: 1 / 0)  # when it is compiled
    assert compile_obstacle(CPU, False, 1) == found

    def fail(f):
        raise RuntimeError("no\n  triton " + 500 * "x")

    monkeypatch.setattr(torch, "compile", fail)
    found = compile_obstacle(CPU, False, 1)
    assert found.startswith("on this machine (RuntimeError: no triton xx") and len(found) < 250


@pytest.fixture
def no_compiler(monkeypatch):
    """A machine on which torch finds no C++ compiler."""
    torch._dynamo.reset()  # what was compiled before is compiled again
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    yield
    torch._dynamo.reset()


def test_a_machine_without_a_compiler_is_noticed(no_compiler):
    found = compile_obstacle(CPU, False, 1)
    assert found.startswith("on this machine (") and "compiler" in found and "\n" not in found
