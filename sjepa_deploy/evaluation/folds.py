"""Divides windows into the folds of an evaluation: every window is tested once, by a model that has not seen its group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DataError, listed
from sjepa_deploy.learning.data import DataConfig, Split, SplitBy, Windows, groups_of, split_windows

Protocol = Literal["within", "cross-session", "cross-subject", "loso"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

FEWEST = 3
"""Groups that are dealt to a training, a validation and a test part."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """Holds one fold.

    Attributes
    ----------
    number : int
        Number of the fold, from 0 on; within subjects each subject has a fold of this number.
    subject : str or None
        Subject whose windows the fold divides; None of a fold of all subjects.
    split : Split
        Rows of the windows of each part.
    """

    number: int
    subject: str | None
    split: Split

    @property
    def name(self) -> str:
        """Return a name that is a relative path."""
        return f"fold-{self.number}" if self.subject is None else f"{_plain(self.subject)}/fold-{self.number}"


def folds_of(windows: Windows, config: DataConfig, protocol: Protocol) -> tuple[Fold, ...]:
    """Return the folds of a protocol.

    Parameters
    ----------
    windows : Windows
        All windows.
    config : DataConfig
        Number of folds, seed of the split, and gap between parts of one recording.
    protocol : {"within", "cross-session", "cross-subject", "loso"}
        "within": each subject alone, recordings of it apart, or with fewer than three its stretches of time. "cross-session":
        each subject alone, sessions apart. "cross-subject": subjects apart. "loso": each subject alone is the test part.

    Raises
    ------
    DataError
        If there are too few subjects or sessions.
    """
    rows = np.arange(len(windows))
    if protocol in ("cross-subject", "loso"):
        n = len(np.unique(windows.subject))
        if n < 2:
            raise DataError(
                f"There is one subject, {windows.subject[0]}, and no other one to learn from.",
                "Use --protocol within or cross-session, or give recordings of more people.",
            )
        n_folds = n if protocol == "loso" else min(config.n_folds, n)
        return _folds(windows, rows, replace(config, n_folds=max(FEWEST, n_folds)), "subject", None)
    found: list[Fold] = []
    for subject in map(str, np.unique(windows.subject)):
        own = np.flatnonzero(windows.subject == subject)
        groups = groups_of(windows.places(own))
        if protocol == "cross-session":
            if len(np.unique(groups["session"])) < 2:
                raise DataError(
                    f"Subject {subject} has one session, and no other one to learn from.",
                    "Use --protocol within or cross-subject, or leave this subject out.",
                )
            found += _folds(windows, own, config, "session", subject)
        else:
            by: SplitBy = "recording" if len(np.unique(groups["recording"])) >= FEWEST else "block"
            found += _folds(windows, own, config, by, subject)
    return tuple(found)


def _folds(windows: Windows, rows: NDArray[np.intp], config: DataConfig, by: SplitBy, subject: str | None) -> tuple[Fold, ...]:
    """Return the folds of some rows of the windows."""
    places = windows.places(rows)
    if by == "block":
        n_folds = config.n_folds
    else:
        names = np.unique(groups_of(places)[by])
        if len(names) < FEWEST:
            return tuple(
                Fold(number=i, subject=subject, split=_two(places, rows, config, by, str(name))) for i, name in enumerate(names)
            )
        n_folds = min(config.n_folds, len(names))
    splits = [split_windows(places, replace(config, split=by, n_folds=n_folds, fold=i)) for i in range(n_folds)]
    return tuple(
        Fold(
            number=i,
            subject=subject,
            split=Split(train=rows[split.train], val=rows[split.val], test=rows[split.test], by=by),
        )
        for i, split in enumerate(splits)
    )


def _two(places: Windows, rows: NDArray[np.intp], config: DataConfig, by: SplitBy, tested: str) -> Split:
    """Return the split of two groups: one is tested, recordings or stretches of the other one train and validate."""
    test = groups_of(places)[by] == tested
    others = np.flatnonzero(~test)
    known = places.places(others)
    inner: SplitBy = "recording" if len(np.unique(known.recording)) >= FEWEST else "block"
    parts = split_windows(known, replace(config, split=inner, fold=0))
    train = np.sort(np.concatenate([parts.train, parts.val]))
    return Split(train=rows[others[train]], val=rows[others[parts.test]], test=rows[np.flatnonzero(test)], by=by)


def chosen(folds: tuple[Fold, ...], numbers: tuple[int, ...] | None) -> tuple[Fold, ...]:
    """Return the folds of these numbers; None takes all.

    Raises
    ------
    DataError
        If there is no such fold.
    """
    if numbers is None:
        return folds
    there = sorted({fold.number for fold in folds})
    if absent := [str(number) for number in numbers if number not in there]:
        raise DataError(f"There is no fold {listed(absent)}; there are {there[0]} to {there[-1]}.", "Mend --folds.")
    return tuple(fold for fold in folds if fold.number in numbers)


def _plain(name: str) -> str:
    """Return a name without separators of paths."""
    return name.replace("/", "_").replace("\\", "_").lstrip(".") or "_"
