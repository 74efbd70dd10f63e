"""``sjepa-stream``: decode a live stream."""

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
from sjepa_deploy.cli import console, entry, print_json
from sjepa_deploy.cli.live import live_view, summary_table
from sjepa_deploy.errors import ParityError, StreamError
from sjepa_deploy.runtime.backend import DEFAULT_BACKEND, BackendOptions
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.open_source import open_source
from sjepa_deploy.runtime.live.recorder import Recorder, RecordSource, RunDescription, read_record
from sjepa_deploy.runtime.live.sources import Chunk, Incident, Source
from sjepa_deploy.runtime.live.windows import BadChannels
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.runtime.watch.dashboard import TOKEN_VARIABLE, Dashboard, parse_address
from sjepa_deploy.runtime.watch.monitor import Monitor
from sjepa_deploy.runtime.watch.watching import watch
from sjepa_deploy.spec import RUN_PRECISIONS, UNITS_IN_VOLTS, RunPrecision, Unit

COLLECT_EVERY_S = 60.0
"""Seconds from one garbage collection to the next: they run after a decision, never in the middle of one."""

MOST_LINES = 10_000
"""Lines that wait for a reader of --out that stalls; what is more is left out, and counted."""

LAST_LINES_S = 5.0
"""Seconds that a reader of --out has at the end."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", help="lsl:NAME, lsl:type=EEG, lsl:source_id=..., file:RECORDING or synthetic.")
@click.option("--check", type=click.Path(path_type=Path), help="Instead: compare the live path on this recording with PyTorch.")
@click.option("--replay", type=click.Path(path_type=Path), help="Instead: decode a record again and compare its decisions.")
@click.option("--hop", type=float, default=0.1, help="Seconds from one decision to the next; 0 decides at every sample.")
@click.option("--deadline", type=float, help="Seconds after the newest sample by which a decision is due.  [default: the hop]")
@click.option("--late", type=click.Choice(["skip", "queue", "hold"]), default="skip", help="What to do with late windows.")
@click.option("--bridge", type=int, default=0, help="Largest number of lost samples to interpolate in time.")
@click.option(
    "--bad-channels",
    type=click.Choice(["flag", "repair", "stop"]),
    default="flag",
    help="What to do with flat, saturated, disconnected or non-finite channels.",
)
@click.option("--interpolate", is_flag=True, help="Interpolate channels of the model that the stream lacks.")
@click.option("--bads", default="", help="Channels of the stream known to be bad, A,B,...: they count as lacking.")
@click.option("--max-jitter", type=float, default=0.1, help="Seconds that a stamp may be off before it is always a loss.")
@click.option("--give-up", type=float, help="Seconds without samples after which to stop.  [default: never]")
@click.option("--unit", type=click.Choice(list(UNITS_IN_VOLTS)), help="Unit of a source that does not state it.")
@click.option("--channels", help="Names A,B,... of the channels of a source that does not name them.")
@click.option("--sfreq", type=float, help="Rate in Hz of the synthetic stream, or of a file that does not state it.")
@click.option("--speed", type=float, default=1.0, help="Speed of a file or the synthetic stream; inf for as fast as possible.")
@click.option("--duration", type=float, help="Seconds of stream after which to stop.  [default: never]")
@click.option("--backend", default=DEFAULT_BACKEND, help="What runs the model.")
@click.option("--precision", type=click.Choice(RUN_PRECISIONS), help="Precision to run in.  [default: the bundle's first]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="JSON-lines file of decisions and incidents to append to; - for stdout."
)
@click.option("--outlet", help="Name of an LSL stream to send decisions to.")
@click.option("--record", type=click.Path(path_type=Path), help="XDF file to record the run in, for --replay.")
@click.option("--dashboard", is_flag=True, help="Serve a page for browsers, and /metrics for Prometheus.")
@click.option(
    "--dashboard-address",
    metavar="HOST:PORT",
    help=f"Where, with --dashboard; other machines need the token in {TOKEN_VARIABLE}.  [default: 127.0.0.1:8765]",
)
@click.option("--priority", type=click.IntRange(1, 99), help="Real-time priority (SCHED_FIFO) of the decoder's threads.")
@click.option("--persistent", is_flag=True, help="A kernel that stays on the GPU answers, without a launch: --backend cuda.")
@click.option(
    "--roll/--no-roll",
    default=None,
    help="Whether the backend is given new samples alone, and keeps the others: --backend cuda.  [default: where it can]",
)
@click.option("--keep-warm", type=float, help="Seconds after which an idle backend gets a dummy call, for GPUs: 0.005.")
@click.option("--quiet", is_flag=True, help="No live view.")
@click.option("--json", "json_output", is_flag=True, help="Print the summary as JSON.")
def stream(
    bundle: Path,
    source: str | None,
    check: Path | None,
    replay: Path | None,
    hop: float,
    deadline: float | None,
    late: Any,
    bridge: int,
    bad_channels: BadChannels,
    interpolate: bool,
    bads: str,
    max_jitter: float,
    give_up: float | None,
    unit: Unit | None,
    channels: str | None,
    sfreq: float | None,
    speed: float,
    duration: float | None,
    backend: str,
    precision: RunPrecision | None,
    out: Path | None,
    outlet: str | None,
    record: Path | None,
    dashboard: bool,
    dashboard_address: str | None,
    priority: int | None,
    persistent: bool,
    roll: bool | None,
    keep_warm: float | None,
    quiet: bool,
    json_output: bool,
) -> None:
    """Decode a live stream with BUNDLE: one decision every hop, with its age, and nothing left out in silence.

    The stream goes through the causal twin of the preprocessing that the bundle asks for. Ctrl-C or SIGTERM end it with
    everything written. The exit status is 1 if --check or --replay find a difference.
    """
    if sum(what is not None for what in (source, check, replay)) != 1:
        raise click.UsageError("Give one of --source, --check and --replay.")
    screen = console(json_output or str(out) == "-")
    config = StreamConfig(
        hop=hop,
        deadline=deadline,
        late=late,
        bridge=bridge,
        bad_channels=bad_channels,
        interpolate=interpolate,
        bads=tuple(filter(None, bads.split(","))),
        max_jitter=max_jitter,
        give_up=give_up,
        keep_warm=keep_warm,
        roll=roll,
    )
    opened = Bundle.open(bundle)
    options = BackendOptions(persistent=persistent)
    if check is not None:
        with load(opened, backend=backend, precision=precision, check_unit=False, options=options) as predict:
            _check(screen, predict, check, config, unit, sfreq, json_output)
        return
    if replay is not None:
        _replay(screen, opened, replay, backend, precision, options, json_output)
        return
    assert source is not None
    if priority is not None:
        _set_real_time(priority)
    with contextlib.ExitStack() as closing:
        predict = load(opened, backend=backend, precision=precision, check_unit=False, options=options)
        closing.callback(predict.close)
        names = None if channels is None else channels.split(",")
        opened_source = open_source(source, opened.spec, unit=unit, ch_names=names, sfreq=sfreq, speed=speed)
        closing.callback(opened_source.close)
        offline = False
        if speed == float("inf") and hasattr(opened_source, "set_chunk"):
            offline = True
            opened_source.set_chunk(max(1, config.hop_samples(opened.spec)))
        decoder = Decoder(predict, opened_source, config)
        monitor = watch(decoder)
        run = RunDescription(
            stream=opened_source.info,
            config=config,
            bundle=str(bundle),
            bundle_digest=opened.manifest.digest,
            backend=backend,
            precision=predict.backend.precision,
            version=sjepa_deploy.__version__,
        )
        recorder = lines = None
        if record is not None:
            n_outputs = math.prod(opened.spec.output_shape)
            recorder = Recorder(record, run, n_outputs, lambda why: _note(opened_source, "record", why), patient=offline)
            closing.callback(recorder.close)
            decoder.on_chunk(recorder.chunk)
            decoder.on_decision(recorder.decision)
            decoder.on_incident(recorder.incident)
        if outlet is not None:
            from sjepa_deploy.runtime.live.lsl_outlet import LslOutlet

            sending = LslOutlet(outlet, opened.spec, {"run": run, "window_s": opened.spec.n_times / opened.spec.sfreq})
            decoder.on_decision(sending.send)
        if out is not None:
            lines = _Lines(out, opened_source, patient=offline)
            closing.callback(lines.close)
            decoder.on_decision(lines.put)
            decoder.on_incident(lines.put)
        if duration is not None:
            decoder.on_chunk(_stop_after(decoder, duration))
        _announce(screen, decoder)
        if opened.manifest.weights.random:
            screen.print("[bold yellow]The weights of this bundle are random: the predictions mean nothing.[/]")
        if dashboard or dashboard_address is not None:
            host, port = parse_address(dashboard_address or "")
            served = closing.enter_context(Dashboard(monitor, host=host, port=port, token=os.environ.get(TOKEN_VARIABLE)))
            screen.print(f"dashboard: {served.url}", soft_wrap=True)
        view = contextlib.nullcontext() if quiet or json_output else live_view(monitor, screen)
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


def _replay(
    screen: Console,
    bundle: Bundle,
    path: Path,
    backend: str,
    precision: RunPrecision | None,
    options: BackendOptions,
    json_output: bool,
) -> None:
    record = read_record(path)
    if record.run.bundle_digest != bundle.manifest.digest:
        raise StreamError(f"{path} was decoded with another bundle ({record.run.bundle}).", "Name that bundle.")
    # What was late then is decoded now, and not compared; whole windows give the bits that new samples alone gave.
    config = dataclasses.replace(record.run.config, late="queue", roll=False)
    precision = precision or record.run.precision
    with load(bundle, backend=backend, precision=precision, check_unit=False, options=options) as predict:
        decoder = Decoder(predict, RecordSource(record), config)
        again = {decision.index: decision.prediction for decision in decoder}
    missing = [index for index in record.decisions if index not in again]
    differ = [i for i, made in again.items() if i in record.decisions and made.tobytes() != record.decisions[i].tobytes()]
    screen.print(
        f"{len(record.decisions)} decisions on {decoder.counters.samples} samples decoded again with {backend}: "
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
        ages = {f"p{q:g}": shot.percentile("age", q) for q in (50.0, 99.0)} | {"max": shot.age_max}
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
