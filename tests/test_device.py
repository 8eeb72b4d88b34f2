"""Device, number format and compilation: what auto takes, and what is refused."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from device import autocast, compile_obstacle, select_compile, select_device, select_precision
from errors import ConfigError

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
def found(monkeypatch):
    """found(False): no C++ compiler; until then all that compiling needs, whatever there is."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(Path, "exists", lambda path: True)

    def make(compiler: bool):
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" * compiler)

    make(True)
    return make


def test_auto_compiles_runs_that_earn_the_time_back(found):
    for where, enough in ((CPU, 200_000), (CUDA, 20_000_000)):
        assert select_compile("auto", where, enough, None)
        assert not select_compile("auto", where, enough - 1, None)
        assert not select_compile("auto", where, enough, "without a compiler")
    assert not select_compile("auto", MPS, 10**12, None)
    assert select_compile(True, CPU, 1, None) and not select_compile(False, CPU, 10**12, None)


def test_what_stands_against_compiling_is_named(found):
    assert compile_obstacle(CPU, recompute=False) is None
    assert compile_obstacle(CPU, recompute=True).startswith("with activation_checkpointing=true")
    assert compile_obstacle(CPU, False, processes=2).startswith("in 2 processes")
    found(False)
    assert compile_obstacle(CPU, False).startswith("without the C++ compiler ")


def test_what_a_gpu_lacks_for_compiling_is_named(found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))  # GTX 1080 Ti
    assert "without a GPU of compute capability 7.0" in compile_obstacle(CUDA, False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compile_obstacle(CUDA, False) == "without the package triton"


def test_a_compiler_with_a_wrapper_is_found(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "ccache" else None)
    assert compile_obstacle(CPU, False) is None
