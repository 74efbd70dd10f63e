"""The signal: recordings, montages, filters and interpolation, offline and live side by side."""
