"""simclr.py with thin_resnet as its resnet18, for runs under torchrun that end in seconds."""

import runpy
import sys

from conftest import REPOSITORY, thin_resnet

from models import BACKBONES

if __name__ == "__main__":
    BACKBONES["resnet18"] = thin_resnet
    sys.argv[0] = str(REPOSITORY / "simclr.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
