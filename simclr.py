"""SimCLR pretraining (Chen et al. 2020, arXiv 2002.05709) on one GPU, or on a CPU.

    python simclr.py backbone=resnet18                        # CIFAR-10, 1000 epochs
    python simclr.py batch_size=256 temperature=0.1           # any key of simclr_config.yml
    python simclr.py dataset=digits image_size=16 epochs=5    # needs no download

Two random views of each image, one encoder, one projection head, the NT-Xent loss. The run folder
(logs/SimCLR/<dataset>/<backbone>) gets config.yaml, metrics.jsonl with one line an epoch, the same
for TensorBoard, and simclr_<backbone>_epoch<N>.pt for simclr_lin.py and plot.py.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from augment import draw, random_views
from checkpoint import checkpoint_name, save_checkpoint
from config import check_config, register_config, run_folder
from data import hold_out, load_split
from device import autocast, check_compile, select_compile, select_device, select_precision
from errors import ConfigError, UserError, one_line_errors
from evaluation import held_out_knn
from metrics import alignment, epoch_means, uniformity, write_metrics
from models import SimCLR, nt_xent
from optim import cosine_learning_rate, make_optimizer, set_learning_rate, view_size

log = logging.getLogger("simclr")


def train_step(
    model: SimCLR,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    views: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """One step of Algorithm 1; views: (2N, 3, S, S), rows i and N+i of image i.

    The model computes in `dtype` (mixed precision), the loss in float32; the scaler acts with
    float16 alone. Returns what metrics.jsonl calls by these names, detached scalars on the device.
    """
    with autocast(views.device, dtype):
        _, z = model(views)  # h: 2N×D, z: 2N×d
    z1, z2 = z.chunk(2)  # N×d each
    loss, accuracy = nt_xent(z1, z2, temperature)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradient_norm = get_total_norm([weight.grad for weight in model.parameters()])
    scaler.step(optimizer)
    scaler.update()
    return {
        "loss": loss.detach(),
        "contrastive_accuracy": accuracy,
        "alignment": alignment(z1, z2),
        "uniformity": uniformity(z1),
        "gradient_norm": gradient_norm,
    }


class Training(NamedTuple):
    """What a run carries from step to step."""

    model: SimCLR
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless dtype is float16
    rng: torch.Generator  # order of the images, and views
    dtype: torch.dtype  # what the model computes in
    make_views: Callable[..., Tensor]  # random_views, compiled or not
    compiled: bool


def start_training(cfg: DictConfig, device: torch.device, steps: int) -> Training:
    """A run of `steps` steps before its first; everything random in it follows from cfg.seed."""
    torch.backends.cudnn.benchmark = True  # shapes are static: try cuDNN's algorithms once
    torch.manual_seed(cfg.seed)  # initial weights
    model = SimCLR(
        cfg.backbone,
        cfg.projection_dim,
        cfg.hidden_dim,
        cfg.cifar_stem,
        cfg.activation_checkpointing,
    )
    model = model.to(device, memory_format=torch.channels_last).train()
    dtype = select_precision(cfg.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = make_optimizer(
        cfg.optimizer,
        model.parameters(),
        cfg.momentum,
        cfg.weight_decay,
        fused=not scaler.is_enabled(),
    )
    rng = torch.Generator(device).manual_seed(cfg.seed)
    make_views = random_views
    sizes = cfg.view_sizes or [[cfg.image_size, 1.0]]
    views = 2 * cfg.batch_size * steps * min(share * (size / 32) ** 2 for size, share in sizes)
    compiled = select_compile(cfg.compile, device, views, cfg.activation_checkpointing)
    if compiled:
        model.compile(dynamic=False)  # in place: the names in its state dict stay
        make_views = torch.compile(random_views, dynamic=False)
    return Training(model, optimizer, scaler, rng, dtype, make_views, compiled)


def pretrain(cfg: DictConfig, out_dir: Path) -> dict[str, float | None]:
    """Train an encoder with the checked config `cfg`; returns the metrics of the last epoch.

    Raises ConfigError if the batch is larger than the training set or compile=true is not
    possible, UserError if the data cannot be had or `out_dir` holds a run already.
    """
    device = select_device(cfg.device)
    check_compile(cfg.compile, device, cfg.activation_checkpointing)
    refuse_used_folder(out_dir)
    split = load_split(cfg.dataset, cfg.data_dir, "pretrain", cfg.image_size, cfg.workers)
    if cfg.batch_size > len(split.images):
        raise ConfigError(
            f"batch_size={cfg.batch_size}: must be an integer from 2 to {len(split.images)}, "
            "the number of training images"
        )
    split = labelled = split.to(device)  # M×3×H×W, uint8: the whole training set
    if cfg.knn_interval:
        if split.labels.min() < 0:  # STL-10's are unlabelled
            labelled = load_split(cfg.dataset, cfg.data_dir, "train", cfg.image_size).to(device)
        # the same tenth in every run; it is held out of kNN's bank, not of pretraining
        remedy = "knn_interval=0 leaves kNN out"
        bank, queries = hold_out(labelled.labels, 0.1, seed=0, remedy=remedy)
    steps = len(split.images) // cfg.batch_size  # an epoch; its last, smaller batch is left out
    training = start_training(cfg, device, cfg.epochs * steps)

    OmegaConf.save(cfg, out_dir / "config.yaml")
    precision = str(training.dtype).removeprefix("torch.")
    log.info(
        f"{len(split.images):,} images of {cfg.dataset}, {cfg.backbone} on {device} in "
        f"{precision}, {'compiled' if training.compiled else 'not compiled'}, in {out_dir}"
    )
    with (
        tqdm(total=cfg.epochs * steps, unit="step", mininterval=1) as bar,
        SummaryWriter(out_dir) as writer,
    ):
        for epoch in range(1, cfg.epochs + 1):
            metrics = train_epoch(cfg, epoch, training, split.images, bar)
            if not math.isfinite(metrics["loss"]):
                raise UserError(
                    f"the loss is {metrics['loss']} in epoch {epoch}, which is not saved: "
                    f"lower learning_rate ({cfg.learning_rate:g}) or raise temperature"
                )
            last = epoch == cfg.epochs
            if cfg.knn_interval and (epoch % cfg.knn_interval == 0 or last):
                shape = cfg.image_size, 2 * cfg.batch_size, training.dtype
                metrics["knn_acc"] = held_out_knn(
                    training.model.enc, labelled, bank, queries, *shape
                )
                bar.set_description(f"kNN {metrics['knn_acc']:.1%}")
            write_metrics(out_dir, writer, metrics)
            if epoch % cfg.log_interval == 0 or last:
                path = out_dir / checkpoint_name(cfg.backbone, epoch)
                save_checkpoint(path, training.model, OmegaConf.to_container(cfg), epoch)
    knn = f", kNN {metrics['knn_acc']:.1%} (training images)" if cfg.knn_interval else ""
    log.info(
        f"epoch {epoch}: loss {metrics['loss']:.4f}, contrastive accuracy "
        f"{metrics['contrastive_accuracy']:.1%}{knn}; saved {path}"
    )
    return metrics


def train_epoch(
    cfg: DictConfig, epoch: int, training: Training, images: Tensor, bar: tqdm
) -> dict[str, float | None]:
    """One pass over the images in a new random order; returns a line of metrics.jsonl."""
    start = time.perf_counter()
    model, optimizer, scaler, rng = training[:4]
    n, steps = cfg.batch_size, len(images) // cfg.batch_size
    total_steps = cfg.epochs * steps
    order = torch.randperm(len(images), device=images.device, generator=rng)
    values = []  # of each step, left on the device: no sync a step
    for i in range(steps):
        step = (epoch - 1) * steps + i
        size = view_size(step, total_steps, cfg.view_sizes) if cfg.view_sizes else cfg.image_size
        batch = images[order[i * n : (i + 1) * n]]  # N×3×H×W
        views = training.make_views(
            batch.repeat(2, 1, 1, 1),  # 2N×3×H×W, each row with parameters of its own
            draw(2 * n, rng),
            size,
            tuple(cfg.crop_scale),
            cfg.flip_probability,
            cfg.color_strength,
            cfg.grayscale_probability,
        )
        learning_rate = cosine_learning_rate(
            step, total_steps, cfg.learning_rate, cfg.min_learning_rate
        )
        set_learning_rate(optimizer, learning_rate)
        found = train_step(model, optimizer, scaler, views, cfg.temperature, training.dtype)
        values.append(torch.stack(list(found.values())))
        if bar.update():  # true about once a second, when the bar is drawn: a sync then
            loss, accuracy = values[-1][:2].tolist()
            progress = f"epoch {epoch}, loss {loss:.3f}, contrastive {accuracy:.1%}"
            bar.set_postfix_str(progress, refresh=False)
    means = epoch_means(list(found), torch.stack(values).tolist())
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch,
        "step": epoch * steps,
        **means,
        "knn_acc": None,
        "learning_rate": learning_rate,  # of the epoch's last step
        "view_size": size,  # the same
        "views_per_second": 2 * n * steps / seconds,
        "seconds": seconds,
    }


def refuse_used_folder(out_dir: Path) -> None:
    """Raise UserError if `out_dir` holds a run: nothing is written over one."""
    if (out_dir / "metrics.jsonl").exists() or any(out_dir.glob("simclr_*.pt")):
        raise UserError(
            f"{out_dir} holds a run already: move it away, or choose another folder with "
            "hydra.run.dir=PATH"
        )


register_config()


@hydra.main(version_base="1.3", config_path=None, config_name="simclr_config")
def main(cfg: DictConfig) -> None:
    """Check the config, then pretrain in Hydra's run folder."""
    with one_line_errors():
        cfg = check_config(cfg, peak="learning_rate")
        pretrain(cfg, run_folder())


if __name__ == "__main__":
    main()
