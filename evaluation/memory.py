"""What an evaluation keeps in memory: refused before the encoder runs if it surely does not fit."""

from evaluation.classifiers import EvaluationTask
from system.memory import check_fits


def check_memory(task: EvaluationTask, encoders: list[str], protocols: list[str]) -> None:
    """Raise ConfigError if the features, or those of the cached crops, surely do not fit.

    task: of the checkpoint; encoders: "checkpoint" and baselines; protocols: names of the config.
    Counted is less than what is needed: the features of all images, with a second copy (normalised,
    or of the first crops) where a protocol makes it.
    """
    if not {*protocols} - {"finetune"}:
        return
    device, m, n = task.train.labels.device, len(task.train.images), len(task.test_images)
    width, pixels = task.dtype.itemsize, 3 * task.size**2
    rows = {e: 4 * pixels if e == "pixels" else width * task.feature_dim for e in encoders}
    encoder = max(rows, key=rows.get)  # the others fit where the features of this one do
    row, classes, count = rows[encoder], len(task.train.classes), f"{m:,} training and {n:,} test"
    copies = 1 + bool({"knn", "linear", "logistic"} & {*protocols})
    check_fits(
        f"labels (now {m // classes} of each class)", f"features ({encoder}) of {count} images",
        row * (copies * m + n), device, lambda free: (free / row - n) / copies / classes,
    )  # fmt: skip
    views = min(task.views, task.epochs) if "linear" in protocols else 0
    check_fits(
        f"finetune_views={task.views}",
        f"features ({encoder}) of {count} images and of {views:,} crops of each training image",
        row * ((1 + views) * m + n), device, lambda free: (free / row - n - m) / m,
    )  # fmt: skip
