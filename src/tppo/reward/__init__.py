"""Reward models: word labels on tokens (align), losses (Eq. 1-3), data, models, metrics, training."""
