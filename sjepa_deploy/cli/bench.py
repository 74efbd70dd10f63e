"""``sjepa-bench``: how fast each backend of this machine is, and which one to use."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, print_json
from sjepa_deploy.errors import BenchmarkError, MissingDependencyError, RegressionError, listed
from sjepa_deploy.runtime.backend import BACKENDS, FASTEST_BACKEND, BackendOptions
from sjepa_deploy.runtime.backends.fastest import FastestRecord
from sjepa_deploy.runtime.bench.compare import Comparison, compare, regressions
from sjepa_deploy.runtime.bench.decision_age import with_decision_ages
from sjepa_deploy.runtime.bench.files import load_report, load_samples, write_report
from sjepa_deploy.runtime.bench.keep_fastest import keep
from sjepa_deploy.runtime.bench.report import write_comparison, write_html, write_markdown
from sjepa_deploy.runtime.bench.results import SCENARIOS, BenchReport, Cell, Estimate, LeftOut, Samples, Scenario
from sjepa_deploy.runtime.bench.run import BenchConfig, run_bench
from sjepa_deploy.spec import RUN_PRECISIONS, RunPrecision

QUICK_S = 2.0
QUICK_PROCESSES = 1


class Share(click.ParamType[float]):
    """A share: "10%" or "0.1"."""

    name = "share"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share as a number."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 100:
            self.fail(f"{value!r} is no share. Use 10% or 0.1.", param, ctx)
        return share


class Duration(click.ParamType[str]):
    """Seconds in each cell, "2", or in those of one scenario, "paced=50"."""

    name = "seconds"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text as it is, once it is known to be right."""
        scenario, equals, seconds = value.rpartition("=")
        try:
            float(seconds)
        except ValueError:
            self.fail(f"{value!r} is no duration. Use seconds, as 2 or paced=50.", param, ctx)
        if equals and scenario not in SCENARIOS:
            self.fail(f"{scenario!r} is not a scenario. Use one of {', '.join(SCENARIOS)}.", param, ctx)
        return value


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option("--backend", "backends", multiple=True, help="Backend to measure; may be repeated.  [default: all that run here]")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(RUN_PRECISIONS),
    multiple=True,
    help="Precision to measure; may be repeated.  [default: all]",
)
@click.option("--scenario", "scenarios", type=click.Choice(SCENARIOS), multiple=True, help="May be repeated.  [default: all]")
@click.option(
    "--batch", "batches", type=int, multiple=True, help="Batch of the closed loops.  [default: 1; throughput 1,4,16,64]"
)
@click.option("--rate", "rates", type=float, multiple=True, help="Windows a second when paced.  [default: 10, 100]")
@click.option("--deadline", type=float, help="Seconds from due to done.  [default: until the next window]")
@click.option(
    "--duration",
    "durations",
    type=Duration(),
    multiple=True,
    help="Seconds in each cell, or of one scenario: 2, paced=50; may be repeated.  [default: 10]",
)
@click.option("--processes", type=click.IntRange(min=1), help=f"Cold starts of each backend.  [default: {BenchConfig.processes}]")
@click.option("--quick", is_flag=True, help=f"The same with {QUICK_S:g} s and {QUICK_PROCESSES} cold start.")
@click.option("--time-limit", type=float, help="Seconds after which the run ends with what it has.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of a call.  [default: the backend's]")
@click.option("--device", type=click.IntRange(min=0), default=0, help="Which GPU.")
@click.option("--seed", type=int, default=0, help="Of the order of blocks, the windows and the phases of streams.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the report, or the comparison.  [default: bench-DATE-TIME]"
)
@click.option("--name", default="bench", help="Of the files in it.")
@click.option("--recommend", is_flag=True, help="Measure only what tells which backend to use, and say which.")
@click.option(
    "--keep-fastest",
    is_flag=True,
    help="Measure the throughput, and keep in each bundle which backend is the fastest at each batch: for --backend fastest.",
)
@click.option(
    "--from", "source", type=click.Path(path_type=Path), help="With --keep-fastest: use this report (.json), do not run."
)
@click.option("--compare", "compared", type=click.Path(path_type=Path), nargs=2, help="Compare two reports (.json).")
@click.option("--render", "rendered", type=click.Path(path_type=Path), help="Write the pages of a report (.json) anew.")
@click.option("--fail-above", type=Share(), help="With --compare: exit status 1 for a slowdown above this, e.g. 10%.")
@click.option("--json", "json_output", is_flag=True, help="Print the report, or the comparison, as JSON.")
def bench(
    bundles: tuple[Path, ...],
    backends: tuple[str, ...],
    precisions: tuple[RunPrecision, ...],
    scenarios: tuple[Scenario, ...],
    batches: tuple[int, ...],
    rates: tuple[float, ...],
    deadline: float | None,
    durations: tuple[str, ...],
    processes: int | None,
    quick: bool,
    time_limit: float | None,
    threads: int | None,
    device: int,
    seed: int,
    out: Path | None,
    name: str,
    recommend: bool,
    keep_fastest: bool,
    source: Path | None,
    compared: tuple[Path, Path] | None,
    rendered: Path | None,
    fail_above: float | None,
    json_output: bool,
) -> None:
    """Measure the latency of every backend of this machine on BUNDLES, beside parity.

    Writes a report with every sample. Ctrl-C ends the run; what was measured by then is written, and marked as partial.
    """
    screen = console(json_output)
    if compared is not None:
        if bundles:
            raise click.UsageError("--compare takes two reports, and no bundle.")
        _compare(compared, fail_above, out, screen, json_output)
        return
    if rendered is not None:
        _render(rendered, bundles, screen)
        return
    if fail_above is not None:
        raise click.UsageError("--fail-above needs --compare.")
    if not bundles:
        raise click.UsageError("Name a bundle, or two reports with --compare.")
    if source is not None and not keep_fastest:
        raise click.UsageError("--from needs --keep-fastest.")
    opened = tuple(Bundle.open(bundle) for bundle in bundles)

    def keep_of(report: BenchReport) -> None:
        for bundle in opened:
            for kept in keep(report, bundle, backends=backends, precisions=precisions, device=device):
                _print_kept(bundle, kept, screen)

    if source is not None:
        keep_of(load_report(source))
        return
    if keep_fastest and backends and len({*backends} & {*BACKENDS} - {FASTEST_BACKEND}) < 2:
        raise click.UsageError("--keep-fastest needs two backends or more that decode.")
    if keep_fastest and scenarios and "throughput" not in scenarios:
        raise click.UsageError("--keep-fastest needs --scenario throughput.")
    chosen: tuple[Scenario, ...] = (("back-to-back", "paced") if recommend else ()) + (("throughput",) if keep_fastest else ())
    defaults = BenchConfig()
    config = BenchConfig(
        backends=backends,
        precisions=precisions,
        scenarios=scenarios or chosen or SCENARIOS,
        batches=batches,
        rates=rates or (defaults.rates[-1:] if recommend else defaults.rates),
        deadline=deadline,
        **_seconds(durations, QUICK_S if quick else defaults.seconds),
        processes=processes or (QUICK_PROCESSES if quick else defaults.processes),
        time_limit=time_limit,
        seed=seed,
        options=BackendOptions(n_threads=threads, device=device),
    )
    folder = out or Path(f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    _make(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("opening", total=None)
        report, samples = run_bench(
            opened,
            config,
            command=_command_line(),
            progress=lambda text, done, total: bar.update(task, description=text, completed=done, total=total or None),
        )
    report = write_report(report, samples, folder / f"{name}.json")
    _write_pages(report, samples, folder / f"{name}.json", screen)
    if recommend:
        _print_recommendations(report, screen)
    else:
        _print_report(report, screen)
    screen.print(f"The report is in [bold]{escape(str(folder))}[/].", soft_wrap=True)
    if json_output:
        print_json(report)
    if report.interrupted:
        raise KeyboardInterrupt
    if keep_fastest:
        keep_of(report)


def _seconds(durations: tuple[str, ...], usual: float) -> dict[str, Any]:
    """Return the fields of `BenchConfig` that --duration says: of all scenarios and of some."""
    pairs = [text.rpartition("=") for text in durations]
    of = {scenario: float(seconds) for scenario, _, seconds in pairs}
    return {"seconds": of.pop("", usual), "seconds_of": of}


def _write_pages(report: BenchReport, samples: Samples, path: Path, screen: Console) -> None:
    """Write the report for people beside the one for machines."""
    write_markdown(report, path.with_suffix(".md"))
    try:
        write_html(report, samples, path.with_suffix(".html"))
    except MissingDependencyError as e:
        screen.print(f"Without a page of plots: {e} Then: sjepa-bench --render {escape(str(path))}", soft_wrap=True)


def _render(path: Path, bundles: tuple[Path, ...], screen: Console) -> None:
    """Write the pages of a report anew; bundles tell what its ages of decisions need."""
    report = load_report(path)
    samples = load_samples(report, path)
    if bundles:
        specs = {opened.manifest.digest: opened.spec for opened in map(Bundle.open, bundles)}
        if strange := [fact.label for fact in report.bundles if fact.digest not in specs]:
            raise BenchmarkError(f"{path} is of other bundles too: {listed(strange)}.", "Name all that were measured, or none.")
        report = with_decision_ages(report, {fact.label: specs[fact.digest] for fact in report.bundles})
        report = write_report(report, samples, path)
    _write_pages(report, samples, path, screen)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BenchmarkError(f"{folder} cannot be made ({e.strerror}).", "Choose another --out.") from e


def _command_line() -> str:
    """Return the command with the options that were given."""
    context = click.get_current_context()
    words = ["sjepa-bench"]
    for parameter in context.command.params:
        assert parameter.name is not None
        if context.get_parameter_source(parameter.name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[parameter.name]
        for each in value if isinstance(value, tuple) else (value,):
            name = [] if isinstance(parameter, click.Argument) else [parameter.opts[0]]
            words += name if each is True else [*name, str(each)]
    return shlex.join(words)


# ---- for people ----------------------------------------------------------------------------------------------------------------


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("cell", "scenario", "backend") else "right", overflow="fold")
    return table


def _print_report(report: BenchReport, screen: Console) -> None:
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
        screen.print(f"not measured: {escape(entry_.what)}. {escape(entry_.reason)}", soft_wrap=True)
    _print_recommendations(report, screen)


def _who(cell: Cell) -> str:
    return f"{cell.key.backend} {cell.key.precision}"


def _print_kept(bundle: Bundle, kept: FastestRecord | LeftOut, screen: Console) -> None:
    if isinstance(kept, LeftOut):
        screen.print(f"not kept: {escape(kept.what)}. {escape(kept.reason)}", soft_wrap=True)
    else:
        screen.print(f"{escape(str(bundle.path))}: the fastest in {kept.precision} is {kept}", soft_wrap=True)


def _print_recommendations(report: BenchReport, screen: Console) -> None:
    for choice in report.recommendations:
        screen.print(
            f"{escape(choice.bundle)}: use [bold]{choice.backend}[/] in {choice.precision}. {escape(choice.why)}", soft_wrap=True
        )
    if report.noise is not None and report.noise.noisy:
        screen.print(f"[bold yellow]The machine was noisy.[/] {escape(' '.join(report.noise.reasons))}", soft_wrap=True)
    if report.partial:
        screen.print(f"[bold yellow]The report is partial.[/] {escape(report.partial)}", soft_wrap=True)


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


def _compare(paths: tuple[Path, Path], fail_above: float | None, out: Path | None, screen: Console, json_output: bool) -> None:
    reports = [load_report(path) for path in paths]
    loaded = [(report, load_samples(report, path)) for report, path in zip(reports, paths, strict=True)]
    comparison = compare(loaded[0], loaded[1], (str(paths[0]), str(paths[1])))
    if not comparison.changes:
        raise BenchmarkError(
            f"{paths[0]} and {paths[1]} have no cell in common.", "Measure the same bundles on the same backends."
        )
    _print_comparison(comparison, screen)
    if out is not None:
        _make(out)
        write_comparison(comparison, out / "compare")
    if json_output:
        print_json(comparison)
    worse = regressions(comparison, fail_above) if fail_above is not None else ()
    if worse:
        words = ", ".join(f"{change.key.label} ({change.verdict})" for change in worse)
        raise RegressionError(f"{len(worse)} of {len(comparison.changes)} cells are worse: {words}.", "See the table.")


def _print_comparison(comparison: Comparison, screen: Console) -> None:
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


main = entry("bench")
