"""Tells when decisions are late because samples waited in the source, as in the blocks that an amplifier sends."""

from __future__ import annotations

import math
from collections import Counter, deque

N_CHUNKS = 16
"""Chunks by whose sizes the size of the source's blocks is known."""

N_LATE = 3
"""Windows that were late on arrival after which the source is named as the cause."""

IDLE_S = 0.001
"""Seconds between the end of the last call and the arrival of a chunk from which on the decoder has waited for the source."""

MOST_WAITING_S = 2.0
"""Seconds beyond which samples did not wait in blocks: their stamps are wrong, or the network is."""

MARGIN = 1.25
"""Times the age on arrival that a deadline should be."""


class Waiting:
    """Learns in which blocks a source sends its samples, and how old they are on arrival.

    Parameters
    ----------
    sfreq : float
        Rate of the source in Hz.
    deadline : float
        Seconds after a window's newest sample by which its decision is due.
    """

    def __init__(self, sfreq: float, deadline: float) -> None:
        self._sfreq, self._deadline = sfreq, deadline
        self._sizes: deque[int] = deque(maxlen=4 * N_CHUNKS)
        self._done = -math.inf  # when the last call ended
        self._took = 0.0
        self._oldest, self._n_late = 0.0, 0

    def chunk(self, n: int) -> None:
        """Take note of a chunk of n samples."""
        self._sizes.append(n)

    def done(self, at: float, took: float | None = None) -> None:
        """Take note of when a window was done, on the source's clock, and of the seconds that the backend took, if called."""
        self._done = at
        if took is not None:
            self._took = took

    def late(self, stamp: float, received: float) -> bool:
        """Take note of a window that got no decision in time. Return whether the source is named as the cause from now on."""
        age = received - stamp
        waited = received - self._done > IDLE_S  # or the chunk may have lain here
        if waited and self._deadline - self._took < age < MOST_WAITING_S and self._took < age:
            self._oldest = max(self._oldest, age)
            self._n_late += 1
            return self._n_late == N_LATE
        return False

    @property
    def block(self) -> float | None:
        """Return the length of the source's blocks in seconds; None if it sends no blocks, or that is not known."""
        if len(self._sizes) < N_CHUNKS:
            return None
        (size, n), *_ = Counter(self._sizes).most_common(1)
        return size / self._sfreq if size > 1 and n > len(self._sizes) / 2 else None

    @property
    def advice(self) -> str | None:
        """Return what makes decisions late in the source, and the deadline that suits it; None without such a cause."""
        if self._n_late < N_LATE:
            return None
        wanted = MARGIN * (self._oldest + self._took)
        step = 10.0 ** (math.floor(math.log10(wanted)) - 1)
        blocks = "" if self.block is None else f"The source sends blocks of {self.block * 1e3:.3g} ms. "
        deadline = f"{math.ceil(wanted / step) * step:.2g}"
        return f"{blocks}Samples are up to {self._oldest:.2g} s old on arrival: use --deadline {deadline}."
