"""Finds the real recordings that tests read. `make recordings` fetches them; they are never part of the repository."""

import csv
import os
from pathlib import Path

import mne
import pooch
import pytest

ROOT = Path(__file__).parents[1]
CACHE = Path(pooch.os_cache("sjepa-deploy")) / "recordings"

with (ROOT / "tests" / "recordings.tsv").open(newline="") as table:
    REAL: dict[str, dict[str, str]] = {row["name"]: row for row in csv.DictReader(table, delimiter="\t")}
"""Every real recording by name: its sha256, the address of its original, and that one's sha256 where it is converted."""


def folders() -> list[Path]:
    """Return where real recordings are looked for: in SJEPA_EEG, in ../shared/eeg, and where `make recordings` puts them."""
    named = os.environ.get("SJEPA_EEG")
    return [*([Path(named)] if named else []), ROOT / "../shared/eeg", CACHE]


def eeg_file(name: str) -> Path:
    """Return the path of a real recording, or skip the test; under ``--require-recordings`` a skipped test fails."""
    assert name in REAL, f"tests/recordings.tsv does not list {name}."
    for folder in folders():
        if (folder / name).is_file():
            return folder / name
    pytest.skip("Real recordings are missing: `make recordings` fetches them.")


def mne_template(name: str) -> mne.channels.DigMontage:
    """Return MNE's template ``colin27_*``, which was called ``standard_*`` before MNE 1.13."""
    known = mne.channels.get_builtin_montages()
    return mne.channels.make_standard_montage(name if name in known else name.replace("colin27_", "standard_"))
