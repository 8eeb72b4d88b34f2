"""Device, precision and compilation: what auto takes, and what is refused."""

import warnings
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor

from config import ConfigError
from system import device as device_module
from system.device import autocast, compile_static, select_device, select_precision, to_device
from system.errors import describe

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def gpu_is(monkeypatch):
    """gpu_is(error): this machine has a GPU, whose first kernel raises the error; None: works."""

    def gpu_is(error):
        def compute(*size, device):
            if error is not None:
                raise error
            return torch.ones(1)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA Relic {index}")
        monkeypatch.setattr(torch, "zeros", compute)

    return gpu_is


def test_auto_takes_cuda_then_mps_then_the_cpu(gpu_is, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, expected in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert select_device("auto").type == expected
    gpu_is(None)
    assert select_device("auto").type == select_device("cuda").type == "cuda"
    assert select_device("cpu").type == "cpu" and not caplog.records


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(ConfigError, match=f"^device={name}: must be one that .* has, cpu, or"):
            select_device(name)


def old_driver():
    warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=2)
    return False


@pytest.mark.parametrize("kind", ["no kernel", "old driver", "torch without CUDA"])
def test_a_gpu_that_torch_cannot_use_is_refused_with_remedy_or_warned_of(
    gpu_is, monkeypatch, caplog, kind
):
    if kind == "no kernel":
        gpu_is(RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might"))
        reason = r"NVIDIA Relic 0: CUDA error: no kernel image is available; install the torch"
    elif kind == "old driver":
        monkeypatch.setattr(torch.cuda, "is_available", old_driver)
        reason = r"CUDA initialization: The NVIDIA driver on your system is too old; install the"
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(device_module.os.path, "exists", lambda path: "nvidia" in path)
        reason = r"this torch, \S+, is built without CUDA; install the torch build that fits GPU"
    with pytest.raises(ConfigError, match=rf"^device=cuda: must be .*\({reason}") as error:
        select_device("cuda")
    assert describe(error.value)[1] == 2 and "take device=cpu" in str(error.value)
    assert not caplog.records and select_device("auto") == CPU
    [record] = caplog.records
    assert record.levelname == "WARNING" and "since torch cannot use the GPU" in record.message
    assert reason.split(r"\S+")[0] in record.message and "\n" not in record.message


def test_ranks_do_not_fall_back_and_a_full_gpu_is_no_broken_one(gpu_is, monkeypatch):
    gpu_is(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        select_device("auto")
    gpu_is(RuntimeError("CUDA error: no kernel image is available"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="device=auto: NVIDIA Relic 1: CUDA error: no kernel"):
        select_device("auto")


def test_float32_products_are_float32_whatever_the_environment_asks():
    """NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which is this."""
    torch.set_float32_matmul_precision("high")
    select_device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"


def test_auto_precision_is_bf16_where_the_hardware_has_it(monkeypatch):
    def cpu_with(*capabilities):
        there = dict.fromkeys(capabilities, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there, raising=False)

    for capability in ("avx512_bf16", "amx_bf16"):
        cpu_with("avx512_f", capability)
        assert select_precision("auto", CPU) == "bf16"
    cpu_with("avx512_f", "avx2")
    assert select_precision("auto", CPU) == "fp32" and select_precision("bf16", CPU) == "bf16"
    with monkeypatch.context() as older:  # torch before 2.13
        older.delattr(torch.cpu, "get_capabilities")
        assert select_precision("auto", CPU) == "fp32"
    assert select_precision("auto", MPS) == "fp32"
    for native, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, native=native: native or including_emulation,
        )
        assert select_precision("auto", CUDA) == expected


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_computes_in_the_precision(name, dtype):
    layer = torch.nn.Linear(2, 2)
    with autocast(CPU, name):
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_a_tensor_is_copied_to_the_device(device):
    x = torch.arange(6).view(2, 3)
    copy = to_device(x, device)
    assert copy.device.type == device.type and torch.equal(copy.cpu(), x)


def double(x):
    return 2 * x


@pytest.fixture
def fail_in(monkeypatch):
    """fail_in(part): torch.compile's compiler fails on that part of the graph, or on none."""

    def fail_in(part):
        def compiler(name):
            def compile_graph(graph, inputs):
                if name == part:
                    raise OSError("failed to map segment\n  from shared object" + 300 * "x")
                return make_boxed_func(graph.forward)

            return compile_graph

        backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    yield fail_in
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_where_compiling_fails_auto_warns_once_and_true_is_refused(fail_in, caplog, part):
    """The backward pass is compiled with the forward pass: nothing has run by then."""
    fail_in(part)
    x = torch.ones(2, requires_grad=True)
    run = compile_static(double, "auto")
    for _ in range(2):
        assert run(x).tolist() == [2, 2]
    run(x).sum().backward()
    [record] = [record for record in caplog.records if record.name == "simclr"]
    said = "warning: compile=auto does not compile on this machine (BackendCompilerFailed: "
    assert record.message.startswith(said) and record.levelname == "WARNING"
    assert "\n" not in record.message and len(record.message) < 300
    with pytest.raises(ConfigError, match="compile=true: must be false or auto on this machine"):
        compile_static(double, True)(x)


def test_an_error_of_the_function_is_not_one_of_the_compiler(fail_in, caplog):
    fail_in(None)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        compile_static(stumble, "auto")(torch.ones(2))
    assert not [record for record in caplog.records if record.name == "simclr"]


@torch.compiler.disable
def stumble(x):
    raise RuntimeError("a bug of ours")


def test_a_machine_without_a_compiler_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    refused = pytest.raises(ConfigError, match="compile=true: must be false or auto")
    with inductor.patch({"cpp.cxx": (None, "/nowhere/c++")}), refused as error:
        compile_static(double, True)(torch.ones(2))
    assert "\n" not in str(error.value) and "TORCHDYNAMO_VERBOSE" not in str(error.value)
    torch.compiler.reset()


def test_every_run_of_a_process_is_compiled(monkeypatch):
    """After eight forms of a function torch would go on with it as it is."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for size in range(2, 12):
        compile_static(double, True)(torch.zeros(size))
    assert len(graphs) == 10
    torch.compiler.reset()
