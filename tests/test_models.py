"""The architecture against torchvision, the loss and a step against slow transcriptions."""

import copy
import itertools
import math

import pytest
import torch
from conftest import thin_resnet
from torch import Tensor, nn
from torchvision.models import resnet18

import config as config_module
from images.augment import draw, random_views
from models import BACKBONES, SimCLR, nt_xent
from simclr import make_learner, train_step
from training.optim import set_learning_rate


def algorithm_1(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of the paper, line by line, in float64: z_{2k-1}, z_{2k} are one image."""
    n = len(z1)
    z = torch.stack([z1, z2], dim=1).flatten(0, 1).double()

    def s(i: int, j: int) -> Tensor:
        return z[i] @ z[j] / (z[i].norm() * z[j].norm())

    def ell(i: int, j: int) -> Tensor:
        others = sum(torch.exp(s(i, k) / temperature) for k in range(2 * n) if k != i)
        return -torch.log(torch.exp(s(i, j) / temperature) / others)

    return sum(ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


def pairs(n: int, d: int) -> tuple[Tensor, Tensor]:
    z1, z2 = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0))
    return z1, 0.5 * z1 + z2  # related, some of the cosines negative


@pytest.mark.parametrize("n", [1, 2, 3, 7, 17])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_is_algorithm_1(device, n, temperature):
    """Loss and gradient."""
    found, expected = ([z.requires_grad_() for z in pairs(n, 5)] for _ in range(2))
    loss, _ = nt_xent([z.to(device) for z in found], temperature)
    exact = algorithm_1(*expected, temperature)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6)
    loss.backward(), exact.backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_positive_pair_with_negative_cosine_is_pulled_together():
    z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    z2 = torch.tensor([[-1.0, 0.2], [0.2, -1.0]])
    nt_xent((z1, z2))[0].backward()
    assert (z1.grad * z2).sum(dim=1).max() < 0  # a step against the gradient raises the cosine


@pytest.mark.parametrize("n", [1, 2, 5, 512])
def test_identical_embeddings_give_log_of_the_number_of_candidates(n):
    z = torch.ones(n, 4)
    assert nt_xent((z, z))[0].item() == pytest.approx(math.log(2 * n - 1), abs=1e-5)


def test_low_temperature_does_not_overflow():
    z1, z2 = pairs(16, 8)
    z1.requires_grad_()
    loss, _ = nt_xent((z1, z2), 1e-3)  # exp(1000) is infinite in float32
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32_under_autocast(device, dtype):
    z1, z2 = (z.to(dtype) for z in pairs(32, 16))
    with torch.autocast(device.type, dtype=dtype):
        loss, _ = nt_xent((z1.to(device), z2.to(device)), 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(algorithm_1(z1, z2, 0.1).item(), rel=1e-5)


def test_contrastive_accuracy_is_the_share_of_views_whose_partner_is_nearest():
    z = torch.eye(4)
    loss, accuracy = nt_xent((z.clone().requires_grad_(), z))
    assert accuracy.item() == 1 and not accuracy.requires_grad and loss.requires_grad
    assert nt_xent((z, z[[1, 0, 2, 3]]))[1].item() == 0.5  # two partners exchanged: 4 of 8 views


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 3)], [(0, 3)] * 2, [(3,)] * 2, [(2, 3)]])
def test_nt_xent_refuses_what_eq_1_does_not_define(shapes):
    with pytest.raises(ValueError, match="zs must be two or more"):
        nt_xent([torch.ones(shape) for shape in shapes])
    with pytest.raises(ValueError, match="temperature must be positive"):
        nt_xent(torch.ones(2, 2, 3), 0.0)


def test_with_more_views_every_two_of_an_image_are_a_positive_pair():
    """Against a direct sum: the negatives of a pair are all views of the other images."""
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    image = torch.arange(3).repeat(4)
    s = torch.exp(torch.cosine_similarity(z[:, None], z[None], dim=2) / 0.3)
    losses, nearest = [], []
    for i, j in itertools.permutations(range(12), 2):
        if image[i] == image[j]:
            negatives = s[i][image != image[i]]
            losses.append(-torch.log(s[i, j] / (s[i, j] + negatives.sum())))
            nearest.append((s[i, j] > negatives).all().float())
    loss, accuracy = nt_xent(z.chunk(4), 0.3)
    both = loss, torch.stack(losses).mean()
    found, exact = ((x, *torch.autograd.grad(x, z, retain_graph=True)) for x in both)
    torch.testing.assert_close(found, exact)
    assert accuracy == torch.stack(nearest).mean() and 0 < accuracy < 1


def test_a_training_step_takes_all_views_of_an_image(thin, toy):
    cfg = toy("precision=fp32", "views=3", "batch_size=4")
    learner, noise = make_learner(cfg, torch.device("cpu")), draw(12, seed=0, step=0)
    batch = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    views = random_views(batch.repeat(3, 1, 1, 1), noise, 8, cfg)
    expected = nt_xent(copy.deepcopy(learner.model)(views)[1].chunk(3), cfg.temperature)
    found = train_step(cfg, learner, batch, noise, 8)
    assert (found["loss"], found["contrastive_accuracy"]) == expected


def test_a_training_step_is_the_papers(thin, toy):
    """Views, embeddings, loss, gradient and Nesterov's update, in two steps."""
    options = "learning_rate=0.1", "weight_decay=0.01", "projection_dim=8", "hidden_dim=16"
    cfg = toy("precision=fp32", "temperature=0.3", "batch_size=4", *options)
    learner = make_learner(cfg, torch.device("cpu"))
    slow = copy.deepcopy(learner.model)
    velocity = {name: 0.0 for name, _ in slow.named_parameters()}
    batch = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    for step in range(2):
        set_learning_rate(learner.optimizer, 0.1)
        found = train_step(cfg, learner, batch, draw(8, seed=0, step=step), 8)

        views = random_views(torch.cat([batch, batch]), draw(8, seed=0, step=step), 8, cfg)
        z1, z2 = slow.embed(views)[1].chunk(2)
        slow.zero_grad()
        loss = algorithm_1(z1, z2, 0.3)
        loss.backward()
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        gradients = [weight.grad.flatten() for weight in slow.parameters()]
        norm = torch.cat(gradients).norm().item()
        assert found["gradient_norm"].item() == pytest.approx(norm, rel=1e-4)
        for name, weight in slow.named_parameters():
            gradient = weight.grad + 0.01 * weight.detach()
            velocity[name] = 0.9 * velocity[name] + gradient
            weight.data -= 0.1 * (gradient + 0.9 * velocity[name])
    for name, value in learner.model.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_defaults_are_a_torchvision_resnet_and_the_published_head():
    """The keys and shapes of p3i0t/SimCLR-CIFAR10: `enc`, without fc, and a projector."""
    model = SimCLR().eval()
    plain = resnet18()
    plain.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    plain.maxpool = plain.fc = nn.Identity()
    plain.load_state_dict(model.enc.state_dict(), strict=True)
    x = torch.rand(2, 3, 32, 32)
    h, z = model(x)
    assert torch.equal(plain.eval()(x), h) and torch.equal(model.projector(h), z)
    assert [type(layer) for layer in model.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    head = {key: (*w.shape,) for key, w in model.state_dict().items() if key[:4] != "enc."}
    assert head == {
        "projector.0.weight": (2048, 512), "projector.0.bias": (2048,),
        "projector.2.weight": (128, 2048), "projector.2.bias": (128,),
    }  # fmt: skip


@pytest.mark.parametrize(("cifar_stem", "size"), [(True, 32), (False, 8)])
def test_the_cifar_stem_keeps_the_resolution_and_the_other_does_not(cifar_stem, size):
    seen = []
    model = SimCLR(cifar_stem=cifar_stem).eval()
    model.enc.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    model(torch.rand(1, 3, 32, 32))
    assert seen == [(1, 64, size, size)]


def test_each_backbone_is_torchvisions_network_of_that_name():
    """Wide ResNets and ResNeXts beside the plain ones, told apart by their number of weights."""
    sizes = {
        "resnet18": 11.69, "resnet34": 21.80, "resnet50": 25.56, "resnet101": 44.55,
        "resnet152": 60.19, "wide_resnet50_2": 68.88, "wide_resnet101_2": 126.89,
        "resnext50_32x4d": 25.03, "resnext101_32x8d": 88.79, "resnext101_64x4d": 83.46,
    }  # fmt: skip
    assert BACKBONES.keys() == sizes.keys() == {*config_module.BACKBONES}
    for name, millions in sizes.items():  # as torchvision's documentation has them, with fc
        with torch.device("meta"):
            model = SimCLR(name, cifar_stem=False)
            h = model.enc.layer4[-1](torch.zeros(1, model.feature_dim, 2, 2))
        weights = sum(weight.numel() for weight in model.enc.parameters())
        fc = 1000 * model.feature_dim + 1000
        assert (weights + fc) / 1e6 == pytest.approx(millions, abs=0.01)
        assert h.shape[1] == model.feature_dim == model.projector[0].in_features
        assert model.feature_dim == (512 if name in ("resnet18", "resnet34") else 2048)


def test_every_convolution_is_initialised_as_torchvisions():
    """He et al.: variance 2 / (output channels · kernel area), the stem of small images too."""
    torch.manual_seed(0)
    for name, conv in SimCLR().enc.named_modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = conv.out_channels * conv.weight[0, 0].numel()
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name


def train_pass(device: torch.device, dtype: torch.dtype, **options: object) -> SimCLR:
    """A model of these options after two passes forward and backward, the same for all."""
    torch.manual_seed(0)
    model = SimCLR(projection_dim=16, hidden_dim=32, **options).train().to(device)
    for _ in range(2):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, z = model(torch.rand(8, 3, 8, 8).to(device))
        nt_xent(z.chunk(2))[0].backward()
    return model


@pytest.mark.usefixtures("same_convolutions", "thin")
@pytest.mark.parametrize(
    ("backbone", "dtype"),
    [("resnet18", torch.float32), ("resnet18", torch.bfloat16), ("resnet50", torch.float32)],
)
def test_recomputed_blocks_give_the_same_gradients_and_running_statistics(device, backbone, dtype):
    plain = train_pass(device, dtype, backbone=backbone)
    recomputed = train_pass(device, dtype, backbone=backbone, activation_checkpointing=True)
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    statistics = recomputed.state_dict()  # names are unchanged, and each batch is counted once
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, statistics[name], msg=name)
    assert statistics["enc.layer1.0.bn1.num_batches_tracked"] == 2


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"micro_batch_size": 2}])
def test_recomputing_holds_few_activations(options):
    kept = []
    for model in (SimCLR(hidden_dim=32), SimCLR(hidden_dim=32, **options)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            model.train()(torch.rand(8, 3, 16, 16))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.usefixtures("same_convolutions")
@pytest.mark.parametrize(("micro_batch_size", "count"), [(1, 2), (2, 3), (3, 2), (3, 4), (6, 2)])
def test_without_batch_norm_micro_batches_are_the_whole_batch(
    device, monkeypatch, micro_batch_size, count
):
    """The same embeddings in the same rows, and the same gradients of one loss over all views."""
    options = {"norm_layer": lambda width: nn.GroupNorm(1, width)}
    monkeypatch.setitem(BACKBONES, "resnet18", lambda weights: thin_resnet(weights, **options))
    torch.manual_seed(0)
    whole = SimCLR(projection_dim=8, hidden_dim=16).train().to(device)
    parts = copy.deepcopy(whole)
    parts.micro_batch_size, parts.views = micro_batch_size, count
    views = torch.rand(12, 3, 8, 8).to(device)
    for a, b in zip(parts(views), whole(views), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for model in (parts, whole):
        nt_xent(model(views)[1].chunk(count))[0].backward()
    scale = max(weight.grad.abs().max() for weight in whole.parameters()).item()
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_with_batch_norm_each_micro_batch_has_its_own_statistics_counted_once(
    thin, activation_checkpointing
):
    """As on several GPUs without synchronised batch norm: both views of a part's images go
    through the same network; here with plain autograd through all parts at once."""
    torch.manual_seed(0)
    plain = SimCLR(projection_dim=8, hidden_dim=16).train()
    model = SimCLR(
        projection_dim=8, hidden_dim=16, micro_batch_size=2,
        activation_checkpointing=activation_checkpointing,
    )  # fmt: skip
    model.load_state_dict(plain.state_dict())
    views = torch.rand(12, 3, 8, 8)
    parts = [plain(views[[i, i + 1, i + 6, i + 7]])[1].chunk(2) for i in (0, 2, 4)]
    expected = [torch.cat(half) for half in zip(*parts, strict=True)]
    found = model.train()(views)[1].chunk(2)
    for embeddings in (found, expected):
        nt_xent(embeddings)[0].backward()
    scale = max(weight.grad.abs().max() for weight in plain.parameters()).item()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * scale)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert model.enc.bn1.num_batches_tracked == 3


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
