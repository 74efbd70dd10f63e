"""Checks the live path: compares its decisions on a recording, cut into chunks of many sizes, with those of PyTorch offline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.eeg.chain import finish_windows, flows_of
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.interpolation import match_channels, mixing_matrix
from sjepa_deploy.eeg.names import parse_rename
from sjepa_deploy.eeg.pauses import segments_of
from sjepa_deploy.eeg.quality import ChannelQuality, ChannelState
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.steps import Channels, Flow, Resample, StreamStep
from sjepa_deploy.eeg.steps.base import run_offline
from sjepa_deploy.eeg.steps.filters import Filter
from sjepa_deploy.eeg.steps.rate import HALF_TAPS, ratio_of_rates
from sjepa_deploy.eeg.units import conversion
from sjepa_deploy.eeg.windows import windows
from sjepa_deploy.errors import StreamError, TooShortError
from sjepa_deploy.parity import TOLERANCE
from sjepa_deploy.runtime.backend import open_backend
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.sources import ReplaySource
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.spec import SignalSpec, Unit

if TYPE_CHECKING:
    import mne
    from numpy.typing import NDArray

CHUNKS = ("1", "7", "32", "1000", "random")
"""Samples that the device sends at once, in the checks."""


@dataclass(frozen=True, kw_only=True)
class StreamingParity:
    """Says how the live path compares with an offline one on the same recording.

    Attributes
    ----------
    recording, backend, precision : str
        What was judged.
    n_windows : int
        Decisions compared.
    chunks : tuple of str
        Samples that were sent at once.
    identical : bool
        Whether all chunkings gave the same bits, and the same as the backend on windows of the whole recording filtered at once.
    max_error, tolerance : float
        Largest difference from PyTorch in float64 on these windows, relative to the outputs' root mean square, and what is
        allowed.
    passed : bool
        Whether `identical`, and within the tolerance.
    correlation : float or None
        Between decisions on causal and on zero-phase preprocessing, which the model was trained with; the smallest over outputs.
        None where the recording is too short for the zero-phase filter.
    difference : float or None
        Root mean square of their difference, relative to the standard deviation of the zero-phase decisions.
    flips : float or None
        Share of windows whose largest output is another one. None for a single output.
    filter_delay : tuple of (float, float)
        Frequency in Hz, and delay of the causal filters in seconds.
    """

    recording: str
    backend: str
    precision: str
    n_windows: int
    chunks: tuple[str, ...]
    identical: bool
    max_error: float
    tolerance: float
    passed: bool
    correlation: float | None
    difference: float | None
    flips: float | None
    filter_delay: tuple[tuple[float, float], ...]


def check_streaming(
    predict: Predictor,
    recording: Path,
    config: StreamConfig,
    *,
    unit: Unit | None = None,
    ch_names: Sequence[str] | None = None,
    rename: Sequence[str] = (),
    sfreq: float | None = None,
    chunks: tuple[str, ...] = CHUNKS,
) -> StreamingParity:
    """Decode a recording through the live path with every chunking, and offline with PyTorch.

    Of a recording with pauses, the longest stretch without one is judged.

    The offline path shares nothing with the live one but the filter's coefficients, the interpolation's weights and the verdict
    on half a second of a channel: SciPy filters the whole recording at once, channels that were bad start anew when they are
    good again, and PyTorch runs the checkpoint in the bundle in float64.

    Parameters
    ----------
    predict : Predictor
        The bundle on a backend.
    recording : Path
        See `sjepa_deploy.eeg.recording.read_recording`, with `unit`, `ch_names`, `rename` and `sfreq`.
    config : StreamConfig
        Hop, interpolation and bad channels. Late windows are decoded, and channels that turn bad only flagged.
    chunks : tuple of str
        Samples to send at once, or "random".

    Raises
    ------
    StreamError
        If the recording does not fit the model, or holds no window.
    """
    spec = predict.spec
    config = dataclasses.replace(config, late="queue", bad_channels="flag", bridge=0)
    raw = read_recording(
        recording,
        sfreq=sfreq,
        unit=unit,
        ch_names=ch_names,
        row_names=spec.ch_names,
        rename=parse_rename(rename, StreamError),
    )
    segments, rate = segments_of(raw), raw.info["sfreq"]
    if len(segments) > 1:  # the longest stretch without a pause
        longest = max(segments, key=lambda segment: segment.stop - segment.start)
        raw.crop(longest.start / rate, (longest.stop - 1) / rate)
    raw.drop_channels(raw.info["bads"])
    raw.drop_channels([name for name in raw.ch_names if name.casefold() in {bad.casefold() for bad in config.bads}])
    config = dataclasses.replace(config, bads=())
    info = StreamInfo(name=recording.name, ch_names=tuple(raw.ch_names), sfreq=raw.info["sfreq"], unit="V")
    samples = np.ascontiguousarray(raw.get_data().T)
    runs = []
    for chunk in chunks:
        source = ReplaySource(info, samples, speed=float("inf"), chunk=_chunking(chunk))
        decoder = Decoder(predict, source, config)
        runs.append(np.array([decision.prediction for decision in decoder]))
    if not len(runs[0]):
        raise StreamError(f"{recording.name} holds no window of {spec.n_times / spec.sfreq:g} s.", "Give a longer recording.")
    causal = causal_preprocessing(samples, info, spec.signal, interpolate=config.share)
    cut = finish_windows(spec.signal, np.ascontiguousarray(windows(causal, spec.n_times, decoder.hop)))
    offline = np.array([predict(window[None])[0] for window in cut])
    identical = all(run.shape == offline.shape and run.tobytes() == offline.tobytes() for run in runs)
    reference = open_backend(predict.bundle, "torch", "fp32")
    expected = np.concatenate([reference.run(cut[start : start + 64]) for start in range(0, len(cut), 64)]).astype(np.float64)
    live = runs[0].astype(np.float64)
    scale = float(np.sqrt(np.mean(expected**2))) or 1.0
    max_error = float(np.abs(live - expected[: len(live)]).max()) / scale
    tolerance = TOLERANCE[predict.backend.precision]
    return StreamingParity(
        recording=recording.name,
        backend=predict.backend.name,
        precision=predict.backend.precision,
        n_windows=len(live),
        chunks=chunks,
        identical=identical,
        max_error=max_error,
        tolerance=tolerance,
        passed=identical and max_error <= tolerance,
        filter_delay=decoder.windows.delay.at_hz,
        **_beside_zero_phase(raw, predict, decoder.hop, live, interpolate=config.share),
    )


def causal_preprocessing(
    samples: NDArray[np.float64], info: StreamInfo, signal: SignalSpec, *, interpolate: float = 0.0
) -> NDArray[np.float32]:
    """Return a whole stream, shape (n_samples, n_chans of it), as the live path gives it to the model, without that path.

    Returns
    -------
    ndarray of float32, shape (n_chans of the model, n_samples at its rate)
    """
    columns, names, _ = match_channels(signal, info, interpolate=interpolate, bads=())
    eeg = samples[:, columns] * conversion(info.unit, signal.unit)
    eeg, restarts = _held_and_restarted(eeg, info.sfreq, conversion("V", signal.unit))
    before = eeg[0]  # what was there for ever before the stream
    sections: list[NDArray[np.float64]] = []
    flow = Flow(ch_names=names, sfreq=info.sfreq, goal=signal.goal)
    for step, at in zip(signal.steps, flows_of(signal, flow), strict=True):
        if isinstance(step, (Filter, Resample)):
            sections.append(step.sections(at))
            if isinstance(step, Filter):
                continue
        if sections:
            eeg, before = _filtered(eeg, np.concatenate(sections), before, restarts)
            sections, restarts = [], []
        if isinstance(step, Resample):
            ratio = ratio_of_rates(at.sfreq, signal.sfreq)
            if ratio.numerator == 1:
                eeg = eeg[:: ratio.denominator]
            else:
                eeg = _between_samples(np.concatenate([np.tile(before, (2 * HALF_TAPS, 1)), eeg]), ratio)
        elif isinstance(step, Channels):
            eeg = _mixed(eeg, mixing_matrix(names, signal)[0])
            before = eeg[0]
        elif isinstance(step, StreamStep):
            eeg = run_offline(step.causal(at), eeg.T).T
            before = eeg[0]
    if sections:
        eeg, _ = _filtered(eeg, np.concatenate(sections), before, restarts)
    return np.ascontiguousarray(eeg.T, dtype=np.float32)


def _filtered(
    eeg: NDArray[np.float64],
    sos: NDArray[np.float64],
    before: NDArray[np.float64],
    restarts: list[tuple[int, NDArray[np.intp], NDArray[np.float64]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a stretch through second-order sections, with restarts of channels, and what comes out of `before` for ever."""
    from scipy.signal import sosfilt, sosfilt_zi

    if not len(sos):
        return eeg, before
    steady = sosfilt_zi(sos)[:, :, None]
    state, filtered, rows = steady * before, [], [*(row for row, _, _ in restarts), len(eeg)]
    for k, piece in enumerate(np.split(eeg, rows[:-1])):
        if len(piece):
            piece, state = sosfilt(sos, piece, axis=0, zi=state)
        filtered.append(piece)
        if k < len(restarts):
            _, channels, sample = restarts[k]
            state = state.copy()
            state[:, :, channels] = steady * sample[channels]
    return np.concatenate(filtered), float(np.prod(sos[:, :3].sum(axis=1) / sos[:, 3:].sum(axis=1))) * before


def _mixed(eeg: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the model's channels, shape (n_samples, n_chans of the model)."""
    mixed = np.empty((len(eeg), len(matrix)))
    for channel, weights in enumerate(matrix):
        used = np.flatnonzero(weights)
        alone = len(used) == 1 and weights[used[0]] == 1.0
        mixed[:, channel] = eeg[:, used[0]] if alone else (np.ascontiguousarray(eeg) * weights).sum(axis=1)
    return mixed


def _held_and_restarted(
    signal: NDArray[np.float64], sfreq: float, volt: float
) -> tuple[NDArray[np.float64], list[tuple[int, NDArray[np.intp], NDArray[np.float64]]]]:
    """Return the signal with the last finite value in place of what is not finite, and where channels are filtered anew.

    A channel that was bad starts anew on the newest sample when it is good again. Each restart is the row before which it
    happens, the channels, and the sample on whose steady state they start.
    """
    missing = ~np.isfinite(signal)
    last = np.maximum.accumulate(np.where(missing, -1, np.arange(len(signal))[:, None]), axis=0)
    held = np.where(last < 0, 0.0, np.take_along_axis(signal, np.maximum(last, 0), axis=0))
    quality = ChannelQuality(signal.shape[1], sfreq, volt)
    size, restarts = quality.room, []
    codes = np.zeros(signal.shape[1], np.int8)
    now = spoilt = np.zeros(signal.shape[1], np.bool_)

    def judge(row: int, sample: NDArray[np.float64]) -> None:
        nonlocal codes
        verdict = np.where(now, ChannelState.NAN, quality.codes).astype(np.int8)
        recovered = np.flatnonzero((verdict == ChannelState.OK) & (codes != ChannelState.OK))
        codes = verdict
        if len(recovered):
            restarts.append((row, recovered, sample))

    changes = np.flatnonzero((missing[1:] != missing[:-1]).any(axis=1)) + 1
    for stop in sorted({0, *changes.tolist(), *range(size, len(signal) + 1, size)}):
        if stop and stop % size == 0:
            quality.take(held[stop - size : stop])
            quality.codes[spoilt] = ChannelState.OK
            spoilt = now
            judge(stop, held[stop - 1])
        if stop < len(signal) and not np.array_equal(missing[stop], now):
            now = missing[stop]
            spoilt = spoilt | now
            judge(stop, held[stop])
    return held, restarts


def _between_samples(signal: NDArray[np.float64], ratio: Fraction) -> NDArray[np.float64]:
    """Return `signal` at every 1 / ratio samples, by a sinc in a Kaiser window about each, `HALF_TAPS` samples late."""
    n_out = math.ceil((len(signal) - 2 * HALF_TAPS) * ratio)
    out = np.zeros((n_out, signal.shape[1]))
    for k in range(n_out):
        at = k / ratio + HALF_TAPS  # in rows of `signal`, which starts 2 * HALF_TAPS before the stream
        before = math.floor(at)
        away = np.arange(-HALF_TAPS + 1, HALF_TAPS + 1) - float(at - before)
        weights = np.sinc(away) * np.i0(8 * np.sqrt(np.clip(1 - (away / HALF_TAPS) ** 2, 0, None))) / np.i0(8.0)
        weights = weights / weights.sum()
        for weight, row in zip(weights, signal[before - HALF_TAPS + 1 :], strict=False):
            out[k] += weight * row
    return out


def _beside_zero_phase(
    raw: mne.io.BaseRaw, predict: Predictor, hop: int, live: NDArray[np.float64], *, interpolate: float
) -> dict[str, Any]:
    spec = predict.spec
    try:
        fitted = fit_recording(raw, spec.signal, interpolate=interpolate, check_unit=False, phase="zero-phase")
    except TooShortError:
        return {"correlation": None, "difference": None, "flips": None}
    zero_phase = predict.predict(np.ascontiguousarray(np.concatenate(fitted.windows(hop)))).astype(np.float64)
    n = min(len(live), len(zero_phase))
    a, b = live[:n].reshape(n, -1), zero_phase[:n].reshape(n, -1)
    centred_a, centred_b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = np.sqrt((centred_a**2).sum(axis=0) * (centred_b**2).sum(axis=0))
    correlation = (centred_a * centred_b).sum(axis=0) / np.where(norm > 0, norm, 1.0)
    spread = float(np.sqrt((centred_b**2).mean())) or 1.0
    return {
        "correlation": float(correlation.min()),
        "difference": float(np.sqrt(((a - b) ** 2).mean())) / spread,
        "flips": float((a.argmax(axis=1) != b.argmax(axis=1)).mean()) if a.shape[1] > 1 and live.ndim == 2 else None,
    }


def _chunking(chunk: str) -> int | Callable[[], int]:
    if chunk != "random":
        return int(chunk)
    rng = np.random.default_rng(0)
    return lambda: int(rng.integers(1, 500))
