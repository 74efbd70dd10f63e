"""Compares two benchmark reports cell by cell, and recommends a backend for each bundle of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.pages.tables import number
from sjepa_deploy.runtime.backend import BACKENDS
from sjepa_deploy.runtime.bench.cells import HARNESS, Cell, CellKey, Estimate, Samples
from sjepa_deploy.runtime.bench.estimates import ratio
from sjepa_deploy.runtime.bench.results import BenchReport, Recommendation
from sjepa_deploy.runtime.bench.words import why_noisy, why_partial
from sjepa_deploy.spec import RUN_PRECISIONS

SMALLEST_CLAIM = 0.05
"""Relative change by which two runs of the same thing on one machine differ at most.

The blocks of one run cannot show the reasons: where memory came to lie, when the threads started, the speed of the cores
(benchmarks/results/bench_checks_2-core-cpu_2026-11-25). A change is claimed only if its whole interval lies beyond this value.
"""

Verdict = Literal["slower", "faster", "no change shown", "not held any more", "held now", "wrong now", "too few blocks"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Says how one cell differs between two reports.

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
        The same for p99, where both have a p99. The p99 takes no part in the verdict.
    """

    key: CellKey
    verdict: Verdict
    before_us: float | None = None
    after_us: float | None = None
    change: Estimate | None = None
    change_p99: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Holds how two reports differ, cell by cell.

    Attributes
    ----------
    before, after : str
        Names of the files.
    smallest_claim : float
        Changes within this (0.05 for 5 %) are not claimed: two runs of the same thing differ by so much.
    machine : Estimate or None
        Relative change of the canary: what the machine itself became slower by.
    differs : tuple of str
        Differences between the environments and bundles of the two reports.
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


def compare(
    before: tuple[BenchReport, Samples], after: tuple[BenchReport, Samples], names: tuple[str, str] = ("before", "after")
) -> Comparison:
    """Compare two reports cell by cell, from their raw samples.

    Whole blocks of both are resampled, so that the interval of a change holds what blocks of each run differ by. A backend has to
    differ by more than what the machine itself may have become slower or faster by, which the interval of the canary's change
    tells.

    Parameters
    ----------
    before, after : tuple of BenchReport and dict of arrays
        The reports with their samples.
    names : tuple of str
        Names of the reports.
    """
    (old, old_samples), (new, new_samples) = before, after
    machine = None
    if "canary_us" in old_samples and "canary_us" in new_samples:
        machine = ratio(_canary(old_samples), _canary(new_samples), 50.0)
    changes = []
    for cell in old.cells:
        twin = new.cell(cell.key)
        if twin is not None and cell.cold_start is None and cell.key.backend != HARNESS:
            changes.append(_change(cell, twin, old_samples, new_samples, machine))
    return Comparison(
        before=names[0],
        after=names[1],
        smallest_claim=SMALLEST_CLAIM,
        machine=machine,
        differs=_differences(old, new),
        changes=tuple(changes),
        only_before=_only_in(old, new),
        only_after=_only_in(new, old),
    )


def _canary(samples: Samples) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the canary's times in ten blocks: those in a row are not independent."""
    times = samples["canary_us"]
    return times, np.arange(len(times)) * 10 // len(times)


def _claimed(change: Estimate, machine: Estimate | None) -> bool:
    """Return whether all of the interval lies beyond the smallest claim, and beyond what the machine may have changed by."""
    if change.low is None or change.high is None:
        return False
    slower = faster = 0.0
    if machine is not None and machine.low is not None and machine.high is not None:
        slower, faster = max(0.0, machine.high), min(0.0, machine.low)
    return change.low > SMALLEST_CLAIM + slower or change.high < -SMALLEST_CLAIM + faster


def _change(old: Cell, new: Cell, old_samples: Samples, new_samples: Samples, machine: Estimate | None) -> Change:
    if old.parity and new.struck_out:
        return Change(key=old.key, verdict="wrong now")
    if old.latency is None or new.latency is None:
        verdict: Verdict = "no change shown"
        if old.latency is not None:
            verdict = "not held any more"
        elif new.latency is not None:
            verdict = "held now"
        return Change(key=old.key, verdict=verdict)
    pools = [(s[f"{c.id}.latency_us"], s[f"{c.id}.block"]) for c, s in ((old, old_samples), (new, new_samples))]
    change = ratio(pools[0], pools[1], 50.0)
    middle = [cell.latency.at(50.0) for cell in (old, new) if cell.latency is not None]
    verdict = "no change shown"
    if change.low is None:
        verdict = "too few blocks"
    elif _claimed(change, machine):
        verdict = "slower" if change.value > 0 else "faster"
    both_p99 = old.latency.at(99.0) is not None and new.latency.at(99.0) is not None
    return Change(
        key=old.key,
        verdict=verdict,
        before_us=None if middle[0] is None else middle[0].value,
        after_us=None if middle[1] is None else middle[1].value,
        change=change,
        change_p99=ratio(pools[0], pools[1], 99.0) if both_p99 else None,
    )


def _differences(old: BenchReport, new: BenchReport) -> tuple[str, ...]:
    found = []
    for name in ("processor", "cores", "system", "python", "gpu", "gpu_driver", "governor"):
        values = getattr(old.environment, name), getattr(new.environment, name)
        if values[0] != values[1]:
            texts = (" and ".join(value) if isinstance(value, tuple) else value for value in values)
            found.append(f"{name}: {' -> '.join(map(str, texts))}")
    packages = old.environment.versions, new.environment.versions
    for name in sorted(packages[0] | packages[1]):
        versions = packages[0].get(name), packages[1].get(name)
        if versions[0] != versions[1]:
            found.append(f"{name}: {' -> '.join(' and '.join(each or ('not installed',)) for each in versions)}")
    digests = [{fact.label: fact.digest for fact in report.bundles} for report in (old, new)]
    found += [f"bundle {b}: another export" for b in digests[0] if b in digests[1] and digests[0][b] != digests[1][b]]
    for report, name in ((old, "before"), (new, "after")):
        if report.noise is not None and report.noise.noisy:
            found.append(f"the run {name} was noisy: {why_noisy(report.noise)}")
        if report.partial:
            found.append(f"the run {name} is partial: {why_partial(report)}")
    return tuple(found)


def _only_in(one: BenchReport, other: BenchReport) -> tuple[str, ...]:
    """Return the cells that only one report has. The numbers of streams are chosen by a search: that those differ is no news."""
    return tuple(c.key.label for c in one.cells if c.key.n_streams is None and other.cell(c.key) is None)


def regressions(comparison: Comparison, above: float) -> tuple[Change, ...]:
    """Return what became worse: claimed slowdowns above `above` (0.1 for 10 %), rates not held any more, wrong outputs."""
    return tuple(
        change
        for change in comparison.changes
        if change.verdict in ("not held any more", "wrong now")
        or (change.verdict == "slower" and change.change is not None and change.change.value > above)
    )


def recommend(report: BenchReport) -> tuple[Recommendation, ...]:
    """Return the backend to use for each bundle: the fastest of those that are right.

    The backends are compared at the highest paced rate that one of them holds, or else back to back. The comparison is by their
    p99, or by their median where one of them has too few samples for a p99. Among the backends whose intervals overlap the
    fastest one's, float32 comes first, and backends of this toolkit before others.
    """
    found = []
    for fact in report.bundles:
        mine = [c for c in report.cells if c.key.bundle == fact.label and c.key.backend != HARNESS]
        wrong = dict.fromkeys(f"{c.key.backend} {c.key.precision}" for c in mine if c.struck_out)
        careful = dict.fromkeys(f"{c.key.backend} {c.key.precision}" for c in mine if c.caution)
        field = _comparable([c for c in mine if c.parity and c.caution is None and c.latency is not None])
        if not field:
            continue
        percent = 99.0 if all(_at(c, 99.0) is not None for c in field) else 50.0
        field = sorted((c for c in field if _at(c, percent) is not None), key=lambda c: _figure(c, percent).value)
        if not field:
            continue
        equal = equally_fast(field, percent)
        best = min(equal, key=_preference)
        rest = [c for c in field if c is not best]
        found.append(
            Recommendation(
                bundle=fact.label,
                backend=best.key.backend,
                precision=best.key.precision,
                why=_why(best, rest, len(equal), percent, list(wrong), list(careful)),
            )
        )
    return tuple(found)


def equally_fast(cells: list[Cell], percent: float) -> list[Cell]:
    """Return those of `cells` that cannot be told from the fastest one, the fastest first: their intervals overlap."""
    ordered = sorted(cells, key=lambda c: _figure(c, percent).value)
    fastest = _figure(ordered[0], percent)
    limit = fastest.value if fastest.high is None else fastest.high
    return [c for c in ordered if (low := _figure(c, percent).low) is not None and low <= limit] or ordered[:1]


def _comparable(cells: list[Cell]) -> list[Cell]:
    """Return the cells that the choice is made by, one for each backend and precision."""
    paced = [c for c in cells if c.key.scenario == "paced" and not c.key.keep_warm and c.key.rate is not None]
    if paced:
        rate = max(c.key.rate or 0 for c in paced)
        return [c for c in paced if c.key.rate == rate]
    closed = [c for c in cells if c.key.scenario in ("back-to-back", "throughput")]
    smallest = min((c.key.batch for c in closed), default=0)
    first = next((c.key.scenario for c in closed), None)
    return [c for c in closed if c.key.batch == smallest and c.key.scenario == first]


def _at(cell: Cell, percent: float) -> Estimate | None:
    return None if cell.latency is None else cell.latency.at(percent)


def _figure(cell: Cell, percent: float) -> Estimate:
    figure = _at(cell, percent)
    assert figure is not None
    return figure


def _preference(cell: Cell) -> tuple[int, int]:
    return RUN_PRECISIONS.index(cell.key.precision), 0 if cell.key.backend in BACKENDS else 1


def _why(best: Cell, rest: list[Cell], n_equal: int, percent: float, wrong: list[str], careful: list[str]) -> str:
    key, figure = best.key, _figure(best, percent)
    where = f"at {key.rate:g} windows a second" if key.rate is not None else f"back to back at batch {key.batch}"
    span = "" if figure.low is None or figure.high is None else f" ({number(figure.low)} to {number(figure.high)})"
    words = [f"p{percent:g} of {number(figure.value)} us{span} {where}."]
    if n_equal > 1:
        words.append(f"{n_equal - 1} more cannot be told from it; the higher precision and our own backends come first.")
    if rest:
        second = rest[0]
        words.append(f"Next: {second.key.backend} {second.key.precision} with {number(_figure(second, percent).value)} us.")
    if wrong:
        words.append(f"Struck out for wrong outputs: {', '.join(wrong)}.")
    if careful:
        words.append(f"Not considered, as outputs differ on windows with electrode offsets: {', '.join(careful)}.")
    return " ".join(words)
