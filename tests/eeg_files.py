"""The real recordings that the tests read: they are shared by checkouts, and never part of the repository."""

import os
from pathlib import Path

import mne
import pytest

ROOT = Path(__file__).parents[1]
EEG = Path(os.environ.get("SJEPA_EEG", ROOT / "../shared/eeg"))


def eeg_file(name: str) -> Path:
    """Return the path of a recording, or fail the test: a skipped oracle would look like a passed one."""
    path = EEG / name
    if not path.is_file():
        pytest.fail(f"There is no recording {path}: set SJEPA_EEG to the folder of the public test recordings.")
    return path


def mne_template(name: str) -> mne.channels.DigMontage:
    """Return MNE's template ``colin27_*``, which was called ``standard_*`` before MNE 1.13."""
    known = mne.channels.get_builtin_montages()
    return mne.channels.make_standard_montage(name if name in known else name.replace("colin27_", "standard_"))
