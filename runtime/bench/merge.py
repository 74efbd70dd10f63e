"""Merges reports: backends that need another Python (TensorRT 8.6, PyTorch) are measured in a run of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sjepa_deploy.errors import BenchmarkError
from sjepa_deploy.runtime.bench.cells import HARNESS, Samples
from sjepa_deploy.runtime.bench.compare import recommend
from sjepa_deploy.runtime.bench.estimates import of_blocks
from sjepa_deploy.runtime.bench.noise import canary_spread
from sjepa_deploy.runtime.bench.results import BenchReport, Disturbance, LeftOut, Noise
from sjepa_deploy.runtime.machine import Environment


def merge(runs: Sequence[tuple[BenchReport, Samples]]) -> tuple[BenchReport, Samples]:
    """Put runs on one machine together. Their blocks were not interleaved with each other's.

    Raises
    ------
    BenchmarkError
        If the runs are of another machine, of different bundles of one name, or measured the same cell.
    """
    (first, first_samples), *others = runs
    cells, samples = list(first.cells), dict(first_samples)
    bundles = {fact.label: fact for fact in first.bundles}
    for run, arrays in others:
        if _hardware(run) != _hardware(first):
            raise BenchmarkError("The reports are of different machines.", "Merge runs of one machine only.")
        for fact in run.bundles:
            if bundles.setdefault(fact.label, fact) != fact:
                raise BenchmarkError(f"The reports have different bundles named {fact.label}.", "Merge runs of the same export.")
        for cell in run.cells:
            if any(cell.key == known.key for known in cells):
                if cell.key.backend == HARNESS:
                    continue
                raise BenchmarkError(f"Two reports have the cell {cell.key.label}.", "Leave one of them out.")
            name = f"c{len(cells):03}"
            cells.append(replace(cell, id=name))
            prefix = f"{cell.id}."
            samples |= {name + key[len(prefix) - 1 :]: array for key, array in arrays.items() if key.startswith(prefix)}
        if "canary_us" in arrays:
            samples["canary_us"] = np.concatenate([samples.get("canary_us", np.empty(0)), arrays["canary_us"]])
    reports = [run for run, _ in runs]
    partial = tuple(replace(ending, run=i) for i, run in enumerate(reports, 1) for ending in run.partial)
    merged = replace(
        first,
        seconds=sum(run.seconds for run in reports),
        command=" && ".join(run.command for run in reports),
        partial=partial,
        environment=_environment(reports),
        noise=_noise(reports, samples),
        bundles=tuple(bundles.values()),
        cells=tuple(cells),
        parity=tuple({(j.bundle, j.result.backend, j.result.precision): j for run in reports for j in run.parity}.values()),
        capacity=tuple(c for run in reports for c in run.capacity),
        decision_age=tuple(age for run in reports for age in run.decision_age),
        left_out=_left_out(reports),
        samples_file=None,
        settings=tuple(dict.fromkeys(setting for run in reports for setting in run.settings)),
    )
    return replace(merged, recommendations=recommend(merged)), samples


def renamed(report: BenchReport, names: Mapping[str, str]) -> BenchReport:
    """Return `report` with other names of backends: a backend that was opened with options of its own counts as another backend.

    Its recommendations and ages of decisions are left out.
    """

    def new(old: str) -> str:
        return names.get(old, old)

    return replace(
        report,
        cells=tuple(replace(cell, key=replace(cell.key, backend=new(cell.key.backend))) for cell in report.cells),
        parity=tuple(replace(j, result=replace(j.result, backend=new(j.result.backend))) for j in report.parity),
        capacity=tuple(replace(found, backend=new(found.backend)) for found in report.capacity),
        settings=tuple(replace(setting, backend=new(setting.backend)) for setting in report.settings),
        recommendations=(),
        decision_age=(),
    )


def _hardware(report: BenchReport) -> tuple[str, int, str | None]:
    return report.environment.processor, report.environment.cores, report.environment.gpu


def _environment(reports: list[BenchReport]) -> Environment:
    """Return the environment of the first report, with the versions of all Pythons."""
    each = [report.environment for report in reports]
    names = dict.fromkeys(name for environment in each for name in environment.versions)
    return replace(
        each[0],
        python=_once(environment.python for environment in each),
        versions={name: _once(environment.versions.get(name, ()) for environment in each) for name in names},
    )


def _once(values: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for several in values for value in several))


def _noise(reports: list[BenchReport], samples: Samples) -> Noise | None:
    known = [(report, report.noise) for report in reports if report.noise is not None]
    if not known:
        return None
    seconds = sum(report.seconds for report, _ in known)

    def average(values: list[float | None]) -> float | None:
        pairs = [(v, report.seconds) for v, (report, _) in zip(values, known, strict=True) if v is not None]
        return sum(v * s for v, s in pairs) / seconds if pairs else None

    canary = samples["canary_us"]
    return Noise(
        noisy=any(noise.noisy for _, noise in known),
        reasons=together([(i, reason) for i, (_, noise) in enumerate(known, 1) for reason in noise.reasons]),
        canary_us=of_blocks(canary),
        canary_spread=canary_spread(canary),
        others_cpu=average([noise.others_cpu for _, noise in known]),
        stolen_cpu=average([noise.stolen_cpu for _, noise in known]),
    )


def together(reasons: Sequence[tuple[int, Disturbance]]) -> tuple[Disturbance, ...]:
    """Return the disturbances of several runs, those of one kind as one: the worst, with the numbers of all its runs.

    Parameters
    ----------
    reasons : sequence of (int, Disturbance)
        Number of a run, and what disturbed it.
    """
    alike: dict[tuple[str, str], list[tuple[int, Disturbance]]] = {}
    for run, reason in reasons:
        alike.setdefault((reason.kind, reason.told), []).append((run, reason))
    found = []
    for group in alike.values():
        worst_run, worst = max(group, key=lambda pair: abs(pair[1].value))
        found.append(replace(worst, runs=tuple(run for run, _ in group), worst_run=worst_run))
    return tuple(found)


def _left_out(reports: list[BenchReport]) -> tuple[LeftOut, ...]:
    """Return the combinations that no run could measure."""
    measured = {cell.key.backend for report in reports for cell in report.cells}
    found: dict[LeftOut, None] = {}
    for report in reports:
        for entry in report.left_out:
            if what := tuple(name for name in entry.what if name not in measured):
                found[replace(entry, what=what)] = None
    return tuple(found)
