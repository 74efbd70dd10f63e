"""Fits recordings to what a model expects, stretch by stretch, so that memory does not grow with a recording."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sjepa_deploy.eeg.amplitudes import UNIT_MEND, median_rms, refuse_rms
from sjepa_deploy.eeg.chain import ZeroPhase, finish_windows, flows_of
from sjepa_deploy.eeg.conditioning import Conditioner
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.names import find_channels, says_other_than_eeg
from sjepa_deploy.eeg.pauses import Segment, segments_of, told
from sjepa_deploy.eeg.places import check_places, interpolation_of
from sjepa_deploy.eeg.quality import flat_seconds
from sjepa_deploy.eeg.readers import reading
from sjepa_deploy.eeg.steps import BandPass, Flow, Phase, Resample
from sjepa_deploy.eeg.steps.filters import Filter
from sjepa_deploy.eeg.steps.rate import check_rate
from sjepa_deploy.eeg.units import volts_in
from sjepa_deploy.eeg.windows import Fitted
from sjepa_deploy.errors import RecordingError, StreamError, TooShortError, listed
from sjepa_deploy.spec import SignalSpec

if TYPE_CHECKING:
    import mne
    from numpy.typing import NDArray

STRETCH = 1 << 22
"""Samples, of all channels together, that are read at once: 32 MiB in float64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedStretches(Fitted):
    """Reads a recording stretch by stretch as a model expects it: memory does not grow with the recording.

    Attributes
    ----------
    pieces : callable
        Returns the fitted samples, in the unit and the channel order of the model, in pieces of shape (n_chans, n) that follow
        each other. A call reads the recording.
    changes : Changes
        Changes of channels that were found so far.
    """

    pieces: Callable[[], Iterator[NDArray[np.float32]]]
    changes: Changes

    def cut(self, starts: NDArray[np.intp], n: int) -> Iterator[NDArray[np.float32]]:
        """Read the recording, and return the windows that begin at fitted samples, with all steps.

        Parameters
        ----------
        starts : ndarray of int, shape (n_windows,)
            The first sample of each window, in ascending order.
        n : int
            Most windows that are returned at once.

        Yields
        ------
        ndarray of float32, shape (1 to n, n_chans, n_times)
            The windows, in the order of `starts`; n of them but for the last ones.
        """
        n_times, n_done, first = self.signal.n_times, 0, 0
        held = np.empty((self.signal.n_chans, 0), np.float32)
        batch: list[NDArray[np.float32]] = []
        for piece in self.pieces():
            held = np.concatenate([held, piece], axis=1)
            n_ready = int(np.searchsorted(starts, first + held.shape[1] - n_times, "right"))
            for start in starts[n_done:n_ready] - first:
                batch.append(held[:, start : start + n_times].copy())
                if len(batch) == n:
                    yield finish_windows(self.signal, np.stack(batch))
                    batch = []
            n_done = n_ready
            gone = held.shape[1] if n_done == len(starts) else min(max(int(starts[n_done]) - first, 0), held.shape[1])
            held, first = held[:, gone:], first + gone
        if batch:
            yield finish_windows(self.signal, np.stack(batch))


class Changes:
    """Collects sentences on changes of channels: the first 20, and the number of all others."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._n = 0

    def __call__(self, sentence: str) -> None:
        """Add a sentence."""
        self._n += 1
        if self._n <= 20:
            self._first.append(sentence)

    @property
    def told(self) -> tuple[str, ...]:
        """Return the sentences."""
        more = [f"{self._n - 20} more changes of channels"] if self._n > 20 else []
        return (*dict.fromkeys(self._first), *more)


def fit_stretches(
    raw: mne.io.BaseRaw,
    signal: SignalSpec,
    *,
    interpolate: float = 0.0,
    check_unit: bool = True,
    phase: Phase | None = None,
    n_values: float = STRETCH,
) -> FittedStretches:
    """Prepare to take a recording through the steps of a signal stretch by stretch.

    The call reads the recording once and judges all of it: what is refused is refused here. The causal phase gives the bits of
    `sjepa_deploy.eeg.recording.fit_recording`. Zero phase gives its samples but for 1e-6 of their RMS.

    Parameters
    ----------
    raw, signal, interpolate, check_unit, phase
        See `sjepa_deploy.eeg.recording.fit_recording`.
    n_values : float
        Samples, of all channels together, that are read at once; at least a second is.

    Raises
    ------
    RecordingError
        See `sjepa_deploy.eeg.recording.fit_recording`.
    """
    sfreq = float(raw.info["sfreq"])
    check_rate(sfreq, signal.sfreq)
    phase = phase or signal.phase
    steps: list[str] = list(told(raw).notes)
    segments = _long_enough(raw, signal, phase, steps)
    source = _match_channels(raw, signal, interpolate, steps)
    second = max(2, round(sfreq))
    size = int(max(1, min(n_values / len(raw.ch_names), raw.n_times) // second)) * second
    _judge(raw, source, size, steps, amplitude=check_unit and phase == "zero-phase")
    size = max(size, raw.n_times) if n_values == math.inf else size
    changes, n_settling = Changes(), 0
    if phase == "causal":
        conditioner = _conditioner(raw, signal, check_unit, interpolate, lambda _: None)
        n_settling = conditioner.n_settling
        for _ in _causal(conditioner, raw, segments, min(size, 10 * second)):
            if conditioner.knows_unit:
                break

    def pieces() -> Iterator[NDArray[np.float32]]:
        made = (
            _causal(_conditioner(raw, signal, check_unit, interpolate, changes), raw, segments, size)
            if phase == "causal"
            else _zero_phase(raw, signal, source, segments, size)
        )
        for piece in made:
            yield np.ascontiguousarray(piece, dtype=np.float32)

    flow = Flow(ch_names=source.names, sfreq=sfreq, goal=signal.goal)
    fitted, start = [], 0
    for segment in segments:
        n = segment.stop - segment.start
        for step, at in zip(signal.steps, flows_of(signal, flow), strict=True):
            if isinstance(step, Resample):
                n = step.n_times(n, at, phase)
        fitted.append(Segment(start=start, stop=start + n, onset=segment.onset))
        start += n
    for step, at in zip(signal.steps, flows_of(signal, flow), strict=True):
        if phrase := step.told(at):
            form = {"causal": ", causal", "zero-phase": ", zero-phase FIR"}[phase] if isinstance(step, Filter) else ""
            steps.append(f"{phrase}{form}")
    steps.append(f"scaled to {signal.unit}")
    return FittedStretches(
        signal=signal,
        segments=tuple(fitted),
        source_sfreq=sfreq,
        n_found=source.n_found,
        n_settling=n_settling,
        steps=tuple(steps),
        pieces=pieces,
        changes=changes,
    )


def _read(raw: mne.io.BaseRaw, start: int, stop: int, picks: Sequence[str] | None = None) -> NDArray[np.float64]:
    """Read samples, shape (n_chans, n_samples). A file that is read here is told damaged here."""
    with contextlib.nullcontext() if raw.preload else reading(Path(raw.filenames[0]).name):
        samples: NDArray[np.float64] = raw.get_data(None if picks is None else list(picks), start, stop)
    return samples


def _judge(raw: mne.io.BaseRaw, source: _Source, size: int, steps: list[str], *, amplitude: bool) -> None:
    """Refuse samples that are not finite or no EEG, and tell of flat seconds. `size` is a number of whole seconds in samples."""
    sfreq = raw.info["sfreq"]
    finite = np.ones(len(source.picks), np.bool_)
    flat: list[NDArray[np.bool_]] = []
    rms: list[NDArray[np.float64]] = []
    for start in range(0, raw.n_times, size):
        samples = _read(raw, start, min(start + size, raw.n_times), source.picks)
        if not (these := np.isfinite(samples).all(axis=1)).all():
            finite &= these
            continue
        flat.append(flat_seconds(samples, sfreq))
        if amplitude and (start == 0 or samples.shape[1] >= sfreq):
            rms.append(median_rms(samples, sfreq))
    if not finite.all():
        broken = [name for name, ok in zip(source.names, finite, strict=True) if not ok]
        raise RecordingError(
            f"The recording holds samples that are not finite (NaN or infinite) in {listed(broken)}.",
            "Cut these stretches out, or mark these channels as bad.",
        )
    seconds = np.concatenate(flat)
    if seconds.any():
        steps.append(f"is flat in {seconds.sum()} of its {len(seconds)} seconds, the first of them number {seconds.argmax()}")
    if amplitude:
        refuse_rms(np.concatenate(rms), "seconds", UNIT_MEND)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Source:
    """Holds which channels of a recording are used.

    Attributes
    ----------
    picks, names : tuple of str
        The channels, and their names as the model writes them.
    matrix : ndarray, shape (n_chans of the model, len(picks))
        The model's channels from these, in zero phase.
    n_found : int
        Channels of the model that are among them.
    """

    picks: tuple[str, ...]
    names: tuple[str, ...]
    matrix: NDArray[np.float64]
    n_found: int


def _zero_phase(
    raw: mne.io.BaseRaw, signal: SignalSpec, source: _Source, segments: Sequence[Segment], size: int
) -> Iterator[NDArray[np.float64]]:
    flow = Flow(ch_names=source.names, sfreq=raw.info["sfreq"], goal=signal.goal)
    single = ((source.matrix != 0).sum(axis=1) == 1) & (source.matrix.max(axis=1) == 1.0)

    def fit_channels(data: NDArray[np.float64], at: Flow) -> NDArray[np.float64]:
        fitted: NDArray[np.float64] = data[source.matrix.argmax(axis=1)]
        fitted[~single] = source.matrix[~single] @ data
        return fitted

    for segment in segments:
        chain = ZeroPhase(signal, flow, fit_channels)
        for start in range(segment.start, segment.stop, size):
            stop = min(start + size, segment.stop)
            yield chain(_read(raw, start, stop, source.picks) / volts_in(signal.unit), last=stop == segment.stop)


def _conditioner(
    raw: mne.io.BaseRaw, signal: SignalSpec, check_unit: bool, interpolate: float, report: Callable[[str], object]
) -> Conditioner:
    info = StreamInfo(name="The recording", ch_names=tuple(raw.ch_names), sfreq=raw.info["sfreq"], unit="V")
    try:
        return Conditioner(signal, info, interpolate=interpolate, bads=raw.info["bads"], check_unit=check_unit, report=report)
    except StreamError as e:
        raise RecordingError(e.problem, e.mend) from e


def _causal(
    conditioner: Conditioner, raw: mne.io.BaseRaw, segments: Sequence[Segment], size: int
) -> Iterator[NDArray[np.float64]]:
    for segment in segments:
        conditioner.restart()
        for start in range(segment.start, segment.stop, size):
            samples = conditioner.pick(np.ascontiguousarray(_read(raw, start, min(start + size, segment.stop)).T))
            made, done = [], 0
            while done < len(samples):
                try:
                    out, _, n_taken = conditioner.take(samples[done:])
                    conditioner.judge()
                except StreamError as e:
                    raise RecordingError(e.problem, e.mend) from e
                made.append(out)
                done += n_taken
            yield np.concatenate(made).T


def _long_enough(raw: mne.io.BaseRaw, signal: SignalSpec, phase: Phase, steps: list[str]) -> list[Segment]:
    """Return the stretches without a pause that hold a window and, in zero phase, the filter."""
    sfreq = raw.info["sfreq"]
    segments = segments_of(raw)
    bands = [step for step in signal.steps if isinstance(step, BandPass)] if phase == "zero-phase" else []
    filter_s, band = max(((step.length(sfreq), step.band) for step in bands), default=(0.0, ""))
    length = signal.seconds
    kept = [s for s in segments if (s.stop - s.start) / sfreq >= max(length, filter_s) - 1e-9]
    if not kept:
        longest = max((s.stop - s.start for s in segments), default=0) / sfreq
        what = "recording lasts" if len(segments) < 2 else f"longest of {len(segments)} stretches between pauses lasts"
        if longest < length - 1e-9:
            raise RecordingError(f"The {what} {longest:g} s, one window of the model {length:g} s.", "Give a longer recording.")
        raise TooShortError(
            f"The filter for {band} lasts {filter_s:.3g} s, the {what.removesuffix(' lasts')} {longest:.3g} s.",
            "Give a longer recording.",
        )
    if len(segments) > 1:
        steps.append(f"cut at {len(segments) - 1} pauses, over which no window reaches")
    if short := len(segments) - len(kept):
        seconds = sum(s.stop - s.start for s in segments) - sum(s.stop - s.start for s in kept)
        steps.append(f"left out {short} stretches between pauses ({seconds / sfreq:.3g} s), shorter than a window or the filter")
    return kept


def _match_channels(raw: mne.io.BaseRaw, signal: SignalSpec, interpolate: float, steps: list[str]) -> _Source:
    """Return which channels of a recording make the model's."""
    if signal.ch_names is None:
        raise RecordingError(
            "The model has no channel names, so the recording's montage cannot be checked against it.",
            "Export the bundle with `--montage` or `--channels`.",
        )
    good = [name for name in raw.ch_names if name not in raw.info["bads"]]
    match = find_channels(signal.ch_names, good)
    found = {mine: good[i] for mine, i in zip(signal.ch_names, match.columns, strict=True) if i is not None}
    missing = [name for name in signal.ch_names if name not in found]
    for name, several in match.doubtful:
        if len({one.casefold() for one in several}) == 1:
            raise RecordingError(
                f"The recording's channels {listed(several)} differ in case only.", "Rename or drop one of them."
            )
        steps.append(f"took none of {listed(several)} as {name}: it could be each of them")
    there = f"it has {listed(raw.ch_names, 64)}"
    doubts = "".join(f"; {name} could be each of {listed(several)}" for name, several in match.doubtful)
    notes = "".join(f"; {note}" for note in told(raw).notes)
    if missing and not interpolate:
        raise RecordingError(
            f"The recording lacks, or marks as bad, {len(missing)} of the model's {signal.n_chans} channels: {listed(missing)}; "
            f"{there}{doubts}{notes}.",
            "Record with the model's montage, give channels the model's names with `--rename THEIRS=MINE`, or make them from the "
            "others with `--interpolate`.",
        )
    if len(missing) > interpolate * signal.n_chans + 1e-9:
        share = math.ceil(100 * len(missing) / signal.n_chans) / 100
        raise RecordingError(
            f"{len(missing)} of {signal.n_chans} channels of the model would be interpolated, more than {interpolate:g}; "
            f"{there}{doubts}{notes}.",
            f"Use a model of the recording's channels, `--rename`, or `--interpolate {share:g}` to take such EEG all the same.",
        )
    check_places(raw, signal, found)
    if match.aliases:
        steps.append(f"took {listed(f'{theirs} as {mine}' for theirs, mine in match.aliases)}")
    theirs = {name: mine for mine, name in found.items()}
    picks = [name for name in good if name in theirs or signal.uses(name, says_other_than_eeg(name))]
    if not missing:
        if unused := [name for name in good if name not in picks]:
            steps.append(f"left out {len(unused)} channels: {listed(unused)}")
        matrix = np.zeros((signal.n_chans, len(picks)))
    else:
        sources, weights = interpolation_of(raw, signal, steps)
        picks += [name for name in sources if name not in picks]
        matrix = np.zeros((signal.n_chans, len(picks)))
        matrix[:, [picks.index(name) for name in sources]] = weights
        steps.append(f"interpolated {len(missing)} of {signal.n_chans} channels: {listed(missing)}")
    for row, mine in enumerate(signal.ch_names):
        if mine in found:
            matrix[row] = 0.0
            matrix[row, picks.index(found[mine])] = 1.0
    names = tuple(theirs.get(name, name) for name in picks)
    return _Source(picks=tuple(picks), names=names, matrix=matrix, n_found=len(found))
