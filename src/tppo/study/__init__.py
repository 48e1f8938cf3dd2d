"""A grid of runs from shared SFT, labels and reward models, and what it shows."""
