"""Device, number format and compilation: what auto takes, and what is refused."""

import pytest
import torch

from device import autocast, select_device, select_precision
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
