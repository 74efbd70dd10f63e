"""Decodes a recording as it would be decoded live, and says which window belongs to which event: data for a decision layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.pauses import segments_of
from sjepa_deploy.errors import DecisionError
from sjepa_deploy.runtime.decisions.data import BETWEEN, NO_EVENT, CalibrationData, LabelledEvents
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.open_source import SourceOptions, open_source
from sjepa_deploy.runtime.predictor import Predictor

LEAST_SHARE = 0.5
"""Share of a window that must lie in an event for the window to belong to it."""


def stream_windows(
    predict: Predictor,
    path: Path,
    raw: Any,
    events: LabelledEvents,
    options: SourceOptions,
    config: StreamConfig,
    *,
    start: float,
) -> CalibrationData:
    """Decode a window every hop of a recording through the live path, with causal filters.

    A window belongs to an event if at least half of it lies in the time of the event: from `start` seconds after its onset for
    its duration, at least for the length of a window. Windows of which less lies there belong to nothing (`BETWEEN`).

    Parameters
    ----------
    predict : Predictor
        The model, loaded with `check_unit=False`.
    path : Path
        The recording.
    raw : mne.io.BaseRaw
        The same recording, as `sjepa_deploy.eeg.recording.read_recording` reads it.
    events : LabelledEvents
        The events.
    options : SourceOptions
        What the recording does not say itself.
    config : StreamConfig
        How the stream is decoded.
    start : float
        Start of an event's time in seconds after its onset.

    Raises
    ------
    StreamError, RecordingError
        If the recording does not fit the model.
    DecisionError
        If the recording is too short for a window.
    """
    spec = predict.spec
    source = open_source(f"file:{path}", spec.signal, options)
    decisions = list(Decoder(predict, source, config))
    if not decisions:
        raise DecisionError(f"{path.name} has no whole window.", "Give a longer recording.")
    length = spec.n_times / spec.sfreq
    begin = stream_time(raw, events.onset) + start
    end = begin + np.maximum(events.duration, length)
    newest = np.array([decision.time for decision in decisions])
    share = (np.minimum(newest[:, None], end) - np.maximum(newest[:, None] - length, begin)) / length
    which = share.argmax(axis=1)
    most = share.max(axis=1)
    inside = most >= LEAST_SHARE
    return CalibrationData(
        outputs=np.stack([decision.prediction.ravel() for decision in decisions]).astype(np.float64),
        labels=np.where(inside, events.labels[which], np.where(most > 0, BETWEEN, NO_EVENT)),
        targets=None,
        times=newest,
        events=np.where(inside, which, NO_EVENT),
        recordings=np.zeros(len(decisions), np.intp),
        flags=tuple(decision.flags for decision in decisions),
        minutes=raw.n_times / raw.info["sfreq"] / 60,
        names=(path.name,),
        hop=config.hop_samples(spec.signal) / spec.sfreq,
    )


def stream_time(raw: Any, onsets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return when events come in the stream of a recording, whose stretches follow each other without their pauses."""
    segments = segments_of(raw)
    sfreq = raw.info["sfreq"]
    own = np.array([segment.onset for segment in segments])
    lengths = np.array([segment.stop - segment.start for segment in segments]) / sfreq
    which = np.maximum(np.searchsorted(own, onsets + 1e-9, side="right") - 1, 0)
    return np.asarray((np.cumsum(lengths) - lengths)[which] + np.minimum(onsets - own[which], lengths[which]), np.float64)
