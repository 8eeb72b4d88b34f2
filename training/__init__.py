"""Optimizers, distributed training, metrics, training state and its record."""
