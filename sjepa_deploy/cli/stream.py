"""``sjepa-stream`` decodes a live stream."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.cli.live import live_view, summary_table
from sjepa_deploy.errors import ParityError, StreamError
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.open_source import open_source
from sjepa_deploy.runtime.live.recorder import Recorder, RecordSource, RunDescription, read_record
from sjepa_deploy.runtime.live.sources import Chunk, Incident, Source
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.runtime.watch.dashboard import TOKEN_VARIABLE, Dashboard, parse_address
from sjepa_deploy.runtime.watch.monitor import Monitor
from sjepa_deploy.runtime.watch.watching import watch
from sjepa_deploy.spec import Unit

COLLECT_EVERY_S = 60.0
"""Seconds from one garbage collection to the next: they run after a decision, never in the middle of one."""

MOST_LINES = 10_000
"""Lines that wait for a reader of --out that stalls; what is more is left out, and counted."""

LAST_LINES_S = 5.0
"""Seconds that a reader of --out has at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Says what to decode: one of the three is given.

    Attributes
    ----------
    source : str or None
        Address of a live stream.
    check : Path or None
        Recording on which the live path is compared with PyTorch.
    replay : Path or None
        Record whose decisions are made again and compared.
    """

    source: str | None
    check: Path | None
    replay: Path | None


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
    """

    out: Path | None
    append: bool
    outlet: str | None
    record: Path | None
    force: bool
    dashboard: bool
    dashboard_address: str | None

    def check(self) -> None:
        """Check, before the decoder starts, that every file may be written."""
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
    duration : float or None
        Seconds of stream after which the decoder stops.
    priority : int or None
        Real-time priority of the decoder's threads.
    quiet : bool
        Whether the live view is left out.
    """

    speed: float
    duration: float | None
    priority: int | None
    quiet: bool


def _config(bads: tuple[str, ...] | None, **values: Any) -> StreamConfig:
    return StreamConfig(bads=bads or (), **values)


DEFAULTS = StreamConfig()


@options.command
@options.bundle
@options.fills(
    "task",
    Task,
    click.option("--source", help="Stream to decode: lsl:NAME, lsl:type=EEG, lsl:source_id=..., file:RECORDING or synthetic."),
    click.option("--check", type=options.path, help="Instead: compare the live path on this recording with PyTorch."),
    click.option("--replay", type=options.path, help="Instead: decode a record again and compare its decisions."),
)
@options.signal_facts
@options.fills(
    "config",
    _config,
    click.option(
        "--hop", type=float, default=DEFAULTS.hop, help="Seconds from one decision to the next; 0 decides at every sample."
    ),
    click.option(
        "--deadline", type=float, help="Seconds after the newest sample by which a decision is due.  [default: the hop]"
    ),
    click.option("--late", type=click.Choice(["skip", "queue", "hold"]), default=DEFAULTS.late, help="Policy for late windows."),
    click.option("--bridge", type=int, default=DEFAULTS.bridge, help="Largest number of lost samples to interpolate in time."),
    click.option(
        "--bad-channels",
        type=click.Choice(["flag", "repair", "stop"]),
        default=DEFAULTS.bad_channels,
        help="Policy for flat, saturated, disconnected or non-finite channels.",
    ),
    options.interpolate,
    click.option(
        "--bads", type=options.Names(), metavar="A,B,...", help="Channels of the stream known to be bad: they count as missing."
    ),
    click.option(
        "--max-jitter",
        type=float,
        default=DEFAULTS.max_jitter,
        help="Seconds that a stamp may be off before it always means lost samples.",
    ),
    click.option("--give-up", type=float, help="Seconds without samples after which the decoder stops.  [default: never]"),
    click.option("--keep-warm", type=float, help="Seconds after which an idle backend gets a dummy call, for GPUs: 0.005."),
    click.option(
        "--roll/--no-roll",
        default=None,
        help="Whether the backend gets new samples alone, and keeps the others: --backend cuda.  [default: where it can]",
    ),
)
@options.backend_choice(
    click.option("--persistent", is_flag=True, help="Keep a kernel on the GPU that answers without a launch: --backend cuda.")
)
@options.fills(
    "outputs",
    Outputs,
    options.out_file,
    options.append,
    click.option("--outlet", help="Name of an LSL stream to send decisions to."),
    click.option("--record", type=options.path, help="XDF file to record the run in, for --replay."),
    options.force,
    click.option("--dashboard", is_flag=True, help="Serve a page for browsers, and /metrics for Prometheus."),
    click.option(
        "--dashboard-address",
        metavar="HOST:PORT",
        help=f"Address of the page; other machines need the token in {TOKEN_VARIABLE}.  [default: 127.0.0.1:8765]",
    ),
)
@options.fills(
    "session",
    Session,
    click.option(
        "--speed", type=float, default=1.0, help="Speed of a file or of the synthetic stream; inf: as fast as possible."
    ),
    click.option("--duration", type=float, help="Seconds of stream after which the decoder stops.  [default: never]"),
    click.option("--priority", type=click.IntRange(1, 99), help="Real-time priority (SCHED_FIFO) of the decoder's threads."),
    options.quiet,
)
@options.json_output
def stream(
    bundle: Path,
    *,
    task: Task,
    facts: options.SignalFacts,
    config: StreamConfig,
    choice: options.BackendChoice,
    outputs: Outputs,
    session: Session,
    json_output: bool,
) -> None:
    """Decode a live stream with BUNDLE into one decision every hop, each with its age, and count every window that is left out.

    The stream goes through the causal twin of the preprocessing that the bundle asks for. Ctrl-C or SIGTERM end the run with
    everything written. The exit status is 1 if --check or --replay find a difference.
    """
    if sum(what is not None for what in (task.source, task.check, task.replay)) != 1:
        raise click.UsageError("Give one of --source, --check and --replay.")
    outputs.check()
    screen = console(json_output or outputs.out == options.STDOUT)
    opened = Bundle.open(bundle)
    if task.check is not None:
        with choice.load(opened, check_unit=False) as predict:
            _check(screen, predict, task.check, config, facts.unit, facts.sfreq, json_output)
        return
    if task.replay is not None:
        _replay(screen, opened, task.replay, choice, json_output)
        return
    assert task.source is not None
    if session.priority is not None:
        _set_real_time(session.priority)
    with contextlib.ExitStack() as closing:
        predict = choice.load(opened, check_unit=False)
        closing.callback(predict.close)
        source = open_source(
            task.source, opened.spec, unit=facts.unit, ch_names=facts.ch_names, sfreq=facts.sfreq, speed=session.speed
        )
        closing.callback(source.close)
        offline = False
        if session.speed == float("inf") and hasattr(source, "set_chunk"):
            offline = True
            source.set_chunk(max(1, config.hop_samples(opened.spec)))
        decoder = Decoder(predict, source, config)
        monitor = watch(decoder)
        run = RunDescription(
            stream=source.info,
            config=config,
            bundle=str(bundle),
            bundle_digest=opened.manifest.digest,
            backend=choice.backend,
            precision=predict.backend.precision,
            version=sjepa_deploy.__version__,
        )
        recorder = lines = None
        if outputs.record is not None:
            options.make_way(outputs.record, force=outputs.force)
            n_outputs = math.prod(opened.spec.output_shape)
            recorder = Recorder(outputs.record, run, n_outputs, lambda why: _note(source, "record", why), patient=offline)
            closing.callback(recorder.close)
            decoder.on_chunk(recorder.chunk)
            decoder.on_decision(recorder.decision)
            decoder.on_incident(recorder.incident)
        if outputs.outlet is not None:
            from sjepa_deploy.runtime.live.lsl_outlet import LslOutlet

            facts_of_run = {"run": run, "window_s": opened.spec.n_times / opened.spec.sfreq}
            sending = LslOutlet(outputs.outlet, opened.spec, facts_of_run)
            decoder.on_decision(sending.send)
        if outputs.out is not None:
            options.make_way(outputs.out, force=outputs.force)
            lines = _Lines(outputs.out, source, patient=offline)
            closing.callback(lines.close)
            decoder.on_decision(lines.put)
            decoder.on_incident(lines.put)
        if session.duration is not None:
            decoder.on_chunk(_stop_after(decoder, session.duration))
        _announce(screen, decoder)
        if opened.manifest.weights.random:
            screen.print("[bold yellow]The weights of this bundle are random: the predictions mean nothing.[/]")
        if outputs.dashboard or outputs.dashboard_address is not None:
            host, port = parse_address(outputs.dashboard_address or "")
            served = closing.enter_context(Dashboard(monitor, host=host, port=port, token=os.environ.get(TOKEN_VARIABLE)))
            screen.print(f"dashboard: {served.url}", soft_wrap=True)
        view = contextlib.nullcontext() if session.quiet or json_output else live_view(monitor, screen)
        started = time.monotonic()
        with view, _stopped_by_signals(decoder), _undisturbed(decoder):
            counters = decoder.run()
            monitor.set_state("stopped")
        elapsed = time.monotonic() - started
    not_written = {} if recorder is None else {f"{what} in the record": n for what, n in recorder.n_lost.items()}
    not_written |= {} if lines is None else {"lines": lines.n_lost}
    _report(screen, decoder, monitor, counters, elapsed, not_written, json_output)


def _check(
    screen: Console,
    predict: Predictor,
    recording: Path,
    config: StreamConfig,
    unit: Unit | None,
    sfreq: float | None,
    json_output: bool,
) -> None:
    from sjepa_deploy.runtime.live.check import check_streaming

    result = check_streaming(predict, recording, config, unit=unit, sfreq=sfreq)
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


def _replay(screen: Console, bundle: Bundle, path: Path, choice: options.BackendChoice, json_output: bool) -> None:
    record = read_record(path)
    if record.run.bundle_digest != bundle.manifest.digest:
        raise StreamError(f"{path} was decoded with another bundle ({record.run.bundle}).", "Name that bundle.")
    # What was late then is decoded now, and not compared; whole windows give the bits that new samples alone gave.
    config = dataclasses.replace(record.run.config, late="queue", roll=False)
    with choice.load(bundle, precision=record.run.precision, check_unit=False) as predict:
        decoder = Decoder(predict, RecordSource(record), config)
        again = {decision.index: decision.prediction for decision in decoder}
    missing = [index for index in record.decisions if index not in again]
    differ = [i for i, made in again.items() if i in record.decisions and made.tobytes() != record.decisions[i].tobytes()]
    screen.print(
        f"{len(record.decisions)} decisions on {decoder.counters.samples} samples decoded again with {choice.backend}: "
        f"{len(differ)} differ, {len(missing)} are missing",
        soft_wrap=True,
    )
    if json_output:
        print_json(
            {"record": str(path), "n_decisions": len(record.decisions), "n_differ": len(differ), "n_missing": len(missing)}
        )
    if differ or missing:
        first = min(differ + missing)
        raise ParityError(f"The replay of {path} differs from window {first} on.", "Use the backend and release of the record.")


def _note(source: Source, kind: str, text: str) -> None:
    """Pass on what another thread saw: the decoder takes a source's incidents in its own."""
    source.incidents.append(Incident(kind=kind, time=source.clock(), text=text))


def _set_real_time(priority: int) -> None:
    """Give this thread, and those that it starts, a priority before all others of the machine.

    Those that write and draw have it too: one that is held up while it has the interpreter's lock would hold up the decoder.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except PermissionError as e:
        raise StreamError(
            "This user may not set a real-time priority.", "Run as root, or allow it (`ulimit -r`, or CAP_SYS_NICE)."
        ) from e


def _stop_after(decoder: Decoder, duration: float) -> Any:
    first: list[float] = []

    def look(chunk: Chunk) -> None:
        if not first:
            first.append(float(chunk.stamps[0]))
        if chunk.stamps[-1] - first[0] >= duration:
            decoder.stop()

    return look


@contextlib.contextmanager
def _stopped_by_signals(decoder: Decoder) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: decoder.stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed(decoder: Decoder) -> Iterator[None]:
    """Keep garbage collections and other threads' long turns out of decisions."""
    turn = sys.getswitchinterval()
    next_at = time.monotonic() + COLLECT_EVERY_S

    def collect(_: Decision) -> None:
        nonlocal next_at
        if time.monotonic() > next_at:
            gc.collect()
            next_at = time.monotonic() + COLLECT_EVERY_S

    decoder.on_decision(collect)
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
        gc.enable()
        gc.unfreeze()


class _Lines:
    """Appends decisions and incidents to a file, one JSON object a line, in a thread of its own: a slow reader delays nothing.

    Written past Python's buffers, whose lock a reader that has stopped would keep from the end of the process. If `patient`, as
    for a recording that is decoded as fast as possible, a slow reader is waited for.
    """

    def __init__(self, path: Path, source: Source, *, patient: bool) -> None:
        self._path, self._source, self._patient = path, source, patient
        self._queue: queue.Queue[Decision | Incident | None] = queue.Queue(MOST_LINES)
        self.n_lost = 0
        try:
            self._file = io.FileIO(os.dup(1), "a") if str(path) == "-" else io.FileIO(path, "a")
        except OSError as e:
            raise StreamError(f"{path} cannot be written ({e.strerror}).", "Choose another --out.") from e
        self._thread = threading.Thread(target=self._keep_writing, name="lines", daemon=True)
        self._thread.start()

    def put(self, what: Decision | Incident) -> None:
        """Write a line soon, or count it if too many wait already."""
        try:
            self._queue.put(what, block=self._patient)
        except queue.Full:
            self.n_lost += 1
            if self.n_lost == 1:
                _note(self._source, "out", f"{self._path} is not read fast enough: lines are left out.")

    def close(self) -> None:
        """Write what is left, unless nobody reads it."""
        ends = time.monotonic() + LAST_LINES_S
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=LAST_LINES_S)
            self._thread.join(max(0.0, ends - time.monotonic()))
        if self._thread.is_alive():
            self.n_lost += self._queue.qsize()
        else:
            self._file.close()

    def _keep_writing(self) -> None:
        try:
            while (what := self._queue.get()) is not None:
                line = memoryview(json.dumps(_line_of(what)).encode() + b"\n")
                while line:
                    line = line[self._file.write(line) :]
        except OSError as e:  # the disk is full, or the reader of a pipe has gone
            _note(self._source, "out", f"{self._path} takes no more lines: {e.strerror}.")
            self.n_lost += 1
            while self._queue.get() is not None:
                self.n_lost += 1


def _line_of(what: Decision | Incident) -> dict[str, object]:
    if isinstance(what, Incident):
        return {"event": what.kind, "time": what.time, "text": what.text, "sample": what.sample}
    return {
        "index": what.index,
        "time": what.time,
        "due": what.due,
        "received": what.received,
        "decided": what.decided,
        "infer_s": round(what.infer_s, 6),
        "age": round(what.age, 6),
        "prediction": what.prediction.ravel().tolist(),
        "flags": what.flags,
        "bad_channels": what.bad_channels,
    }


def _announce(screen: Console, decoder: Decoder) -> None:
    info, spec = decoder.source.info, decoder.spec
    screen.print(
        f"[bold]{escape(info.name)}[/]: {len(info.ch_names)} channels at {info.sfreq:g} Hz in {info.unit}; "
        f"{spec.n_times / spec.sfreq:g} s windows every {decoder.hop / spec.sfreq:g} s, due within {decoder.deadline:g} s",
        soft_wrap=True,
    )
    delays = ", ".join(f"{seconds * 1e3:.0f} ms at {hertz:g} Hz" for hertz, seconds in decoder.windows.delay.at_hz)
    screen.print(f"delay of the causal filters: {delays or 'none'}", soft_wrap=True)
    if decoder.windows.missing:
        screen.print(f"interpolated: {escape(', '.join(decoder.windows.missing))}", soft_wrap=True)


def _report(
    screen: Console,
    decoder: Decoder,
    monitor: Monitor,
    counters: Counters,
    elapsed: float,
    not_written: dict[str, int],
    json_output: bool,
) -> None:
    shot = monitor.snapshot()
    screen.print(summary_table(counters, shot))
    for what, n in not_written.items():
        if n:
            screen.print(f"[bold red]Not written: {n} {what}.[/]")
    if json_output:
        ages = {f"p{q:g}": shot.percentile("age", q) for q in (50.0, 99.0)} | {"max": shot.age.largest}
        print_json(
            {
                "counters": counters,
                "hop": decoder.hop / decoder.spec.sfreq,
                "deadline": decoder.deadline,
                "filter_delay": decoder.windows.delay,
                "age_of_the_newest_decisions": {name: None if value != value else value for name, value in ages.items()},
                "elapsed_s": elapsed,
                "not_written": not_written,
            }
        )


main = entry("stream")
