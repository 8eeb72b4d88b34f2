"""SimCLR pretraining (Chen et al. 2020, arXiv 2002.05709) on one GPU, on several, or on a CPU.

    python simclr.py backbone=resnet18                        # CIFAR-10, 1000 epochs
    python simclr.py batch_size=256 temperature=0.1           # any key of simclr_config.yml
    python simclr.py dataset=digits image_size=16 epochs=5    # needs no download
    torchrun --nproc_per_node=4 simclr.py                     # a quarter of the batch on each GPU

Two random views of each image, one encoder, one projection head, the NT-Xent loss. The run folder
(logs/SimCLR/<dataset>/<backbone>) gets config.yaml, metrics.jsonl with one line an epoch, the same
for TensorBoard, simclr_<backbone>_epoch<N>.pt for simclr_lin.py and plot.py, and the state from
which the same command goes on after it was stopped.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import distributed
from augment import draw, random_views
from checkpoint import checkpoint_name
from config import check_config, register_config, run_folder
from data import Split, check_batch_size, load_pretraining
from device import (
    autocast,
    compile_obstacle,
    out_of_memory,
    precision_name,
    read_late,
    select_compile,
    select_device,
    select_precision,
    tune_convolutions,
)
from errors import ConfigError, NotFinite, Stopped, StopSignals, one_line_errors
from evaluation import held_out_knn
from files import locked
from metrics import alignment, epoch_means, is_finite, spread, uniformity
from models import SimCLR, nt_xent
from optim import cosine_learning_rate, make_optimizer, set_learning_rate, view_size
from record import Record, complete, say_end
from state import Training, check_unchanged, load_state

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

    The model computes in `dtype` (mixed precision), the loss in float32; the scaler acts with
    float16 alone. Returns what metrics.jsonl calls by these names, detached scalars on the device.
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


def start_training(
    cfg: DictConfig, device: torch.device, steps: int, obstacle: str | None = None
) -> Training:
    """A run of `steps` steps before its first; everything random in it follows from cfg.seed.

    obstacle: what stands against compiling.
    """
    tune_convolutions()
    torch.manual_seed(cfg.seed)  # initial weights
    widths = cfg.projection_dim, cfg.hidden_dim
    memory = cfg.activation_checkpointing, cfg.micro_batch_size
    model = SimCLR(cfg.backbone, *widths, cfg.cifar_stem, *memory)
    model = model.to(device, memory_format=torch.channels_last).train()
    dtype = select_precision(cfg.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    weights, fused = model.parameters(), not scaler.is_enabled()
    optimizer = make_optimizer(cfg.optimizer, weights, cfg.momentum, cfg.weight_decay, fused)
    rng = torch.Generator(device).manual_seed(cfg.seed)
    make_views = random_views
    sizes = cfg.view_sizes or [[cfg.image_size, 1.0]]
    views = 2 * cfg.batch_size * steps * min(share * (size / 32) ** 2 for size, share in sizes)
    compiled = select_compile(cfg.compile, device, views, obstacle)
    if compiled:
        model.compile(dynamic=False)  # in place: the names in its state dict stay
        make_views = torch.compile(random_views, dynamic=False)
    trained = distributed.parallel(model, cfg.sync_batchnorm)
    return Training(model, trained, optimizer, scaler, rng, dtype, make_views, compiled)


def train_steps(
    cfg: DictConfig, training: Training, images: Tensor, stop: StopSignals
) -> Iterator[dict[str, Tensor]]:
    """The steps that are left of the epoch in flight, up to a signal; yields what they return."""
    n, steps = cfg.batch_size, len(images) // cfg.batch_size
    for i in range(len(training.found), steps):
        if stop.noted():
            return
        learning_rate, size = schedule(cfg, training.epoch * steps + i, cfg.epochs * steps)
        batch = images[distributed.own_part(training.order[i * n : (i + 1) * n])]  # N×3×H×W
        views = training.make_views(
            batch.repeat(2, 1, 1, 1),  # 2N×3×H×W, each row with parameters of its own
            distributed.own_part(draw(2 * n, training.rng), views=2),
            size,
            tuple(cfg.crop_scale),
            cfg.flip_probability,
            cfg.color_strength,
            cfg.grayscale_probability,
        )
        set_learning_rate(training.optimizer, learning_rate)
        learner = training.parallel, training.optimizer, training.scaler
        yield distributed.average(train_step(*learner, views, cfg.temperature, training.dtype))


def schedule(cfg: DictConfig, step: int, total_steps: int) -> tuple[float, int]:
    """Learning rate, and size of the views in pixels: functions of the step alone."""
    ends = cfg.learning_rate, cfg.min_learning_rate
    warmup_steps = cfg.warmup_epochs * (total_steps // cfg.epochs)
    rate = cosine_learning_rate(step, total_steps, *ends, warmup_steps)
    return rate, view_size(step, total_steps, cfg.view_sizes or [[cfg.image_size, 1.0]])


def train_epoch(
    cfg: DictConfig, training: Training, images: Tensor, bar: tqdm, stop: StopSignals
) -> dict[str, float | None]:
    """One pass over the images in a new random order, or the rest of one that was interrupted.

    Returns a line of metrics.jsonl. Raises NotFinite; or Stopped, after a signal.
    """
    epoch, steps = training.epoch + 1, len(images) // cfg.batch_size
    if training.order is None:
        training.order = torch.randperm(len(images), device=images.device, generator=training.rng)
    start = time.perf_counter()
    for values in read_late(train_steps(cfg, training, images, stop)):
        if not is_finite(values, training.scaler.is_enabled()):
            raise NotFinite(values)
        training.found.append(values)
        if bar.update():  # true about once a second, when the bar is drawn
            accuracy = values["contrastive_accuracy"]
            progress = f"epoch {epoch}, loss {values['loss']:.3f}, contrastive {accuracy:.1%}"
            bar.set_postfix_str(progress, refresh=False)
    training.seconds += time.perf_counter() - start
    stop.check()
    learning_rate, size = schedule(cfg, epoch * steps - 1, cfg.epochs * steps)
    return {
        "epoch": epoch,
        "step": epoch * steps,
        **epoch_means(training.found),
        "knn_acc": None,
        "learning_rate": learning_rate,  # of the epoch's last step
        "view_size": size,  # the same
        "views_per_second": 2 * cfg.batch_size * steps / training.seconds,
        "seconds": training.seconds,
    }


def pretrain(cfg: DictConfig, out_dir: Path) -> dict[str, float | None]:
    """Train an encoder with the checked config `cfg`, or go on where `out_dir` has its state.

    Returns the metrics of the last epoch. Raises ConfigError if the batch is larger than the
    training set, compile=true is not possible, or the state is one of another config; UserError
    if the data or the state cannot be used, another process trains in `out_dir`, the loss is not
    finite, or the last state is not on disk in the end; Stopped after a signal, the state saved if
    that was possible.
    """
    device = select_device(cfg.device)
    precision = precision_name(select_precision(cfg.precision, device))
    config = {**OmegaConf.to_container(cfg), "precision": precision}
    with distributed.joined(device), locked(out_dir, "simclr", needed=distributed.rank() == 0):
        distributed.check_parts(cfg.batch_size, cfg.micro_batch_size)
        recompute = cfg.activation_checkpointing or cfg.micro_batch_size is not None
        obstacle = compile_obstacle(device, recompute, distributed.world())
        if cfg.compile is True and obstacle is not None:
            raise ConfigError(f"compile=true: must be false or auto {obstacle}")
        resume = cfg.resume or distributed.restarted()
        found = load_state(out_dir) if resume else None
        done = found and (found.content["epoch"], len(found.content["found"]))
        distributed.check_same(done or (-1, 0), f"the state in {out_dir}")
        if found is not None:
            check_unchanged(found.content["config"], config, found.path)
            if found.content["epoch"] == cfg.epochs:
                return complete(out_dir, found, writes=distributed.rank() == 0)
        where = cfg.dataset, cfg.data_dir, cfg.image_size, cfg.workers, device
        with distributed.one_first():
            images, fingerprint, knn = load_pretraining(*where, knn=cfg.knn_interval > 0)
        check_batch_size(cfg.batch_size, len(images))
        steps = cfg.epochs * (len(images) // cfg.batch_size)
        training = start_training(cfg, device, steps, obstacle)
        saves = cfg.log_interval, cfg.save_minutes
        record = Record(out_dir, config, fingerprint, *saves, writes=distributed.rank() == 0)
        with closing(record), StopSignals(distributed.largest) as stop:
            record.begin(training, found, start_over=not resume)
            del found  # a second copy of the weights
            log.info(
                f"{len(images):,} images of {cfg.dataset}, {cfg.backbone} on {device} in "
                f"{precision}, {'compiled' if training.compiled else 'not compiled'}, in {out_dir}"
            )
            train(cfg, training, images, knn, record, stop)
            record.check()
    say_end(training.history[-1], out_dir / checkpoint_name(cfg.backbone, cfg.epochs))
    return training.history[-1]


def train(
    cfg: DictConfig,
    training: Training,
    images: Tensor,
    knn: tuple[Split, Tensor, Tensor] | None,
    record: Record,
    stop: StopSignals,
) -> None:
    """The epochs that are left, each recorded. Raises as `pretrain`."""
    steps = len(images) // cfg.batch_size
    done = training.epoch * steps + len(training.found)
    part = cfg.micro_batch_size or cfg.batch_size // distributed.world()  # images held at a time
    try:
        with tqdm(total=cfg.epochs * steps, initial=done, unit="step", mininterval=1) as bar:
            while training.epoch < cfg.epochs:
                line = train_epoch(cfg, training, images, bar, stop)
                last = line["epoch"] == cfg.epochs
                if knn is not None and (line["epoch"] % cfg.knn_interval == 0 or last):
                    shape = cfg.image_size, 2 * part, training.dtype
                    line["knn_acc"] = held_out_knn(training.model.enc, *knn, *shape, stop.check)
                    bar.set_description(f"kNN {line['knn_acc']:.1%}")
                training.end_epoch(line)
                record.end_epoch(training)
        return
    except Stopped as stopped:
        raise record.stopped(training, stopped.number, steps) from None
    except NotFinite as error:
        step = training.epoch * steps + len(training.found)
        rate, _ = schedule(cfg, step, cfg.epochs * steps)
        raise record.failed(training, error.values, step, rate) from None
    except torch.OutOfMemoryError:
        if not torch.cuda.is_available():
            raise  # its traceback, which holds the tensors of the step, else ends here

    def step_of(n: int) -> None:
        size = max(pixels for pixels, _ in cfg.view_sizes or [[cfg.image_size, 1.0]])
        views = torch.rand(2 * n, 3, size, size, device=images.device)
        scaler = torch.amp.GradScaler(images.device.type, enabled=training.scaler.is_enabled())
        training.model.micro_batch_size = None
        train_step(training.model, training.optimizer, scaler, views, 0.5, training.dtype)

    step = step_of if distributed.world() == 1 else None  # of several this one may be here alone
    raise out_of_memory(step, images.device, part, cfg.activation_checkpointing)


register_config()


@hydra.main(version_base="1.3", config_path=None, config_name="simclr_config")
def main(cfg: DictConfig) -> float | None:
    """Check the config, then pretrain in Hydra's run folder.

    Returns what Hydra's sweepers optimise: the kNN accuracy of held-out training images.
    """
    with one_line_errors():
        cfg = check_config(cfg, peak="learning_rate")
        return pretrain(cfg, run_folder())["knn_acc"]


if __name__ == "__main__":
    main()
