"""Holds what commands share that need labelled events: how events of a recording are chosen, and the gate of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import options
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.eeg.events import ALL, Events, events_of, read_events
from sjepa_deploy.eeg.names import parse_rename
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.errors import DecisionError, ParityError, RecordingError
from sjepa_deploy.evaluation.seen import warn_if_seen
from sjepa_deploy.evaluation.task import DIFFERS, TaskParity, check_task, labels_of, write_task
from sjepa_deploy.runtime.decisions.data import CalibrationData, LabelledEvents, Predict, event_windows, labelled, read_npz
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.spec import ModelSpec

if TYPE_CHECKING:
    import mne


@dataclass(frozen=True, kw_only=True)
class EventChoice:
    """Says which events of a recording are decoded, and what they are labelled with.

    Attributes
    ----------
    events : tuple of str
        Descriptions of events, `ALL`, or the path of one table of events; empty where none are decoded.
    tmin : float or None
        Start of the windows in seconds after their events; None is the model's.
    classes : tuple of str
        "CLASS=EVENT" for events that are not called like their class.
    column : str or None
        Column of the events that holds the class or the number.
    trial_starts : tuple of str
        Events that begin a trial, whose evidence a decision layer adds up. Empty: each event is a trial.
    """

    events: tuple[str, ...]
    tmin: float | None
    classes: tuple[str, ...] | None
    column: str | None
    trial_starts: tuple[str, ...] = ()

    @property
    def table(self) -> Path | None:
        """Return the path of the table of events; None where events are named."""
        return Path(self.events[0]) if len(self.events) == 1 and self.events[0].endswith(".tsv") else None

    def find(self, raw: mne.io.BaseRaw) -> Events:
        """Return the chosen events of a recording."""
        if self.table is not None:
            return read_events(self.table).named((ALL,))
        return events_of(raw).named(self.events)

    def label(self, raw: mne.io.BaseRaw, spec: ModelSpec, class_names: Sequence[str] | None) -> LabelledEvents:
        """Return the chosen events of a recording with their classes; without a choice, those that are of a class."""
        events = self.find(raw) if self.events else events_of(raw)
        named = spec.replace(class_names=tuple(class_names)) if class_names is not None else spec
        labels = labels_of(events, named, classes=self.class_of, column=self.column)
        if labels is None and class_names is None:
            raise DecisionError(
                "Nothing tells the number of each event.", "Name the --column of the events' table that holds it."
            )
        known = list(events.description) if labels is None else labels
        trials = None
        if self.trial_starts:
            every = events if self.table is not None else events_of(raw)
            begins = every.named(self.trial_starts).onset
            trials = np.searchsorted(begins, events.onset, side="right") - 1
        return labelled(events, known, class_names, all_of_them=bool(self.events) and trials is None, trials=trials)

    def start(self, spec: ModelSpec) -> float:
        """Return the start of the windows in seconds after their events."""
        if self.tmin is not None:
            return self.tmin
        if spec.signal.event_window is None:
            raise click.UsageError(
                "The bundle does not say where its windows lie after events. Name their start with --tmin, in seconds."
            )
        return spec.signal.event_window.start

    @property
    def class_of(self) -> dict[str, str]:
        """Return the class of each event that is not called like its class."""
        pairs = [text.split("=", 1) for text in self.classes or ()]
        if wrong := [pair[0] for pair in pairs if len(pair) < 2 or not all(part.strip() for part in pair)]:
            raise click.UsageError(f"--classes has {wrong[0]!r}, which is no CLASS=EVENT. Write for example LEFT=T1,RIGHT=T2.")
        return {event.strip(): name.strip() for name, event in pairs}


def _learned_at_events(spec: ModelSpec) -> str | None:
    """Return a sentence on the events that a model learned from; None where it learned from other windows."""
    if (window := spec.signal.event_window) is None:
        return None
    which = f" ({', '.join(window.events)})" if window.events else ""
    return f"The model learned from windows at {window.start:g} s after events{which}."


def refuse_sliding(spec: ModelSpec, mend: str) -> None:
    """Refuse windows that slide over a recording, which nobody asked for, where the model learned from windows at events."""
    if (learned := _learned_at_events(spec)) is not None:
        raise click.UsageError(
            f"{learned} {mend} Windows that slide over the recording (--hop SECONDS) show it signals that it never saw."
        )


def tell_sliding(screen: Console, spec: ModelSpec) -> None:
    """Tell on windows that slide, which somebody asked for, where the model learned from windows at events."""
    if (learned := _learned_at_events(spec)) is not None:
        screen.print(f"[bold yellow]{escape(learned)}[/] Windows that slide show it other signals too.", soft_wrap=True)


which = options.several("-e", "--events", help="Decode the window of each event: names of events, all, or a table FILE.tsv.")
tmin = click.option(
    "--tmin", type=float, help="Start of a window in seconds after its event; may be negative.  [default: the model's]"
)
trial_starts = click.option(
    "--trial-starts",
    type=options.Names(),
    default=(),
    metavar="NAME,...",
    help="Events that begin a trial, for a decision layer that adds up the events of a trial.",
)
labels = options.added(
    click.option(
        "--classes", type=options.Names(), metavar="CLASS=EVENT,...", help="Class of events that are not called like it."
    ),
    click.option("--column", help="Column of the events' table that holds the class or the number."),
)


def read_task(
    recording: Path, choice: EventChoice, spec: ModelSpec, facts: options.SignalFacts
) -> tuple[mne.io.BaseRaw, Events, list[str] | None]:
    """Read a recording, and return it with the chosen events and the label of each event, where something tells."""
    choice.start(spec)  # before the recording is read
    raw = read_source(recording, spec, facts)
    events = choice.find(raw)
    return raw, events, labels_of(events, spec, classes=choice.class_of, column=choice.column)


def read_source(recording: Path, spec: ModelSpec, facts: options.SignalFacts) -> mne.io.BaseRaw:
    """Read a recording with what the user says of it."""
    return read_recording(
        recording,
        sfreq=facts.sfreq,
        unit=facts.unit,
        ch_names=facts.ch_names,
        row_names=spec.ch_names,
        rename=parse_rename(facts.rename, RecordingError),
    )


def read_trials(
    bundle: Bundle,
    source: Path,
    spec: ModelSpec,
    class_names: Sequence[str] | None,
    predict: Predict,
    choice: EventChoice,
    facts: options.SignalFacts,
    *,
    check_unit: bool,
) -> CalibrationData:
    """Return what `predict` makes of one window an event, with the label of each, from a recording or an ``.npz`` file."""
    if source.suffix == ".npz":
        return read_npz(source, spec, class_names, predict)
    start = choice.start(spec)
    raw = read_source(source, spec, facts)
    warn_if_seen(bundle, raw, source.name)
    events = choice.label(raw, spec, class_names)
    return event_windows(raw, spec, events, predict, start=start, name=source.name, check_unit=check_unit)


def judge_task(
    screen: Console,
    predict: Predictor,
    recording: Path,
    choice: EventChoice,
    facts: options.SignalFacts,
    *,
    interpolate: float,
    check_unit: bool,
) -> TaskParity:
    """Decode events three ways, print the result, and write it into the bundle."""
    raw, events, known = read_task(recording, choice, predict.spec, facts)
    warn_if_seen(predict.bundle, raw, recording.name)
    with progress(f"decoding the events of {recording.name} three ways"):
        result = check_task(
            predict,
            raw,
            events,
            recording=recording.name,
            start=choice.start(predict.spec),
            labels=known,
            interpolate=interpolate,
            check_unit=check_unit,
        )
    print_task(screen, result)
    file = write_task(predict.bundle, result)
    screen.print(f"written: {escape(str(file))}", soft_wrap=True)
    return result


def require_passed(result: TaskParity) -> None:
    """Refuse a live decoder that does not decide as the model did.

    Raises
    ------
    ParityError
        If the task is not passed.
    """
    if not result.passed:
        mend = "Train on causal windows (--phase causal)." if result.phase == "zero-phase" else "Compare the steps of training."
        raise ParityError(f"The live decoder does not decide as the model did on {result.recording}.", mend)


def print_task(screen: Console, result: TaskParity) -> None:
    """Print the decisions and scores of the three ways."""
    title = f"{result.n_events} events of {result.recording}, {result.phase} model on {result.backend}"
    table = Table(title=title, title_justify="left")
    table.add_column("way")
    table.add_column("other decisions", justify="right")
    if result.metric:
        table.add_column(result.metric.replace("_", " "), justify="right")
        table.add_column("95 % interval")
    for way in result.ways:
        score = [] if way.score is None else [f"{way.score.value:.3f}", f"{way.score.low:.3f} to {way.score.high:.3f}"]
        table.add_row(way.name, "" if way.name == "PyTorch" else f"{way.differ:.1%}", *score)
    screen.print(table)
    if not result.metric:
        screen.print("The events have no labels of the model: decisions are compared, not scores (--classes, --column).")
    if result.loss is not None:
        loss = result.loss
        screen.print(f"live less PyTorch: {loss.value:+.3f} ({loss.low:+.3f} to {loss.high:+.3f})")
    if result.metric == "r2" or not result.metric:
        screen.print(f"Numbers count as other decisions from {DIFFERS:g} of their spread on.")
    bits = "all" if result.identical == 1 else f"{result.identical:.1%}"
    screen.print(f"live windows with the bits of the offline run of the causal steps: {bits}")
    if result.settling:
        screen.print(f"{result.settling} windows begin where the steps still settle.")
    if result.left_out:
        screen.print(f"{result.left_out} events were left out: their windows reach beyond the recording or over a pause.")
    for reason in result.reasons:
        screen.print(f"[bold red]why:[/] {escape(reason)}", soft_wrap=True)
