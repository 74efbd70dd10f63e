"""The real recordings that the tests read: they are shared by checkouts, and never part of the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EEG = Path(os.environ.get("SJEPA_EEG", ROOT / "../shared/eeg"))


def eeg_file(name: str) -> Path:
    """Return the path of a recording, or fail the test: a skipped oracle would look like a passed one."""
    path = EEG / name
    if not path.is_file():
        pytest.fail(f"There is no recording {path}: set SJEPA_EEG to the folder of the public test recordings.")
    return path
