"""Runs bundles: backends, live decoding, benchmarks. Importing it never imports PyTorch."""
