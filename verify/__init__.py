"""Judging what others send or publish: admission of deltas, replay of units, weights of a merge, checkpoints."""
