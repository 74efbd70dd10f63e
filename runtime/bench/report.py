"""Writes a benchmark report as Markdown, and as one HTML file that needs no other file."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sjepa_deploy.errors import BenchmarkError
from sjepa_deploy.files import write_atomically
from sjepa_deploy.pages.figures import Plot
from sjepa_deploy.pages.page import Card, Draw, Section, render_page
from sjepa_deploy.pages.tables import NOTHING, Column, Entry, Row, Table, all_markdown, markdown_code, markdown_text, plain
from sjepa_deploy.runtime.bench import report_plots as plots
from sjepa_deploy.runtime.bench import report_tables
from sjepa_deploy.runtime.bench.baselines import BASELINES
from sjepa_deploy.runtime.bench.cells import HARNESS, Cell, Estimate, Samples, Scenario
from sjepa_deploy.runtime.bench.compare import Comparison
from sjepa_deploy.runtime.bench.results import BenchReport, Judgement
from sjepa_deploy.runtime.bench.words import estimate, percentile, why_noisy, why_partial
from sjepa_deploy.spec import RUN_PRECISIONS

MAKER = "sjepa-bench"

_LEADS: dict[Scenario, tuple[str, str]] = {
    "back-to-back": (
        "Back to back",
        "Closed loop: each call begins when the last one has ended. It shows the cost of a call at its best, and hides what "
        "queues behind a slow one.",
    ),
    "paced": (
        "Paced",
        "Open loop, as in live decoding: windows are due at a rate, whatever the backend does. Latency counts from the time a "
        "window was due, so one that is late makes those behind it late too.",
    ),
    "streams": (
        "Many streams",
        "Independent streams, batched within the deadline. A stream is held as long as p99 stays within the deadline and the "
        "backlog does not grow.",
    ),
    "throughput": ("Throughput", "Closed loop over batch sizes. Decoded a second counts windows over the time in the backend."),
    "cold-start": ("Cold start", "New processes, from their start to the first decision and the steady state."),
}


def sections(report: BenchReport, samples: Samples) -> tuple[Section, ...]:
    """Return the parts of `report` in their order, also those that have nothing to show."""
    found = [
        Section(
            name="decision-age",
            title="Age of a decision",
            lead="An upper bound on how old the EEG behind a decision is: the whole hop, the 99th percentiles of what is "
            "measured. The window is half of the newest token's span. The model part is the end of the window that enters no "
            "token; a shorter window on the same weights (sjepa-export --n-times) is without it, and its outputs differ.",
            tables=(report_tables.age_table(report), report_tables.age_sources(report)),
            draw=((lambda: plots.age_plot(report.decision_age),),),
        )
    ]
    for scenario, (title, lead) in _LEADS.items():
        cells = [cell for cell in report.cells if cell.key.scenario == scenario]
        if scenario == "cold-start":
            shown: tuple[Table, ...] = (report_tables.cold_start_table(report),)
        else:
            shown = report_tables.cell_tables(report, scenario)
            shown += (report_tables.capacity_table(report),) if scenario == "streams" else ()
            shown += (report_tables.curve_table(cells),) if scenario == "throughput" else ()
        draw = tuple(_drawers(scenario, bundle, cells, samples) for bundle in _bundles(cells))
        found.append(Section(name=scenario, title=title, lead=lead, tables=shown, draw=draw))
    found += [
        Section(
            name="parity",
            title="Parity",
            lead="Every backend was compared with the PyTorch model in float64 in this run. One that differs by more than is "
            "allowed is struck out everywhere: fast and wrong is wrong.",
            tables=(report_tables.parity_table(report),),
        ),
        Section(
            name="split",
            title="Where the time goes",
            lead="Calls on a GPU split with CUDA events.",
            tables=(report_tables.split_table(report),),
        ),
        Section(
            name="resources",
            title="Memory, energy, clocks",
            lead="Memory is what opening and warming up a backend added. States are before and after a cell.",
            tables=(report_tables.resource_table(report),),
        ),
        Section(name="left-out", title="Not measured", lead="", tables=(report_tables.left_out_table(report),)),
        Section(
            name="environment",
            title="Environment",
            lead="Percentiles are of all samples of a cell, never of percentiles; intervals (95 %) come from resampled blocks, "
            "which were run in random order. A percentile without enough samples says how many it needs.",
            tables=(
                report_tables.bundle_table(report),
                report_tables.setting_table(report),
                report_tables.environment_table(report),
            ),
        ),
    ]
    return tuple(found)


MOST_IN_SHORT = 6
"""Rows of the summary: with the cards it fits one screen."""


def summary(report: BenchReport) -> Section:
    """Return what a reader sees first: the quickest backends of each bundle that are right, and PyTorch beside them.

    The latencies are of the paced rate at which the most backends have a p99, as in live decoding; without a paced run, of calls
    back to back.
    """
    decoding = [cell for cell in report.cells if cell.key.backend != HARNESS and not cell.key.keep_warm and not cell.struck_out]
    paced = [cell for cell in decoding if cell.key.scenario == "paced"]
    known = Counter(cell.key.rate for cell in paced if cell.latency is not None and cell.latency.at(99.0) is not None)
    rate = min((cell.key.rate for cell in paced), key=lambda rate: (-known[rate], rate), default=None)
    alone = [cell for cell in decoding if cell.key.scenario == "back-to-back" and cell.key.batch == 1]
    cells = [cell for cell in paced if cell.key.rate == rate] or alone
    right = [(cell, median) for cell in cells if (median := _median(cell)) is not None]
    right.sort(key=lambda pair: pair[1].value)
    bundles = tuple(dict.fromkeys(cell.key.bundle for cell, _ in right))
    most = max(2, MOST_IN_SHORT // max(1, len(bundles)))
    rows: list[Row] = []
    for bundle in bundles:
        own = [pair for pair in right if pair[0].key.bundle == bundle]
        reference = next((pair for pair in own if pair[0].key.backend in BASELINES), None)
        shown = own[:most] if reference is None or reference in own[:most] else [*own[: most - 1], reference]
        rows += [_in_short(cell, median, None if reference is None else reference[1]) for cell, median in shown]
    columns = (
        Column(name="backend", meaning="what ran the model, and its precision"),
        Column(name="p50", numeric=True),
        Column(name="p99", numeric=True),
        Column(name="PyTorch = 1", numeric=True, meaning="median of the fastest model in PyTorch over this median"),
    )
    caption = f"Microseconds, {'back to back' if rate is None else f'paced {rate:g}/s'}"
    table = Table(caption=caption, columns=columns, rows=tuple(rows))
    return Section(name="summary", title="In short", lead="", tables=(table,))


def _median(cell: Cell) -> Estimate | None:
    return None if cell.latency is None else cell.latency.at(50.0)


def _in_short(cell: Cell, median: Estimate, reference: Estimate | None) -> Row:
    assert cell.latency is not None
    p99 = next((percentile(found) for found in cell.latency.percentiles if found.percent == 99.0), NOTHING)
    times = NOTHING if reference is None else plain(reference.value / median.value)
    backend = Entry(text=f"{cell.key.backend} {cell.key.precision}", small=cell.key.bundle)
    return Row(entries=(backend, estimate(median), p99, times))


def _bundles(cells: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cell.key.bundle for cell in cells if cell.key.backend != HARNESS))


def _drawers(scenario: Scenario, bundle: str, cells: Sequence[Cell], samples: Samples) -> tuple[Draw, ...]:
    own = [cell for cell in cells if cell.key.bundle == bundle and cell.key.backend != HARNESS]
    if scenario == "cold-start":
        return (lambda: plots.cold_starts(own, f"{bundle}: from nothing to decoding"),)
    if scenario == "throughput":
        precisions = sorted({cell.key.precision for cell in own}, key=RUN_PRECISIONS.index)
        return (
            lambda: plots.throughput(own, f"{bundle}: windows a second over the batch size"),
            *(functools.partial(_latency_curve, own, bundle, precision) for precision in precisions),
        )
    spread = (lambda: plots.histograms(own, samples, f"{bundle}: distribution of latencies, counts on a log axis"),)
    share = (lambda: plots.exceedance(own, samples, f"{bundle}: share of windows that took longer"),)
    if scenario == "streams":
        return share
    run = (lambda: plots.time_series(own, samples, f"{bundle}: latency over the run"),)
    return spread + run + share if scenario == "paced" else spread + share


def _latency_curve(cells: Sequence[Cell], bundle: str, precision: str) -> Plot | None:
    own = [cell for cell in cells if cell.key.precision == precision]
    return plots.latency_curve(own, f"{bundle} {precision}: latency of a call over the batch size")


def to_markdown(report: BenchReport) -> str:
    """Return `report` as Markdown: its tables, what limits them, and the command that repeats them."""
    parts = [f"# sjepa-bench: {markdown_text(_headline(report))}", *(f"> {markdown_text(text)}" for text in warnings(report))]
    parts += [
        f"- {markdown_text(r.bundle)}: **{markdown_text(r.backend)} {r.precision}**. {markdown_text(r.why)}"
        for r in report.recommendations
    ]
    parts.append(markdown_code(report.command))
    for section in sections(report, {}):
        if section.has_rows:
            parts += [f"## {section.title}", section.lead, all_markdown(section.tables)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_markdown(report: BenchReport, path: Path) -> None:
    """Write `report` as Markdown, whole or not at all.

    Raises
    ------
    BenchmarkError
        If it cannot be written.
    """
    _write_text(path, to_markdown(report))


def comparison_to_markdown(comparison: Comparison) -> str:
    """Return `comparison` as Markdown."""
    parts = ["# sjepa-bench --compare", *(f"> {markdown_text(text)}" for text in comparison_warnings(comparison))]
    parts.append(all_markdown([report_tables.change_table(comparison)]))
    return "\n\n".join(parts) + "\n"


def write_html(report: BenchReport, samples: Samples, path: Path) -> None:
    """Write `report` with plots of its raw `samples` to one HTML file, whole or not at all.

    Raises
    ------
    BenchmarkError
        If it cannot be written.
    MissingDependencyError
        If matplotlib or Jinja2 is not installed.
    """
    page = render_page(
        maker=MAKER,
        title=_headline(report),
        facts=(report.created.replace("T", " "), *_verdicts(report)),
        warnings=warnings(report),
        cards=[Card(about=r.bundle, answer=f"{r.backend} {r.precision}", why=r.why) for r in report.recommendations],
        command=report.command,
        sections=(summary(report), *sections(report, samples)),
    )
    _write_text(path, page)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write `comparison` to `path`.md and `path`.html, each whole or not at all.

    Raises
    ------
    BenchmarkError
        If they cannot be written.
    MissingDependencyError
        If Jinja2 is not installed.
    """
    _write_text(path.with_name(f"{path.name}.md"), comparison_to_markdown(comparison))
    table = report_tables.change_table(comparison)
    page = render_page(
        maker=MAKER,
        title=f"{comparison.before} against {comparison.after}",
        facts=(f"{len(table.rows)} cells in both",),
        warnings=comparison_warnings(comparison),
        sections=(Section(name="changes", title="Changes", lead="", tables=(table,)),),
    )
    _write_text(path.with_name(f"{path.name}.html"), page)


def warnings(report: BenchReport) -> tuple[str, ...]:
    """Return warnings that a reader must know before believing a figure."""
    found = [f"Partial: {why_partial(report)}"] if report.partial else []
    if report.noise is not None and report.noise.noisy:
        found.append(f"The machine was not quiet: {why_noisy(report.noise)}")
    if wrong := sorted(_judged(judgement) for judgement in report.parity if not judgement.passed):
        found.append(f"Outputs are wrong, and struck out: {', '.join(wrong)}.")
    careful: dict[str, list[str]] = {}
    for judgement in report.parity:
        if judgement.caution is not None:
            careful.setdefault(f"{judgement.result.backend} {judgement.result.precision}", []).append(judgement.bundle)
    if careful:
        names = "; ".join(f"{who} ({', '.join(bundles)})" for who, bundles in sorted(careful.items()))
        found.append(f"Right on EEG, but not on windows with electrode offsets of millivolts (errors are under Parity): {names}.")
    cells = [cell for cell in report.cells if cell.latency is not None]
    if drifting := [cell.key.label for cell in cells if cell.latency is not None and cell.latency.drifting]:
        found.append(f"Latencies rose or fell over the run: {', '.join(drifting)}.")
    if unstable := [cell.key.label for cell in cells if cell.latency is not None and not cell.latency.stable]:
        found.append(f"The warm-up did not become stable: {', '.join(unstable)}.")
    if random := [b.label for b in report.bundles if b.weights == "random"]:
        found.append(f"Random weights, whose predictions mean nothing: {', '.join(random)}.")
    return tuple(found)


def _judged(judgement: Judgement) -> str:
    return f"{judgement.bundle} on {judgement.result.backend} {judgement.result.precision}"


def comparison_warnings(comparison: Comparison) -> tuple[str, ...]:
    """Return warnings that a reader must know before believing a change."""
    found = [f"Changes within {100 * comparison.smallest_claim:.2g} % are not claimed."]
    if (machine := comparison.machine) is not None:
        interval = "" if machine.low is None or machine.high is None else f" ({machine.low:+.1%} to {machine.high:+.1%})"
        found.append(f"A fixed piece of work took {machine.value:+.1%}{interval} longer: the machine itself.")
    found += [f"Different: {what}" for what in comparison.differs]
    found += [f"Only in {comparison.before}: {cell}" for cell in comparison.only_before]
    found += [f"Only in {comparison.after}: {cell}" for cell in comparison.only_after]
    return tuple(found)


def _headline(report: BenchReport) -> str:
    return report.environment.gpu or f"{report.environment.processor}, {report.environment.cores} cores"


def _verdicts(report: BenchReport) -> tuple[str, ...]:
    judged = len(report.parity)
    facts = [f"{len(report.cells)} cells", f"{sum(judgement.passed for judgement in report.parity)} of {judged} pass parity"]
    if report.noise is not None:
        facts.append("noisy machine" if report.noise.noisy else "quiet machine")
    return tuple(facts)


def _write_text(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode(errors="backslashreplace"))  # commands may name files that are no UTF-8
    except OSError as e:
        raise BenchmarkError(f"{path} cannot be written ({e.strerror}).", "Choose another --out.") from e
