"""``sjepa-stream`` decodes a live stream."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.cli import feedback as feedback_options
from sjepa_deploy.cli import task as event_options
from sjepa_deploy.cli.feedback import FeedbackChoice
from sjepa_deploy.cli.help_page import is_quiet
from sjepa_deploy.cli.live import live_view, summary_table, verdict_of
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.cli.session import Kept, kept
from sjepa_deploy.cli.task import EventChoice
from sjepa_deploy.eeg.events import ALL
from sjepa_deploy.errors import OutputError, ParityError, SjepaError
from sjepa_deploy.evaluation.task import read_tasks
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.stored import layers_of
from sjepa_deploy.runtime.live.adapt import AdaptConfig, Adapter, adapt
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lines import write_lines
from sjepa_deploy.runtime.live.process import set_real_time, stopped_by_signals, undisturbed
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.live.schedule import HISTORY_S, Events
from sjepa_deploy.runtime.live.shadow import Shadow, ShadowReport
from sjepa_deploy.runtime.live.swap import Opening
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.runtime.watch.dashboard import DASHBOARD, TOKEN_VARIABLE, Dashboard
from sjepa_deploy.runtime.watch.monitor import Monitor
from sjepa_deploy.runtime.watch.watching import watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Says what to decode: one of the three is given.

    Attributes
    ----------
    source : str or None
        Address of a live stream.
    check : Path or None
        Recording on which the live path is compared with PyTorch.
    events : EventChoice
        Events of that recording about which decisions are compared, or events of the stream that are decided.
    markers : tuple of str
        Where the events of the stream come from.
    history : float
        Seconds of samples that are kept for markers that come late.
    replay : Path or None
        Record whose decisions are made again and compared.
    """

    source: str | None
    check: Path | None
    replay: Path | None
    events: EventChoice
    markers: tuple[str, ...]
    history: float

    @property
    def schedule(self) -> Events | None:
        """Return the events of the stream that are decided; None for a decision every hop."""
        names = (ALL,) if self.events.table is not None else self.events.events
        return Events(names, self.events.tmin, self.history, self.events.trial_starts) if names else None

    @property
    def event_markers(self) -> tuple[str, ...]:
        """Return where the events of the stream come from."""
        if self.events.table is None:
            return self.markers
        if self.markers:
            raise click.UsageError("A table of events tells them all. Leave --markers out, or name events of the markers.")
        return (f"table:{self.events.table}",)


def _task(
    source: str | None, check: Path | None, replay: Path | None, markers: tuple[str, ...], history: float, **events: Any
) -> Task:
    choice = EventChoice(**events)
    return Task(source=source, check=check, replay=replay, events=choice, markers=markers, history=history)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Says where decisions go.

    Attributes
    ----------
    out : Path or None
        File of JSON lines; ``-`` is standard output.
    append : bool
        Whether lines are added to a file that is there.
    outlet : str or None
        Name of an LSL stream.
    record : Path or None
        XDF file of the whole run.
    force : bool
        Whether files that are there are replaced.
    dashboard : bool
        Whether a page for browsers is served.
    dashboard_address : str or None
        HOST:PORT of the page.
    traces : tuple of str or None
        Channels whose samples the page draws.
    control : bool
        Whether the page gives commands.
    shadow : Path or None
        Second bundle that is compared and not sent.
    """

    out: Path | None
    append: bool
    outlet: str | None
    record: Path | None
    force: bool
    dashboard: bool
    dashboard_address: str | None
    traces: tuple[str, ...] | None
    control: bool
    shadow: Path | None

    @property
    def served(self) -> bool:
        """Return whether a page is served."""
        return self.dashboard or self.dashboard_address is not None

    def check(self) -> None:
        """Check, before the decoder starts, that every file may be written."""
        if (self.control or self.traces) and not self.served:
            raise click.UsageError("--control and --traces are of the page: add --dashboard.")
        if self.append and self.force:
            raise click.UsageError("--append keeps the file and --force replaces it: give one of them.")
        options.check_file(self.out, force=self.force, append=self.append)
        if self.record is not None:
            options.check_file(self.record, "--record", force=self.force)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """Says how the command runs.

    Attributes
    ----------
    speed : float
        Speed of a file or of the synthetic stream.
    successor : bool
        Whether another LSL stream may follow a lost one without a source_id.
    duration : float or None
        Seconds after the first sample's arrival after which the decoder stops.
    priority : int or None
        Real-time priority of the decoder's threads.
    """

    speed: float
    successor: bool
    duration: float | None
    priority: int | None


def _config(bads: tuple[str, ...] | None, interpolate: float | None, **values: Any) -> StreamConfig:
    return StreamConfig(bads=bads or (), interpolate=bool(interpolate), interpolate_share=interpolate or 0.0, **values)


def _adapt(adapt: bool, adapt_budget: int, adapt_cooldown: float) -> AdaptConfig | None:
    return AdaptConfig(budget=adapt_budget, cooldown=adapt_cooldown) if adapt else None


DEFAULTS = StreamConfig()
LEARNS = AdaptConfig()
NO_LAYER = "none"


@options.command
@options.bundle
@options.fills(
    "task",
    _task,
    click.option(
        "-s",
        "--source",
        help="Stream to decode: lsl:NAME, lsl:type=EEG, lsl:source_id=..., brainflow:BOARD, file:RECORDING or synthetic.",
    ),
    click.option("--check", type=options.path, help="Instead: compare the live path on this recording with PyTorch."),
    click.option("--replay", type=options.path, help="Instead: decode a record again and compare its decisions."),
    event_options.which,
    options.rare(event_options.tmin),
    options.rare(event_options.labels),
    click.option(
        "--markers",
        multiple=True,
        metavar="ADDRESS",
        help="Where the events of --source come from, once for each: lsl:NAME, lsl:type=Markers, channel:NAME of the stream, "
        "annotations, board of brainflow:BOARD, every:SECONDS for synthetic.  [default: annotations of a file, or the table of "
        "--events]",
    ),
    options.rare(
        click.option(
            "--history", type=float, default=HISTORY_S, help="Seconds of samples that are kept for markers that come late."
        )
    ),
    options.rare(event_options.trial_starts),
    title="What is decoded",
)
@options.signal_facts
@options.fills(
    "config",
    _config,
    click.option(
        "--hop", type=float, default=DEFAULTS.hop, help="Seconds from one decision to the next; 0 decides at every sample."
    ),
    options.rare(
        options.rare(
            click.option(
                "--deadline", type=float, help="Seconds after the newest sample by which a decision is due.  [default: the hop]"
            )
        )
    ),
    click.option("--late", type=click.Choice(["skip", "queue", "hold"]), default=DEFAULTS.late, help="Policy for late windows."),
    options.rare(
        click.option("--bridge", type=int, default=DEFAULTS.bridge, help="Largest number of lost samples to interpolate in time.")
    ),
    click.option(
        "--bad-channels",
        type=click.Choice(["flag", "repair", "stop"]),
        default=DEFAULTS.bad_channels,
        help="Policy for flat, saturated, disconnected or non-finite channels.",
    ),
    options.section(options.SIGNAL, options.interpolate, options.check_unit),
    options.rare(
        click.option(
            "--bads",
            type=options.Names(),
            metavar="A,B,...",
            help="Channels of the stream known to be bad: they count as missing.",
        )
    ),
    options.rare(
        click.option(
            "--max-jitter",
            type=float,
            default=DEFAULTS.max_jitter,
            help="Seconds that a stamp may be off before it always means lost samples.",
        )
    ),
    options.rare(
        click.option("--give-up", type=float, help="Seconds without samples after which the decoder stops.  [default: never]")
    ),
    options.rare(
        click.option("--keep-warm", type=float, help="Seconds after which an idle backend gets a dummy call, for GPUs: 0.005.")
    ),
    options.rare(
        click.option(
            "--roll/--no-roll",
            default=None,
            help="Whether the backend gets new samples alone, and keeps the others: --backend cuda.  [default: where it can]",
        )
    ),
    title="Decoding",
)
@options.backend_choice(
    click.option("--persistent", is_flag=True, help="Keep a kernel on the GPU that answers without a launch: --backend cuda.")
)
@options.section("Decoding", options.rare(options.decisions("the only one; none: outputs alone")))
@options.fills(
    "adaptation",
    _adapt,
    click.option("--adapt", is_flag=True, help="Adapt the last layer to the classes of --events and to labels of the run."),
    options.rare(
        click.option("--adapt-budget", type=int, default=LEARNS.budget, help="Largest number of labels that are learned from."),
        click.option(
            "--adapt-cooldown", type=float, default=LEARNS.cooldown, help="Seconds from one update to the next, at least."
        ),
    ),
    title="Decoding",
)
@kept
@options.fills(
    "outputs",
    Outputs,
    options.out_file,
    options.rare(options.append),
    options.rare(click.option("--outlet", help="Name of an LSL stream to send decisions to.")),
    click.option("--record", type=options.path, help="XDF file to record the run in, for --replay."),
    options.force,
    click.option("--dashboard", is_flag=True, help="Serve a page for browsers, and /metrics for Prometheus."),
    options.rare(
        click.option(
            "--dashboard-address",
            metavar="HOST:PORT",
            help=f"Address of the page; other machines need the token in {TOKEN_VARIABLE}.  [default: 127.0.0.1:8765]",
        )
    ),
    options.rare(
        click.option(
            "--traces",
            type=options.Names(),
            metavar="A,B,...",
            help="Channels whose samples the page draws.  [default: 8 of them]",
        )
    ),
    options.rare(
        click.option(
            "--control",
            is_flag=True,
            help=f"Let the page mark, pause and name bad channels; always needs the token in {TOKEN_VARIABLE}.",
        )
    ),
    options.rare(
        click.option("--shadow", type=options.path, help="Second bundle to compare on the same windows; nothing of it is sent.")
    ),
    title=options.OUTPUT,
)
@feedback_options.choice
@options.fills(
    "session",
    Session,
    options.rare(
        click.option(
            "--speed", type=float, default=1.0, help="Speed of a file or of the synthetic stream; inf: as fast as possible."
        )
    ),
    options.rare(
        click.option(
            "--successor",
            is_flag=True,
            help="Go on with another LSL stream of the same name after a lost one without a source_id.",
        )
    ),
    click.option(
        "-d", "--duration", type=float, help="Seconds from the first sample on after which the decoder stops.  [default: never]"
    ),
    options.rare(
        click.option("--priority", type=click.IntRange(1, 99), help="Real-time priority (SCHED_FIFO) of the decoder's threads.")
    ),
    title="Run",
)
@options.json_output
def stream(
    bundle: Path,
    *,
    task: Task,
    facts: options.SignalFacts,
    config: StreamConfig,
    choice: options.BackendChoice,
    decisions: str | None,
    adaptation: AdaptConfig | None,
    outputs: Outputs,
    socket: FeedbackChoice,
    kept: Kept,
    session: Session,
    json_output: bool,
) -> None:
    """Decode a live stream with BUNDLE into one decision every hop or each event, and count every window that is left out.

    The stream goes through the causal twin of the preprocessing. Ctrl-C, SIGTERM and SIGHUP end the run with everything written.
    The exit status is 1 if --check or --replay find a difference, and 2 if an error ended the run or something was not written.
    """
    if sum(what is not None for what in (task.source, task.check, task.replay)) != 1:
        raise click.UsageError("Give one of --source, --check and --replay.")
    outputs.check()
    socket.check()
    screen = console(json_output or outputs.out == options.STDOUT)
    opened = Bundle.open(bundle)
    if task.replay is not None and task.events.events:
        raise click.UsageError("--events is of --source and --check. A record tells what was decided.")
    if task.events.trial_starts and (task.source is None or not task.events.events):
        raise click.UsageError("--trial-starts begin the trials of --events of a --source. Name the events, or all.")
    if task.markers and (task.source is None or not (task.events.events or outputs.record or kept.folder)):
        raise click.UsageError("--markers say where the events of --source come from. Name them with --events, or record them.")
    if task.check is not None:
        slides = click.get_current_context().get_parameter_source("hop") is not ParameterSource.DEFAULT
        if not task.events.events and not slides:
            event_options.refuse_sliding(opened.spec, "Judge it on them with --events NAME,.. (or all, or FILE.tsv).")
        with choice.load(opened, check_unit=False) as predict:
            if task.events.events:
                result = event_options.judge_task(
                    screen,
                    predict,
                    task.check,
                    task.events,
                    facts,
                    interpolate=config.share,
                    check_unit=config.check_unit,
                )
                if json_output:
                    print_json(result)
                event_options.require_passed(result)
                return
            _check(screen, predict, task.check, config, facts, json_output)
        return
    if task.replay is not None:
        _replay(screen, opened, task.replay, choice, json_output)
        return
    assert task.source is not None
    if kept.folder is not None and outputs.record is not None:
        raise click.UsageError("--session records the run: leave out --record.")
    labels, layer = kept.labels(), _layer(opened, decisions)
    if session.priority is not None:
        set_real_time(session.priority)
    with contextlib.ExitStack() as closing:
        decoder = closing.enter_context(
            Decoder.open(
                opened,
                task.source,
                config,
                decisions=layer,
                schedule=task.schedule,
                markers=task.event_markers,
                backend=choice.backend,
                precision=choice.precision,
                options=choice.options,
                **dataclasses.asdict(facts),
                successor=session.successor,
                speed=session.speed,
            )
        )
        adapter = None if adaptation is None else adapt(decoder, adaptation, classes=task.events.class_of)
        closing.enter_context(stopped_by_signals(decoder))
        monitor = watch(decoder, outputs.traces if outputs.served else ())
        recorder = lines = error = served = None
        if outputs.served:  # files come last: a start that fails leaves none
            host, port = DASHBOARD.parse(outputs.dashboard_address or "")
            served = closing.enter_context(
                Dashboard(
                    monitor,
                    host=host,
                    port=port,
                    token=os.environ.get(TOKEN_VARIABLE),
                    commands=decoder.commands if outputs.control else None,
                )
            )
            screen.print(f"dashboard: {served.url}", soft_wrap=True)
        opening = Opening(backend=choice.backend, precision=choice.precision, options=choice.options)
        feedback = closing.enter_context(socket.served(decoder, screen, opening))
        shadow = None if outputs.shadow is None else closing.enter_context(Shadow(decoder, outputs.shadow, opening))
        if outputs.outlet is not None:
            from sjepa_deploy.runtime.live.lsl_outlet import send_decisions

            send_decisions(decoder, outputs.outlet)
        if outputs.out is not None:
            options.make_way(outputs.out, force=outputs.force)
            lines = write_lines(decoder, outputs.out)
            closing.callback(lines.close)
        if outputs.record is not None:
            options.make_way(outputs.record, force=outputs.force)
            recorder = record(decoder, outputs.record, adapter=adapter)
        elif labels is not None:
            recorder = kept.record(screen, decoder, labels, adapter=adapter)
        if recorder is not None:
            closing.callback(recorder.close)
            if served is not None:
                served.recorder = recorder
        if session.duration is not None:
            decoder.stop_after(session.duration)
        _announce(screen, decoder)
        if opened.manifest.weights.random:
            screen.print("[bold yellow]The weights of this bundle are random: the predictions mean nothing.[/]")
        view = contextlib.nullcontext() if is_quiet() or json_output else live_view(monitor, screen)
        started = time.monotonic()
        with view, undisturbed(decoder):
            try:
                decoder.run()
            except SjepaError as e:  # what was counted until then is told first
                error = e
            monitor.set_state("stopped")
        elapsed = time.monotonic() - started
    not_written = {} if recorder is None else {f"{what} in the record": n for what, n in recorder.n_lost.items()}
    not_written |= {} if lines is None else {"lines": lines.n_lost}
    not_written |= {} if feedback is None else {"messages of the feedback socket": feedback.counts["left out"]}
    if adapter is not None:
        for change in adapter.changes:
            screen.print(f"{change.why} after the decision {change.after}: {escape(change.text)}", soft_wrap=True)
        screen.print(f"{adapter.n_labels} labels were learned from, {adapter.n_refused} were not.")
    report = None if shadow is None else shadow.report
    _report(screen, decoder, adapter, monitor, elapsed, not_written, error, json_output, report)
    if error is not None:
        raise error
    if any(not_written.values()):
        lost = ", ".join(f"{n} {what}" for what, n in not_written.items() if n)
        raise OutputError(f"Not written: {lost}.", "Look at the disk, and at the reader of the lines.")
    screen.print(f"[bold green]decoded:[/] {verdict_of(decoder.counters, at_events=decoder.events is not None)}")


def _layer(bundle: Bundle, name: str | None) -> DecisionLayer | None:
    """Return the decision layer that is asked for: by default the only one of the bundle, where there is one."""
    if name == NO_LAYER or (name is None and not layers_of(bundle)):
        return None
    return DecisionLayer.load(bundle, name)


def _check(
    screen: Console,
    predict: Predictor,
    recording: Path,
    config: StreamConfig,
    facts: options.SignalFacts,
    json_output: bool,
) -> None:
    from sjepa_deploy.runtime.live.check import check_streaming

    with progress(f"comparing live, offline and PyTorch on {recording.name}"):
        result = check_streaming(predict, recording, config, **dataclasses.asdict(facts))
    bits = "the same bits" if result.identical else "[bold red]other bits[/]"
    screen.print(
        f"{result.n_windows} decisions in chunks of {', '.join(result.chunks)} samples and offline: {bits} with {result.backend}",
        soft_wrap=True,
    )
    screen.print(
        f"beside PyTorch in float64: {result.max_error:.1e} of the outputs' scale, {result.tolerance:.0e} allowed", soft_wrap=True
    )
    if result.correlation is not None:
        flips = "" if result.flips is None else f", another class in {result.flips:.1%} of the windows"
        screen.print(
            f"causal beside zero-phase preprocessing: correlation {result.correlation:.2f}, difference {result.difference:.2f} "
            f"standard deviations{flips}",
            soft_wrap=True,
        )
    else:
        screen.print("The recording is too short for the zero-phase filter of training.")
    if json_output:
        print_json(result)
    if not result.passed:
        raise ParityError(f"The live path differs from the offline one on {recording}.", "Do not decode with this release.")
    screen.print(f"[bold green]checked:[/] {result.n_windows} live decisions are the offline ones", soft_wrap=True)


def _replay(screen: Console, bundle: Bundle, path: Path, choice: options.BackendChoice, json_output: bool) -> None:
    recorded = read_record(path)
    with (
        choice.load(bundle, precision=recorded.run.precision, check_unit=False) as predict,
        progress(f"decoding {path.name} again"),
    ):
        result = replay(predict, recorded)
    screen.print(
        f"{result.n_decisions} decisions on {result.n_samples} samples decoded again with {result.backend}: "
        f"{len(result.differ)} differ, {len(result.missing)} are missing",
        soft_wrap=True,
    )
    if result.decisions is not None:
        screen.print(
            f"{result.n_states} states of the decision layer {escape(result.decisions)}: {len(result.states_differ)} differ",
            soft_wrap=True,
        )
    if result.n_cut_off:
        screen.print(f"The samples of {result.n_cut_off} more decisions at its end are not in the record: it was cut off.")
    if json_output:
        counts = {"n_differ": len(result.differ), "n_missing": len(result.missing), "n_cut_off": result.n_cut_off}
        states = {"decisions": result.decisions, "n_states": result.n_states, "n_states_differ": len(result.states_differ)}
        print_json({"record": result.record, "n_decisions": result.n_decisions} | counts | states)
    if not result.passed:
        first = min(result.differ + result.missing + result.states_differ)
        raise ParityError(f"The replay of {path} differs from window {first} on.", "Use the backend and release of the record.")
    screen.print(f"[bold green]replayed:[/] {result.n_decisions} decisions are those of the record", soft_wrap=True)


def _told_of_layer(layer: DecisionLayer, hop: float | None) -> list[str]:
    """Return sentences on a decision layer, and on what differs from the windows that it was fitted on.

    Without a hop, windows belong to events.
    """
    described = layer.description
    lines = [f"decisions: {escape(described.name)} ({described.digest[:12]}); sjepa-decide --show tells its steps"]
    fitted = described.fit
    if fitted is not None and (fitted.hop is None or hop is None or abs(fitted.hop - hop) > 1e-6) and fitted.hop != hop:
        then, now = ("at events" if one is None else f"every {one:g} s" for one in (fitted.hop, hop))
        lines.append(f"[bold yellow]The layer was fitted on windows {then}, not {now}: its figures are of those.[/]")
    return lines


def _announce(screen: Console, decoder: Decoder) -> None:
    info, spec = decoder.source.info, decoder.spec
    when = f"every {decoder.hop / spec.sfreq:g} s" if decoder.events is None else f"at events ({', '.join(decoder.events.names)})"
    screen.print(
        f"[bold]{escape(info.name)}[/]: {len(info.ch_names)} channels at {info.sfreq:g} Hz in {info.unit}; "
        f"{spec.n_times / spec.sfreq:g} s windows {escape(when)}, due within {decoder.deadline:g} s",
        soft_wrap=True,
    )
    delays = ", ".join(f"{seconds * 1e3:.0f} ms at {hertz:g} Hz" for hertz, seconds in decoder.windows.delay.at_hz)
    screen.print(f"delay of the causal filters: {delays or 'none'}", soft_wrap=True)
    if spec.signal.phase == "zero-phase" and not decoder.predict.bundle.manifest.weights.random:
        screen.print(
            "[bold yellow]The model learned from zero-phase filtered windows; live filters are causal.[/] "
            "--check RECORDING --events NAME,.. measures what it costs; a model trained with --phase causal pays nothing.",
            soft_wrap=True,
        )
        for known in read_tasks(decoder.predict.bundle):
            if known.loss is not None:
                screen.print(
                    f"measured on {escape(known.recording)}: {known.metric.replace('_', ' ')} {known.loss.value:+.3f} "
                    f"({known.loss.low:+.3f} to {known.loss.high:+.3f}), other decisions in {known.ways[-1].differ:.1%}",
                    soft_wrap=True,
                )
    if decoder.events is None:
        event_options.tell_sliding(screen, spec)
    if decoder.layer is not None:
        for line in _told_of_layer(decoder.layer, None if decoder.events is not None else decoder.hop / spec.sfreq):
            screen.print(line, soft_wrap=True)
    for note in info.notes:
        screen.print(f"stream: {escape(note)}", soft_wrap=True)
    if decoder.windows.missing:
        screen.print(f"interpolated: {escape(', '.join(decoder.windows.missing))}", soft_wrap=True)


def _told_of_shadow(report: ShadowReport) -> str:
    """Return one line on how the second bundle compared."""
    pairs = ", ".join(f"{pair} {n}" for pair, n in list(report.pairs.items())[:5])
    left_out = f"; no time for {report.n_left_out} windows" if report.n_left_out else ""
    return (
        f"shadow {report.bundle} ({report.digest[:12]}): disagrees about {report.n_disagree} of {report.n_compared} windows"
        f"{f' ({pairs})' if pairs else ''}, outputs differ by {report.largest_difference:.3g} at most{left_out}"
        f"{f'; stopped: {report.error}' if report.error else ''}"
    )


def _report(
    screen: Console,
    decoder: Decoder,
    adapter: Adapter | None,
    monitor: Monitor,
    elapsed: float,
    not_written: dict[str, int],
    error: SjepaError | None,
    json_output: bool,
    shadow: ShadowReport | None,
) -> None:
    shot = monitor.snapshot()
    screen.print(summary_table(decoder.counters, shot))
    if (lacking := decoder.event_names.told()) is not None:
        screen.print(f"[bold yellow]{escape(lacking)}[/]", soft_wrap=True)
    if decoder.advice is not None:
        screen.print(f"Late decisions: {decoder.advice}", soft_wrap=True)
    if shadow is not None:
        screen.print(escape(_told_of_shadow(shadow)), soft_wrap=True)
    if json_output:
        ages = {f"p{q:g}": shot.percentile("age", q) for q in (50.0, 99.0)} | {"max": shot.age.largest}
        print_json(
            {
                "counters": decoder.counters,
                "events_came": dict(decoder.event_names.came),
                "events_missing": decoder.event_names.missing,
                "hop": decoder.hop / decoder.spec.sfreq,
                "deadline": decoder.deadline,
                "filter_delay": decoder.windows.delay,
                "age_of_the_newest_decisions": {name: None if value != value else value for name, value in ages.items()},
                "elapsed_s": elapsed,
                "advice": decoder.advice,
                "not_written": not_written,
                "adaptation": None if adapter is None else _summary_of(adapter),
                "error": None if error is None else str(error),
                "shadow": shadow,
            }
        )


def _summary_of(adapter: Adapter) -> dict[str, Any]:
    """Return what an adaptation did, without the weights of the last layers."""
    changes = [{name: getattr(change, name) for name in ("why", "after", "n_labels", "digest")} for change in adapter.changes]
    return {"labels": adapter.n_labels, "refused": adapter.n_refused, "alarm": adapter.alarmed, "changes": changes}


main = entry("stream")
