"""Reads, fits and filters EEG: recordings, montages, filters and interpolation. Offline and live code stand side by side."""
