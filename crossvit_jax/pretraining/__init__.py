"""Pre-training without labels: masked image modelling, and self-distillation."""
