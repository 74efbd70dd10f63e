"""Keeps in a bundle the backend that a benchmark found to be the fastest at each batch size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BenchmarkError, listed
from sjepa_deploy.files import bytes_hash, json_file, now, write_atomically
from sjepa_deploy.runtime.backend import BACKENDS, FASTEST_BACKEND
from sjepa_deploy.runtime.backends.fastest import Choice, FastestRecord, clause, machine_of, record_folder
from sjepa_deploy.runtime.bench.cells import Cell, Estimate
from sjepa_deploy.runtime.bench.compare import equally_fast
from sjepa_deploy.runtime.bench.results import BenchReport, LeftOut
from sjepa_deploy.spec import RUN_PRECISIONS, RunPrecision

MEDIAN = 50.0


def choose(cells: Sequence[Cell]) -> tuple[Choice, ...]:
    """Return the fastest backend at each batch size, of those whose outputs are right.

    Where several cannot be told from the fastest, as their intervals overlap, the one comes first that may run most sizes.

    Parameters
    ----------
    cells : sequence of Cell
        Throughput of several backends on one bundle in one precision.

    Raises
    ------
    BenchmarkError
        If none is right, or a cell has too few calls or blocks to be compared.
    """
    right = [cell for cell in cells if cell.parity and cell.caution is None]
    if not right:
        raise BenchmarkError(f"No backend is right: {listed(cell.key.label for cell in cells)}.", "See sjepa-verify.")
    for cell in right:
        if _median(cell).low is None:
            raise BenchmarkError(f"{cell.key.label} has too few blocks to be compared.", "Measure longer.")
    batches = sorted({cell.key.batch for cell in right})
    equal = {batch: equally_fast([cell for cell in right if cell.key.batch == batch], MEDIAN) for batch in batches}
    n_sizes = Counter(cell.key.backend for found in equal.values() for cell in found)
    return tuple(
        Choice(
            batch=batch,
            backend=max(found, key=lambda cell: n_sizes[cell.key.backend]).key.backend,
            medians_us={cell.key.backend: _median(cell).value for cell in right if cell.key.batch == batch},
        )
        for batch, found in equal.items()
    )


def _median(cell: Cell) -> Estimate:
    median = None if cell.latency is None else cell.latency.at(MEDIAN)
    if median is None:
        raise BenchmarkError(f"{cell.key.label} has too few calls to be compared.", "Measure longer.")
    return median


def keep(
    report: BenchReport,
    bundle: Bundle,
    *,
    backends: Iterable[str] = (),
    precisions: Iterable[RunPrecision] = (),
    device: int = 0,
) -> tuple[FastestRecord | LeftOut, ...]:
    """Keep in `bundle`, for each precision of a report of this machine, which backend is the fastest at each batch size.

    Parameters
    ----------
    report : BenchReport
        What was measured here.
    bundle : Bundle
        One of those that were measured.
    backends, precisions : iterable of str
        Which are considered; empty for all that were measured.
    device : int
        Which GPU.

    Returns
    -------
    tuple of FastestRecord and LeftOut
        What was kept, and precisions in which fewer than two backends were measured.

    Raises
    ------
    BenchmarkError
        If nothing can be chosen, the run was interrupted, or was made with another bundle or machine; or the folder cannot be
        written.
    """
    if report.interrupted:
        raise BenchmarkError("The run was interrupted, and nothing is kept of it.", "Let it end, if need be with --time-limit.")
    label = next((fact.label for fact in report.bundles if fact.digest == bundle.manifest.digest), None)
    if label is None:
        raise BenchmarkError(f"The report is not of the bundle {bundle.path} as it is now.", "Measure this bundle.")
    known = (set(backends) or set(BACKENDS)) & set(BACKENDS) - {FASTEST_BACKEND}
    cells = [c for c in report.cells if c.key.scenario == "throughput" and c.key.bundle == label and c.key.backend in known]
    found: list[FastestRecord | LeftOut] = []
    for precision in precisions or RUN_PRECISIONS:
        mine = [cell for cell in cells if cell.key.precision == precision]
        names = {cell.key.backend for cell in mine}
        if len(names) == 1:
            found.append(LeftOut(what=(f"{label} in {precision}",), reason=f"Only {names.pop()} was measured."))
        elif names:
            found.append(_record(report, bundle, precision, choose(mine), device))
    records = [each for each in found if isinstance(each, FastestRecord)]
    if not records:
        measured = listed(dict.fromkeys(f"{cell.key.backend} {cell.key.precision}" for cell in cells)) or "none"
        raise BenchmarkError(
            f"There is nothing to choose from on {label}: backends with a measured throughput that decode are {measured}.",
            "Measure --scenario throughput on two or more in one precision.",
        )
    for record in records:
        _write(record, bundle, report)
    return tuple(found)


def _record(
    report: BenchReport, bundle: Bundle, precision: RunPrecision, choices: tuple[Choice, ...], device: int
) -> FastestRecord:
    environment, here = report.environment, machine_of([choice.backend for choice in choices], device)
    there: dict[str, tuple[str | None, ...]] = {
        "processor": (environment.processor,),
        "cores": (str(environment.cores),),
        "gpu": (environment.gpu,),
        "driver": (environment.gpu_driver,),
        **environment.versions,
    }
    for name, value in here.items():
        found = there.get(name, (None,))  # of runs in several Pythons a report has the versions of all
        if value not in found:
            measured = " and ".join(version for version in found if version is not None)
            raise BenchmarkError(
                f"The report is of another machine or Python: {clause(name, measured, value, 'report')}.",
                "Keep it where it was measured, or measure here.",
            )
    machine = {name: value for name, value in here.items() if value is not None}
    return FastestRecord(
        precision=precision, bundle=bundle.manifest.digest, machine=machine, choices=choices, created=now()
    ).sealed()


def _write(record: FastestRecord, bundle: Bundle, report: BenchReport) -> None:
    """Write `record` in place of the record that was kept before for such a machine."""
    e = report.environment
    machine = "|".join((e.processor, str(e.cores), e.gpu or "", e.gpu_driver or ""))
    file = record_folder(bundle) / f"{record.precision}-{bytes_hash(machine.encode())[:16]}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json_file(record))
    except OSError as error:
        raise BenchmarkError(
            f"{file} cannot be written ({error.strerror}).", "Give the bundle's folder room and rights."
        ) from error
