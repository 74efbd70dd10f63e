"""Makes the tables of a benchmark report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sjepa_deploy.pages.tables import NOTHING, Column, Entry, Row, Table, duration, number, plain, without_empty_columns
from sjepa_deploy.parity import NOT_FINITE, ParityResult
from sjepa_deploy.runtime.bench.cells import HARNESS, PERCENTS, Cell, CellKey, Estimate, Scenario
from sjepa_deploy.runtime.bench.compare import Comparison
from sjepa_deploy.runtime.bench.results import BenchReport, Judgement
from sjepa_deploy.runtime.bench.words import estimate, percentile
from sjepa_deploy.runtime.machine import MachineState


@dataclass(frozen=True, kw_only=True)
class _Field:
    """Joins a column with the function that gives its entry for a cell."""

    column: Column
    entry: Callable[[Cell], Entry]
    needed: bool = True
    """A needed column stays even if no cell has a figure for the column."""


# ---- tables of cells ------------------------------------------------------------------------------------------------------


def _key(name: str, read: Callable[[CellKey], str | float | None], *, meaning: str = "", numeric: bool = False) -> _Field:
    def entry(cell: Cell) -> Entry:
        value = read(cell.key)
        if value is None:
            return NOTHING
        return Entry(text=value) if isinstance(value, str) else Entry(text=f"{value:g}", sort=value)

    return _Field(column=Column(name=name, meaning=meaning, numeric=numeric), entry=entry)


def _figure(name: str, entry: Callable[[Cell], Entry], meaning: str = "", *, needed: bool = False) -> _Field:
    return _Field(column=Column(name=name, numeric=True, meaning=meaning), entry=entry, needed=needed)


def _latency(percent: float) -> _Field:
    def entry(cell: Cell) -> Entry:
        if cell.latency is None:
            refused = cell.open_loop is not None and not cell.open_loop.held and percent == PERCENTS[0]
            return Entry(text="not held", absent=True) if refused else NOTHING
        return next((percentile(p) for p in cell.latency.percentiles if p.percent == percent), NOTHING)

    return _figure(f"p{percent:g}", entry, f"{percent:g} % of the calls are at most as slow", needed=True)


def _missed(cell: Cell) -> Entry:
    run = cell.open_loop
    if run is None or not run.held:
        return NOTHING
    return Entry(text=f"{run.missed:,} of {run.n_done:,}", sort=run.missed)


def _parity(report: BenchReport) -> _Field:
    judgements = {(j.bundle, j.result.backend, j.result.precision): j for j in report.parity}

    def entry(cell: Cell) -> Entry:
        if cell.key.backend == HARNESS:
            return Entry(text="decodes nothing", absent=True)
        found = judgements.get((cell.key.bundle, cell.key.backend, cell.key.precision))
        if found is None:
            return Entry(text="not judged", absent=True)
        return Entry(text=_verdict(found), small=_error(found.result), sort=found.result.max_error)

    column = Column(name="parity", meaning="largest error over the outputs' scale, and what is allowed")
    return _Field(column=column, entry=entry)


def _verdict(judgement: Judgement) -> str:
    if not judgement.passed:
        return "WRONG"
    return "passed" if judgement.caution is None else "not with offsets"


def _size(error: float) -> str:
    return "not finite" if error == NOT_FINITE else f"{error:.1e}"


def _error(result: ParityResult) -> str:
    return f"{result.max_error:.1e} of {result.tolerance:g}" if result.nan_agrees else "NaN elsewhere"


def _open_loop(name: str, read: Callable[[Cell], Entry], meaning: str) -> _Field:
    return _figure(name, lambda cell: read(cell) if cell.open_loop is not None else NOTHING, meaning)


BACKEND = _Field(
    column=Column(name="backend", meaning="what ran the model, and its precision"),
    entry=lambda cell: Entry(text=cell.key.backend, small=cell.key.precision),
)
BATCH = _key("batch", lambda key: key.batch, numeric=True, meaning="windows of a call")
RATE = _key("windows/s", lambda key: key.rate, numeric=True, meaning="rate at which windows come, of each stream")
STREAMS = _key("streams", lambda key: key.n_streams, numeric=True)
KEEP_WARM = _key("keep-warm", lambda key: "yes" if key.keep_warm else "no", meaning="idle gaps filled with dummy calls")
PERCENTILES = tuple(_latency(percent) for percent in PERCENTS)
MAX = _figure("max", lambda cell: plain(None if cell.latency is None else cell.latency.max_us), "the slowest call", needed=True)
JITTER = _figure(
    "jitter",
    lambda cell: plain(None if cell.latency is None else cell.latency.jitter_us),
    "standard deviation of the interval between two outputs",
)
SAMPLES = _figure("samples", lambda cell: plain(None if cell.latency is None else cell.latency.n))
WINDOWS_PER_S = _figure("decoded/s", lambda cell: estimate(cell.windows_per_s), "windows over the time in the backend")
MISSED = _figure("missed", _missed, "windows done later than the deadline")
LONGEST_RUN = _open_loop(
    "in a row", lambda cell: plain(cell.open_loop.longest_run) if cell.open_loop else NOTHING, "most windows missed in a row"
)
UTILIZATION = _open_loop(
    "busy %", lambda cell: plain(100 * cell.open_loop.utilization) if cell.open_loop else NOTHING, "time in the backend"
)
BEATS = _open_loop(
    "warming %",
    lambda cell: plain(100 * cell.open_loop.beats_busy) if cell.open_loop and cell.key.keep_warm else NOTHING,
    "time in dummy calls",
)
CPU = _open_loop(
    "CPU", lambda cell: plain(cell.open_loop.cpu) if cell.open_loop else NOTHING, "processor seconds of the process a second"
)
MEAN_BATCH = _open_loop(
    "mean batch", lambda cell: plain(cell.open_loop.mean_batch) if cell.open_loop else NOTHING, "windows of a call"
)

FIELDS: dict[Scenario, tuple[_Field, ...]] = {
    "back-to-back": (BACKEND, BATCH, *PERCENTILES, MAX, WINDOWS_PER_S, SAMPLES),
    "paced": (
        *(BACKEND, RATE, KEEP_WARM, *PERCENTILES, MAX, JITTER),
        *(MISSED, LONGEST_RUN, UTILIZATION, BEATS, CPU, SAMPLES),
    ),
    "streams": (BACKEND, STREAMS, RATE, *PERCENTILES, MAX, MISSED, LONGEST_RUN, MEAN_BATCH, UTILIZATION, CPU),
    "throughput": (BACKEND, BATCH, WINDOWS_PER_S, *PERCENTILES, MAX, SAMPLES),
}
"""Columns for the cells of each scenario."""


def cell_tables(report: BenchReport, scenario: Scenario) -> tuple[Table, ...]:
    """Return one table a bundle for the cells of `scenario`, the fastest first."""
    cells = [cell for cell in report.cells if cell.key.scenario == scenario]
    backend, *rest = FIELDS[scenario]
    fields = (backend, _parity(report), *rest)
    by_rate = scenario == "throughput"
    sorted_by = fields.index(WINDOWS_PER_S if by_rate else PERCENTILES[0])
    labels = dict.fromkeys(cell.key.bundle for cell in cells)
    return tuple(
        _table(f"{label}, microseconds", [c for c in cells if c.key.bundle == label], fields, sorted_by, descending=by_rate)
        for label in labels
    )


def _table(caption: str, cells: Sequence[Cell], fields: Sequence[_Field], sorted_by: int, *, descending: bool) -> Table:
    entries = [[field.entry(cell) for field in fields] for cell in cells]
    kept = [i for i, field in enumerate(fields) if field.needed or any(not row[i].absent for row in entries)]

    def rank(i: int) -> tuple[bool, bool, float]:
        value = entries[i][sorted_by].sort
        return (cells[i].struck_out, value is None, 0.0 if value is None else -value if descending else value)

    rows = tuple(
        Row(entries=tuple(entries[i][k] for k in kept), struck=cells[i].struck_out) for i in sorted(range(len(cells)), key=rank)
    )
    return Table(
        caption=caption,
        columns=tuple(fields[k].column for k in kept),
        rows=rows,
        sorted_by=kept.index(sorted_by) if sorted_by in kept else None,
        direction="descending" if descending else "ascending",
    )


# ---- the other tables -----------------------------------------------------------------------------------------------------


def _columns(*names: str) -> tuple[Column, ...]:
    """Return columns: a name that ends in # holds numbers."""
    return tuple(Column(name=name.rstrip("#"), numeric=name.endswith("#")) for name in names)


def _texts(*texts: str) -> tuple[Entry, ...]:
    return tuple(Entry(text=text) for text in texts)


def bundle_table(report: BenchReport) -> Table:
    """Return the table of the bundles that were measured."""
    rows = tuple(
        Row(
            entries=(
                *_texts(b.label, b.variant, f"{b.n_chans} x {b.n_times}", f"{b.sfreq:g} Hz", b.weights),
                Entry(text=b.digest[:12], small="sha256"),
            )
        )
        for b in report.bundles
    )
    return Table(caption="Bundles", columns=_columns("bundle", "variant", "window", "rate", "weights", "manifest"), rows=rows)


def parity_table(report: BenchReport) -> Table:
    """Return the table that compares every backend with the float64 reference."""
    rows = []
    for judgement in sorted(report.parity, key=lambda j: (not j.passed, j.bundle, j.result.max_error)):
        r, without = judgement.result, judgement.without_offsets
        entries = (
            Entry(text=judgement.bundle),
            Entry(text=r.backend, small=r.precision),
            Entry(text=_verdict(judgement), small="" if r.nan_agrees else "NaN elsewhere"),
            Entry(text=_size(r.max_error), sort=r.max_error),
            NOTHING if without is None else Entry(text=_size(without.max_error), sort=without.max_error),
            Entry(text=f"{r.tolerance:g}", sort=r.tolerance),
            Entry(text=_size(r.max_abs), sort=r.max_abs),
            NOTHING if r.decision_flips is None else Entry(text=str(r.decision_flips), sort=r.decision_flips),
            Entry(text=r.worst),
        )
        rows.append(Row(entries=entries, struck=not judgement.passed))
    columns = _columns(
        *("bundle", "backend", "verdict", "error / scale#", "without offsets#", "allowed#", "error#", "flips#", "worst at")
    )
    table = Table(caption="Outputs against the PyTorch model in float64", columns=columns, rows=tuple(rows))
    return without_empty_columns(table)


def curve_table(cells: Sequence[Cell]) -> Table:
    """Return the table of the median latencies over the batch size: one row a bundle, backend and precision."""
    cells = [cell for cell in cells if cell.key.scenario == "throughput" and cell.key.backend != HARNESS]
    curves: dict[tuple[str, str, str], dict[int, Cell]] = {}
    for cell in cells:
        curves.setdefault((cell.key.bundle, cell.key.precision, cell.key.backend), {})[cell.key.batch] = cell
    sizes = sorted({cell.key.batch for cell in cells})

    def median(cell: Cell | None) -> Entry:
        found = None if cell is None or cell.latency is None else cell.latency.at(50.0)
        return plain(None if found is None else found.value)

    rows = [
        Row(
            entries=(*_texts(bundle, precision, backend), *(median(curve.get(size)) for size in sizes)),
            struck=any(cell.struck_out for cell in curve.values()),
        )
        for (bundle, precision, backend), curve in curves.items()
    ]
    rows.sort(key=lambda row: (row.struck, *(entry.text for entry in row.entries[:3])))
    columns = _columns("bundle", "precision", "backend", *(f"{size:,}#" for size in sizes))
    return Table(caption="Median latency of a call in microseconds, over the batch size", columns=columns, rows=tuple(rows))


def capacity_table(report: BenchReport) -> Table:
    """Return the table of the streams that each backend holds, the most first."""
    rows = tuple(
        Row(
            entries=(
                *_texts(c.bundle, c.backend, c.precision),
                plain(c.rate),
                Entry(text=duration(c.deadline_s), sort=c.deadline_s),
                Entry(text=str(c.n_held), sort=c.n_held),
                Entry(text="none tried", absent=True) if c.n_refused is None else Entry(text=str(c.n_refused), sort=c.n_refused),
            )
        )
        for c in sorted(report.capacity, key=lambda c: (c.bundle, -c.n_held))
    )
    columns = _columns("bundle", "backend", "precision", "windows/s#", "deadline#", "streams held#", "too many#")
    return Table(caption="Streams held: p99 within the deadline, and no growing backlog", columns=columns, rows=rows)


def cold_start_table(report: BenchReport) -> Table:
    """Return the table of the phases from a new process to decoding, the quickest start first."""
    started = [(cell, cell.cold_start) for cell in report.cells if cell.cold_start is not None]
    names = tuple(dict.fromkeys(phase.name for _, cold in started for phase in cold.phases))
    rows = []
    for cell, cold in sorted(started, key=lambda pair: (pair[0].key.bundle, sum(p.seconds.value for p in pair[1].phases))):
        phases = {phase.name: phase.seconds for phase in cold.phases}
        entries = (
            *_texts(cell.key.bundle, cell.key.backend, cell.key.precision),
            *(estimate(phases.get(name), 1e3) for name in names),
            Entry(text=cold.engine or "none"),
            plain(cold.calls_to_steady),
            plain(cold.n),
        )
        rows.append(Row(entries=entries, struck=cell.struck_out))
    rows.sort(key=lambda row: row.struck)
    columns = _columns(
        *("bundle", "backend", "precision", *(f"{name}#" for name in names), "engine", "calls to steady#", "processes#")
    )
    return Table(caption="Milliseconds: median over processes, smallest to largest", columns=columns, rows=tuple(rows))


def split_table(report: BenchReport) -> Table:
    """Return the table that splits the time of a call into its parts."""
    rows = []
    for cell in report.cells:
        if (s := cell.split) is None:
            continue
        figures = (s.enqueue_us, s.h2d_us, s.compute_us, s.d2h_us, s.host_us, s.overhead_us)
        names = _texts(cell.key.bundle, cell.key.backend, cell.key.precision, cell.key.what, s.how)
        rows.append(Row(entries=(*names, *map(plain, figures), plain(s.n)), struck=cell.struck_out))
    rows.sort(key=lambda row: row.struck)
    columns = _columns(
        *("bundle", "backend", "precision", "scenario", "how", "enqueue#", "H2D#", "compute#", "D2H#", "host#"),
        *("events add#", "calls#"),
    )
    return Table(
        caption="Microseconds: medians of calls that were split, apart from those above", columns=columns, rows=tuple(rows)
    )


def resource_table(report: BenchReport) -> Table:
    """Return the table of memory, energy, clocks and temperatures."""

    def moved(cell: Cell, read: Callable[[MachineState], float | None]) -> Entry:
        before, after = read(cell.before), read(cell.after)
        if before is None or after is None:
            return NOTHING
        return Entry(text=f"{number(before)} to {number(after)}", sort=after)

    rows = []
    for cell in report.cells:
        took = cell.resources
        host, device = (None if size is None else size / 2**20 for size in (took.host_bytes, took.device_bytes))
        energy = None if took.joules_per_window is None else 1e3 * took.joules_per_window
        entries = (
            Entry(text=cell.key.label),
            *map(plain, (host, device, energy)),
            plain(cell.stolen_cpu),
            *(moved(cell, read) for read in (lambda s: s.cpu_mhz, lambda s: s.load, lambda s: s.gpu_mhz)),
            *(moved(cell, read) for read in (lambda s: s.gpu_celsius, lambda s: s.gpu_watts)),
        )
        if not all(entry.absent for entry in entries[1:]):
            rows.append(Row(entries=entries, struck=cell.struck_out))
    columns = _columns(
        *("cell", "host MiB#", "device MiB#", "mJ/window#", "stolen cores#"),
        *("CPU MHz#", "load#", "GPU MHz#", "GPU C#", "GPU W#"),
    )
    return without_empty_columns(Table(caption="Memory, energy and the state of the machine", columns=columns, rows=tuple(rows)))


def age_table(report: BenchReport) -> Table:
    """Return the parts of the ages of decisions, the youngest decisions first."""
    ages = sorted(report.decision_age, key=lambda age: age.total_s)
    names = tuple(dict.fromkeys(part.name for age in ages for part in age.parts))
    rows = []
    for age in ages:
        parts = {part.name: part.seconds for part in age.parts}
        figures = (plain(1e3 * parts[name]) if name in parts else NOTHING for name in names)
        who = (Entry(text=age.bundle), Entry(text=age.backend, small=age.precision))
        rows.append(Row(entries=(*who, *figures, plain(1e3 * age.total_s))))
    columns = _columns("decodes", "backend", *(f"{name}#" for name in names), "sum#")
    return Table(caption="Milliseconds", columns=columns, rows=tuple(rows), sorted_by=len(columns) - 1)


def age_sources(report: BenchReport) -> Table:
    """Return the source of each part of the ages of decisions."""
    found: dict[tuple[str, str], list[str]] = {}
    for age in report.decision_age:
        for part in age.parts:
            found.setdefault((part.name, part.source), []).append(f"{age.bundle} {age.backend} {age.precision}")
    rows = tuple(
        Row(entries=_texts(name, source, "all" if len(who) == len(report.decision_age) else ", ".join(who)))
        for (name, source), who in found.items()
    )
    return Table(caption="Where the parts come from", columns=_columns("part", "source", "of"), rows=rows)


def environment_table(report: BenchReport) -> Table:
    """Return the table of hardware and software."""
    e = report.environment
    facts = {
        "processor": f"{e.processor}, {e.cores} cores",
        "GPU": e.gpu,
        "GPU driver": e.gpu_driver,
        "CPU governor": e.governor,
        "system": e.system,
        "Python": " and ".join(e.python),
        "packages": ", ".join(f"{name} {' and '.join(versions)}" for name, versions in e.versions.items()),
        "commit": e.commit,
        "clock": e.clock or None,
        "a turn of the measuring loop": None if report.loop_us is None else duration(report.loop_us * 1e-6),
        "run": f"{report.created}, {duration(report.seconds)}, seed {report.seed}",
        "raw samples": report.samples_file,
    }
    if report.noise is not None:
        low, high = report.noise.canary_us.low, report.noise.canary_us.high
        interval = "" if low is None or high is None else f" ({number(low)} to {number(high)})"
        facts["canary"] = f"{number(report.noise.canary_us.value)} us{interval}, spread {100 * report.noise.canary_spread:.2g} %"
        facts["other processes"] = _cores(report.noise.others_cpu)
        facts["stolen by the hypervisor"] = _cores(report.noise.stolen_cpu)
    rows = tuple(Row(entries=_texts(name, value)) for name, value in facts.items() if value is not None)
    return Table(caption="Environment", columns=_columns("what", "value"), rows=rows)


def _cores(value: float | None) -> str | None:
    return None if value is None else f"{number(value)} cores busy on average"


def setting_table(report: BenchReport) -> Table:
    """Return the table of the choices that the speed of the backends depends on."""
    rows = tuple(Row(entries=_texts(s.backend, s.precision, s.setting)) for s in report.settings)
    return Table(caption="Settings of the backends", columns=_columns("backend", "precision", "setting"), rows=rows)


def left_out_table(report: BenchReport) -> Table:
    """Return the table of what was not measured."""
    rows = tuple(Row(entries=_texts(left.label, left.reason)) for left in report.left_out)
    return Table(caption="Not measured", columns=_columns("what", "why"), rows=rows)


def change_table(comparison: Comparison) -> Table:
    """Return the table of changes from one report to another, the worst first."""

    def relative(value: Estimate | None) -> Entry:
        if value is None:
            return NOTHING
        interval = "" if value.low is None or value.high is None else f"{100 * value.low:+.1f} to {100 * value.high:+.1f}"
        return Entry(text=f"{100 * value.value:+.1f}", small=interval, sort=100 * value.value)

    order = sorted(comparison.changes, key=lambda c: -math.inf if c.change is None else -c.change.value)
    rows = tuple(
        Row(
            entries=(
                *_texts(c.key.label, c.verdict),
                plain(c.before_us),
                plain(c.after_us),
                relative(c.change),
                relative(c.change_p99),
            ),
        )
        for c in order
    )
    columns = _columns("cell", "verdict", "before us#", "after us#", "p50 change %#", "p99 change %#")
    return Table(caption=f"{comparison.before} to {comparison.after}", columns=columns, rows=rows)
