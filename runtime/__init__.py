"""What decodes: backends, parity, and nothing that needs PyTorch at import."""
