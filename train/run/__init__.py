"""A run's folder and what is kept and shown of it: checkpoints, metrics, progress."""
