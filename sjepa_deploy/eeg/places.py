"""Compares the electrode positions of a recording and a model, and makes the channels that the recording lacks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sjepa_deploy.eeg.montage import fit_sphere, read_montage, require_mne
from sjepa_deploy.eeg.names import canonical, says_other_than_eeg
from sjepa_deploy.errors import RecordingError, listed
from sjepa_deploy.spec import Position, SignalSpec

if TYPE_CHECKING:
    import mne
    from numpy.typing import NDArray

OTHER_ELECTRODES_DEG = 10.0
"""Median difference from which on electrodes of the same names are others: see `difference_of_places`.

Of the same electrodes the difference is at most 5 degrees (MNE's templates beside each other and beside three recordings). Of
the names that BioSemi's caps of 128 and 160 electrodes share, the difference is 17 degrees or more; of the names that EGI's nets
of 128 and 256 share, the difference is 25 degrees or more.
"""

HEAD_RADIUS = 0.09
"""Radius of a head in metres, on which distances are told in degrees."""

_NETS = ("GSN-HydroCel-32", "GSN-HydroCel-65_1.0", "GSN-HydroCel-129", "GSN-HydroCel-257", "GSN-HydroCel-256")
_CAPS = ("biosemi128", "biosemi160", "biosemi256")


def places_of(raw: mne.io.BaseRaw) -> tuple[dict[str, Position], str]:
    """Return the positions of the good EEG channels of a recording, and how these positions are known.

    Returns
    -------
    places : dict of str to (float, float, float)
        In metres, of the channels that have a place. The recording states the places; where the recording states none, the names
        give them, in the 10-05 system or in the net or cap that has these names. A system counts if at least half of the channels
        are named in the system. A net or cap counts if the recording has nearly all of its names too: a letter and a number mean
        other electrodes in each net or cap.
    source : str
        "" if the recording says it, else the name of the montage.
    """
    good = [
        channel
        for channel, kind in zip(raw.info["chs"], raw.get_channel_types(), strict=True)
        if kind == "eeg" and channel["ch_name"] not in raw.info["bads"] and not says_other_than_eeg(channel["ch_name"])
    ]
    placed = {
        channel["ch_name"]: (float(x), float(y), float(z))
        for channel in good
        for x, y, z in [channel["loc"][:3]]
        if all(map(math.isfinite, (x, y, z))) and any((x, y, z))
    }
    if placed or not good:
        return placed, ""
    names = {canonical(channel["ch_name"]): channel["ch_name"] for channel in good}
    best: tuple[dict[str, Position], str] = ({}, "")
    for montage in ("standard_1005", *(_NETS if sum(name[:1] == "e" for name in names) > len(names) / 2 else _CAPS)):
        template = read_montage(montage)
        by_name = {canonical(name): place for name, place in zip(template.ch_names, template.positions, strict=True)}
        known = {theirs: by_name[name] for name, theirs in names.items() if name in by_name}
        whole = montage == "standard_1005" or len(known) >= 0.9 * len(by_name)
        if whole and len(known) >= 0.5 * len(names) and len(known) > len(best[0]):
            best = known, montage
    return best


def difference_of_places(these: Mapping[str, Position], those: Mapping[str, Position], pairs: Sequence[tuple[str, str]]) -> float:
    """Return by how many degrees on a head of `HEAD_RADIUS` the distances between electrodes differ, as a median over all pairs.

    Distances do not depend on the frame. The sizes of the two heads are made equal where they differ by a quarter at most. NaN
    for fewer than two electrodes.

    Parameters
    ----------
    these, those : mapping of str to (float, float, float)
        Places in metres on each side.
    pairs : sequence of (str, str)
        Electrodes of `these` and of `those` that are meant to be the same.
    """
    if len(pairs) < 2:
        return math.nan
    upper = np.triu_indices(len(pairs), 1)
    distances = []
    for side, places in enumerate((these, those)):
        points = np.array([places[pair[side]] for pair in pairs])
        distances.append(np.linalg.norm(points[:, None] - points, axis=2)[upper])
    size = float(np.clip(np.median(distances[1]) / max(float(np.median(distances[0])), 1e-9), 0.8, 1.25))
    one, other = (2 * np.arcsin(np.clip(d / (2 * HEAD_RADIUS), 0, 1)) for d in (distances[0] * size, distances[1]))
    return float(np.degrees(np.median(np.abs(one - other))))


def check_places(raw: mne.io.BaseRaw, signal: SignalSpec, found: Mapping[str, str]) -> None:
    """Refuse a recording whose electrodes have the names of the model's and are others.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording.
    signal : SignalSpec
        The signal of the model; without positions nothing can be compared.
    found : mapping of str to str
        Channels of the model, and what they are called in the recording.

    Raises
    ------
    RecordingError
        If they lie elsewhere, by `OTHER_ELECTRODES_DEG`.
    """
    if signal.ch_names is None or signal.positions is None:
        return
    theirs, source = places_of(raw)
    ours = dict(zip(signal.ch_names, signal.positions, strict=True))
    pairs = [(name, mine) for mine, name in found.items() if name in theirs]
    difference = difference_of_places(theirs, ours, pairs)
    if difference > OTHER_ELECTRODES_DEG:
        why = f" by its {len(theirs)} names, those of {source}" if source else ""
        raise RecordingError(
            f"The recording has other electrodes than the model under the same names: the distances between the {len(pairs)} "
            f"that both call {listed([mine for _, mine in pairs], 4)} differ by {difference:.0f} degrees in the median{why}.",
            "Use a model of this net or cap, or give the channels the names that these electrodes have in the model: `--rename`.",
        )


def interpolation_of(raw: mne.io.BaseRaw, signal: SignalSpec, steps: list[str]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return the weights that make all channels of a model from the good EEG channels of a recording, by spherical splines.

    Returns
    -------
    sources : tuple of str
        Channels of the recording that have a place.
    weights : ndarray, shape (n_chans of the model, len(sources))
        What MNE's `interpolate_to` multiplies them with.

    Raises
    ------
    RecordingError
        If the model has no positions, or fewer than four channels of the recording have.
    """
    mne = require_mne()
    if signal.ch_names is None or signal.positions is None:
        raise RecordingError("The model has no channel positions to interpolate to.", "Export it with `--montage`.")
    placed, source = places_of(raw)
    if source:
        what = "the 10-05 system" if source == "standard_1005" else source
        steps.append(f"placed {len(placed)} channels by their names in {what}")
    if len(placed) < 4:
        raise RecordingError(
            f"Only {len(placed)} good EEG channels of the recording have a position, by digitisation or by name; it has "
            f"{listed(raw.ch_names, 64)}.",
            "Give a recording with positions, or with 10-05 names for at least 4 channels and half of them.",
        )
    with mne.use_log_level("error"):  # one sample for each channel alone
        sources = mne.io.RawArray(np.eye(len(placed)), mne.create_info(list(placed), raw.info["sfreq"], "eeg"))
    sources.set_montage(_centred(placed, placed.values()), verbose="error")
    target = _centred(signal.ch_names, signal.positions)
    with mne.use_log_level("error"):
        made = sources.interpolate_to(target, origin=(0.0, 0.0, 0.0), method="spline")
    weights: NDArray[np.float64] = made.get_data()
    return tuple(placed), weights


def _centred(ch_names: Iterable[str], positions: Iterable[Position]) -> mne.channels.DigMontage:
    """Return a montage about the centre of the sphere that fits best."""
    mne = require_mne()
    points = np.array(list(positions))
    centre, radius = fit_sphere(points)
    if not 0.05 <= radius <= 0.15:
        raise RecordingError(
            f"The {len(points)} channel positions lie on a sphere of {radius * 1e3:.0f} mm, which is no head.",
            "Give positions in metres that go around the head.",
        )
    return mne.channels.make_dig_montage(dict(zip(ch_names, points - centre, strict=True)), coord_frame="head")
