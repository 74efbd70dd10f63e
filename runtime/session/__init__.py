"""Keeps the runs of an experiment in a folder, and exports them to BIDS."""
