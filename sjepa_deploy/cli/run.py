"""``sjepa-run`` decodes a recording."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click
import numpy as np
from numpy.typing import NDArray
from rich.markup import escape

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, options, print_json, task
from sjepa_deploy.cli.progress import Steps, progress
from sjepa_deploy.cli.task import EventChoice
from sjepa_deploy.eeg.epochs import holds_windows, read_windows
from sjepa_deploy.eeg.events import Events
from sjepa_deploy.eeg.names import parse_rename
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.eeg.stretches import FittedStretches, fit_stretches
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.files import written_whole
from sjepa_deploy.runtime.backend import FloatArray
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Cut(EventChoice):
    """Says which windows of a recording are decoded.

    Attributes
    ----------
    hop : float or None
        Seconds from one window to the next.
    """

    hop: float | None
    classes: tuple[str, ...] | None = None
    column: str | None = None

    def step(self, spec: ModelSpec) -> int:
        """Return the samples from one window to the next."""
        if self.hop is not None:
            return _samples(self.hop, spec)
        task.refuse_sliding(spec, "Decode them with --events NAME,.. (or all, or FILE.tsv).")
        return spec.n_times


@dataclass(frozen=True, kw_only=True, eq=False)
class _Decodable:
    """Holds the windows to decode, and the columns of the table that stand before the predictions.

    `batches` reads windows, at most so many at once. `columns` returns the cells of some of them. `changes` tells what reading
    has shown so far. `what` says where the windows lie, and `hop` is the time in seconds from one to the next where they follow
    each other.
    """

    n: int
    batches: Callable[[int], Iterator[FloatArray]]
    columns: Callable[[slice], Mapping[str, Sequence[str]]]
    told: list[str]
    steps: tuple[str, ...]
    changes: Callable[[], tuple[str, ...]] = tuple
    what: str = ""
    hop: float | None = None


@options.command
@options.bundle
@click.argument("recording", type=options.path)
@options.out_file
@options.force
@options.fills(
    "cut",
    Cut,
    click.option("--hop", type=float, help="Seconds from one window to the next.  [default: one window]"),
    task.which,
    task.tmin,
    title="Windows",
)
@options.signal_facts
@options.section(options.SIGNAL, options.interpolate, options.check_unit)
@options.backend_choice()
@options.json_output
def run(
    bundle: Path,
    recording: Path,
    *,
    out: Path | None,
    force: bool,
    cut: Cut,
    interpolate: float | None,
    check_unit: bool,
    facts: options.SignalFacts,
    choice: options.BackendChoice,
    json_output: bool,
) -> None:
    """Decode RECORDING with BUNDLE into a table of time and prediction.

    The table is tab-separated. Without --out it goes to standard output. The recording goes through the steps of the bundle's
    signal, in the phase that the model learned from. No window reaches over a pause.

    With --events each row is an event: its onset in seconds, its description, its own columns, the prediction and, of a
    classifier, the class. Without it each row is a window: the time of its last sample in seconds from the start of the
    recording, and the prediction. Of windows that are cut already (*-epo.fif, or an array of windows) each gives a row.
    """
    out = None if out == options.STDOUT else out
    if json_output and out is None:
        raise click.UsageError("--json needs --out: standard output cannot hold both.")
    options.check_file(out, force=force)
    if cut.events and cut.hop is not None:
        raise click.UsageError("--events and --hop contradict each other: a window belongs to its event.")
    if cut.tmin is not None and not cut.events:
        raise click.UsageError("--tmin is the place of windows after events. Name these with --events.")
    screen = console(json_output or out is None)
    opened = Bundle.open(bundle)
    spec = opened.spec
    if holds_windows(recording):
        found = _cut_before(recording, spec, cut, facts, check_unit=check_unit)
    else:
        start, step = (cut.start(spec), 0) if cut.events else (0.0, cut.step(spec))
        raw = read_recording(
            recording,
            sfreq=facts.sfreq,
            unit=facts.unit,
            ch_names=facts.ch_names,
            row_names=spec.ch_names,
            rename=parse_rename(facts.rename, RecordingError),
            preload=False,
        )
        events = cut.find(raw) if cut.events else None
        fitted = fit_stretches(raw, spec.signal, interpolate=interpolate or 0.0, check_unit=check_unit)
        found = _of_events(fitted, events, start) if events is not None else _one_after_the_other(fitted, step)
        found.told.insert(0, f"has {fitted.n_found} of the model's {spec.n_chans} channels")
    with choice.load(opened, check_unit=False) as predict:  # the recording was judged as a whole
        if cut.hop is not None:
            task.tell_sliding(screen, spec)
        for note in found.told:
            screen.print(f"recording: {escape(note)}", soft_wrap=True)
        try:
            with (
                contextlib.nullcontext(sys.stdout) if out is None else _whole_file(out) as stream,
                progress("decoding windows", total=found.n) as steps,
            ):
                _decode(stream, found, predict, steps, with_class=bool(cut.events))
        except BrokenPipeError:
            raise  # click ends quietly where a reader like `head` has seen enough
        except OSError as e:
            raise RecordingError(
                f"{out or 'Standard output'} cannot be written ({e.strerror}).", "Choose another --out, or free some space."
            ) from e
    for note in found.changes():
        screen.print(f"recording: {escape(note)}", soft_wrap=True)
    if opened.manifest.weights.random:
        screen.print("[bold yellow]The weights of this bundle are random: the predictions mean nothing.[/]")
    where = "" if out is None else f" in [bold]{escape(str(out))}[/]"
    what = f"windows of {spec.signal.seconds:g} s{found.what}"
    screen.print(f"outputs: {escape(spec.outputs_told)}", soft_wrap=True)
    screen.print(f"[bold green]decoded:[/] {found.n} {what}{where}", soft_wrap=True)
    if json_output:
        print_json(
            {
                "bundle": str(bundle),
                "recording": str(recording),
                "out": str(out),
                "n_windows": found.n,
                "hop": found.hop,
                "events": cut.events,
                "signal": spec.signal,
                "task": spec.task,
                "outputs": spec.output_names,
                "class_names": spec.class_names,
                "output_unit": spec.output_unit,
                "steps": (*found.steps, *found.changes()),
                "random_weights": opened.manifest.weights.random,
            }
        )


def _cut_before(recording: Path, spec: ModelSpec, cut: Cut, facts: options.SignalFacts, *, check_unit: bool) -> _Decodable:
    """Return windows that were cut before; of Epochs with --events, the chosen ones at the model's place."""
    if cut.hop is not None:
        raise click.UsageError(f"{recording.name} holds windows, which are decoded as they are. Leave out --hop.")
    tmin = cut.start(spec) if cut.events or spec.signal.event_window is not None else None
    windows = read_windows(recording, spec.signal, unit=facts.unit, tmin=tmin, check_unit=check_unit)
    eeg = windows.eeg
    columns: Callable[[slice], Mapping[str, Sequence[str]]] = lambda rows: {"time": _seconds(windows.times[rows])}  # noqa: E731
    if cut.events:
        if windows.events is None:
            raise click.UsageError(f"{recording.name} holds windows without events. Leave out --events.")
        names = windows.events.named(cut.events).description
        kept = np.flatnonzero([name in names for name in windows.events.description])
        eeg, columns = eeg[kept], _of(windows.events[kept])
    return _Decodable(
        n=len(eeg),
        batches=lambda n: (eeg[i : i + n] for i in range(0, len(eeg), n)),
        columns=columns,
        told=[*windows.steps],
        steps=windows.steps,
        what=" of events" if cut.events else "",
    )


def _one_after_the_other(fitted: FittedStretches, step: int) -> _Decodable:
    starts = fitted.window_starts(step)
    return _Decodable(
        n=len(starts),
        batches=lambda n: fitted.cut(starts, n),
        columns=lambda rows: {"time": _seconds(fitted.times(starts[rows] + fitted.signal.n_times - 1))},
        told=[*fitted.steps, *_settling(fitted, starts)],
        steps=fitted.steps,
        changes=lambda: fitted.changes.told,
        what=f" every {step / fitted.sfreq:g} s",
        hop=step / fitted.sfreq,
    )


def _of_events(fitted: FittedStretches, events: Events, start: float) -> _Decodable:
    starts, whole = fitted.place_windows(events.onset, start)
    if not whole.any():
        raise RecordingError(
            f"No window at {start:g} s after an event lies within the recording or within one of its stretches.",
            "Mend the onsets or --tmin, or give a longer recording.",
        )
    starts = starts[whole]
    told = [*fitted.steps, *_settling(fitted, starts)]
    if n := int((~whole).sum()):
        told.append(f"left out {n} of {len(whole)} events: their windows reach beyond the recording or over a pause")
    return _Decodable(
        n=len(starts),
        batches=lambda n: fitted.cut(starts, n),
        columns=_of(events[whole]),
        told=told,
        steps=fitted.steps,
        changes=lambda: fitted.changes.told,
        what=f" at {start:g} s after events",
    )


def _settling(fitted: FittedStretches, starts: NDArray[np.intp]) -> list[str]:
    n, seconds = int(fitted.settling(starts).sum()), fitted.n_settling / fitted.sfreq
    return [f"{n} windows begin in the {seconds:.2g} s in which the steps settle"] if n else []


def _of(events: Events) -> Callable[[slice], Mapping[str, Sequence[str]]]:
    columns: dict[str, Sequence[str]] = {"onset": _seconds(events.onset), "description": events.description}
    columns |= {name: values for name, values in events.columns.items() if name not in columns}
    return lambda rows: {name: values[rows] for name, values in columns.items()}


def _seconds(values: NDArray[np.float64]) -> list[str]:
    return [f"{value:.6f}" for value in values]


def _samples(hop: float, spec: ModelSpec) -> int:
    if not 0.5 < hop * spec.sfreq < 2**31:
        seconds = 1 / spec.sfreq
        raise click.UsageError(f"--hop is {hop:g} s, a sample of this model {seconds:g} s: use {seconds:g} or more.")
    return round(hop * spec.sfreq)


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[IO[str]]:
    """Open `path` for writing. A file is written whole or not at all; devices and pipes are written as they are."""
    if path.exists() and not path.is_file():
        with path.open("w", newline="") as stream:
            yield stream
        return
    with written_whole(path.resolve()) as partial, partial.open("w", newline="") as stream:
        yield stream


def _decode(stream: IO[str], found: _Decodable, predict: Predictor, steps: Steps, *, with_class: bool) -> None:
    """Decode all windows, and write their rows as they come."""
    spec, n_done = predict.spec, 0
    with_class &= spec.task == "classification"
    stream.write("\t".join([*found.columns(slice(0)), *spec.output_names, *(["class"] if with_class else [])]) + "\n")
    for windows in found.batches(predict.max_batch):
        columns = found.columns(slice(n_done, n_done + len(windows)))
        _write(stream, columns, predict.predict(windows), spec, with_class=with_class)
        n_done += len(windows)
        steps.at(done=n_done)
    assert n_done == found.n
    stream.flush()


def _write(
    stream: IO[str], columns: Mapping[str, Sequence[str]], outputs: FloatArray, spec: ModelSpec, *, with_class: bool
) -> None:
    """Write one row for each window: what is known of it, its outputs and its class."""
    rows = outputs.reshape(len(outputs), -1)
    cells = [*columns.values(), *([f"{value:.9g}" for value in column] for column in rows.T)]
    if with_class:
        cells.append([spec.class_of(row.tolist()) for row in rows])
    for row in zip(*cells, strict=True):
        stream.write("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row) + "\n")


main = entry("run")
