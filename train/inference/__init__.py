"""Trained models at work: evaluation and prediction."""
