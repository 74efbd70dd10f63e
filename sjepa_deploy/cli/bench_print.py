"""Prints reports of ``sjepa-bench`` and their comparisons for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.runtime.backends.fastest import FastestRecord
from sjepa_deploy.runtime.bench.cells import Cell, Estimate
from sjepa_deploy.runtime.bench.compare import Comparison
from sjepa_deploy.runtime.bench.results import BenchReport, LeftOut
from sjepa_deploy.runtime.bench.words import why_noisy, why_partial


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("cell", "scenario", "backend") else "right", overflow="fold")
    return table


def print_report(report: BenchReport, screen: Console) -> None:
    """Print the latencies, cold starts, streams and recommendations of a report, and what was not measured."""
    for fact in report.bundles:
        table = _table("scenario", "backend", "p50 us", "95 %", "p99 us", "missed", title=escape(fact.label))
        for cell in report.cells:
            if cell.key.bundle == fact.label and cell.key.scenario not in ("streams", "cold-start"):
                table.add_row(*_row(cell))
        if table.rows:
            screen.print(table)
    for cell in report.cells:
        if cell.cold_start is not None:
            phases = ", ".join(f"{phase.name} {phase.seconds.value:.3g} s" for phase in cell.cold_start.phases)
            screen.print(f"cold start of {_who(cell)} ({escape(cell.key.bundle)}): {phases}", soft_wrap=True)
    for found in report.capacity:
        screen.print(
            f"{escape(found.bundle)} on {found.backend} {found.precision} holds [bold]{found.n_held}[/] streams of "
            f"{found.rate:g} windows a second, p99 within {found.deadline_s:g} s",
            soft_wrap=True,
        )
    for what in dict.fromkeys((cell.key.bundle, _who(cell), cell.caution) for cell in report.cells if cell.caution):
        screen.print(f"{escape(what[0])} on {what[1]}: {what[2]}", soft_wrap=True)
    for entry_ in report.left_out:
        screen.print(f"not measured: {escape(entry_.label)}. {escape(entry_.reason)}", soft_wrap=True)
    print_recommendations(report, screen)


def _who(cell: Cell) -> str:
    return f"{cell.key.backend} {cell.key.precision}"


def print_kept(bundle: Bundle, kept: FastestRecord | LeftOut, screen: Console) -> None:
    """Print which backend is kept as the fastest, or why none is."""
    if isinstance(kept, LeftOut):
        screen.print(f"not kept: {escape(kept.label)}. {escape(kept.reason)}", soft_wrap=True)
    else:
        screen.print(f"{escape(str(bundle.path))}: the fastest in {kept.precision} is {kept}", soft_wrap=True)


def print_recommendations(report: BenchReport, screen: Console) -> None:
    """Print which backend to use for each bundle, and what makes the report less certain."""
    for choice in report.recommendations:
        screen.print(
            f"{escape(choice.bundle)}: use [bold]{choice.backend}[/] in {choice.precision}. {escape(choice.why)}", soft_wrap=True
        )
    if report.noise is not None and report.noise.noisy:
        screen.print(f"[bold yellow]The machine was noisy.[/] {escape(why_noisy(report.noise))}", soft_wrap=True)
    if report.partial:
        screen.print(f"[bold yellow]The report is partial.[/] {escape(why_partial(report))}", soft_wrap=True)


def _row(cell: Cell) -> tuple[str, ...]:
    who = f"[strike]{_who(cell)}[/] [bold red]wrong[/]" if cell.struck_out else _who(cell)
    missed = "" if cell.open_loop is None else f"{cell.open_loop.missed} of {cell.open_loop.n_due}"
    if cell.latency is None:
        return cell.key.what, who, "not held", "", "", missed
    middle, tail = cell.latency.at(50.0), cell.latency.at(99.0)
    return cell.key.what, who, _number(middle), _span(middle), _number(tail), missed


def _number(figure: Estimate | None) -> str:
    return "" if figure is None else f"{figure.value:.4g}"


def _span(figure: Estimate | None) -> str:
    return "" if figure is None or figure.low is None else f"{figure.low:.4g} to {figure.high:.4g}"


def print_comparison(comparison: Comparison, screen: Console) -> None:
    """Print how each cell changed, and what else differs between the two reports."""
    colours = {"slower": "bold red", "wrong now": "bold red", "not held any more": "bold red", "faster": "green"}
    for bundle in dict.fromkeys(change.key.bundle for change in comparison.changes):
        table = _table("scenario", "backend", "p50 us", "change", "95 %", "p99", "", title=escape(bundle))
        for change in comparison.changes:
            key, colour = change.key, colours.get(change.verdict, "dim")
            if key.bundle == bundle:
                who = f"{key.backend} {key.precision}"
                medians = "" if change.before_us is None else f"{change.before_us:.4g} -> {change.after_us:.4g}"
                figures = (_percent(change.change), _percent_span(change.change), _percent(change.change_p99))
                table.add_row(key.what, who, medians, *figures, f"[{colour}]{change.verdict}[/]")
        screen.print(table)
    screen.print(f"Changes within {comparison.smallest_claim:.0%} are not claimed: two runs of the same thing differ by as much.")
    if comparison.machine is not None:
        screen.print(f"The machine itself (fixed work): {_percent(comparison.machine)} ({_percent_span(comparison.machine)}).")
    for text in comparison.differs:
        screen.print(f"differs: {escape(text)}", soft_wrap=True)
    for where, labels in (("before", comparison.only_before), ("after", comparison.only_after)):
        for label in labels:
            screen.print(f"only {where}: {escape(label)}", soft_wrap=True)


def _percent(change: Estimate | None) -> str:
    return "" if change is None else f"{change.value:+.1%}"


def _percent_span(change: Estimate | None) -> str:
    return "" if change is None or change.low is None else f"{change.low:+.1%} to {change.high:+.1%}"
