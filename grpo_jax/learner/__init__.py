"""Scores to new weights: advantages, log-probabilities, the loss, the optimiser, and the jitted update."""
