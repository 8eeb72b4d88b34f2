"""Device, files, checkpoints, errors and signals."""
