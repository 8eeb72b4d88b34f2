"""What the encoder sees: datasets, image folders, augmentations."""
