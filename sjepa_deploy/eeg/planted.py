"""Makes recordings with planted events, for tutorials and for trying the commands without an amplifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.synthetic import eeg_windows

if TYPE_CHECKING:
    import mne

CH_NAMES = ("F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2")
CLASSES = ("left", "right")
SFREQ = 250.0

EVERY_S, JITTER_S = 2.2, 0.2
"""Seconds from one event to the next, and the largest random addition."""

WAVE_UV, WAVE_HZ, WAVE_S, WAVE_DELAY_S = 4.5, 8.0, 0.8, 0.2
"""Amplitude in microvolts, frequency, duration and delay of the wave that follows each event."""


def planted_recording(n_events: int = 120, *, seed: int = 0) -> mne.io.BaseRaw:
    """Return a recording of 8 channels at 250 Hz in which a wave follows each event.

    The wave is locked to its event. It has another sign for the two classes, and opposite signs on neighbouring channels.

    Parameters
    ----------
    n_events : int
        Number of events, half of them "left" and half of them "right", in random order.
    seed : int
        Seed of noise, onsets and order. The place of the wave does not depend on it.

    Returns
    -------
    mne.io.RawArray
        EEG in volts with annotations, 2.2 s for each event.
    """
    import mne

    rng = np.random.default_rng(seed)
    n_times = round((n_events * EVERY_S + 10) * SFREQ)
    microvolts = eeg_windows(1, len(CH_NAMES), n_times, SFREQ, rng)[0].astype(np.float64)
    onsets = 6.0 + EVERY_S * np.arange(n_events) + rng.uniform(0, JITTER_S, n_events)
    kinds = rng.permutation([CLASSES[i % 2] for i in range(n_events)])
    length = round(WAVE_S * SFREQ)
    wave = WAVE_UV * np.sin(2 * np.pi * WAVE_HZ * np.arange(length) / SFREQ) * np.hanning(length)
    signs = np.array([1, -1] * (len(CH_NAMES) // 2))
    for onset, kind in zip(onsets, kinds, strict=True):
        first = round((onset + WAVE_DELAY_S) * SFREQ)
        microvolts[:, first : first + length] += np.outer(signs, wave if kind == "left" else -wave)
    raw = mne.io.RawArray(microvolts * 1e-6, mne.create_info(list(CH_NAMES), SFREQ, "eeg"), verbose="error")
    montage = read_montage("sjepa-62").pick(CH_NAMES)
    positions = dict(zip(montage.ch_names, map(np.asarray, montage.positions), strict=True))
    raw.set_montage(mne.channels.make_dig_montage(positions, coord_frame="head"), verbose="error")
    annotated: mne.io.BaseRaw = raw.set_annotations(mne.Annotations(onsets, 0.0, kinds), verbose="error")
    return annotated
