"""Decodes live streams: sources, windows, decisions, records."""
