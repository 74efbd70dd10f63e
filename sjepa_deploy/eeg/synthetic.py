"""Makes realistic EEG without a recording: 1/f noise that channels share, an alpha rhythm, and faults."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.eeg.montage import fit_sphere
from sjepa_deploy.spec import Position

RMS_UV = 12.0
"""Root mean square of band-passed scalp EEG in microvolts, as in the recordings of adults at rest."""

ALPHA_UV = 8.0
"""Amplitude of the alpha rhythm in microvolts."""

OFFSET_UV = 20_000.0
"""Electrode offset of an unfiltered DC-coupled amplifier in microvolts."""

RAIL_UV = 400_000.0
"""Amplitude in microvolts at which such an amplifier saturates."""


def eeg_windows(n_windows: int, n_chans: int, n_times: int, sfreq: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return windows of synthetic EEG in microvolts.

    Parameters
    ----------
    n_windows, n_chans, n_times : int
        Shape of the result.
    sfreq : float
        Sampling rate in Hz.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    array of float32, shape (n_windows, n_chans, n_times)
        1/f noise of which half the variance comes from a few sources seen by many channels, with a 10 Hz rhythm of another
        phase and strength in each channel.
    """
    n_sources = max(1, n_chans // 8)
    mixing = rng.standard_normal((n_chans, n_sources)) / np.sqrt(n_sources)
    shared = _pink((n_windows, n_sources, n_times), rng)
    noise = (mixing @ shared + _pink((n_windows, n_chans, n_times), rng)) * (RMS_UV / np.sqrt(2))
    time = np.arange(n_times) / sfreq
    phase = rng.uniform(0, 2 * np.pi, (n_windows, n_chans, 1))
    alpha = ALPHA_UV * rng.uniform(0, 1, (n_windows, n_chans, 1)) * np.sin(2 * np.pi * 10.0 * time + phase)
    return np.ascontiguousarray(noise + alpha, dtype=np.float32)


def _pink(shape: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return noise of unit variance whose power falls with 1/f."""
    n_times = shape[-1]
    spectrum = np.fft.rfft(rng.standard_normal(shape))
    frequency = np.arange(spectrum.shape[-1])
    spectrum *= np.where(frequency > 0, 1 / np.sqrt(np.maximum(frequency, 1)), 0)
    noise = np.fft.irfft(spectrum, n_times)
    unit: NDArray[np.float64] = noise / noise.std(axis=-1, keepdims=True)
    return unit


RHYTHMS_HZ = (10.0, 6.0, 20.0, 8.0, 14.0)
"""Frequencies of the planted sources that go on all the time, with another phase and amplitude in every window."""

EVOKED_UV, EVOKED_S, EVOKED_HZ = 12.0, 0.7, 2.0
"""Mean peak in microvolts, latency in seconds and frequency of the planted evoked potential, which the targets depend on."""

SOURCE_WIDTH, EVOKED_WIDTH = 0.5, 0.9
"""Standard deviations of the topographies of a rhythm and of the evoked potential in head radii."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedEEG:
    """Holds synthetic EEG whose planted effects are known.

    Attributes
    ----------
    eeg : ndarray of float32, shape (n_windows, n_chans, n_times)
        Windows in microvolts.
    latent : ndarray, shape (n_windows,)
        Amplitude of the evoked potential, standardised.
    reaction_time : ndarray, shape (n_windows,)
        0.6 s + 0.1 s x latent + noise of 0.03 s: at best, R2 is 0.92.
    subject : ndarray of int, shape (n_windows,)
        Subjects differ in gain, and in how strong each source is.
    """

    eeg: NDArray[np.float32]
    latent: NDArray[np.float64]
    reaction_time: NDArray[np.float64]
    subject: NDArray[np.intp]


def planted_eeg(
    n_subjects: int, n_windows: int, positions: tuple[Position, ...], n_times: int, sfreq: float, rng: np.random.Generator
) -> PlantedEEG:
    """Return synthetic EEG with planted spatial structure and planted effects.

    Sources with smooth topographies lie in 1/f noise: an evoked potential at the back of the head, whose amplitude the targets
    follow, and rhythms elsewhere. A channel can be told from its neighbours, which is what pretraining learns.

    Parameters
    ----------
    n_subjects, n_windows : int
        Subjects, and windows of each.
    positions : tuple of (float, float, float)
        Positions of the channels in metres.
    n_times : int
        Samples of a window.
    sfreq : float
        Sampling rate in Hz.
    rng : numpy.random.Generator
        Source of randomness. The sources' places do not depend on it.
    """
    points = np.array(positions)
    centre, radius = fit_sphere(points)
    points = (points - centre) / radius
    places = _far_apart(points, 1 + len(RHYTHMS_HZ))
    distance = np.linalg.norm(points[places][:, None] - points, axis=-1)
    width = np.array([EVOKED_WIDTH] + [SOURCE_WIDTH] * (len(places) - 1))[:, None]
    topographies = np.exp(-((distance / width) ** 2) / 2)
    n_total, n_rhythms = n_subjects * n_windows, len(places) - 1
    subject = np.repeat(np.arange(n_subjects), n_windows)
    latent = rng.standard_normal(n_total)
    time = np.arange(n_times) / sfreq
    wave = np.cos(2 * np.pi * EVOKED_HZ * (time - EVOKED_S)) * np.exp(-(((time - EVOKED_S) * EVOKED_HZ) ** 2) / 2)
    evoked = EVOKED_UV * (1 + latent)[:, None, None] * wave
    strength = rng.normal(0, 0.2, (n_subjects, n_rhythms))[subject]
    amplitude = ALPHA_UV / 4 * np.exp(0.5 * rng.standard_normal((n_total, n_rhythms)) + strength)
    phase = rng.uniform(0, 2 * np.pi, (n_total, n_rhythms, 1))
    frequency = np.array(RHYTHMS_HZ)[:n_rhythms, None] * rng.normal(1, 0.03, (n_total, n_rhythms, 1))
    rhythms = amplitude[..., None] * np.sin(2 * np.pi * frequency * time + phase)
    sources = np.concatenate([evoked, rhythms], axis=1)
    noise = RMS_UV / 2 * _pink((n_total, len(points), n_times), rng)
    gain = rng.lognormal(0, 0.2, n_subjects)[subject, None, None]
    eeg = np.ascontiguousarray(gain * (topographies.T @ sources + noise), dtype=np.float32)
    reaction_time = 0.6 + 0.1 * latent + rng.normal(0, 0.03, n_total)
    return PlantedEEG(eeg=eeg, latent=latent, reaction_time=reaction_time, subject=subject)


def _far_apart(points: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    """Return the indices of up to `n` points, each as far as possible from those before it."""
    chosen = [int(points[:, 1].argmin())]  # the most posterior one, where alpha is
    while len(chosen) < min(n, len(points)):
        chosen.append(int(np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(axis=1).argmax()))
    return np.array(chosen)


def hard_windows(n_chans: int, n_times: int, sfreq: float, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Return the windows in microvolts that a decoder must survive, by kind.

    Returns
    -------
    dict of str to array of float32, shape (n_chans, n_times)
        Plain EEG, electrode offsets, a flat and a saturated channel, white noise, very small and very large amplitudes, all
        zeros, and one NaN.
    """
    clean = iter(eeg_windows(16, n_chans, n_times, sfreq, rng))
    windows = {f"eeg {i}": next(clean) for i in range(6)}
    windows["eeg with 20 mV offsets"] = next(clean) + np.float32(OFFSET_UV) * rng.uniform(-1, 1, (n_chans, 1))
    windows["flat channel"] = next(clean)
    windows["flat channel"][rng.integers(n_chans)] = 0
    windows["channel flat at an offset"] = next(clean)
    windows["channel flat at an offset"][rng.integers(n_chans)] = OFFSET_UV
    windows["saturated channel"] = next(clean)
    windows["saturated channel"][rng.integers(n_chans)] = RAIL_UV * np.sign(np.sin(np.arange(n_times) / 20))
    windows["white noise of 20 uV"] = 20 * rng.standard_normal((n_chans, n_times))
    windows["white noise of 1 mV"] = 1000 * rng.standard_normal((n_chans, n_times))
    windows["eeg / 100"] = next(clean) / 100
    windows["eeg x 100"] = next(clean) * 100
    windows["zeros"] = np.zeros((n_chans, n_times))
    windows["one NaN"] = next(clean)
    windows["one NaN"][rng.integers(n_chans), n_times // 2] = np.nan
    return {kind: np.ascontiguousarray(window, dtype=np.float32) for kind, window in windows.items()}
