"""Judges whether the channels of a stream carry EEG at present."""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray


class ChannelState(enum.IntEnum):
    """Names what is wrong with a channel, if anything."""

    OK = 0
    FLAT = 1
    SATURATED = 2
    NOISY = 3
    NAN = 4
    MISSING = 5


FLAT_V = 1e-7
"""Peak to peak in volts below which half a second of a channel is flat: EEG has 10 uV, an amplifier's own noise 0.3 uV."""

ROUNDING_V = 1e-16
"""Standard deviation in volts below which a channel is constant but for rounding: EEG in volts taken for nanovolts has 1e-15."""

RAIL_V = 0.1
"""A flat channel beyond this is saturated: electrode offsets are up to 50 mV."""

NOISY_V = 1e-3
"""Standard deviation in volts above which a channel is disconnected: blinks reach 0.1 mV, an open input mains hum of several."""

CLIPPED = 0.25
"""Share of samples at exactly the largest or the smallest value from which on a channel is saturated."""

BLOCK_S = 0.5
"""Channels are judged by blocks of this many seconds, counted from the start, whatever the chunks."""

REASONS = {
    ChannelState.OK: "good",
    ChannelState.FLAT: "flat",
    ChannelState.SATURATED: "saturated",
    ChannelState.NOISY: "disconnected, or very noisy",
    ChannelState.NAN: "not finite",
    ChannelState.MISSING: "named as bad",
}
"""Names each state of a channel in words."""

Codes = NDArray[np.int8]


def flat_seconds(volts: NDArray[np.float64], sfreq: float) -> NDArray[np.bool_]:
    """Return for each whole second of a recording, shape (n_chans, n_samples), whether half of its channels or more are flat."""
    n = max(2, round(sfreq))
    starts = np.arange(0, volts.shape[1] - n + 1, n)
    whole = volts[:, : len(starts) * n]
    if not len(starts):
        return np.zeros(0, np.bool_)
    range_of = np.maximum.reduceat(whole, starts, axis=1) - np.minimum.reduceat(whole, starts, axis=1)
    flat: NDArray[np.bool_] = np.median(range_of, axis=0) < FLAT_V
    return flat


class ChannelQuality:
    """Judges channels block by block.

    Parameters
    ----------
    n_chans : int
        Number of channels.
    sfreq : float
        Rate in Hz.
    volt : float
        A volt in the unit of the samples.

    Attributes
    ----------
    codes : ndarray of int8, shape (n_chans,)
        The verdict on the last whole block, all good before that.
    spread : ndarray, shape (n_chans,)
        Standard deviation in that block, in volts.
    """

    def __init__(self, n_chans: int, sfreq: float, volt: float) -> None:
        self._block = np.empty((max(2, round(BLOCK_S * sfreq)), n_chans))
        self._volt = volt
        self.spread = np.zeros(n_chans)
        self.codes: Codes = np.zeros(n_chans, np.int8)
        self._filled = 0

    def restart(self) -> None:
        """Begin a new block: what came before the next sample does not belong to it."""
        self._filled = 0

    @property
    def room(self) -> int:
        """Return how many samples the block still takes."""
        return len(self._block) - self._filled

    def take(self, samples: NDArray[np.float64]) -> bool:
        """Take up to `room` samples, shape (n_samples, n_chans), and return whether the block is full and was judged."""
        stop = self._filled + len(samples)
        self._block[self._filled : stop] = samples
        self._filled = stop
        if stop < len(self._block):
            return False
        self._filled = 0
        self.codes = self._judge()
        return True

    def _judge(self) -> Codes:
        block, volt = self._block, self._volt
        low, high = block.min(axis=0), block.max(axis=0)
        flat = high - low < FLAT_V * volt
        at_rail = ((block == high) | (block == low)).mean(axis=0) > CLIPPED
        codes = np.zeros(block.shape[1], np.int8)
        self.spread = np.where(high > low, block.std(axis=0) / volt, 0.0)  # not the rounding of a constant
        codes[self.spread > NOISY_V] = ChannelState.NOISY
        codes[at_rail | (np.maximum(-low, high) > RAIL_V * volt)] = ChannelState.SATURATED
        codes[flat & (np.abs(high) <= RAIL_V * volt)] = ChannelState.FLAT
        return codes
