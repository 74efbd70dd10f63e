"""Turns models into files that other machines run."""
