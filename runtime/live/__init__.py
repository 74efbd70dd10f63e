"""Live decoding: sources, windows, decisions, records."""
