"""Datasets, image folders and augmentations."""
