"""Trains models: pretraining, fine-tuning, and the labelled EEG windows that both read."""
