"""SimCLR pretraining (Chen et al. 2020, arXiv 2002.05709) on one GPU, on several, or on a CPU.

    python simclr.py backbone=resnet18                        # CIFAR-10, 1000 epochs
    python simclr.py recipe=digits temperature=0.1            # any key of simclr_config.yml
    torchrun --nproc_per_node=4 simclr.py                     # a quarter of the batch on each GPU

Two random views of each image, or more, one encoder, one projection head, the NT-Xent loss. The run
directory (logs/SimCLR/<dataset>/<backbone>) gets config.yaml, metrics.jsonl (a line an epoch, as
TensorBoard gets it), checkpoints simclr_<backbone>_epoch<N>.pt for simclr_lin.py and plot.py, and
the training state from which the same command resumes a stopped run.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils import get_total_norm

from config import Config
from evaluation.features import held_out_knn, sample_rank
from images.augment import draw, random_views, shuffle
from images.datasets import HostImages, Images, Probe, load_pretraining
from models import SimCLR, nt_xent
from system.commandline import run_command, run_directory, to_config
from system.device import autocast, compile_static, select_device, select_precision, to_device
from training import distributed
from training.distributed import local_shard
from training.graph import GraphedStep
from training.metrics import alignment, spread, uniformity
from training.optim import make_optimizer, schedule, set_learning_rate
from training.run import Learner, Run, open_run

log = logging.getLogger("simclr")


def train_step(
    cfg: Config, learner: Learner, batch: Tensor, noise: Tensor, size: int
) -> dict[str, Tensor]:
    """One step of Algorithm 1: views, encoder, projection, NT-Xent, update.

    batch: (N, 3, H, W), uint8, N = cfg.batch_size / ranks; noise: (38, VN), random numbers of the
    V = cfg.views views (`draw`); size: of a view, in pixels. Rows i, N+i, … are views of image i.
    The model computes in cfg.precision (mixed), `nt_xent` in float32. Returns the step metrics,
    detached scalars on the device.
    """
    views = learner.make_views(batch.repeat(cfg.views, 1, 1, 1), noise, size, cfg)  # VN×3×S×S
    with autocast(views.device, cfg.precision):
        _h, z = learner.ddp_model(views)  # VN×D, VN×d: the loss takes z alone
    zs = z.chunk(cfg.views)  # N×d each
    loss, accuracy = nt_xent(zs, cfg.temperature, distributed.gather, distributed.rank())

    learner.optimizer.zero_grad()
    learner.scaler.scale(loss).backward()
    learner.scaler.unscale_(learner.optimizer)
    gradient_norm = get_total_norm([weight.grad for weight in learner.model.parameters()])
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    return {
        "loss": loss.detach(),
        "contrastive_accuracy": accuracy,
        "alignment": alignment(zs[0], zs[1]),
        "uniformity": uniformity(zs[0]),
        "z_std": spread(zs[0]),
        "gradient_norm": gradient_norm,
    }


def train(cfg: Config, learner: Learner, images: Images, probe: Probe | None, run: Run) -> None:
    """Train for the epochs and steps that `run` has not counted; it logs, saves and may stop.
    `probe`: images for effective rank and kNN accuracy on the way."""
    n, steps = cfg.batch_size, len(images) // cfg.batch_size  # drops an incomplete last batch
    run_step = partial(train_step, cfg, learner)
    if learner.graphed:
        run_step = GraphedStep(run_step, learner.optimizer)
    while run.epoch < cfg.epochs:
        order = shuffle(len(images), cfg.seed, run.epoch)  # a function of seed and epoch
        if not isinstance(images, HostImages):
            order = order.to(images.device)
        for i in range(run.steps_done, steps):
            step = run.epoch * steps + i  # rate, size and views are functions of it and the seed
            learning_rate, size = schedule(cfg, step, cfg.epochs * steps)
            set_learning_rate(learner.optimizer, learning_rate)
            batch = images[local_shard(order[i * n : (i + 1) * n])]  # N×3×H×W, N = n / ranks
            noise = local_shard(draw(cfg.views * n, cfg.seed, step), views=cfg.views)
            metrics = run_step(batch, to_device(noise, batch.device), size)
            run.log_step(metrics)  # and counts it

        knn_acc, rank, epoch = None, None, run.epoch + 1
        if probe is not None and (epoch % cfg.knn_interval == 0 or epoch == cfg.epochs):
            rank = sample_rank(learner.model.enc, probe.sample, cfg)
            if probe.labelled is not None:
                knn_acc = held_out_knn(learner.model.enc, probe, cfg, run.check_signal)
        run.end_epoch(knn_acc, rank)  # logs, saves, and counts the epoch


def make_learner(cfg: Config, device: torch.device) -> Learner:
    """Build model and optimizer; the initial weights are a function of cfg.seed."""
    torch.manual_seed(cfg.seed)
    model = SimCLR(
        backbone=cfg.backbone,
        projection_dim=cfg.projection_dim,
        hidden_dim=cfg.hidden_dim,
        cifar_stem=cfg.cifar_stem,
        activation_checkpointing=cfg.activation_checkpointing,
        micro_batch_size=cfg.micro_batch_size,
        views=cfg.views,
    )
    model = model.to(device, memory_format=torch.channels_last).train()
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    recomputes = cfg.activation_checkpointing or cfg.micro_batch_size is not None
    static = not recomputes and distributed.world_size() == 1  # may become compiled, a CUDA graph
    graphed = static and device.type == "cuda" and not scaler.is_enabled()
    learning_rate = torch.zeros((), device=device) if graphed else 0.0
    fused = not scaler.is_enabled()
    optimizer = make_optimizer(cfg, model.parameters(), fused=fused, learning_rate=learning_rate)
    make_views = random_views
    compiled = cfg.compile is True or (cfg.compile == "auto" and static and cfg.epochs >= 100)
    if compiled:  # takes about a minute
        model.forward = compile_static(model.forward, cfg.compile)
        make_views = compile_static(random_views, cfg.compile)
    ddp_model = distributed.wrap_ddp(model, cfg.sync_batchnorm)
    return Learner(model, ddp_model, optimizer, scaler, make_views=make_views, graphed=graphed)


def pretrain(cfg: Config, run_dir: Path) -> dict[str, float | None]:
    """Pretrain with the config `cfg`, or resume the run in `run_dir`; the last epoch's metrics.

    Raises ConfigError if a value does not fit data, machine or saved state; UserError if something
    cannot be read or written, or a step is not finite; Stopped after a signal.
    """
    for key in ("checkpoint", "load_epoch", "labels"):
        cfg.require(key, getattr(cfg, key) is None, "null for simclr.py, which does not use it")
    device = select_device(cfg.device)
    with distributed.process_group(device), open_run(run_dir, cfg) as saved:  # or None
        distributed.check_ranks(cfg, device)
        resumed = saved is not None and cfg.precision == "auto"
        precision = saved["config"]["precision"] if resumed else cfg.precision
        cfg = replace(cfg, precision=select_precision(precision, device))
        images, fingerprint, probe = load_pretraining(cfg, device)
        learner = make_learner(cfg, device)
        run = Run(run_dir, cfg, learner, images=fingerprint, steps=len(images) // cfg.batch_size)
        if probe is not None:
            run.untrained_rank = sample_rank(learner.model.enc, probe.sample, cfg)
        run.start(saved)
        compiled = "not compiled" if learner.make_views is random_views else "compiled"
        used = f"{cfg.backbone}, recipe {cfg.recipe}, on {device} in {cfg.precision}, {compiled}"
        log.info(f"{len(images):,} images of {cfg.dataset}, {used}, in {run_dir}")
        with run.recording():
            train(cfg, learner, images, probe, run)
        return run.history[-1]


@hydra.main(version_base="1.3", config_path=None, config_name="simclr_config")  # registered
def main(cfg: DictConfig) -> float | None:
    """Pretrain; returns what sweepers optimise, the held-out kNN accuracy."""
    return pretrain(to_config(cfg), run_directory())["knn_acc"]


if __name__ == "__main__":
    run_command(main)
