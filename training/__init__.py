"""What a pretraining run is made of: optimizer, ranks, metrics, state, record."""
