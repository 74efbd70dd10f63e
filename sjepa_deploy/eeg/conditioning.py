"""Conditions a live stream: samples as they were received become samples as the model expects them.

`sjepa_deploy.eeg.recording.fit_recording` conditions recordings with the same code where the phase is causal. There is no clock:
the output depends on the samples alone, and not on how they were cut into chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.chain import Chain, settling_time
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.interpolation import LEAST_GOOD, match_channels, mixing_matrix
from sjepa_deploy.eeg.quality import REASONS, ROUNDING_V, ChannelQuality, ChannelState
from sjepa_deploy.eeg.units import PLAUSIBLE_RMS, conversion, volts_in
from sjepa_deploy.errors import RecordingError, StreamError, listed
from sjepa_deploy.spec import SignalSpec

BadChannels = Literal["flag", "repair", "stop"]
"""Says what happens to channels that turn bad: they are named; also interpolated while they are bad; or they end the stream."""

FloatArray = NDArray[np.float64]


class Conditioner:
    """Picks and scales the channels of a stream, filters them, reduces their rate, and watches their quality.

    Give the samples of a stream to `take` in their order. After each `take` call `judge`: a decision on the samples need not wait
    for the verdict on their channels.

    Parameters
    ----------
    signal : SignalSpec
        The signal of the model.
    info : StreamInfo
        The stream.
    interpolate : float
        Largest share of the model's channels that is interpolated where the stream lacks them; more are an error.
    bads : sequence of str
        Channels of the stream that are known to be bad: they count as lacking.
    bad_channels : {"flag", "repair", "stop"}
        What happens to channels that turn bad.
    check_unit : bool
        Whether amplitudes that no EEG has end the stream.
    report : callable
        Called with one sentence for every change of a channel.

    Attributes
    ----------
    ch_names, missing : tuple of str
        Channels of the stream that are used, and channels of the model that are made from them.
    delay : AlgorithmicDelay
        Delay of the steps.
    n_settling : int
        Samples at the model's rate after a start in which the steps settle, see `settling_time`.
    codes : ndarray of int8, shape (len(ch_names),)
        The `ChannelState` of each channel now.
    interpolated : tuple of str
        Channels of the model that are made from others now: `missing`, and those that are repaired.
    n_non_finite : int
        Values so far that were NaN or infinite.

    Raises
    ------
    StreamError
        If the stream does not fit the model.
    """

    def __init__(
        self,
        signal: SignalSpec,
        info: StreamInfo,
        *,
        interpolate: float = 0.0,
        bads: Sequence[str] = (),
        bad_channels: BadChannels = "flag",
        check_unit: bool = True,
        report: Callable[[str], object],
    ) -> None:
        self._signal, self._info, self._report = signal, info, report
        self._columns, self.ch_names, self.missing = match_channels(signal, info, interpolate=interpolate, bads=bads)
        self._all_columns = np.array_equal(self._columns, np.arange(len(info.ch_names)))
        self._policy: BadChannels = bad_channels
        if bad_channels == "repair" and signal.positions is None:
            raise StreamError("The bundle holds no positions to repair channels by.", "Use `--bad-channels flag`.")
        matrix, self.interpolated = mixing_matrix(self.ch_names, signal)
        try:
            self._chain = Chain(signal, self.ch_names, info.sfreq, matrix)
        except RecordingError as e:
            raise StreamError(e.problem, e.mend) from e
        self.delay, self.ratio = self._chain.delay, self._chain.ratio
        self.n_settling = math.ceil(settling_time(signal, info.sfreq) * signal.sfreq)
        self._scale = np.float64(conversion(info.unit, signal.unit))
        self._quality = ChannelQuality(len(self.ch_names), info.sfreq, 1 / volts_in(signal.unit))
        n = len(self.ch_names)
        self.codes = np.zeros(n, np.int8)
        self._looks = self.codes  # without what was named
        self.n_non_finite = 0
        self._non_finite = self._spoilt = np.zeros(n, bool)  # now, and somewhere in this block
        self._named = np.zeros(n, bool)
        self._any_non_finite = False
        self._newest = np.zeros(n)
        self._n_made = 0
        self._bad_until = np.full(n, -(2**62))  # samples made when a channel was last bad
        self._any_bad = False
        self._any_bad_until = -(2**62)
        self._started, self._plausible = False, not check_unit
        self._n_taken = 0

    def pick(self, samples: NDArray[Any]) -> FloatArray:
        """Return the channels that are used, in the model's unit.

        Parameters
        ----------
        samples : ndarray, shape (n_samples, n_chans of the stream)
            In the stream's unit and type.
        """
        scaled: FloatArray = (samples if self._all_columns else samples[:, self._columns]) * self._scale
        return scaled

    def take(self, samples: FloatArray) -> tuple[FloatArray, list[int], int]:
        """Condition samples from `pick` that follow the last ones: as many as can be judged together.

        Returns
        -------
        made : ndarray, shape (n_made, n_chans of the model)
            Samples at the model's rate.
        rows : list of int
            The row of `samples` after which each of them came out.
        n_taken : int
            Rows that were taken; give the others again.
        """
        piece = samples[: self._quality.room]
        finite = np.isfinite(piece)
        if self._any_non_finite or not finite.all():
            piece = self._without_non_finite(piece, finite)
        if not self._started:
            self._chain.start(piece[0])
            self._started = True
        made, rows = self._chain(piece)
        self._n_made += len(made)
        if self._any_bad:
            self._bad_until[self.codes != ChannelState.OK] = self._any_bad_until = self._n_made
        self._piece, self._newest = piece, piece[-1]
        self._n_taken += len(piece)
        return made, rows, len(piece)

    def judge(self) -> bool:
        """Judge the channels by the samples of the last `take`, at the end of every `BLOCK_S`.

        Returns
        -------
        bool
            Whether a block was judged.

        Raises
        ------
        StreamError
            If a channel turned bad and bad channels end the stream, or if the amplitudes are none of EEG in the stream's unit.
        """
        if not self._quality.take(self._piece):
            return False
        self._quality.codes[self._spoilt] = ChannelState.OK  # they are held, not flat
        self._spoilt = self._non_finite
        if not self._plausible:
            self._check_unit()
        self._update(self._newest)
        return True

    def name_bads(self, names: Sequence[str]) -> None:
        """Count these channels of the stream as bad from the next sample on, and no others but those that look bad.

        Raises
        ------
        StreamError
            If there are no such channels, bad channels end the stream, or too few others are left to repair the channels by.
        """
        number = {name.casefold(): i for i, name in enumerate(self.ch_names)}
        if unknown := sorted({name for name in names if name.casefold() not in number}):
            raise StreamError(f"{self._info.name} has no channels {listed(unknown)} that the model uses.", "Name others.")
        named = np.zeros(len(number), bool)
        named[[number[name.casefold()] for name in names]] = True
        if named.any() and self._policy == "stop":
            raise StreamError("A bad channel would end this stream.", "Use another --bad-channels.")
        if self._policy == "repair":
            bad = [name for name, is_bad in zip(self.ch_names, named | (self.codes != ChannelState.OK), strict=True) if is_bad]
            if len(self.ch_names) - len(bad) < LEAST_GOOD:
                raise StreamError(f"{len(bad)} channels would be bad, too many to repair.", "Name fewer channels.")
            mixing_matrix(self.ch_names, self._signal, bad)
        self._named = named
        self._update(self._newest)

    def restart(self) -> None:
        """Start anew: the next sample does not follow the last one."""
        self._started = False
        self._spoilt = self._non_finite
        self._quality.restart()

    @property
    def knows_unit(self) -> bool:
        """Return whether the amplitudes were judged, or need not be."""
        return self._plausible

    def bad_in_newest(self, n: int) -> tuple[str, ...]:
        """Return the channels of the stream that were bad somewhere in the newest `n` samples that were made."""
        if self._n_made - self._any_bad_until >= n:
            return ()
        return tuple(self.ch_names[c] for c in np.flatnonzero(self._n_made - self._bad_until < n))

    def _without_non_finite(self, piece: FloatArray, finite: NDArray[np.bool_]) -> FloatArray:
        """Return the first rows in which the same channels are not finite, with the last finite value in their place."""
        missing = ~finite[0]
        changes = np.flatnonzero((finite != finite[0]).any(axis=1))
        piece = piece[: changes[0] if len(changes) else None].copy()
        self.n_non_finite += int(missing.sum()) * len(piece)
        piece[:, missing] = self._newest[missing]
        self._spoilt = self._spoilt | missing
        if not np.array_equal(missing, self._non_finite):
            self._non_finite, self._any_non_finite = missing, bool(missing.any())
            self._update(piece[0])
        return piece

    def _update(self, sample: FloatArray) -> None:
        """Bring the verdicts on the channels up to date, and act on those that changed."""
        looks = np.where(self._non_finite, ChannelState.NAN, self._quality.codes).astype(np.int8)
        # a channel that was only named as bad has filtered its own samples all along
        recovered = np.flatnonzero((looks == ChannelState.OK) & (self._looks != ChannelState.OK))
        self._looks = looks
        if len(recovered) and self._started:
            self._chain.restart_channels(recovered.tolist(), sample)
        codes = looks.copy()
        codes[self._named] = ChannelState.MISSING
        changed = np.flatnonzero(codes != self.codes)
        if not len(changed):
            return
        for c in changed:
            was, now = REASONS[ChannelState(self.codes[c])], REASONS[ChannelState(codes[c])]
            self._report(f"{self.ch_names[c]} is {now}" + (f" again, it was {was}." if codes[c] == ChannelState.OK else "."))
        self.codes = codes
        bad = [name for name, code in zip(self.ch_names, codes, strict=True) if code != ChannelState.OK]
        if bad and self._policy == "stop":
            raise StreamError(
                f"{listed(bad)} turned bad ({REASONS[ChannelState(max(codes))]}).",
                "Mend the electrodes, or use another --bad-channels.",
            )
        self._any_bad = bool(bad)
        if self._policy == "repair":
            if len(self.ch_names) - len(bad) < LEAST_GOOD:
                self._report(f"{len(bad)} channels are bad, too many to repair.")
                bad = []
            matrix, self.interpolated = mixing_matrix(self.ch_names, self._signal, bad)
            self._chain.set_matrix(matrix)

    def _check_unit(self) -> None:
        """Refuse amplitudes that no EEG has in the stream's unit: volts taken for microvolts change outputs without any error."""
        alive = self._quality.spread[(self._quality.spread > ROUNDING_V) & ~self._non_finite]
        self._plausible = len(alive) > 0
        if self._plausible and not PLAUSIBLE_RMS[0] <= float(np.median(alive)) <= PLAUSIBLE_RMS[1]:
            raise StreamError(
                f"The median channel of {self._info.name} has an RMS of {np.median(alive) * 1e6:.3g} uV "
                f"{self._n_taken / self._info.sfreq:.3g} s after the start when taken as {self._info.unit}, which is no EEG.",
                "State the unit that the samples are really in with `--unit`, or take them as they are with `--no-check-unit`.",
            )
