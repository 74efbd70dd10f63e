"""Collects what a decision layer is fitted on: outputs of a model with the classes that are true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.pauses import segments_of, time_of
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


def class_of_events(class_names: Sequence[str], events: Mapping[str, str]) -> dict[str, int]:
    """Return the number of the class of each annotation: those named in `events` (class to annotation), else the class's own.

    Raises
    ------
    DecisionError
        If `events` names a class that is none.
    """
    if unknown := [name for name in events if name not in class_names]:
        raise DecisionError(f"{unknown[0]!r} is no class; the classes are {listed(class_names)}.", "Mend --events.")
    return {events.get(name, name): i for i, name in enumerate(class_names)}


def event_windows(
    raw: Any,
    spec: ModelSpec,
    number_of: Mapping[str, int],
    predict: Predict,
    *,
    tmin: float = 0.0,
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
    number_of : mapping of str to int
        Annotations that are events, and the number of their class.
    predict : callable
        Returns the outputs of windows.
    tmin : float
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
    onsets, labels, _ = events_of(raw, number_of, name)
    starts, whole = fitted.place_windows(onsets, tmin)
    if not whole.any():
        raise DecisionError(f"No event of {name} has a whole window in the recording.", "Check --tmin.")
    starts, labels = starts[whole], labels[whole]
    return CalibrationData(
        outputs=predict(fitted.cut(starts)).astype(np.float64),
        labels=labels,
        targets=None,
        times=fitted.times(starts + spec.n_times - 1),
        events=np.arange(len(starts)),
        recordings=np.zeros(len(starts), np.intp),
        flags=((),) * len(starts),
        minutes=fitted.data.shape[1] / fitted.sfreq / 60,
        names=(name,),
    )


def events_of(
    raw: Any, number_of: Mapping[str, int], name: str
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.float64]]:
    """Return onset in seconds of the recording's own time, number of the class, and duration of the events, in order of time.

    Raises
    ------
    DecisionError
        If the recording has no such annotation.
    """
    marks = raw.annotations
    kept = np.array([str(each) in number_of for each in marks.description], np.bool_)
    if not kept.any():
        there = sorted({str(each) for each in marks.description})
        raise DecisionError(
            f"{name} has no events {listed(sorted(number_of))}; its annotations are {listed(there) or 'none'}.",
            "Name the annotation of each class with --events CLASS=ANNOTATION,...",
        )
    onsets = time_of(marks.onset[kept] - raw.first_time, segments_of(raw), raw.info["sfreq"])
    labels = np.array([number_of[str(each)] for each in marks.description[kept]], np.intp)
    order = np.argsort(onsets, kind="stable")
    return onsets[order], labels[order], np.asarray(marks.duration[kept], np.float64)[order]
