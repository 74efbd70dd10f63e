"""Judges what a bundle with its decision layer does on a stream: false activations, latency, time to decision, bits a minute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.evaluation.figures import wolpaw_bits
from sjepa_deploy.evaluation.results import Continuous
from sjepa_deploy.runtime.decisions.chain import Outcome
from sjepa_deploy.runtime.decisions.data import CalibrationData
from sjepa_deploy.runtime.decisions.description import Figure
from sjepa_deploy.runtime.decisions.judge import blocks_of, counted
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.state import State
from sjepa_deploy.runtime.intervals import MIN_BLOCKS, N_RESAMPLES, interval, quotient

Array = NDArray[np.float64]


def on_stream(data: CalibrationData, layer: DecisionLayer, onsets: Sequence[Array]) -> Continuous:
    """Run a decision layer over the windows of streams, and say what the layer decides.

    Parameters
    ----------
    data : CalibrationData
        Windows every hop of all recordings, with the truth.
    layer : DecisionLayer
        The layer. It begins anew with each recording.
    onsets : sequence of ndarray
        Times of the events of each recording in seconds of its stream, up to the last event that a window belongs to.
    """
    outcome = decided_by(data, layer)
    blocks = blocks_of(data)
    counts = counted(data, outcome, blocks, np.ones(len(data)))
    accept_rate, accuracy, false_per_minute = counts.figures
    onset = np.concatenate([*onsets, np.empty(0)])
    known = data.labels >= 0
    first = _first(data, known & outcome.decided)
    right = _first(data, known & outcome.decided & (outcome.chosen == data.labels))
    latency, time = (data.times[rows] - onset[data.events[rows]] for rows in (right, first))
    n_blocks = int(blocks.max()) + 1
    without, windows = (np.bincount(blocks[rows], minlength=n_blocks).astype(float) for rows in (~outcome.decided, slice(None)))
    bits = None
    if accuracy.value is not None:
        bits = wolpaw_bits(accuracy.value, len(layer.class_names)) * len(first) / data.minutes
    figures = {
        "accept_rate": accept_rate,
        "accuracy": accuracy,
        "false_per_minute": false_per_minute,
        "latency_median": _quantile(latency, blocks[right], 0.5),
        "latency_p90": _quantile(latency, blocks[right], 0.9),
        "time_to_decision": _quantile(time, blocks[first], 0.5),
        "undecided": Figure(**dict(zip(("value", "low", "high"), quotient(without, windows), strict=True))),
        "bits_per_minute": Figure(value=bits),
    }
    assert data.hop is not None
    return Continuous(
        hop=data.hop,
        layer=layer.description.name,
        n_events=round(counts.events.sum()),
        minutes=data.minutes,
        figures=figures,
        latencies=tuple(latency.tolist()),
    )


def decided_by(data: CalibrationData, layer: DecisionLayer) -> Outcome:
    """Return what a layer decides about the windows of each recording."""
    outcome = Outcome.empty(len(data))
    numbers = {name: i for i, name in enumerate(layer.class_names)}
    for recording in np.unique(data.recordings):
        rows = np.flatnonzero(data.recordings == recording)
        layer.restart()
        states = layer.run(data.outputs[rows], data.times[rows], [data.flags[row] for row in rows])
        for row, state in zip(rows.tolist(), states, strict=True):
            _put(outcome, row, state, numbers)
    return outcome


def _put(outcome: Outcome, row: int, state: State, numbers: dict[str, int]) -> None:
    if state.name == "decided":
        assert state.class_name is not None
        outcome.decided[row], outcome.chosen[row] = True, numbers[state.class_name]
    if state.probabilities:
        outcome.best[row], outcome.likely[row] = max(state.probabilities), int(np.argmax(state.probabilities))


def _first(data: CalibrationData, rows: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the first of these windows of each event."""
    there = np.flatnonzero(rows)
    return there[np.unique(data.events[there], return_index=True)[1]]


def _quantile(values: Array, blocks: NDArray[np.intp], share: float) -> Figure:
    """Return a quantile with an interval over blocks."""
    if not len(values):
        return Figure()
    value = float(np.quantile(values, share))
    there = np.unique(blocks)
    if len(there) < MIN_BLOCKS:
        return Figure(value=value)
    parts = [values[blocks == block] for block in there]
    low, high = interval(_resampled(parts, lambda drawn: float(np.quantile(drawn, share))), len(there))
    return Figure(value=value, low=low, high=high)


def _resampled(parts: Sequence[Array], figure: Callable[[Array], float]) -> Array:
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(parts), size=(N_RESAMPLES, len(parts)))
    return np.array([figure(np.concatenate([parts[i] for i in rows])) for rows in drawn])
