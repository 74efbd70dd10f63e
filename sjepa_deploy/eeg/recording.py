"""Reads recordings of EEG and fits them to a signal; `sjepa_deploy.eeg.windows` cuts them into windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sjepa_deploy.eeg.montage import require_mne
from sjepa_deploy.eeg.names import renamed
from sjepa_deploy.eeg.pauses import Told, told
from sjepa_deploy.eeg.readers import read_edf, read_npy, read_with_mne, reading
from sjepa_deploy.eeg.steps import Phase
from sjepa_deploy.eeg.stretches import fit_stretches
from sjepa_deploy.eeg.units import check_unit
from sjepa_deploy.eeg.windows import FittedRecording
from sjepa_deploy.eeg.xdf import read_xdf
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.spec import SignalSpec, Unit

if TYPE_CHECKING:
    import mne


def read_recording(
    path: str | Path,
    *,
    sfreq: float | None = None,
    unit: Unit | None = None,
    ch_names: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    preload: bool = True,
) -> mne.io.BaseRaw:
    """Read the EEG channels of a recording.

    Parameters
    ----------
    path : str or Path
        EDF, BDF, BrainVision .vhdr, EEGLAB .set, FIF or what else `mne.io.read_raw` reads; XDF with one regular EEG
        stream, taken at its nominal rate, also a record of `sjepa-stream`; or .npy with an array of shape (n_chans, n_samples).
    sfreq : float or None
        Sampling rate in Hz. Needed for .npy; elsewhere it must be the file's own.
    unit : {"nV", "uV", "mV", "V"} or None
        Unit of the samples. Needed for .npy and for files that state none. A unit that the file states gives way to it, with a
        note.
    ch_names : sequence of str or None
        Names of the channels of .npy files and of XDF streams without labels. Other files carry names, and ignore these.
    row_names : sequence of str or None
        Names of the rows of a .npy file, where `ch_names` is None: as a rule the channels of the model.
    rename : mapping of str to str or None
        Channels that get other names, see `sjepa_deploy.eeg.names.parse_rename`.
    preload : bool
        Whether to read the samples now. Otherwise those of FIF (.fif), EDF, BDF, BrainVision and EEGLAB with .fdt stay in their
        file until they are asked for.

    Returns
    -------
    raw : mne.io.BaseRaw
        The EEG channels in volts. "EEG Fp1" of an EDF file is called "Fp1". Of an EDF file with several rates, the
        channels at the rate of most of them. ``raw.info["temp"]`` holds what reading has shown, see
        `sjepa_deploy.eeg.pauses.told`.

    Raises
    ------
    RecordingError
        If the file is missing, of an unknown format, truncated, damaged, without EEG, or contradicts `sfreq`; or if `sfreq`,
        `unit` or `ch_names` are needed and missing.
    MissingDependencyError
        If MNE, or pyxdf for an XDF file, is not installed.
    """
    require_mne()  # before anything else can go wrong
    path = Path(path)
    if not path.exists():
        raise RecordingError(f"There is no recording {path}.", "Check the path.")
    if unit is not None:
        check_unit(unit)
    suffix = path.suffix.lower()
    notes: list[str] = []
    with reading(path.name):
        if suffix == ".npy":
            raw = read_npy(path, sfreq, unit, ch_names or row_names)
        elif suffix == ".xdf":
            raw = read_xdf(path, unit, ch_names, notes)
        elif suffix in (".edf", ".bdf"):
            raw = read_edf(path, unit, notes, preload=preload)
        else:
            raw = read_with_mne(path, unit, notes, preload=preload)
    if sfreq is not None and not math.isclose(sfreq, raw.info["sfreq"], rel_tol=1e-6):
        raise RecordingError(f"{path.name} is sampled at {raw.info['sfreq']:g} Hz, not {sfreq:g} Hz.", "Leave out `--sfreq`.")
    if rename:
        names = renamed(raw.ch_names, rename, RecordingError)
        raw.rename_channels(dict(zip(raw.ch_names, names, strict=True)))
    raw.info["temp"] = Told(notes=tuple(notes), paused=told(raw).paused)
    return raw


def fit_recording(
    raw: mne.io.BaseRaw, signal: SignalSpec, *, interpolate: float = 0.0, check_unit: bool = True, phase: Phase | None = None
) -> FittedRecording:
    """Take a recording through the steps of a signal.

    In the causal phase the samples go through the very code that runs live (`sjepa_deploy.eeg.conditioning`), and each stretch
    without a pause starts anew. In zero phase each stretch goes through the zero-phase forms; stretches that are shorter than the
    band-pass are left out. Stretches that are shorter than a window are always left out. Channels are taken by name (see
    `sjepa_deploy.eeg.names.find_channels`); channels marked bad count as missing.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording in volts, as `read_recording` returns it. The recording is left as it is.
    signal : SignalSpec
        The signal of the model.
    interpolate : float
        Largest share of the model's channels, 0 to 1, that is made by spherical splines (Perrin et al. 1989). In the causal phase
        from the model's other channels, as live. In zero phase from all good EEG channels: the recording's positions and the
        model's are each taken about the centre of their best sphere, since montages come in frames whose origins lie centimetres
        apart. The tilt of these frames (up to 6 degrees between MNE's templates and its head frame) remains. A recording without
        positions takes those of the 10-05 system, or of its net, by name.
    check_unit : bool
        Whether amplitudes that no EEG has are refused.
    phase : {"causal", "zero-phase"} or None
        Form of the steps; None is the signal's.

    Raises
    ------
    RecordingError
        If the recording lacks more channels of the model than `interpolate` allows; has other electrodes under the model's names;
        is slower than the model; has no stretch of one window, or of the length of the band-pass; holds samples of these channels
        that are not finite; is in another unit by the looks of it (`sjepa_deploy.eeg.amplitudes`); or does not suit a step.
        `TooShortError` where the band-pass is longer.
    """
    stretches = fit_stretches(raw, signal, interpolate=interpolate, check_unit=check_unit, phase=phase, n_values=math.inf)
    pieces = list(stretches.pieces())
    return FittedRecording(
        data=np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)),
        signal=signal,
        segments=stretches.segments,
        source_sfreq=stretches.source_sfreq,
        n_found=stretches.n_found,
        n_settling=stretches.n_settling,
        steps=(*stretches.steps, *stretches.changes.told),
    )
