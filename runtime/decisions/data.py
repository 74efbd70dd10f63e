"""Collects what a decision layer is fitted on: outputs of a model with the classes that are true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.events import Events
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.errors import DecisionError, listed
from sjepa_deploy.parity import UNREADABLE_NPZ
from sjepa_deploy.spec import ModelSpec

NO_EVENT, BETWEEN = -1, -2
"""Labels of windows that lie in no event, and of those that lie too little in one: decisions at the latter do not count."""

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Returns the outputs of windows, shape (n_windows, n_outputs), e.g. `sjepa_deploy.runtime.predictor.Predictor.predict`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationData:
    """Holds outputs of a model with the truth. Windows of a recording follow each other in time.

    Attributes
    ----------
    outputs : ndarray of float64, shape (n_windows, n_outputs)
        Outputs of the model.
    labels : ndarray of int, shape (n_windows,)
        Number of the true class, or `NO_EVENT`, or `BETWEEN`. Of a regression zeros.
    targets : ndarray of float64, shape (n_windows,), or None
        True numbers of a regression.
    times : ndarray of float64, shape (n_windows,)
        Time of the newest sample of each window in seconds.
    events : ndarray of int, shape (n_windows,)
        Number of the event that a window belongs to, `NO_EVENT` for none.
    recordings : ndarray of int, shape (n_windows,)
        Number of the recording of each window.
    flags : tuple of tuple of str, length n_windows
        Flags of each window, see `sjepa_deploy.runtime.live.decision.Decision.flags`.
    minutes : float
        Minutes of signal that the windows come from.
    names : tuple of str
        Names of the recordings.
    hop : float or None
        Seconds from one window to the next. None: one window, or a few, an event.
    """

    outputs: NDArray[np.float64]
    labels: NDArray[np.intp]
    targets: NDArray[np.float64] | None
    times: NDArray[np.float64]
    events: NDArray[np.intp]
    recordings: NDArray[np.intp]
    flags: tuple[tuple[str, ...], ...]
    minutes: float
    names: tuple[str, ...]
    hop: float | None = None

    def __post_init__(self) -> None:
        n = len(self.outputs)
        assert n == len(self.labels) == len(self.times) == len(self.events) == len(self.recordings) == len(self.flags)

    def __len__(self) -> int:
        return len(self.outputs)

    def picked(self, rows: NDArray[np.bool_]) -> CalibrationData:
        """Return the windows of a mask. The minutes are shared out by their number."""
        return CalibrationData(
            outputs=self.outputs[rows],
            labels=self.labels[rows],
            targets=None if self.targets is None else self.targets[rows],
            times=self.times[rows],
            events=self.events[rows],
            recordings=self.recordings[rows],
            flags=tuple(flags for flags, kept in zip(self.flags, rows.tolist(), strict=True) if kept),
            minutes=self.minutes * float(rows.mean()),
            names=self.names,
            hop=self.hop,
        )


def joined(parts: Sequence[CalibrationData]) -> CalibrationData:
    """Return the data of several recordings as one. Events and recordings get new numbers."""
    first = parts[0]
    if any(part.hop != first.hop or (part.targets is None) != (first.targets is None) for part in parts):
        raise DecisionError("Windows at events and windows of a stream do not go together.", "Fit on one kind.")
    events, recordings, n_events, n_recordings = [], [], 0, 0
    for part in parts:
        events.append(np.where(part.events >= 0, part.events + n_events, part.events))
        recordings.append(part.recordings + n_recordings)
        n_events += int(part.events.max(initial=-1)) + 1
        n_recordings += int(part.recordings.max(initial=-1)) + 1

    def together(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    return CalibrationData(
        outputs=together("outputs"),
        labels=together("labels"),
        targets=None if first.targets is None else together("targets"),
        times=together("times"),
        events=np.concatenate(events),
        recordings=np.concatenate(recordings),
        flags=tuple(flags for part in parts for flags in part.flags),
        minutes=sum(part.minutes for part in parts),
        names=tuple(name for part in parts for name in part.names),
        hop=first.hop,
    )


def read_npz(path: Path, spec: ModelSpec, class_names: Sequence[str] | None, predict: Predict) -> CalibrationData:
    """Read windows or outputs with labels from an .npz file.

    The file holds ``outputs`` of shape (n, n_outputs), or ``eeg`` of shape (n, n_chans, n_times) in the model's unit; for
    classes ``labels`` of shape (n,), names or numbers ("" and -1 are windows without an event), for a regression ``targets``.
    It may hold ``times`` in seconds, ``event`` and ``recording`` (numbers that windows share), ``hop`` in seconds of windows
    that follow each other as in a stream, and ``minutes`` of signal.

    Raises
    ------
    DecisionError
        If arrays are missing, of another shape or not finite, or a label is no class.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except UNREADABLE_NPZ as e:
        raise DecisionError(f"{path.name} cannot be read ({e}).", "Save it with numpy.savez, strings as str arrays.") from e
    truth = "targets" if class_names is None else "labels"
    if truth not in arrays or not {"outputs", "eeg"} & set(arrays):
        raise DecisionError(f"{path.name} holds {listed(sorted(arrays)) or 'nothing'}.", f"Save outputs or eeg, and {truth}.")
    n = len(arrays[truth])
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("labels", "targets", "times", "event", "recording"), (n,))
    shapes |= {"outputs": (n, spec.n_outputs), "eeg": (n, *spec.input_shape), "hop": (), "minutes": ()}
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise DecisionError(f"{path.name} has {name} of shape {arrays[name].shape}, not {shape}.", "Save it in that shape.")
        words = name in ("labels", "recording")
        if name in arrays and (arrays[name].dtype.kind not in ("fiuU" if words else "fiu")):
            raise DecisionError(f"{name} of {path.name} has the type {arrays[name].dtype}.", "Save real numbers.")
        if name in arrays and arrays[name].dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            raise DecisionError(f"{name} of {path.name} holds numbers that are not finite.", "Leave these windows out.")
    outputs = arrays["outputs"] if "outputs" in arrays else predict(np.ascontiguousarray(arrays["eeg"], np.float32))
    labels = np.zeros(n, np.intp) if class_names is None else _numbers(arrays["labels"], class_names, path.name)
    hop = float(arrays["hop"]) if "hop" in arrays else None
    times = np.asarray(arrays.get("times", np.arange(n) * (hop or spec.n_times / spec.sfreq)), np.float64)
    alone = np.where(labels >= 0, np.arange(n), NO_EVENT)
    recording = np.unique(arrays["recording"], return_inverse=True)[1] if "recording" in arrays else np.zeros(n, np.intp)
    whole = float(np.ptp(times)) / 60 if n else 0.0
    return CalibrationData(
        outputs=np.asarray(outputs, np.float64),
        labels=labels,
        targets=np.asarray(arrays["targets"], np.float64) if class_names is None else None,
        times=times,
        events=np.asarray(arrays["event"], np.intp) if "event" in arrays else alone,
        recordings=recording.astype(np.intp),
        flags=((),) * n,
        minutes=float(arrays["minutes"]) if "minutes" in arrays else whole,
        names=(path.name,),
        hop=hop,
    )


def _numbers(labels: NDArray[Any], class_names: Sequence[str], where: str) -> NDArray[np.intp]:
    """Return labels as numbers of classes."""
    if labels.dtype.kind != "U":
        if len(labels) and not (labels.min() >= NO_EVENT and labels.max() < len(class_names)):
            raise DecisionError(f"{where} has labels outside 0 to {len(class_names) - 1}.", "Number the classes from 0 on.")
        return labels.astype(np.intp)
    known = {name: i for i, name in enumerate(class_names)} | {"": NO_EVENT}
    if strange := sorted(set(labels.tolist()) - set(known)):
        raise DecisionError(
            f"{where} has the labels {listed(strange)}; the classes are {listed(class_names)}.", "Mend the labels."
        )
    return np.array([known[name] for name in labels.tolist()], np.intp)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledEvents:
    """Holds events of a recording with the truth.

    Attributes
    ----------
    onset : ndarray of float64, shape (n_events,)
        Seconds of the recording's own time, in rising order.
    duration : ndarray of float64, shape (n_events,)
        Seconds.
    labels : ndarray of int, shape (n_events,)
        Number of the class; of a regression zeros.
    targets : ndarray of float64, shape (n_events,), or None
        Number of each event, of a regression.
    trials : ndarray of int, shape (n_events,), or None
        Trial of each event. None: each event is a trial.
    """

    onset: NDArray[np.float64]
    duration: NDArray[np.float64]
    labels: NDArray[np.intp]
    targets: NDArray[np.float64] | None
    trials: NDArray[np.intp] | None = None


def labelled(
    events: Events,
    labels: Sequence[str],
    class_names: Sequence[str] | None,
    *,
    all_of_them: bool,
    trials: NDArray[np.intp] | None = None,
) -> LabelledEvents:
    """Return events with their classes or numbers.

    Parameters
    ----------
    events : Events
        The events.
    labels : sequence of str
        Class or number of each event.
    class_names : sequence of str or None
        Classes of the layer; None for a regression.
    all_of_them : bool
        Whether events of other classes are an error. Otherwise they are left out.
    trials : ndarray of int, shape (n_events,), or None
        Trial of each event, negative for events before the first one, which are left out. None: each event is a trial.

    Raises
    ------
    DecisionError
        If no event is of a class, or an event of no class is there with `all_of_them`, or a label is no number, or the events of
        a trial are of several classes.
    """
    kept = np.array([class_names is None or label in class_names for label in labels], np.bool_)
    if class_names is not None and (not kept.any() or (all_of_them and not kept.all())):
        raise DecisionError(
            f"There are events of {listed(sorted(set(labels))) or 'nothing'}; the classes are {listed(class_names)}.",
            "Say which event is of which class with --classes CLASS=EVENT,...",
        )
    if trials is not None:
        kept &= trials >= 0
    durations = events.columns.get("duration", ("0",) * len(events))
    targets = None
    try:
        duration = np.array([float(each) for each in durations])[kept]
        if class_names is None:
            targets = np.array([float(label) for label in labels])
    except ValueError as e:
        raise DecisionError(f"A duration or a label of an event is no number ({e}).", "Name another --column.") from e
    numbers = [
        0 if class_names is None else class_names.index(label) for label, ok in zip(labels, kept.tolist(), strict=True) if ok
    ]
    if trials is not None:
        trials = trials[kept]
        if len(trials) == 0:
            raise DecisionError("No event comes after one that begins a trial.", "Name other --trial-starts.")
        pairs = set(zip(trials.tolist(), numbers, strict=True))
        if len({trial for trial, _ in pairs}) < len(pairs):
            raise DecisionError(
                "A trial has events of several classes, whose evidence cannot be added up.",
                "Name the events that begin a trial of one class with --trial-starts.",
            )
    return LabelledEvents(
        onset=events.onset[kept], duration=duration, labels=np.array(numbers, np.intp), targets=targets, trials=trials
    )


def event_windows(
    raw: Any,
    spec: ModelSpec,
    events: LabelledEvents,
    predict: Predict,
    *,
    start: float,
    name: str = "recording",
    check_unit: bool = True,
) -> CalibrationData:
    """Decode one window an event of a recording, through the causal steps that run live.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording, see `sjepa_deploy.eeg.recording.read_recording`.
    spec : ModelSpec
        The model.
    events : LabelledEvents
        The events.
    predict : callable
        Returns the outputs of windows.
    start : float
        Start of the window in seconds after its event.
    name : str
        Name of the recording.
    check_unit : bool
        Whether amplitudes that no EEG has are refused.

    Raises
    ------
    RecordingError
        If the recording does not fit the model.
    DecisionError
        If no event has a whole window.
    """
    fitted = fit_recording(raw, spec.signal, check_unit=check_unit, phase="causal")
    starts, whole = fitted.place_windows(events.onset, start)
    if not whole.any():
        raise DecisionError(f"No event of {name} has a whole window in the recording.", "Check --tmin.")
    starts = starts[whole]
    return CalibrationData(
        outputs=predict(fitted.cut(starts)).astype(np.float64),
        labels=events.labels[whole],
        targets=None if events.targets is None else events.targets[whole],
        times=fitted.times(starts + spec.n_times - 1),
        events=np.arange(len(starts))
        if events.trials is None
        else np.unique(events.trials[whole], return_inverse=True)[1].astype(np.intp),
        recordings=np.zeros(len(starts), np.intp),
        flags=((),) * len(starts),
        minutes=fitted.data.shape[1] / fitted.sfreq / 60,
        names=(name,),
    )
