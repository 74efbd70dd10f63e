"""Evaluates a bundle on recordings with events: offline, through the live path with its decision layer, and on other backends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.errors import DataError
from sjepa_deploy.evaluation.continuous import on_stream
from sjepa_deploy.evaluation.folder import finished, others_of
from sjepa_deploy.evaluation.predictions import UNDECIDED, Predictions, Way, joined, of_outputs
from sjepa_deploy.evaluation.report import Examples
from sjepa_deploy.evaluation.results import Continuous, EvaluationReport, agreement
from sjepa_deploy.evaluation.seen import warn_if_seen
from sjepa_deploy.evaluation.task import live_windows
from sjepa_deploy.runtime.decisions.data import LabelledEvents
from sjepa_deploy.runtime.decisions.data import joined as joined_data
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.live.calibration import stream_time, stream_windows
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.open_source import SourceOptions
from sjepa_deploy.runtime.predictor import Predictor

if TYPE_CHECKING:
    import mne


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledRecording:
    """Holds a recording with the truth about its events.

    Attributes
    ----------
    path : Path
        File of the recording.
    name : str
        Name in tables.
    raw : mne.io.BaseRaw
        The recording in volts.
    events : LabelledEvents
        Events with their classes or numbers.
    """

    path: Path
    name: str
    raw: mne.io.BaseRaw
    events: LabelledEvents

    def entity(self, key: str, otherwise: str) -> str:
        """Return an entity of the BIDS name of the file, such as "sub"."""
        found = re.search(rf"(?:^|_){key}-([^_.]+)", self.path.name)
        return otherwise if found is None else found[1]


@dataclass(frozen=True, kw_only=True)
class How:
    """Says how a bundle is evaluated.

    Attributes
    ----------
    name : str
        Name of the model in tables.
    start : float
        Start of the windows in seconds after their events.
    live : bool
        Whether recordings are decoded through the live path too.
    hop : float or None
        Seconds between windows of a stream that is decoded as well; None decodes events alone.
    interpolate : float
        Largest share of the channels that are made from the others.
    check_unit : bool
        Whether amplitudes that no EEG has are refused.
    source : SourceOptions
        What recordings do not say themselves.
    """

    name: str
    start: float
    live: bool
    hop: float | None
    interpolate: float
    check_unit: bool
    source: SourceOptions


def evaluate_bundle(
    predict: Predictor,
    recordings: Iterable[LabelledRecording],
    folder: Path,
    how: How,
    *,
    layer: DecisionLayer | None = None,
    backends: Mapping[str, Predictor] | None = None,
    against: Sequence[str] = (),
    command: str = "",
    tell: Callable[[str], None] = lambda what: None,
) -> EvaluationReport:
    """Evaluate a bundle, and write ``predictions.tsv``, ``results.json`` and ``report.html``.

    Parameters
    ----------
    predict : Predictor
        The bundle on the backend that is judged.
    recordings : iterable of LabelledRecording
        The recordings, read one after the other.
    folder : Path
        Folder of the evaluation, which is there.
    how : How
        How to decode.
    layer : DecisionLayer or None
        Decision layer of the bundle; None decides for the most probable class.
    backends : mapping of str to Predictor, or None
        The bundle on other backends and in other precisions, whose decisions are compared.
    against : sequence of str
        Folders of evaluations of the same windows.
    command : str
        Command that repeats the evaluation.
    tell : callable
        Called with what comes next.

    Raises
    ------
    RecordingError, DataError, DecisionError
        If a recording does not fit, no event has a whole window, or all events are of one class.
    """
    parts: dict[Way, list[Predictions]] = {"offline": [], "live": []}
    others: dict[str, list[Predictions]] = {name: [] for name in backends or {}}
    eeg: list[NDArray[np.float32]] = []
    streams, onsets, told = [], [], []
    for recording in recordings:
        tell(f"decoding {recording.name}")
        if warn_if_seen(predict.bundle, recording.raw, recording.name):
            told.append(f"The model has learned from {recording.name}: figures on it flatter the model.")
        windows, live, known = _windows(predict, recording, how, first=sum(map(len, eeg)))
        if n := len(recording.events.onset) - len(windows):
            told.append(f"{recording.name}: {n} events are left out, whose windows reach beyond the recording or over a pause.")
        if not len(windows):
            continue
        eeg.append(windows)
        parts["offline"].append(_predicted(predict, windows, known, "offline", layer))
        for name, other in (backends or {}).items():
            others[name].append(_predicted(other, windows, known, "offline", layer))
        if how.live:
            parts["live"].append(_predicted(predict, live, known, "live", layer))
        if how.hop is not None:
            assert layer is not None, "a stream is decided on by a layer"
            config = StreamConfig(hop=how.hop, late="queue", check_unit=False)
            options = replace(how.source, speed=math.inf, chunk=config.hop_samples(predict.spec.signal))
            stream = stream_windows(predict, recording.path, recording.raw, recording.events, options, config, start=how.start)
            streams.append(stream)
            onsets.append(stream_time(recording.raw, recording.events.onset)[: int(stream.events.max()) + 1])
    if not eeg:
        raise DataError(f"No event has a whole window at {how.start:g} s.", "Mend --tmin, or give longer recordings.")
    every = [joined(each) for each in parts.values() if each]
    first = every[0]
    _check(first)
    reference = f"{predict.backend.name} {predict.backend.precision}"
    return finished(
        folder,
        every,
        [part for path in against for part in others_of(Path(path), first)],
        protocol="bundle",
        folds=(),
        seeds=(),
        baselines=(),
        command=command,
        told=tuple(told),
        examples=Examples(eeg=np.concatenate(eeg), ch_names=predict.spec.ch_names or (), sfreq=predict.spec.sfreq),
        agreements=tuple(agreement(first, joined(each), name, reference) for name, each in others.items()),
        continuous=_continuous(streams, layer, onsets),
    )


def _windows(
    predict: Predictor, recording: LabelledRecording, how: How, *, first: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, Any]]:
    """Return the windows of the events offline and live, and what is known of them."""
    signal, raw, events = predict.spec.signal, recording.raw, recording.events
    fitted = causal = fit_recording(raw, signal, interpolate=how.interpolate, check_unit=how.check_unit)
    if signal.phase != "causal":
        causal = fit_recording(raw, signal, interpolate=how.interpolate, check_unit=False, phase="causal")
    starts, whole = fitted.place_windows(events.onset, how.start)
    live_starts, there = causal.place_windows(events.onset, how.start)
    whole &= there
    windows = fitted.cut(starts[whole])
    live = windows[:0]
    if how.live and len(windows):
        live = np.stack(list(live_windows(raw, causal, live_starts[whole], signal, interpolate=how.interpolate, seed=0)))
    n = len(windows)
    known = {
        "model": how.name,
        "class_names": classes_of(predict),
        "window": np.arange(first, first + n),
        "subject": np.full(n, recording.entity("sub", recording.name)),
        "session": np.full(n, recording.entity("ses", "1")),
        "recording": np.full(n, recording.name),
        "onset": fitted.times(starts[whole]),
        "fold": np.zeros(n, np.intp),
        "seed": np.zeros(n, np.intp),
        "truth": events.labels[whole] if events.targets is None else events.targets[whole],
    }
    return windows, live, known


def classes_of(predict: Predictor) -> tuple[str, ...] | None:
    """Return the classes of a model, by number where they have no names, or None of a regression."""
    spec = predict.spec
    if spec.task != "classification":
        return None
    return spec.class_names or tuple(map(str, range(max(2, spec.n_outputs))))


def _predicted(
    predict: Predictor, windows: NDArray[np.float32], known: dict[str, Any], way: Way, layer: DecisionLayer | None
) -> Predictions:
    outputs = predict.predict(windows)
    made = of_outputs(outputs, known["class_names"])
    if layer is not None and known["class_names"] is not None:
        made |= _decided(layer, outputs, known["onset"] + predict.spec.signal.seconds, made)
    return Predictions(way=way, **known, **made)


def _decided(
    layer: DecisionLayer, outputs: NDArray[np.float32], times: NDArray[np.float64], made: dict[str, Any]
) -> dict[str, Any]:
    """Return probabilities and decisions of a layer, which begins anew with each event."""
    probabilities, decisions = made["probabilities"].copy(), np.full(len(outputs), UNDECIDED)
    for i, (row, time) in enumerate(zip(outputs.reshape(len(outputs), -1), times.tolist(), strict=True)):
        layer.restart()
        state = layer.step(row, time, ("new trial",))
        if state.probabilities:
            probabilities[i] = state.probabilities
        if state.class_name is not None:
            decisions[i] = layer.class_names.index(state.class_name)
    return {"probabilities": probabilities, "decision": decisions}


def _check(predictions: Predictions) -> None:
    """Refuse events that are all alike: nothing can be told apart."""
    there = np.unique(predictions.truth)
    if len(there) < 2:
        names = predictions.class_names
        what = f"{there[0]:g}" if names is None else names[int(there[0])]
        raise DataError(f"All {len(predictions)} events are labelled {what}.", "Give events of two classes or numbers at least.")


def _continuous(streams: list[Any], layer: DecisionLayer | None, onsets: list[NDArray[np.float64]]) -> tuple[Continuous, ...]:
    if not streams:
        return ()
    assert layer is not None
    return (on_stream(joined_data(streams), layer, onsets),)
