"""Judges task parity: whether the live decoder decides about events as the model did on the windows that it learned from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.bundle import TASK_FOLDER, Bundle
from sjepa_deploy.eeg.chain import algorithmic_delay, finish_windows
from sjepa_deploy.eeg.events import Events
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.pauses import Segment, segments_of
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.eeg.windows import FittedRecording
from sjepa_deploy.errors import BundleError, RecordingError, listed
from sjepa_deploy.files import bytes_hash, json_file, load_json, seal, write_atomically
from sjepa_deploy.learning.metrics import Score, balanced_accuracy, r2
from sjepa_deploy.runtime.backend import open_backend
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.sources import ReplaySource
from sjepa_deploy.runtime.live.windows import WindowStream
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import ModelSpec, SignalSpec

if TYPE_CHECKING:
    import mne

LARGEST_SHARE = 0.01
"""Share of decisions that may differ between PyTorch on the training pipeline and the live path."""

DIFFERS = 0.1
"""Difference of two outputs of a regression, relative to their spread over the events, from which on they are other decisions."""

N_BLOCKS = 20
"""Blocks of successive events that intervals are made of: windows of one recording are not independent."""

N_RESAMPLED = 2000
"""Resamplings of the blocks that an interval is made of."""

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Way:
    """Describes the decisions of one way through the software.

    Attributes
    ----------
    name : str
        "PyTorch", "offline" or "live".
    score : Score or None
        Score against the labels, where there are labels.
    differ : float
        Share of decisions that differ from PyTorch's.
    """

    name: str
    score: Score | None
    differ: float


@dataclass(frozen=True, kw_only=True)
class TaskParity:
    """Says whether the live decoder decides as the model did on its training pipeline.

    Attributes
    ----------
    recording, backend, precision, phase : str
        What was judged.
    n_events : int
        Events that were decoded.
    left_out : int
        Events whose windows reach beyond the recording or over a pause.
    settling : int
        Windows that begin where the live steps still settle.
    metric : str
        "balanced_accuracy" or "r2"; "" without labels.
    ways : tuple of Way
        The model in PyTorch on the training pipeline, the bundle offline, and the bundle through the live path.
    identical : float
        Share of live windows that have the bits of the offline run of the causal steps.
    loss : Score or None
        Score of the live path less that of PyTorch, with the interval of the paired difference over blocks of events.
    reasons : tuple of str
        Sentences that say why decisions differ, where they do.
    passed : bool
        Whether at most `LARGEST_SHARE` of the decisions differ, and the interval of the loss does not lie below zero.
    """

    recording: str
    backend: str
    precision: str
    phase: str
    n_events: int
    left_out: int
    settling: int
    metric: str
    ways: tuple[Way, ...]
    identical: float
    loss: Score | None
    reasons: tuple[str, ...]
    passed: bool


def check_task(
    predict: Predictor,
    raw: mne.io.BaseRaw,
    events: Events,
    *,
    recording: str,
    start: float,
    labels: Sequence[str] | None = None,
    interpolate: float = 0.0,
    check_unit: bool = True,
    seed: int = 0,
) -> TaskParity:
    """Decode the events of a recording in PyTorch on the training pipeline, with the bundle offline, and through the live path.

    Parameters
    ----------
    predict : Predictor
        The bundle on a backend.
    raw : mne.io.BaseRaw
        The recording in volts.
    events : Events
        The events.
    recording : str
        Name of the recording, for the report.
    start : float
        Start of the windows in seconds after their events.
    labels : sequence of str or None
        True class, or true number, of each event.
    interpolate, check_unit
        See `sjepa_deploy.eeg.recording.fit_recording`.
    seed : int
        Seed of the live path's chunks, and of the intervals.

    Raises
    ------
    RecordingError
        If the recording does not fit the model, holds no whole window of an event, or labels are none of the model's.
    """
    spec = predict.spec
    signal = spec.signal
    trained = fit_recording(raw, signal, interpolate=interpolate, check_unit=check_unit)
    causal = trained
    if signal.phase != "causal":
        causal = fit_recording(raw, signal, interpolate=interpolate, check_unit=check_unit, phase="causal")
    starts, whole = trained.place_windows(events.onset, start)
    live_starts, live_whole = causal.place_windows(events.onset, start)
    whole &= live_whole
    if whole.sum() < 2:
        raise RecordingError(
            f"{recording} holds {whole.sum()} whole windows at {start:g} s after these events.",
            "Name other events, mend the start of the windows, or give a longer recording.",
        )
    truth = None if labels is None else _targets([label for label, kept in zip(labels, whole, strict=True) if kept], spec)
    windows, live_starts = trained.cut(starts[whole]), live_starts[whole]
    reference = open_backend(predict.bundle, "torch", "fp32")
    outputs = {
        "PyTorch": np.concatenate([reference.run(windows[i : i + BATCH]) for i in range(0, len(windows), BATCH)]),
        "offline": predict.predict(windows),
    }
    streamed = np.stack(list(live_windows(raw, causal, live_starts, signal, interpolate=interpolate, seed=seed)))
    outputs["live"] = np.concatenate([predict(window[None]) for window in streamed])
    same = [live.tobytes() == offline.tobytes() for live, offline in zip(streamed, causal.cut(live_starts), strict=True)]
    decisions = {name: _decisions(out, spec) for name, out in outputs.items()}
    differ = {name: _differ(decisions["PyTorch"], theirs, spec) for name, theirs in decisions.items()}
    scores, loss = _scores(decisions, truth, spec, seed)
    worse = loss is not None and loss.high < 0
    passed = differ["live"] <= LARGEST_SHARE and not worse
    return TaskParity(
        recording=recording,
        backend=predict.backend.name,
        precision=predict.backend.precision,
        phase=signal.phase,
        n_events=int(whole.sum()),
        left_out=int((~whole).sum()),
        settling=int(causal.settling(live_starts).sum()),
        metric="" if truth is None else _metric(spec),
        ways=tuple(Way(name=name, score=scores.get(name), differ=differ[name]) for name in outputs),
        identical=float(np.mean(same)),
        loss=loss,
        reasons=() if passed else _reasons(spec, raw.info["sfreq"], differ, float(np.mean(same))),
        passed=passed,
    )


def write_task(bundle: Bundle, result: TaskParity) -> Path:
    """Write a result into the bundle, beside the manifest, whose digest does not change: ``task/RECORDING.json``."""
    folder = bundle.path / TASK_FOLDER
    folder.mkdir(exist_ok=True)
    stored: dict[str, Any] = {"manifest": bundle.manifest.digest, "result": encode(result), "digest": ""}
    file = folder / f"{Path(result.recording).stem}-{bytes_hash(result.recording.encode())[:8]}.json"
    write_atomically(file, json_file(stored | {"digest": seal(stored)}))
    return file


def read_tasks(bundle: Bundle) -> tuple[TaskParity, ...]:
    """Return the results that lie in the bundle.

    Raises
    ------
    BundleError
        If a result was changed, or is of another bundle.
    """
    found = []
    for file in sorted((bundle.path / TASK_FOLDER).glob("*.json")):
        try:
            data = load_json(file.read_bytes())
            if data["digest"] != seal(data):
                raise BundleError(f"{file} was changed after it was written (its digest differs).", "Make it again with --check.")
            if data["manifest"] != bundle.manifest.digest:
                raise BundleError(f"{file} is of another bundle.", "Delete it, or make it again with --check.")
            found.append(decode(TaskParity, data["result"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, DecodeError) as e:
            raise BundleError(f"{file} is no result of a task ({e}).", "Make it again with --check.") from e
    return tuple(found)


def labels_of(events: Events, spec: ModelSpec, *, classes: Mapping[str, str], column: str | None) -> list[str] | None:
    """Return the true class or number of each event, or None where nothing tells.

    Parameters
    ----------
    events : Events
        The events.
    spec : ModelSpec
        The model.
    classes : mapping of str to str
        Class of each description, where they are not called the same.
    column : str or None
        Column of the events that holds the label.

    Raises
    ------
    RecordingError
        If the events have no such column.
    """
    if column is not None:
        if column not in events.columns:
            raise RecordingError(
                f"The events have no column {column}; they have {listed(events.columns) or 'none'}.", "Name another --column."
            )
        labels = list(events.columns[column])
    elif spec.task == "classification":
        labels = list(events.description)
    else:
        return None
    labels = [classes.get(label, label) for label in labels]
    if column is None and not classes and not set(labels) & set(spec.class_names or ()):
        return None
    return labels


def _targets(labels: Sequence[str], spec: ModelSpec) -> NDArray[Any]:
    if spec.task == "classification":
        names = list(spec.class_names or map(str, range(max(2, spec.n_outputs))))
        if unknown := sorted(set(labels) - set(names)):
            raise RecordingError(
                f"The events are of {listed(unknown)}, the model's classes are {listed(names)}.",
                "Say which event is of which class with --classes CLASS=EVENT,.., or name the column of the class.",
            )
        return np.array([names.index(label) for label in labels])
    try:
        numbers = np.array([float(label) for label in labels])
    except ValueError as e:
        raise RecordingError(f"A label is no number ({e}).", "Name another --column.") from e
    if not np.isfinite(numbers).all():
        raise RecordingError("A label is not finite.", "Leave these events out.")
    return numbers


def live_windows(
    raw: mne.io.BaseRaw,
    fitted: FittedRecording,
    starts: NDArray[np.intp],
    signal: SignalSpec,
    *,
    interpolate: float,
    seed: int,
) -> Iterator[NDArray[np.float32]]:
    """Give the windows at `starts` of `fitted`, in this order, as the live path makes them from chunks of random sizes."""
    rng = np.random.default_rng(seed)
    info = StreamInfo(name="The recording", ch_names=tuple(raw.ch_names), sfreq=raw.info["sfreq"], unit="V")
    config = StreamConfig(
        hop=0,
        late="queue",
        interpolate=bool(interpolate),
        interpolate_share=interpolate,
        check_unit=False,
        bads=tuple(raw.info["bads"]),
    )
    places: dict[float, Segment] = {segment.onset: segment for segment in segments_of(raw)}
    found: dict[int, NDArray[np.float32]] = {}
    for segment in fitted.segments:
        wanted = {int(start) - segment.start for start in starts if segment.start <= start < segment.stop}
        if not wanted:
            continue
        place = places[segment.onset]
        samples = np.ascontiguousarray(raw.get_data(start=place.start, stop=place.stop).T)
        source = ReplaySource(info, samples, speed=float("inf"), chunk=lambda: int(rng.integers(1, 500)))
        stream = WindowStream(signal, info, config, counters=Counters(), report=lambda kind, text: None)
        while (chunk := source.read(0.0)) is not None:
            for window in stream.push(chunk):
                if window.index in wanted:
                    found[segment.start + window.index] = finish_windows(signal, stream.eeg())[0].copy()
    yield from (found[int(start)] for start in starts)


def _decisions(outputs: NDArray[np.float32], spec: ModelSpec) -> NDArray[Any]:
    """Return the class of each window, or its outputs."""
    rows = outputs.reshape(len(outputs), -1)
    if spec.task != "classification":
        return rows.astype(np.float64)
    return (rows[:, 0] > 0).astype(int) if rows.shape[1] == 1 else rows.argmax(axis=1)


def _differ(reference: NDArray[Any], decisions: NDArray[Any], spec: ModelSpec) -> float:
    if spec.task == "classification":
        return float((reference != decisions).mean())
    spread = reference.std(axis=0)
    return float((np.abs(reference - decisions) > DIFFERS * np.where(spread > 0, spread, 1.0)).any(axis=1).mean())


def _metric(spec: ModelSpec) -> str:
    return "balanced_accuracy" if spec.task == "classification" else "r2"


def _score(truth: NDArray[Any], decisions: NDArray[Any], spec: ModelSpec) -> float:
    if spec.task != "classification":
        return r2(truth, decisions[:, 0])
    n_classes = max(int(truth.max()), int(decisions.max())) + 1
    return balanced_accuracy(truth, np.eye(n_classes)[decisions])


def _scores(
    decisions: Mapping[str, NDArray[Any]], truth: NDArray[Any] | None, spec: ModelSpec, seed: int
) -> tuple[dict[str, Score], Score | None]:
    """Return the score of each way, and the live path's less PyTorch's, with intervals over blocks of successive events."""
    if truth is None or len(np.unique(truth)) < 2:
        return {}, None
    blocks = np.array_split(np.arange(len(truth)), min(N_BLOCKS, len(truth) // 2))
    rng = np.random.default_rng(seed)
    values: dict[str, list[float]] = {name: [] for name in decisions}
    while len(values["PyTorch"]) < N_RESAMPLED:
        rows = np.concatenate([blocks[i] for i in rng.integers(len(blocks), size=len(blocks))])
        if len(np.unique(truth[rows])) < 2:
            continue
        for name, theirs in decisions.items():
            values[name].append(_score(truth[rows], theirs[rows], spec))
    whole = {name: _score(truth, theirs, spec) for name, theirs in decisions.items()}
    lost = np.array(values["live"]) - np.array(values["PyTorch"])
    loss = _with_interval(whole["live"] - whole["PyTorch"], lost)
    return {name: _with_interval(whole[name], values[name]) for name in decisions}, loss


def _with_interval(value: float, resampled: Sequence[float] | NDArray[np.float64]) -> Score:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(value=value, low=float(low), high=float(high))


def _reasons(spec: ModelSpec, sfreq: float, differ: Mapping[str, float], identical: float) -> tuple[str, ...]:
    """Return sentences that say what differs between the training pipeline and the live path."""
    signal = spec.signal
    reasons = []
    if differ["offline"] > LARGEST_SHARE:
        reasons.append(
            f"The bundle decides otherwise than PyTorch on the same windows in {differ['offline']:.1%}: see sjepa-verify."
        )
    if signal.phase == "zero-phase":
        delays = [f"{seconds * 1e3:.0f} ms at {hertz:g} Hz" for hertz, seconds in algorithmic_delay(signal, sfreq).at_hz]
        late = f" They delay the EEG by {listed(delays)}." if delays else ""
        reasons.append(
            f"The model learned from zero-phase windows, and live filters are causal.{late} Train with --phase causal."
        )
    if identical < 1:
        names = listed([step.name for step in signal.steps], 12)
        reasons.append(f"{1 - identical:.1%} of the live windows differ from the offline run of the causal steps ({names}).")
    return tuple(reasons)
