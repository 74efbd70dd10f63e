"""Says what a training learns from, before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.learning.data import Split, SplitBy, Windows


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """Counts what one part of the windows holds.

    Attributes
    ----------
    n_windows, n_subjects, n_recordings : int
        Windows, and the subjects and recordings that they are of.
    classes : dict of str to int
        Windows of each class; empty where nothing is classified.
    """

    n_windows: int
    n_subjects: int
    n_recordings: int
    classes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Says what a training learns from.

    Attributes
    ----------
    split : {"subject", "session", "recording", "block"}
        What the parts do not share.
    parts : dict of str to PartReport
        "train", "val" and "test".
    n_gap : int
        Windows in the gaps between parts.
    n_unused : int
        Training windows that each epoch leaves out, others every time, as they do not fill a batch.
    class_weights : dict of str to float
        Weight of each class in the loss; empty where none is weighted.
    skipped : tuple of str
        Sentences that say which recordings gave no window, and why.
    """

    split: SplitBy
    parts: dict[str, PartReport]
    n_gap: int
    n_unused: int
    class_weights: dict[str, float]
    skipped: tuple[str, ...]


def report_on(windows: Windows, split: Split, batch: int, class_weights: NDArray[np.float64] | None = None) -> DataReport:
    """Return what a training in batches of so many windows, of all devices together, learns from."""
    parts = {name: _part(windows, getattr(split, name)) for name in ("train", "val", "test")}
    names = windows.class_names or ()
    return DataReport(
        split=split.by,
        parts=parts,
        n_gap=len(windows) - sum(part.n_windows for part in parts.values()),
        n_unused=len(split.train) % batch,
        class_weights={} if class_weights is None else dict(zip(names, class_weights.tolist(), strict=True)),
        skipped=windows.skipped,
    )


def _part(windows: Windows, rows: NDArray[np.intp]) -> PartReport:
    classes: dict[str, int] = {}
    if windows.class_names is not None and windows.targets is not None:
        counts = np.bincount(windows.targets[rows], minlength=len(windows.class_names))
        classes = dict(zip(windows.class_names, counts.tolist(), strict=True))
    return PartReport(
        n_windows=len(rows),
        n_subjects=len(np.unique(windows.subject[rows])),
        n_recordings=len(np.unique(windows.recording[rows])),
        classes=classes,
    )
