"""Measures backends: scenarios, estimates, reports, comparisons."""
