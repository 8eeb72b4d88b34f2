"""The machine under it: device, files, checkpoints, errors and signals."""
