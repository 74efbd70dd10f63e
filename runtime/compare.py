"""What changed between two benchmark reports, and whether the difference is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sjepa_deploy.runtime.bench_results import CellKey, Estimate

Verdict = Literal["slower", "faster", "no change shown", "not held any more", "held now", "wrong now", "too few blocks"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """How one cell differs between two reports.

    Attributes
    ----------
    key : CellKey
        Which.
    verdict : str
        See `Verdict`. "slower" and "faster" are said only if the whole interval lies beyond the smallest change that is claimed.
    before_us, after_us : float or None
        Medians.
    change : Estimate or None
        Relative change of the median, 0.1 for 10 % slower, with its interval.
    change_p99 : Estimate or None
        The same for p99, where both have one. It takes no part in the verdict.
    """

    key: CellKey
    verdict: Verdict
    before_us: float | None = None
    after_us: float | None = None
    change: Estimate | None = None
    change_p99: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two reports, cell by cell.

    Attributes
    ----------
    before, after : str
        Names of the files.
    smallest_claim : float
        Changes within this (0.03 for 3 %) are not claimed: two runs of the same thing differ by so much.
    machine : Estimate or None
        Relative change of the canary: what the machine itself became slower by.
    differs : tuple of str
        What differs between the environments and bundles of the two.
    changes : tuple of Change
        Of the cells that are in both.
    only_before, only_after : tuple of str
        Labels of those that are not.
    """

    before: str
    after: str
    smallest_claim: float
    machine: Estimate | None
    differs: tuple[str, ...]
    changes: tuple[Change, ...]
    only_before: tuple[str, ...] = ()
    only_after: tuple[str, ...] = ()
