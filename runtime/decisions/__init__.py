"""Turns outputs of a model into decisions: probabilities, smoothing, thresholds, evidence, and how they are fitted."""
