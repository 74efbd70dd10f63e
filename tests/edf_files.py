"""Writes EDF files as devices write them, and as writers of libraries would not: other units, rates a channel, pauses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_edf(
    path: Path,
    labels: Sequence[str],
    data: Sequence[np.ndarray],
    rates: Sequence[int],
    *,
    dims: Sequence[str] | None = None,
    onsets: Sequence[float] | None = None,
    events: Sequence[tuple[float, str]] = (),
) -> Path:
    """Write records of one second of 16 bits, from -3276.7 to 3276.7 in the unit of `dims`.

    `onsets`: when each record begins, which makes it EDF+D. `events`: onset and text, in the record that they lie in or after.
    """
    dims = list(dims or ["uV"] * len(labels))
    n_records = min(len(x) // rate for x, rate in zip(data, rates, strict=True))
    starts = list(range(n_records)) if onsets is None else list(onsets)
    tal_samples = 60
    names, units = [*labels, "EDF Annotations"], [*dims, ""]
    n_samples = [*rates, tal_samples]
    n = len(names)

    def text(values, width):
        return b"".join(str(value).encode("latin-1").ljust(width) for value in values)

    kind = "EDF+C" if onsets is None else "EDF+D"
    head = text(["0"], 8) + text(["X X X X", "Startdate X X X X"], 80) + text(["01.01.20", "10.00.00", 256 * (n + 1)], 8)
    head += text([kind], 44) + text([n_records, 1], 8) + text([n], 4)
    head += text(names, 16) + text([""] * n, 80) + text(units, 8)
    head += text([-3276.7] * (n - 1) + [-1], 8) + text([3276.7] * (n - 1) + [1], 8)
    head += text([-32767] * n, 8) + text([32767] * n, 8) + text([""] * n, 80) + text(n_samples, 8) + text([""] * n, 32)
    with path.open("wb") as file:
        file.write(head)
        for record in range(n_records):
            for x, rate in zip(data, rates, strict=True):
                file.write(np.rint(x[record * rate : (record + 1) * rate] * 10).astype("<i2").tobytes())
            tal = f"+{starts[record]:g}\x14\x14\0"
            for onset, what in events:
                last = record == n_records - 1
                if starts[record] <= onset and (last or onset < starts[record + 1]):
                    tal += f"+{onset:g}\x14{what}\x14\0"
            file.write(tal.encode().ljust(2 * tal_samples, b"\0"))
    return path


def eeg(n_chans: int, n_samples: int, *, seed: int = 0, scale: float = 20.0) -> np.ndarray:
    """Return noise in tenths of a microvolt, shape (n_chans, n_samples), which 16 bits keep as it is."""
    return np.round(np.random.default_rng(seed).normal(0, scale, (n_chans, n_samples)), 1)
