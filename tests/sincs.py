"""Resamples by hand: the sum of sincs in a Kaiser window that `sjepa_deploy.eeg.steps.rate` documents, sample by sample."""

import numpy as np


def sinc_sums(data: np.ndarray, sfreq_in: float, sfreq_out: float) -> np.ndarray:
    """Return `data`, shape (n_chans, n), at k / sfreq_out from its first to its last sample, in float64.

    Passes 90 % of the lower Nyquist frequency and stops at it by 100 dB; ends are continued by point reflection.
    """
    nyquist = min(sfreq_in, sfreq_out) / 2
    cutoff, width = 0.95 * nyquist, 0.1 * nyquist
    half = int(np.ceil((100 - 7.95) / (2.285 * 2 * np.pi * width / sfreq_in) / 2))  # samples
    padded = np.pad(data, ((0, 0), (half, half)), mode="reflect", reflect_type="odd")
    time = (np.arange(padded.shape[1]) - half) / sfreq_in
    rows = []
    for k in range(int(np.floor((data.shape[1] - 1) / sfreq_in * sfreq_out + 1e-9)) + 1):
        first = int(k / sfreq_out * sfreq_in)
        around = slice(max(0, first - 1), first + 2 * half + 2)
        away = time[around] - k / sfreq_out
        inside = np.abs(away) * sfreq_in < half - 1e-9
        window = np.i0(0.1102 * 91.3 * np.sqrt(np.maximum(0, 1 - (away * sfreq_in / half) ** 2)))
        weights = np.where(inside, np.sinc(2 * cutoff * away) * window, 0)
        rows.append(padded[:, around] @ weights / weights.sum())
    return np.array(rows).T
