"""The encoder of a checkpoint alone, in float16: 22 MB for ResNet-18 instead of 50.

    python benchmarks/half_encoder.py CHECKPOINT weights/resnet18.pt

It is a checkpoint without projection head, which load_encoder, simclr_lin.py and init take. Its
matrices are float16, batch norm stays float32; the config goes along, the path of the images not.
"""

from pathlib import Path

from harness import parser

from system.checkpoint import load_checkpoint, to_bytes
from system.files import write_file


def half_encoder(path: Path) -> bytes:
    """What weights/resnet18.pt holds, of the checkpoint in `path`."""
    saved = load_checkpoint(path)
    config = {key: value for key, value in saved["config"].items() if key != "data_dir"}
    weights = {
        name: weight.half() if weight.dim() > 1 else weight
        for name, weight in saved["model"].items()
        if name.startswith("enc.")
    }
    return to_bytes({"model": weights, "config": config, "epoch": saved["epoch"]})


def main() -> None:
    """Write the file."""
    args = parser(__doc__)
    args.add_argument("checkpoint", type=Path)
    args.add_argument("out", type=Path)
    args = args.parse_args()
    write_file(args.out, half_encoder(args.checkpoint))


if __name__ == "__main__":
    main()
