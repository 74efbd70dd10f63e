"""Reads, fits and filters EEG: recordings, montages, filters and interpolation, offline and live side by side."""
