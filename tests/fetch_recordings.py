"""Fetch the real recordings that tests read into a cache: ``python tests/fetch_recordings.py`` (run by ``make recordings``)."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import mne
import numpy as np
import pooch
from eeg_files import CACHE, REAL

CH_NAMES = ("TP9", "AF7", "AF8", "TP10")
EVENTS = {1: "nontarget", 2: "target"}


def fetch(recordings: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Bring `recordings` into `folder`, each checked by its sha256: what has one of the original too is converted from it.

    Raises
    ------
    ValueError
        If what came, or what was made of it, has another sha256.
    """
    for name, row in recordings.items():
        path = folder / name
        if path.is_file() and pooch.file_hash(path) == row["sha256"]:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if row["sha256_of_original"] == "-":
            pooch.retrieve(row["url"], f"sha256:{row['sha256']}", fname=path.name, path=path.parent)
        else:
            known = f"sha256:{row['sha256_of_original']}"
            original = Path(pooch.retrieve(row["url"], known, fname=f"{path.stem}.csv", path=folder / "originals"))
            made = muse_to_edf(original)
            if (found := pooch.file_hash(made)) != row["sha256"]:
                raise ValueError(
                    f"{name} was converted to another file than expected (sha256 {found}). "
                    "Install the versions of mne and edfio in constraints.txt, and run `make recordings` again."
                )
            made.replace(path)
        sys.stdout.write(f"{path}\n")


def muse_to_edf(source: Path) -> Path:
    """Convert a run of eeg-notebooks, a table of microvolts at 256 Hz whose last column is markers, to EDF+ without a date."""
    with source.open(newline="") as file:
        header, *lines = csv.reader(file)
    table = np.array(lines, dtype=float)
    eeg = table[:, [header.index(name) for name in CH_NAMES]].T * 1e-6
    raw = mne.io.RawArray(eeg, mne.create_info(list(CH_NAMES), 256.0, "eeg"), verbose="error")
    (at,) = np.nonzero(table[:, -1])
    raw.set_annotations(mne.Annotations(at / 256.0, 0.0, [EVENTS[int(kind)] for kind in table[at, -1]]))
    path = source.with_suffix(".edf")
    mne.export.export_raw(path, raw, physical_range="channelwise", overwrite=True, verbose="error")
    return path


if __name__ == "__main__":
    fetch(REAL, CACHE)
    sys.stdout.write(f"All {len(REAL)} files of real recordings are in {CACHE}.\n")
