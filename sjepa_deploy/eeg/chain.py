"""Runs the steps of a signal one after the other: causal on a stream, or zero-phase on a whole stretch of a recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.steps.base import FloatArray, Flow, Running, StreamStep
from sjepa_deploy.eeg.steps.channels import Channels, Mixer
from sjepa_deploy.eeg.steps.filters import NO_SECTIONS, CausalFilter, Filter
from sjepa_deploy.eeg.steps.rate import RateReducer, Resample, ratio_of_rates, same_rate
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.spec import SignalSpec

DELAYS_AT_HZ = (2.0, 4.0, 10.0, 20.0)
"""Rhythms whose delay is told."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmicDelay:
    """Says by how many seconds the filters delay a rhythm.

    Attributes
    ----------
    at_hz : tuple of (float, float)
        Frequency in Hz and delay.
    """

    at_hz: tuple[tuple[float, float], ...]


def algorithmic_delay(signal: SignalSpec, sfreq: float) -> AlgorithmicDelay:
    """Return how much the causal forms of all steps delay rhythms of a stream of `sfreq` Hz."""
    flows = flows_of(signal, Flow(ch_names=signal.ch_names or (), sfreq=sfreq, goal=signal.goal))
    at = [
        (hertz, sum(step.delay(hertz, flow) for step, flow in zip(signal.steps, flows, strict=True)))
        for hertz in DELAYS_AT_HZ
        if hertz < 0.4 * min(sfreq, signal.sfreq)
    ]
    return AlgorithmicDelay(at_hz=tuple(at))


def settling_time(signal: SignalSpec, sfreq: float) -> float:
    """Return after how many seconds of a stream of `sfreq` Hz the causal forms of all steps have settled."""
    flows = flows_of(signal, Flow(ch_names=signal.ch_names or (), sfreq=sfreq, goal=signal.goal))
    return sum(step.settling(flow) for step, flow in zip(signal.steps, flows, strict=True))


def flows_of(signal: SignalSpec, flow: Flow) -> list[Flow]:
    """Return the signal before each step, from what enters the first one."""
    flows = []
    for step in signal.steps:
        flows.append(flow)
        flow = flow if isinstance(step, Channels) and signal.ch_names is None else step.after(flow)
    return flows


class Chain:
    """Runs the causal forms of a signal's steps on a stream. The output has the same bits for any chunks.

    Second-order sections that follow each other run as one filter.

    Parameters
    ----------
    signal : SignalSpec
        The signal.
    ch_names : sequence of str
        Channels of the stream that are used.
    sfreq : float
        Rate of the stream in Hz.
    matrix : ndarray, shape (n_chans of the model, n_chans of the stream)
        Channels of the model from those of the stream, see `sjepa_deploy.eeg.interpolation`.

    Attributes
    ----------
    ratio : Fraction
        Samples at the model's rate for each sample of the stream.
    delay : AlgorithmicDelay
        Delay of the steps.

    Raises
    ------
    RecordingError, StreamError
        If a step cannot run on this stream: it is slower than the model, or lacks a channel of the reference.
    """

    def __init__(self, signal: SignalSpec, ch_names: Sequence[str], sfreq: float, matrix: FloatArray) -> None:
        self.ratio = ratio_of_rates(sfreq, signal.sfreq)
        self.delay = algorithmic_delay(signal, sfreq)
        self._mixer = Mixer(matrix)
        self._n_out = signal.n_chans
        flow = Flow(ch_names=tuple(ch_names), sfreq=sfreq, goal=signal.goal)
        self._stages: list[Running] = []
        sections: list[FloatArray] = []
        for step, at in zip(signal.steps, flows_of(signal, flow), strict=True):
            if isinstance(step, Filter):
                sections.append(step.sections(at))
                continue
            if isinstance(step, Resample):
                sections.append(step.sections(at))
            if sections:
                self._stages.append(CausalFilter(np.concatenate([NO_SECTIONS, *sections]), len(at.ch_names)))
                sections = []
            if isinstance(step, Resample):
                self._stages.append(step.reducer(at))
            elif isinstance(step, Channels):
                self._stages.append(self._mixer)
            elif isinstance(step, StreamStep):
                self._stages.append(step.causal(at))
        if sections:
            self._stages.append(CausalFilter(np.concatenate([NO_SECTIONS, *sections]), signal.n_chans))

    def set_matrix(self, matrix: FloatArray) -> None:
        """Make the model's channels by another matrix from the next sample on."""
        self._mixer.set_matrix(matrix)

    def start(self, sample: FloatArray) -> None:
        """Start on `sample`, shape (n_chans of the stream,), as if it had been there for ever."""
        for stage in self._stages:
            sample = stage.start(sample)

    def restart_channels(self, channels: Sequence[int], sample: FloatArray) -> None:
        """Start some channels of the stream anew on their values in `sample`, as far as channels do not touch each other."""
        for stage in self._stages:
            if isinstance(stage, CausalFilter):
                sample = stage.restart_channels(channels, sample)
            elif not isinstance(stage, RateReducer):
                return

    def __call__(self, samples: FloatArray) -> tuple[FloatArray, list[int]]:
        """Take samples of the stream, shape (n_samples, n_chans of the stream).

        Returns
        -------
        samples : ndarray, shape (n_out, n_chans of the model)
            Samples at the model's rate.
        rows : list of int
            The row of the input after which each of them came out.
        """
        rows: list[int] = []
        for stage in self._stages:
            samples = stage(samples)
            if isinstance(stage, RateReducer):
                rows = stage.rows
                if not rows:
                    return np.empty((0, self._n_out)), rows
        return samples, rows


def zero_phase(
    signal: SignalSpec, data: FloatArray, flow: Flow, fit_channels: Callable[[FloatArray, Flow], FloatArray]
) -> FloatArray:
    """Return the zero-phase forms of a signal's steps on a whole stretch, shape (n_chans of the model, n_samples).

    Parameters
    ----------
    data : ndarray, shape (n_chans, n_samples)
        The stretch, in the unit of the signal.
    flow : Flow
        What `data` are.
    fit_channels : callable
        Makes the channels of the model.
    """
    return ZeroPhase(signal, flow, fit_channels)(data, last=True)


class ZeroPhase:
    """Runs the zero-phase forms of a signal's steps on a stretch that comes in pieces.

    Each step has as many samples around those that it returns as it depends on (`StreamStep.reach`), so the result is that of the
    whole stretch but for 1e-6 of its RMS. A piece that is a whole stretch gives the same bits.

    Parameters
    ----------
    signal, flow, fit_channels
        See `zero_phase`.
    """

    def __init__(self, signal: SignalSpec, flow: Flow, fit_channels: Callable[[FloatArray, Flow], FloatArray]) -> None:
        self._stages: list[Callable[[FloatArray, bool], FloatArray]] = []
        for step, at in zip(signal.steps, flows_of(signal, flow), strict=True):
            if isinstance(step, Channels):
                self._stages.append(lambda data, _, at=at: fit_channels(data, at))  # type: ignore[misc]
            elif isinstance(step, StreamStep):
                self._stages.append(_InTurn(step, at) if step.causal_only else _Overlapping(step, at))

    def __call__(self, data: FloatArray, *, last: bool) -> FloatArray:
        """Return what samples that follow the last ones, shape (n_chans, n_samples), make ready; all that is left if `last`."""
        for stage in self._stages:
            data = stage(data, last)
        return data


class _InTurn:
    """Runs a step that has only its causal form."""

    def __init__(self, step: StreamStep, flow: Flow) -> None:
        self._running, self._started = step.causal(flow), False

    def __call__(self, data: FloatArray, last: bool) -> FloatArray:
        if not data.shape[1]:
            return data
        samples = np.ascontiguousarray(data.T)
        if not self._started:
            self._running.start(samples[0])
            self._started = True
        return np.ascontiguousarray(self._running(samples).T)


class _Overlapping:
    """Runs a step on each piece and on the samples around it that the step reaches."""

    def __init__(self, step: StreamStep, flow: Flow) -> None:
        self._step, self._flow, self._reach = step, flow, step.reach(flow)
        ratio = Fraction(1)
        if isinstance(step, Resample) and not same_rate(flow.sfreq, flow.goal.sfreq):
            ratio = ratio_of_rates(flow.sfreq, flow.goal.sfreq)
        self._up, self._down = ratio.numerator, ratio.denominator  # every `down` samples one of the new rate meets one of the old
        self._held = np.empty((len(flow.ch_names), 0))
        self._first = self._done = 0  # of the stretch: the first sample that is held, and the first that is not done

    def __call__(self, data: FloatArray, last: bool) -> FloatArray:
        held = self._held = np.concatenate([self._held, data], axis=1) if self._held.shape[1] else data
        have = self._first + held.shape[1]
        stop = have if last else self._meeting(have - self._reach)
        if stop <= self._done:
            return np.empty((len(held), 0))
        made = self._step.offline(held, self._flow)
        begin, end = ((at - self._first) * self._up // self._down for at in (self._done, stop))
        if not last:
            keep = self._meeting(stop - self._reach)
            self._held, self._first, self._done = held[:, keep - self._first :].copy(), keep, stop
        return made[:, begin : None if last else end]

    def _meeting(self, sample: float) -> int:
        """Return the last sample up to `sample` of the stretch at which both rates have one."""
        return int(max(sample, 0)) // self._down * self._down


def finish_windows(signal: SignalSpec, eeg: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return windows after the steps on windows, shape (..., n_chans, n_times); the same array where there are none."""
    if not signal.window_steps:
        return eeg
    windows = eeg.astype(np.float64)
    for step in signal.window_steps:
        windows = step.on_windows(windows, signal.goal)
    return windows.astype(np.float32)


def apply_to_cut(signal: SignalSpec, windows: NDArray[np.float64], told: list[str]) -> NDArray[np.float32]:
    """Return windows that were filtered and cut before, after the steps that have no memory.

    Parameters
    ----------
    windows : ndarray, shape (n_windows, n_chans, n_times)
        In the unit of the signal, with the model's channels.
    told : list of str
        Phrases that say what was done; extended.

    Raises
    ------
    RecordingError
        If a step with memory, such as a moving standardisation, is part of the signal: its past is not in the windows.
    """
    flow = Flow(ch_names=signal.ch_names or tuple(map(str, range(signal.n_chans))), sfreq=signal.sfreq, goal=signal.goal)
    for step in signal.stream_steps:
        if isinstance(step, (Filter, Resample, Channels)):
            continue
        if step.memory:
            raise RecordingError(
                f"Windows that were cut before cannot go through the step {step.name!r}, which needs what came before them.",
                "Give the continuous recording.",
            )
        assert isinstance(step, StreamStep)
        windows = np.stack([step.offline(window, flow) for window in windows])
        told.append(step.told(flow))
    told += [step.told(flow) for step in signal.window_steps]
    return finish_windows(signal, np.ascontiguousarray(windows, dtype=np.float32))
