"""From a SignalJEPA EEG model's PyTorch checkpoint to a verified, real-time decoder."""
