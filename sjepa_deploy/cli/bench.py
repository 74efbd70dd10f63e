"""``sjepa-bench`` measures how fast each backend of this machine is, and which one to use."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import command_line, console, entry, options, print_json
from sjepa_deploy.cli.bench_print import print_comparison, print_kept, print_recommendations, print_report
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.errors import BenchmarkError, MissingDependencyError, RegressionError, listed
from sjepa_deploy.runtime.backend import BACKENDS, FASTEST_BACKEND, BackendOptions
from sjepa_deploy.runtime.bench.cells import SCENARIOS, Samples, Scenario
from sjepa_deploy.runtime.bench.compare import compare, regressions
from sjepa_deploy.runtime.bench.decision_age import with_decision_ages
from sjepa_deploy.runtime.bench.files import load_report, load_samples, write_report
from sjepa_deploy.runtime.bench.keep_fastest import keep
from sjepa_deploy.runtime.bench.report import write_comparison, write_html, write_markdown
from sjepa_deploy.runtime.bench.results import BenchReport
from sjepa_deploy.runtime.bench.run import BenchConfig, run_bench
from sjepa_deploy.spec import RunPrecision

QUICK_S = 2.0
QUICK_PROCESSES = 1


class Share(click.ParamType[float]):
    """Parses a share: "10%" or "0.1"."""

    name = "share"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share as a number."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 100:
            self.fail(f"{value!r} is not a share. Use 10% or 0.1.", param, ctx)
        return share


class Duration(click.ParamType[str]):
    """Checks a duration: seconds in each cell, "2", or in the cells of one scenario, "paced=50"."""

    name = "seconds"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text unchanged, once it is known to be right."""
        scenario, equals, seconds = value.rpartition("=")
        try:
            float(seconds)
        except ValueError:
            self.fail(f"{value!r} is not a duration. Use seconds, as in 2 or paced=50.", param, ctx)
        if equals and scenario not in SCENARIOS:
            self.fail(f"{scenario!r} is not a scenario. Use one of {', '.join(SCENARIOS)}.", param, ctx)
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Says what is measured. A value that is empty or None takes the default.

    Attributes
    ----------
    backends : tuple of str
        Backends to measure.
    precisions : tuple of RunPrecision
        Precisions to measure.
    scenarios : tuple of Scenario
        How the backend is loaded.
    batches : tuple of int
        Batches of the closed loops.
    rates : tuple of float
        Windows a second when paced.
    deadline : float or None
        Seconds from due to done.
    durations : tuple of str
        Seconds in each cell, "2", or in the cells of one scenario, "paced=50".
    processes : int or None
        Cold starts of each backend.
    quick : bool
        Whether cells are short.
    time_limit : float or None
        Seconds after which the run ends with what it has.
    seed : int
        Seed of the order of blocks, the windows and the phases of streams.
    options : BackendOptions
        What the backends are asked for.
    """

    backends: tuple[str, ...]
    precisions: tuple[RunPrecision, ...]
    scenarios: tuple[Scenario, ...]
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    deadline: float | None
    durations: tuple[str, ...]
    processes: int | None
    quick: bool
    time_limit: float | None
    seed: int
    options: BackendOptions

    def config(self, aim: Aim) -> BenchConfig:
        """Return what to measure for `aim`."""
        defaults = BenchConfig()
        chosen: list[Scenario] = ["back-to-back", "paced"] if aim.recommend else []
        chosen += ["throughput"] if aim.keep_fastest else []
        return BenchConfig(
            backends=self.backends,
            precisions=self.precisions,
            scenarios=self.scenarios or tuple(chosen) or SCENARIOS,
            batches=self.batches,
            rates=self.rates or (defaults.rates[-1:] if aim.recommend else defaults.rates),
            deadline=self.deadline,
            **_seconds(self.durations, QUICK_S if self.quick else defaults.seconds),
            processes=self.processes or (QUICK_PROCESSES if self.quick else defaults.processes),
            time_limit=self.time_limit,
            seed=self.seed,
            options=self.options,
        )


def _plan(n_threads: int | None, device: int, **values: Any) -> Plan:
    return Plan(options=BackendOptions(n_threads=n_threads, device=device), **values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """Says what a benchmark is for. Without an aim everything is measured and reported.

    Attributes
    ----------
    recommend : bool
        Measure only what tells which backend to use.
    keep_fastest : bool
        Keep in each bundle which backend is the fastest at each batch.
    source : Path or None
        Report from which the fastest are kept, in place of a run.
    compared : tuple of Path or None
        Two reports to compare.
    rendered : Path or None
        Report whose pages are written anew.
    fail_above : float or None
        Slowdown of a comparison that makes the exit status 1.
    """

    recommend: bool
    keep_fastest: bool
    source: Path | None
    compared: tuple[Path, Path] | None
    rendered: Path | None
    fail_above: float | None

    def check(self, bundles: tuple[Path, ...], plan: Plan) -> None:
        """Refuse options that contradict each other."""
        if self.compared is not None:
            if bundles:
                raise click.UsageError("--compare takes two reports, and no bundle.")
            return
        if self.fail_above is not None:
            raise click.UsageError("--fail-above needs --compare.")
        if self.rendered is not None:
            return
        if not bundles:
            raise click.UsageError("Name a bundle, or two reports with --compare.")
        if self.source is not None and not self.keep_fastest:
            raise click.UsageError("--from needs --keep-fastest.")
        if self.keep_fastest and self.source is None:
            if plan.backends and len({*plan.backends} & {*BACKENDS} - {FASTEST_BACKEND}) < 2:
                raise click.UsageError("--keep-fastest needs two backends or more that decode.")
            if plan.scenarios and "throughput" not in plan.scenarios:
                raise click.UsageError("--keep-fastest needs --scenario throughput.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Says where the report goes.

    Attributes
    ----------
    out : Path or None
        Folder.
    name : str
        Name of the files in the folder, without suffix.
    force : bool
        Whether files that are there are replaced.
    """

    out: Path | None
    name: str
    force: bool

    def check(self, name: str) -> None:
        """Check, before anything is measured, that files of this `name` may be written."""
        if self.out is not None:
            suffixes = (".json", ".npz", ".md", ".html")
            options.check_files([self.out / f"{name}{suffix}" for suffix in suffixes], force=self.force)


@options.command
@options.bundles
@options.fills(
    "plan",
    _plan,
    options.section(options.BACKEND, options.backends, options.precisions, options.threads, options.rare(options.device)),
    click.option(
        "--scenario", "scenarios", type=click.Choice(SCENARIOS), multiple=True, help="Load; may be repeated.  [default: all]"
    ),
    click.option(
        "--batch", "batches", type=int, multiple=True, help="Batch of the closed loops.  [default: 1; throughput 1,4,16,64]"
    ),
    click.option("--rate", "rates", type=float, multiple=True, help="Windows a second when paced.  [default: 10, 100]"),
    options.rare(click.option("--deadline", type=float, help="Seconds from due to done.  [default: until the next window]")),
    click.option(
        "-d",
        "--duration",
        "durations",
        type=Duration(),
        multiple=True,
        help="Seconds in each cell, or of one scenario: 2, paced=50; may be repeated.  [default: 10]",
    ),
    options.rare(
        click.option(
            "--processes", type=click.IntRange(min=1), help=f"Cold starts of each backend.  [default: {BenchConfig.processes}]"
        )
    ),
    click.option("-Q", "--quick", is_flag=True, help=f"Measure {QUICK_S:g} s in each cell, and {QUICK_PROCESSES} cold start."),
    options.rare(click.option("--time-limit", type=float, help="Seconds after which the run ends with what it has.")),
    options.seed,
    title="What is measured",
)
@options.fills(
    "outputs",
    Outputs,
    options.out_folder("bench-DATE-TIME"),
    options.rare(click.option("--name", default="bench", help="Name of the files in --out, without suffix.")),
    options.force,
    title=options.OUTPUT,
)
@options.fills(
    "aim",
    Aim,
    click.option("-r", "--recommend", is_flag=True, help="Measure only what tells which backend to use, and name it."),
    click.option(
        "--keep-fastest",
        is_flag=True,
        help="Measure the throughput, and keep in each bundle which backend is the fastest at each batch, for --backend fastest.",
    ),
    click.option("--from", "source", type=options.path, help="With --keep-fastest: use this report (.json); measure nothing."),
    click.option("--compare", "compared", type=options.path, nargs=2, help="Compare two reports (.json)."),
    options.rare(click.option("--render", "rendered", type=options.path, help="Write the pages of a report (.json) anew.")),
    options.rare(
        click.option("--fail-above", type=Share(), help="With --compare: exit status 1 for a slowdown above this, e.g. 10%.")
    ),
    title="Aim",
)
@options.json_output
def bench(bundles: tuple[Path, ...], *, plan: Plan, outputs: Outputs, aim: Aim, json_output: bool) -> None:
    """Measure the latency of every backend of this machine on BUNDLES, beside parity.

    The command writes a report with every sample. Ctrl-C ends the run; what was measured by then is written, and marked as
    partial.
    """
    screen = console(json_output)
    aim.check(bundles, plan)
    if aim.compared is not None:
        _compare(aim.compared, aim.fail_above, outputs, screen, json_output)
        return
    if aim.rendered is not None:
        _render(aim.rendered, bundles, screen)
        return
    outputs.check(outputs.name)
    opened = tuple(Bundle.open(bundle) for bundle in bundles)

    def keep_of(report: BenchReport) -> None:
        for bundle in opened:
            for kept in keep(report, bundle, backends=plan.backends, precisions=plan.precisions, device=plan.options.device):
                print_kept(bundle, kept, screen)

    if aim.source is not None:
        keep_of(load_report(aim.source))
        return
    config = plan.config(aim)
    folder = outputs.out or Path(f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    _make(folder)
    with progress("opening backends") as steps:
        report, samples = run_bench(
            opened,
            config,
            command=command_line("sjepa-bench"),
            progress=lambda text, done, total: steps.at(text, done, total),
        )
    path = folder / f"{outputs.name}.json"
    report = write_report(report, samples, path)
    _write_pages(report, samples, path, screen)
    if aim.recommend:
        print_recommendations(report, screen)
    else:
        print_report(report, screen)
    screen.print(f"The report is in [bold]{escape(str(folder))}[/].", soft_wrap=True)
    if json_output:
        print_json(report)
    if report.interrupted:
        raise KeyboardInterrupt
    if aim.keep_fastest:
        keep_of(report)


def _seconds(durations: tuple[str, ...], usual: float) -> dict[str, Any]:
    """Return the fields of `BenchConfig` that --duration sets, for all scenarios and for some."""
    pairs = [text.rpartition("=") for text in durations]
    of = {scenario: float(seconds) for scenario, _, seconds in pairs}
    return {"seconds": of.pop("", usual), "seconds_of": of}


def _write_pages(report: BenchReport, samples: Samples, path: Path, screen: Console) -> None:
    """Write the report for people beside the one for machines."""
    write_markdown(report, path.with_suffix(".md"))
    try:
        write_html(report, samples, path.with_suffix(".html"))
    except MissingDependencyError as e:
        screen.print(f"No page of plots was written. {e} Then: sjepa-bench --render {escape(str(path))}", soft_wrap=True)


def _render(path: Path, bundles: tuple[Path, ...], screen: Console) -> None:
    """Write the pages of a report anew; the bundles hold the contracts that the ages of decisions need."""
    report = load_report(path)
    samples = load_samples(report, path)
    if bundles:
        specs = {opened.manifest.digest: opened.spec for opened in map(Bundle.open, bundles)}
        if strange := [fact.label for fact in report.bundles if fact.digest not in specs]:
            raise BenchmarkError(
                f"{path} also measured other bundles: {listed(strange)}.", "Name all that were measured, or none."
            )
        report = with_decision_ages(report, {fact.label: specs[fact.digest] for fact in report.bundles})
        report = write_report(report, samples, path)
    _write_pages(report, samples, path, screen)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BenchmarkError(f"{folder} cannot be made ({e.strerror}).", "Choose another --out.") from e


def _compare(paths: tuple[Path, Path], fail_above: float | None, outputs: Outputs, screen: Console, json_output: bool) -> None:
    outputs.check("compare")
    reports = [load_report(path) for path in paths]
    loaded = [(report, load_samples(report, path)) for report, path in zip(reports, paths, strict=True)]
    comparison = compare(loaded[0], loaded[1], (str(paths[0]), str(paths[1])))
    if not comparison.changes:
        raise BenchmarkError(
            f"{paths[0]} and {paths[1]} have no cell in common.", "Measure the same bundles on the same backends."
        )
    print_comparison(comparison, screen)
    if outputs.out is not None:
        _make(outputs.out)
        write_comparison(comparison, outputs.out / "compare")
    if json_output:
        print_json(comparison)
    worse = regressions(comparison, fail_above) if fail_above is not None else ()
    if worse:
        words = ", ".join(f"{change.key.label} ({change.verdict})" for change in worse)
        raise RegressionError(f"{len(worse)} of {len(comparison.changes)} cells are worse: {words}.", "See the table.")


main = entry("bench")
