"""Judges whether the amplitudes of recordings and windows are those of EEG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.eeg.quality import ROUNDING_V
from sjepa_deploy.eeg.units import PLAUSIBLE_RMS, volts_in
from sjepa_deploy.eeg.windows import windows
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.spec import Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNIT_MEND = (
    "State the unit they are stored in with `--unit` (volts passed as microvolts?), or take them as they are with "
    "`--no-check-unit`."
)
"""Says what to do about amplitudes that no EEG has."""


def check_amplitude(samples: NDArray[np.floating[Any]], sfreq: float, mend: str, *, unit: Unit = "V") -> None:
    """Refuse an amplitude that no EEG has.

    Parameters
    ----------
    samples : ndarray, shape (n_chans, n_samples) or (n_windows, n_chans, n_samples)
        A recording, or windows.
    sfreq : float
        Rate in Hz, to tell where.
    unit : {"nV", "uV", "mV", "V"}
        Their unit.
    mend : str
        What to do about it.

    Raises
    ------
    RecordingError
        If all channels are flat, or the median over windows, or seconds, of the RMS about the mean of the median channel that is
        not flat lies outside `PLAUSIBLE_RMS`.
    """
    refuse_rms(median_rms(samples, sfreq, unit=unit), "seconds" if samples.ndim == 2 else "windows", mend)


def median_rms(samples: NDArray[np.floating[Any]], sfreq: float, *, unit: Unit = "V") -> NDArray[np.float64]:
    """Return the RMS about the mean, in volts, of the median channel of each second, or window, in which a channel is not flat.

    Parameters
    ----------
    samples, sfreq, unit
        See `check_amplitude`.
    """
    n = max(1, round(sfreq)) if samples.ndim == 2 else samples.shape[2]
    pieces = windows(samples, n, n) if samples.ndim == 2 and samples.shape[1] >= n else samples.reshape(-1, *samples.shape[-2:])
    spread = pieces.std(axis=2) * volts_in(unit)
    carrying = (spread > ROUNDING_V) & np.isfinite(spread)
    return np.array([np.median(row[mask]) for row, mask in zip(spread, carrying, strict=True) if mask.any()])


def refuse_rms(each: NDArray[np.float64], what: str, mend: str) -> None:
    """Refuse the amplitudes of `median_rms` where they are none of EEG, see `check_amplitude`; `what` says what each is of."""
    if not len(each):
        raise RecordingError("All channels are flat.", "Choose channels, or a recording, that carry EEG.")
    rms = float(np.median(each))
    if PLAUSIBLE_RMS[0] <= rms <= PLAUSIBLE_RMS[1]:
        return
    out = np.flatnonzero((each < PLAUSIBLE_RMS[0]) | (each > PLAUSIBLE_RMS[1]))
    where = f" ({len(out)} of its {len(each)} {what}, the first of them number {out[0]})" if 0 < len(out) < len(each) else ""
    raise RecordingError(
        f"The median channel has an RMS of {rms * 1e6:.3g} uV{where}, which is no EEG: the samples look like another unit's.",
        mend,
    )
