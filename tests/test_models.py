"""The architecture against torchvision, NT-Xent against a slow transcription of Algorithm 1."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torchvision.models import resnet18

from models import BACKBONES, SimCLR, nt_xent


def algorithm_1(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """Algorithm 1 of the paper, line by line, in float64: z_{2k-1}, z_{2k} are one image."""
    n = len(z1)
    z = np.empty((2 * n, z1.shape[1]))
    z[0::2], z[1::2] = z1, z2

    def s(i: int, j: int) -> float:
        return z[i] @ z[j] / (np.linalg.norm(z[i]) * np.linalg.norm(z[j]))

    def ell(i: int, j: int) -> float:
        others = sum(math.exp(s(i, k) / temperature) for k in range(2 * n) if k != i)
        return -math.log(math.exp(s(i, j) / temperature) / others)

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


def pairs(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    z1, z2 = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    return z1, 0.5 * z1 + z2  # related, some of the cosines negative


@pytest.mark.parametrize("n", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_is_algorithm_1(device, n, temperature):
    z1, z2 = pairs(n, 5)
    loss, _ = nt_xent(z1.to(device), z2.to(device), temperature)
    expected = algorithm_1(z1.double().numpy(), z2.double().numpy(), temperature)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gradient_is_that_of_algorithm_1(device):
    """By central differences of the transcription, for every coordinate of both views."""
    z1, z2 = (z.requires_grad_() for z in pairs(4, 3))
    nt_xent(z1.to(device), z2.to(device), 0.5)[0].backward()
    values = [z.detach().double().numpy() for z in (z1, z2)]
    for view, z in enumerate((z1, z2)):
        for index in np.ndindex(4, 3):
            losses = []
            for change in (1e-5, -1e-5):
                moved = [value.copy() for value in values]
                moved[view][index] += change
                losses.append(algorithm_1(*moved, 0.5))
            numeric = (losses[0] - losses[1]) / 2e-5
            assert z.grad[index].item() == pytest.approx(numeric, abs=1e-5)


def test_a_positive_pair_with_negative_cosine_is_pulled_together():
    z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    z2 = torch.tensor([[-1.0, 0.2], [0.2, -1.0]])
    nt_xent(z1, z2)[0].backward()
    assert (z1.grad * z2).sum(dim=1).max() < 0  # a step against the gradient raises the cosine


@pytest.mark.parametrize("n", [1, 2, 5, 512])
def test_identical_embeddings_give_log_of_the_number_of_candidates(n):
    z = torch.ones(n, 4)
    assert nt_xent(z, z)[0].item() == pytest.approx(math.log(2 * n - 1), abs=1e-5)


def test_low_temperature_does_not_overflow():
    z1, z2 = pairs(16, 8)
    z1.requires_grad_()
    loss, _ = nt_xent(z1, z2, 1e-3)  # exp(1000) is infinite in float32
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32_under_autocast(device, dtype):
    z1, z2 = (z.to(dtype) for z in pairs(32, 16))
    expected = algorithm_1(z1.double().numpy(), z2.double().numpy(), 0.1)
    with torch.autocast(device.type, dtype=dtype):
        loss, _ = nt_xent(z1.to(device), z2.to(device), 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_accuracy_is_the_share_of_views_whose_partner_is_nearest():
    z = torch.eye(4)
    z1 = z.clone().requires_grad_()
    loss, accuracy = nt_xent(z1, z)
    assert accuracy.item() == 1 and not accuracy.requires_grad and loss.requires_grad
    z2 = z.clone()
    z2[[0, 1]] = z2[[1, 0]]  # the partners of 0 and 1 exchanged: 4 of 8 views are wrong
    assert nt_xent(z, z2)[1].item() == 0.5
    torch.manual_seed(0)
    chance = nt_xent(*torch.randn(2, 256, 64))[1].item()
    assert chance < 0.03


@pytest.mark.parametrize(
    ("shape1", "shape2", "temperature"),
    [((2, 3), (3, 3), 0.5), ((0, 3), (0, 3), 0.5), ((3,), (3,), 0.5), ((2, 3), (2, 3), 0.0)],
)
def test_nt_xent_refuses_what_eq_1_does_not_define(shape1, shape2, temperature):
    with pytest.raises(ValueError, match=r"z1 and z2|temperature"):
        nt_xent(torch.ones(shape1), torch.ones(shape2), temperature)


def published_keys() -> set[str]:
    """The state-dict keys of p3i0t/SimCLR-CIFAR10: a torchvision resnet18 as `enc`, no `fc`."""
    enc = {f"enc.{key}" for key in resnet18().state_dict() if not key.startswith("fc.")}
    return enc | {f"projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


def test_defaults_have_the_keys_and_shapes_of_the_published_checkpoints():
    weights = SimCLR().state_dict()
    assert set(weights) == published_keys()
    assert weights["enc.conv1.weight"].shape == (64, 3, 3, 3)
    assert weights["projector.0.weight"].shape == (2048, 512)
    assert weights["projector.2.bias"].shape == (128,)


def test_encoder_loads_strictly_into_a_torchvision_resnet_and_gives_the_same_h():
    model = SimCLR().eval()
    plain = resnet18()
    plain.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    plain.maxpool = plain.fc = nn.Identity()
    weights = model.state_dict().items()
    enc = {key.removeprefix("enc."): value for key, value in weights if key.startswith("enc.")}
    plain.load_state_dict(enc, strict=True)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain.eval()(x), model(x)[0])


@pytest.mark.parametrize(
    ("backbone", "feature_dim"), [("resnet18", 512), ("resnet50", 2048), ("resnext50_32x4d", 2048)]
)
def test_forward_gives_h_and_z(backbone, feature_dim):
    model = SimCLR(backbone, projection_dim=16, hidden_dim=32).eval()
    with torch.no_grad():
        h, z = model(torch.rand(2, 3, 32, 32))
    assert model.feature_dim == feature_dim
    assert h.shape == (2, feature_dim) and z.shape == (2, 16)
    assert torch.equal(model.projector(h), z)


def first_map(cifar_stem: bool) -> torch.Size:
    """The size of what reaches the first residual block for a 32×32 image."""
    seen = []
    model = SimCLR(cifar_stem=cifar_stem).eval()
    model.enc.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    return seen[0]


def test_cifar_stem_keeps_the_resolution_and_the_other_does_not():
    assert first_map(cifar_stem=True) == (1, 64, 32, 32)
    assert first_map(cifar_stem=False) == (1, 64, 8, 8)


def test_each_backbone_is_torchvisions_network_of_that_name():
    """Wide ResNets and ResNeXts beside the plain ones, told apart by their number of weights."""
    sizes = {
        "resnet18": 11.69, "resnet34": 21.80, "resnet50": 25.56, "resnet101": 44.55,
        "resnet152": 60.19, "wide_resnet50_2": 68.88, "wide_resnet101_2": 126.89,
        "resnext50_32x4d": 25.03, "resnext101_32x8d": 88.79, "resnext101_64x4d": 83.46,
    }  # fmt: skip
    assert BACKBONES.keys() == sizes.keys()
    for name, millions in sizes.items():  # as torchvision's documentation has them, with fc
        with torch.device("meta"):
            weights = SimCLR(name, cifar_stem=False).enc.parameters()
        fc = 1000 * (512 if name in ("resnet18", "resnet34") else 2048) + 1000
        assert (sum(w.numel() for w in weights) + fc) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_is_without_fc_and_has_its_feature_dim(backbone):
    with torch.device("meta"):
        model = SimCLR(backbone)
        h = model.enc.layer4[-1](torch.zeros(1, model.feature_dim, 2, 2))
    assert isinstance(model.enc.fc, nn.Identity)
    assert h.shape[1] == model.feature_dim == model.projector[0].in_features


def test_head_has_no_batch_norm():
    assert [type(layer) for layer in SimCLR().projector] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("name", ["resnet19", "__import__('os')", ""])
def test_an_unknown_backbone_is_refused_with_the_list(name):
    with pytest.raises(ValueError, match="resnet18, resnet34, resnet50, resnet101, resnet152"):
        SimCLR(name)


def test_nt_xent_holds_two_matrices_of_all_pairs_at_most():
    """At N = 4,096, forward and backward together; beside them z and its gradient, 4 MiB each."""
    n = 4096
    with FakeTensorMode():
        z = [torch.rand(n, 128, requires_grad=True) for _ in range(2)]
        tracker = MemTracker()
        tracker.track_external(*z)
        with tracker:
            nt_xent(*z)[0].backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    matrix = 4 * (2 * n) ** 2
    assert 1.9 * matrix < peak < 2 * matrix + 24 * 2**20


@pytest.mark.usefixtures("same_convolutions")
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_blocks_give_the_same_gradients_and_running_statistics(device, backbone, dtype):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = SimCLR(backbone, 16, 32, activation_checkpointing=recompute).train().to(device)
        for _ in range(2):  # a second pass, to see that the statistics moved on once
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                _, z = model(torch.rand(8, 3, 16, 16).to(device))
            nt_xent(*z.chunk(2))[0].backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        found.append((gradients, dict(model.named_buffers())))
    for plain, recomputed in zip(*found, strict=True):
        assert plain.keys() == recomputed.keys()
        for name in plain:
            torch.testing.assert_close(plain[name], recomputed[name], msg=name)
    assert found[1][1]["enc.layer1.0.bn1.num_batches_tracked"] == 2


def test_recomputing_keeps_each_block_from_holding_its_activations():
    kept = []
    for recompute in (False, True):
        model = SimCLR("resnet18", 16, 32, activation_checkpointing=recompute).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(torch.rand(8, 3, 16, 16))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_recomputation_changes_neither_names_nor_evaluation():
    torch.manual_seed(0)
    plain, recomputed = SimCLR(), SimCLR(activation_checkpointing=True)
    recomputed.load_state_dict(plain.state_dict(), strict=True)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x)[0], recomputed.eval()(x)[0])


def test_an_exported_encoder_is_the_encoder_for_any_batch_size(device, thin, tmp_path):
    """As in the README; from the file, on the device on which it was exported."""
    torch.manual_seed(0)
    enc = SimCLR().enc.eval().requires_grad_(False).to(device)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(enc, (torch.rand(2, 3, 8, 8).to(device),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    images = torch.rand(5, 3, 8, 8).to(device)
    torch.testing.assert_close(loaded(images), enc(images))


def test_every_convolution_is_initialised_as_torchvisions():
    """He et al.: variance 2 / (output channels · kernel area), the stem of small images too."""
    torch.manual_seed(0)
    for name, conv in SimCLR().enc.named_modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = conv.out_channels * conv.weight[0, 0].numel()
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
