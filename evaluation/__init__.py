"""What a checkpoint is worth: features, protocols, results."""
