"""``sjepa-decide`` fits the decision layer of a bundle."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.bundle import DECISION_FOLDER, Bundle
from sjepa_deploy.cli import console, entry, options, print_json, task
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.cli.task import EventChoice
from sjepa_deploy.errors import DecisionError, OutputError, listed
from sjepa_deploy.evaluation.seen import warn_if_seen
from sjepa_deploy.files import write_atomically
from sjepa_deploy.runtime.decisions.chain import Asked, FitRequest, Stop
from sjepa_deploy.runtime.decisions.data import CalibrationData, joined
from sjepa_deploy.runtime.decisions.description import LayerFacts, classes_of
from sjepa_deploy.runtime.decisions.fit import Fit, fit
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.report import html_page, number, percent
from sjepa_deploy.runtime.decisions.signal import Signal
from sjepa_deploy.runtime.decisions.stored import layers_of, write_layer
from sjepa_deploy.runtime.live.calibration import stream_windows
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.open_source import SourceOptions
from sjepa_deploy.runtime.predictor import Predictor

if TYPE_CHECKING:
    pass

DEFAULT_NAME = "default"
GAP_HOPS = 3
"""Hops after which a stream was interrupted, where no --max-gap is given."""

DEFAULTS = Signal()


class Pairs(click.ParamType[dict[str, str]]):
    """Parses CLASS=VALUE pairs separated by commas; a configuration file may give a list."""

    name = "pairs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, str]:
        """Return the pairs as a dictionary."""
        if isinstance(value, dict):
            return value
        pairs = [each.rpartition("=") for each in options.Names().convert(value, param, ctx)]
        if wrong := [pair for pair in pairs if not pair[0] or not pair[2]]:
            self.fail(f"{''.join(wrong[0])!r} is no pair. Write CLASS=VALUE.", param, ctx)
        return {name.strip(): chosen.strip() for name, _, chosen in pairs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """Says what the threshold is chosen by: one of the four is given.

    Attributes
    ----------
    accept_rate, max_false_per_minute, target_accuracy, coverage : float or None
        See `FitRequest`.
    """

    accept_rate: float | None
    max_false_per_minute: float | None
    target_accuracy: float | None
    coverage: float | None

    @property
    def asked(self) -> tuple[Asked, float]:
        """Return what is asked for, and its value."""
        pairs: tuple[tuple[Asked, float | None], ...] = (
            ("accept-rate", self.accept_rate),
            ("max-false-per-minute", self.max_false_per_minute),
            ("target-accuracy", self.target_accuracy),
            ("coverage", self.coverage),
        )
        given = [(name, value) for name, value in pairs if value is not None]
        if len(given) != 1:
            raise click.UsageError("Give one of --accept-rate, --max-false-per-minute, --target-accuracy and --coverage.")
        return given[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut(EventChoice):
    """Says which windows belong to which class.

    Attributes
    ----------
    class_names : tuple of str or None
        Classes of a model that names none.
    hop : float or None
        Seconds from one window to the next. None: one window an event.
    """

    class_names: tuple[str, ...] | None
    hop: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Says which steps the layer has.

    Attributes
    ----------
    prevalence : dict of str to str
        Share of each class where the layer decides.
    smoothing, mean_of, hysteresis, dwell, refractory, stop, target_pf, target_pd, most
        See `FitRequest`.
    no_signal : tuple of str
        Flags of windows that are no signal.
    max_gap : float or None
        See `Signal`.
    """

    prevalence: dict[str, str]
    smoothing: float | None
    mean_of: int | None
    hysteresis: float
    dwell: float
    refractory: float
    stop: Stop | None
    target_pf: float
    target_pd: float
    most: int | None
    no_signal: tuple[str, ...]
    max_gap: float | None

    def request(self, wanted: Wanted, class_names: tuple[str, ...] | None, hop: float | None) -> FitRequest:
        """Return what is to be fitted."""
        asked, value = wanted.asked
        max_gap = GAP_HOPS * hop if self.max_gap is None and hop is not None else self.max_gap
        return FitRequest(
            asked=asked,
            wanted=value,
            prevalence=_shares(self.prevalence, class_names or ()),
            smoothing=self.smoothing,
            mean_of=self.mean_of,
            hysteresis=self.hysteresis,
            dwell=self.dwell,
            refractory=self.refractory,
            stop=self.stop,
            target_pf=self.target_pf,
            target_pd=self.target_pd,
            most=self.most,
            signal=Signal(refuse=tuple(flag for flag in self.no_signal if flag != "none"), max_gap=max_gap),
        )


def _shares(prevalence: dict[str, str], class_names: tuple[str, ...]) -> tuple[float, ...] | None:
    if not prevalence:
        return None
    if set(prevalence) != set(class_names):
        raise click.UsageError(f"--prevalence needs a share for each of {listed(class_names)}.")
    try:
        return tuple(float(prevalence[name]) for name in class_names)
    except ValueError:
        raise click.UsageError(f"--prevalence takes numbers, not {', '.join(prevalence.values())}.") from None


@options.command
@options.bundle
@options.section(
    "Data",
    click.option("--show", is_flag=True, help="Instead of a fit: tell the decision layers of the bundle in words."),
    click.option(
        "--fit", "sources", type=options.path, multiple=True, help="Recording with annotations, or .npz of windows with labels."
    ),
)
@options.fills(
    "wanted",
    Wanted,
    click.option("--accept-rate", type=float, help="Share of events that get a decision."),
    click.option("--max-false-per-minute", type=float, help="Most decisions a minute that are wrong or belong to no event."),
    click.option("--target-accuracy", type=float, help="Share of right decisions among those that are made."),
    click.option("--coverage", type=float, help="Of a regression: share of targets that lie inside the interval."),
    title="What is asked for: one of",
)
@options.fills(
    "cut",
    Cut,
    task.which,
    task.labels,
    task.tmin,
    options.rare(
        click.option("--class-names", type=options.Names(), metavar="A,B,...", help="Classes of a model that names none.")
    ),
    click.option(
        "--hop", type=float, help="Seconds between windows of a stream, decoded as live.  [default: one window an event]"
    ),
    task.trial_starts,
    title="Data",
)
@options.fills(
    "chain",
    Chain,
    options.rare(
        click.option(
            "--prevalence",
            type=Pairs(),
            default={},
            metavar="CLASS=SHARE,...",
            help="Share of each class where the layer decides.",
        )
    ),
    click.option("--smoothing", type=float, help="Time constant in seconds of an exponential mean of the probabilities."),
    options.rare(
        click.option("--mean-of", type=click.IntRange(min=1), help="Number of windows whose probabilities are averaged.")
    ),
    options.rare(
        click.option("--hysteresis", type=float, default=0.0, help="How far the probability of a decided class may fall.")
    ),
    click.option("--dwell", type=float, default=0.0, help="Seconds that a class must last."),
    click.option("--refractory", type=float, default=0.0, help="Seconds after a decision without another one."),
    click.option(
        "--stop",
        type=click.Choice(get_args(Stop)),
        help="Add up the evidence of an event's windows until this rule stops.",
    ),
    options.rare(click.option("--target-pf", type=float, default=0.05, help="Of bds1, bds2: probability of a false decision.")),
    options.rare(
        click.option("--target-pd", type=float, default=0.8, help="Of bds1, bds2: probability of a decision for the true class.")
    ),
    options.rare(click.option("--most", type=click.IntRange(min=1), help="Most windows that --stop adds up.")),
    options.rare(
        options.several(
            "--no-signal",
            "no_signal",
            choices=("held", "bridged", "bad channels", "doubtful", "settling", "late", "none"),
            default=DEFAULTS.refuse,
            help="Flags of windows that are no signal.",
        )
    ),
    options.rare(
        click.option(
            "--max-gap", type=float, help="Seconds without signal after which everything begins anew.  [default: three hops]"
        )
    ),
    title="Steps of the layer",
)
@options.signal_facts
@options.section(options.SIGNAL, options.check_unit)
@options.backend_choice()
@options.section(options.OUTPUT, options.decisions(DEFAULT_NAME))
@options.out_file
@options.force
@options.json_output
def decide(
    bundle: Path,
    *,
    show: bool,
    sources: tuple[Path, ...],
    wanted: Wanted,
    decisions: str | None,
    cut: Cut,
    chain: Chain,
    check_unit: bool,
    facts: options.SignalFacts,
    choice: options.BackendChoice,
    out: Path | None,
    force: bool,
    json_output: bool,
) -> None:
    """Fit how outputs of BUNDLE become decisions, and write the layer beside the manifest.

    The data must be such that the model was not trained on them. Temperature and threshold are fitted on all the events. The
    figures come from cross-fitting: of events that the layer was not fitted on. --out names a page with the curve of other
    thresholds. sjepa-stream takes the layer from the bundle.
    """
    screen = console(json_output or out == options.STDOUT)
    opened = Bundle.open(bundle)
    if show:
        _show(screen, opened, decisions, json_output)
        return
    if not sources:
        raise click.UsageError("Give --fit with a recording or an .npz file, or --show.")
    name = decisions or DEFAULT_NAME
    options.check_file(out, force=force)
    if not force and name in layers_of(opened):
        raise OutputError(
            f"{opened.path} has a decision layer {name} already.", "Use --force to replace it, or another name with --decisions."
        )
    spec = opened.spec
    if cut.class_names is not None and spec.class_names is not None:
        raise DecisionError(f"The model names its classes: {listed(spec.class_names)}.", "Leave --class-names out.")
    if cut.trial_starts and (chain.stop is None or cut.hop is not None):
        raise click.UsageError("--trial-starts is of layers that add up the events of a trial: use --stop, and no --hop.")
    if cut.hop is not None:
        task.tell_sliding(screen, spec)
    class_names = classes_of(spec, cut.class_names)
    request = chain.request(wanted, class_names, cut.hop)
    described = LayerFacts(
        name=name,
        bundle=opened.manifest.digest,
        output_name=spec.output_name,
        n_outputs=spec.n_outputs,
        class_names=class_names,
    )
    with choice.load(opened, check_unit=False) as predict:
        parts = []
        with progress("decoding", total=len(sources)) as steps:
            for source in sources:
                steps.begin(f"decoding {source.name}")
                parts.append(_read(predict, source, class_names, cut, facts, check_unit=check_unit))
    with progress("fitting the layer"):
        result = fit(joined(parts), described, request)
    file = write_layer(opened, result.layer)
    if out is not None:
        options.make_way(out, force=force)
        page = html_page(result)
        if out == options.STDOUT:
            click.echo(page)
        else:
            write_atomically(out, page.encode())
    if opened.manifest.weights.random:
        screen.print("[bold yellow]The weights of this bundle are random: the decisions mean nothing.[/]")
    _report(screen, result, file)
    if json_output:
        print_json({"file": str(file), "layer": result.layer.encoded(), "curve": result.curve, "notes": result.notes})


def _read(
    predict: Predictor,
    source: Path,
    class_names: tuple[str, ...] | None,
    cut: Cut,
    facts: options.SignalFacts,
    *,
    check_unit: bool,
) -> CalibrationData:
    """Return the windows of one source, decoded, with their labels."""
    spec = predict.spec
    if cut.hop is None or source.suffix == ".npz":
        return task.read_trials(predict.bundle, source, spec, class_names, predict.predict, cut, facts, check_unit=check_unit)
    raw = task.read_source(source, spec, facts)
    warn_if_seen(predict.bundle, raw, source.name)
    events, start = cut.label(raw, spec, class_names), cut.start(spec)
    if class_names is None:
        raise DecisionError("The windows of a stream have no number each.", "Leave --hop out: one window an event.")
    config = StreamConfig(hop=cut.hop, late="queue", check_unit=check_unit)
    known = SourceOptions(**dataclasses.asdict(facts), speed=math.inf, chunk=config.hop_samples(spec.signal))
    return stream_windows(predict, source, raw, events, known, config, start=start)


def _show(screen: Console, bundle: Bundle, name: str | None, json_output: bool) -> None:
    there = layers_of(bundle)
    if name is None and not there:
        DecisionLayer.load(bundle)  # the error says how to fit one
    layers = [DecisionLayer.load(bundle, each).description for each in ([name] if name is not None else there)]
    for layer in layers:
        screen.print(escape(str(layer)), soft_wrap=True)
        for line in _figures(layer.fit):
            screen.print(escape(line), soft_wrap=True)
    if json_output:
        print_json([layer.encoded() for layer in layers])


def _figures(summary: Any) -> list[str]:
    """Return a few sentences on where a layer comes from and what it does."""
    if summary is None:
        return ["It was not fitted."]
    where = "at events" if summary.hop is None else f"every {summary.hop:g} s"
    lines = [
        f"Fitted to --{summary.asked} {summary.wanted:g} on {summary.n_events} events of {listed(summary.data)}: "
        f"{summary.n_windows} windows {where}, {summary.minutes:.1f} minutes."
    ]
    if summary.coverage.value is not None:
        return [*lines, f"On other data {percent(summary.coverage)} of the targets lie inside the interval."]
    error = "" if summary.calibration_error is None else f" The calibration error is {summary.calibration_error:.3f}."
    return [
        *lines,
        f"On other events: {percent(summary.accept_rate)} get a decision, {percent(summary.accuracy)} of these are right, "
        f"{number(summary.false_per_minute)} false ones a minute.{error}",
    ]


def _report(screen: Console, result: Fit, file: Path) -> None:
    for note in result.notes:
        screen.print(f"[bold yellow]{escape(note)}[/]", soft_wrap=True)
    screen.print(escape(str(result.layer)), soft_wrap=True)
    for line in _figures(result.layer.fit):
        screen.print(escape(line), soft_wrap=True)
    if result.curve:
        table = Table("threshold", "accept rate", "accuracy", "false a minute", box=box.SIMPLE, title="other thresholds")
        for point in result.curve[:: max(1, len(result.curve) // 10)]:
            table.add_row(
                f"{point.threshold:.4g}", percent(point.accept_rate), percent(point.accuracy), number(point.false_per_minute)
            )
        screen.print(table)
    screen.print(
        f"written: [bold]{escape(str(file.parent.parent.name))}/{DECISION_FOLDER}/{escape(file.name)}[/]", soft_wrap=True
    )


main = entry("decide")
