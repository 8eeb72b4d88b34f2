"""SimCLR pretraining (Chen et al. 2020, arXiv 2002.05709) on one GPU, on several, or on a CPU.

    python simclr.py backbone=resnet18                        # CIFAR-10, 1000 epochs
    python simclr.py recipe=digits temperature=0.1            # any key of simclr_config.yml
    torchrun --nproc_per_node=4 simclr.py                     # a quarter of the batch on each GPU

Two random views of each image, one encoder, one projection head, the NT-Xent loss. The run
directory (logs/SimCLR/<dataset>/<backbone>) gets config.yaml, metrics.jsonl (a line an epoch; also
for TensorBoard), checkpoints simclr_<backbone>_epoch<N>.pt for simclr_lin.py and plot.py, and the
training state from which the same command resumes after it was stopped.
"""

import system.environment  # noqa: F401, first
import logging
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from config import MAY_CHANGE, RULES, check_config, register_config
from evaluation.features import held_out_knn
from images.augment import draw, random_views
from images.datasets import Split, check_batch_size, load_pretraining
from images.host import Images, batches, describe
from models import SimCLR, nt_xent
from system.checkpoint import load_init
from system.commandline import run_command, run_directory
from system.device import autocast, compile_static, select_compile, select_device, select_precision
from system.files import locked
from system.memory import PRETRAINING, check_training, memory_advice
from training import distributed
from training.distributed import all_reduce_mean, local_shard
from training.graph import GraphedStep
from training.metrics import alignment, spread, uniformity
from training.optim import cosine_learning_rate, make_optimizer, view_size
from training.record import RunRecord, log_summary, report_complete
from training.state import Training, choose_precision, find_state

log = logging.getLogger("simclr")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    views: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """One step of Algorithm 1; views: (2N, 3, S, S), rows i and N+i of image i.

    The model computes in `dtype` (mixed precision), the loss in float32; the scaler is enabled only
    for float16. Returns the step metrics, detached scalars on the device.
    """
    with autocast(views.device, dtype):
        _, z = model(views)  # h: 2N×D, z: 2N×d
    z1, z2 = z.chunk(2)  # N×d each
    loss, accuracy = nt_xent(z1, z2, temperature, distributed.gather, distributed.rank())
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
        "z_std": spread(z1),
        "gradient_norm": gradient_norm,
    }


def train(
    cfg: DictConfig,
    training: Training,
    images: Images,
    knn: tuple[Split, Tensor, Tensor] | None,
    record: RunRecord,
) -> None:
    """Train for the remaining epochs and steps; `record` logs, saves and stops the run."""
    n, steps = cfg.batch_size, len(images) // cfg.batch_size  # drops an incomplete last batch
    total_steps = cfg.epochs * steps
    learner = training.ddp_model, training.optimizer, training.scaler
    colors = cfg.color_strength, cfg.grayscale_probability, cfg.blur_probability
    augmentation = tuple(cfg.crop_scale), cfg.flip_probability, *colors

    def step(batch: Tensor, noise: Tensor, size: int) -> dict[str, Tensor]:
        views = training.make_views(batch.repeat(2, 1, 1, 1), noise, size, *augmentation)
        return train_step(*learner, views, cfg.temperature, training.dtype)

    run_step = GraphedStep(step, training.optimizer, eager=not training.graphed)
    while training.epoch < cfg.epochs:
        order, done = training.start_epoch(len(images)), training.steps_done  # 0 unless resumed
        rows = local_shard(order[: steps * n].view(steps, n))[done:]  # indices, a row a step
        for i, batch in enumerate(batches(images, rows), done):  # N×3×H×W, uint8
            learning_rate, size = schedule(cfg, training.epoch * steps + i, total_steps)
            noise = local_shard(draw(2 * n, training.rng, cfg.blur_probability > 0), views=2)
            metrics = run_step(batch, noise, size, learning_rate)
            record.log_step(training, all_reduce_mean(metrics), learning_rate)

        epoch, knn_acc = training.epoch + 1, None
        if knn is not None and (epoch % cfg.knn_interval == 0 or epoch == cfg.epochs):
            batch_size = min(512, 2 * (cfg.micro_batch_size or n // distributed.world_size()))
            inference = cfg.image_size, batch_size, training.dtype
            knn_acc = held_out_knn(training.model.enc, *knn, *inference, record.stop.check)
        last_step = schedule(cfg, epoch * steps - 1, total_steps)  # learning rate and view size
        record.end_epoch(training, knn_acc, *last_step)  # logs, saves, and counts the epoch


def schedule(cfg: DictConfig, step: int, total_steps: int) -> tuple[float, int]:
    """Learning rate and view size in pixels: pure functions of the global step."""
    ends = cfg.learning_rate, cfg.min_learning_rate
    warmup_steps = cfg.warmup_epochs * (total_steps // cfg.epochs)
    learning_rate = cosine_learning_rate(step, total_steps, *ends, warmup_steps)
    return learning_rate, view_size(step, total_steps, cfg.view_sizes or [[cfg.image_size, 1.0]])


def start_training(cfg: DictConfig, device: torch.device, steps: int, new: bool = True) -> Training:
    """Build model, optimizer and random state from cfg.seed, a new encoder from cfg.init if given.

    steps: of the whole run. Raises UserError as `load_init`.
    """
    torch.manual_seed(cfg.seed)  # initial weights
    memory = cfg.activation_checkpointing, cfg.micro_batch_size
    model = SimCLR(cfg.backbone, cfg.projection_dim, cfg.hidden_dim, cfg.cifar_stem, *memory)
    init = load_init(model.enc, cfg.init) if new and cfg.init is not None else None
    model = model.to(device, memory_format=torch.channels_last).train()
    dtype = select_precision(cfg.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    weights, fused = model.parameters(), not scaler.is_enabled()
    optimizer = make_optimizer(cfg.optimizer, weights, cfg.momentum, cfg.weight_decay, fused)
    rng = torch.Generator(device).manual_seed(cfg.seed)
    # one compilation for each view size: count the least used one, in views of 32×32
    shares = [part * (size / 32) ** 2 for size, part in cfg.view_sizes or [[cfg.image_size, 1.0]]]
    work = 2 * cfg.batch_size * steps * min(shares)
    supported = memory == (False, None) and distributed.world_size() == 1
    compiled = select_compile(cfg.compile, device, work, supported)
    if compiled:
        model.forward = compile_static(model.forward, cfg.compile)
    make_views = compile_static(random_views, cfg.compile) if compiled else random_views
    graphed = device.type == "cuda" and supported and fused
    ddp_model = distributed.wrap_ddp(model, cfg.sync_batchnorm)
    parts = model, ddp_model, optimizer, scaler, rng, dtype, make_views
    return Training(*parts, compiled, graphed, init)


def pretrain(cfg: DictConfig, run_dir: Path) -> dict[str, float | None]:
    """Pretrain an encoder with the checked config `cfg`, or resume the run in `run_dir`.

    Returns the metrics of the last epoch. Raises ConfigError if a value does not fit data, machine
    or saved state; UserError if data, init or state cannot be used, another process trains in
    `run_dir`, a step is not finite, or a file is not on disk in the end; Stopped after a signal.
    """
    device = select_device(cfg.device)
    with distributed.process_group(device), locked(run_dir, "simclr", distributed.rank() == 0):
        sharding = cfg.batch_size, cfg.micro_batch_size, cfg.sync_batchnorm, cfg.compile
        distributed.check_ranks(*sharding, device)
        resume = cfg.resume or distributed.is_elastic_restart()
        saved = find_state(run_dir, OmegaConf.to_container(cfg), MAY_CHANGE) if resume else None
        if saved is not None and saved.content["epoch"] == cfg.epochs:
            return report_complete(run_dir, saved)
        precision = choose_precision(cfg.precision, device, saved)
        cfg = OmegaConf.merge(cfg, {"precision": precision})
        config = OmegaConf.to_container(cfg)
        source = cfg.dataset, cfg.data_dir, cfg.image_size, cfg.workers, device
        with distributed.local_rank_zero_first():
            images, fingerprint, knn, remarks = load_pretraining(*source, cfg.knn_interval > 0)
        check_batch_size(cfg.batch_size, len(images))
        steps = len(images) // cfg.batch_size
        check_training(cfg, device)
        training = start_training(cfg, device, cfg.epochs * steps, new=saved is None)
        record = RunRecord(run_dir, config, fingerprint, steps)
        with record.recording(training, saved, start_over=not resume):
            del saved  # frees a second copy of the weights, with record's
            compiled = "compiled" if training.compiled else "not compiled"
            used = f"{cfg.backbone}, recipe {cfg.recipe}, on {device} in {precision}, {compiled}"
            for line in (f"{describe(images, cfg.dataset)}, {used}, in {run_dir}", *remarks):
                log.info(line)
            train(cfg, training, images, knn, record)
    return log_summary(run_dir, config, training.history)


register_config()


@hydra.main(version_base="1.3", config_path=None, config_name="simclr_config")
def main(cfg: DictConfig) -> float | None:
    """Check the config and pretrain; returns what sweepers optimise, the held-out kNN accuracy."""
    with memory_advice(PRETRAINING):
        return pretrain(check_config(cfg, peak="learning_rate"), run_directory())["knn_acc"]


if __name__ == "__main__":
    run_command(main, RULES)
