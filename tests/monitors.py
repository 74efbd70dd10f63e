"""Facts of a small stream, for tests of what watches a decoder."""

from bundles import MONTAGE

from sjepa_deploy.runtime.monitor import StreamFacts


def facts(**changes) -> StreamFacts:
    """Return the facts of a stream of 8 channels with two outputs."""
    known = {
        "bundle": "left-or-right",
        "bundle_hash": "0123456789abcdef" * 4,
        "backend": "ort-cpu",
        "source": "synthetic",
        "ch_names": MONTAGE.ch_names,
        "positions": MONTAGE.positions,
        "sfreq": 100.0,
        "unit": "uV",
        "hop": 0.1,
        "deadline": 0.1,
        "output_names": ("left", "right"),
    }
    return StreamFacts(**known | changes)
