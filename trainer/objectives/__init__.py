"""The objectives that a training step can minimise."""
