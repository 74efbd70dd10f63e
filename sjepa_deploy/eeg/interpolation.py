"""Compares a stream's channels with a model's, and interpolates missing ones by spherical splines, without MNE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.polynomial.legendre import legval
from numpy.typing import NDArray

from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.montage import fit_sphere, read_montage
from sjepa_deploy.eeg.names import find_channels, says_other_than_eeg
from sjepa_deploy.errors import StreamError, listed
from sjepa_deploy.spec import Position, SignalSpec

Matrix = NDArray[np.float64]

LEAST_GOOD = 4
"""Channels that others can be interpolated from."""

INTERPOLATED_SHARE = 0.25
"""Share of a model's channels that is interpolated on request, unless more is asked for by name."""

_STIFFNESS, _N_TERMS = 4, 50  # those of MNE's `interpolate_to`, with which recordings are interpolated


def on_sphere(positions: Sequence[Position]) -> Matrix:
    """Return unit vectors to the positions from the centre of their best sphere, shape (n_chans, 3)."""
    centre, _ = fit_sphere(positions)
    away = np.asarray(positions, dtype=np.float64) - centre
    unit: Matrix = away / np.linalg.norm(away, axis=1, keepdims=True)
    return unit


def spline_weights(sources: Matrix, targets: Matrix) -> Matrix:
    """Return the weights that make each target of the sources, shape (n_targets, n_sources).

    Spherical splines (Perrin et al. 1989, Electroencephalogr. Clin. Neurophysiol. 72, 184-187) with MNE's stiffness and number
    of Legendre terms, not regularised.

    Parameters
    ----------
    sources, targets : ndarray, shape (n, 3)
        Unit vectors.
    """
    n = np.arange(1, _N_TERMS + 1)
    terms = np.concatenate([[0.0], (2 * n + 1) / (n**_STIFFNESS * (n + 1.0) ** _STIFFNESS * 4 * np.pi)])
    n_sources = len(sources)
    system = np.ones((n_sources + 1, n_sources + 1))
    system[-1, -1] = 0.0
    system[:-1, :-1] = legval(sources @ sources.T, terms)
    of_targets = np.column_stack([legval(targets @ sources.T, terms), np.ones(len(targets))])
    weights: Matrix = np.ascontiguousarray(of_targets @ np.linalg.pinv(system)[:, :-1])
    return weights


def mixing_matrix(ch_names: Sequence[str], signal: SignalSpec, bads: Sequence[str] = ()) -> tuple[Matrix, tuple[str, ...]]:
    """Return the matrix from a stream's channels to a model's, and the names of those that are interpolated.

    Parameters
    ----------
    ch_names : sequence of str
        The stream's channels.
    signal : SignalSpec
        The signal of the model.
    bads : sequence of str
        Channels of the stream that are not to be used.

    Returns
    -------
    matrix : ndarray of float64, shape (n_chans, len(ch_names))
        Rows of channels that the stream has hold a single one.
    interpolated : tuple of str
        The other channels, made of those that the stream shares with the model or, where these are fewer than four, of all
        that have a name of the 10-05 system (its positions come from MNE).

    Raises
    ------
    StreamError
        If there are no positions, or fewer than four channels to interpolate from.
    """
    assert signal.ch_names is not None, "the contract was checked"
    without = {name.casefold() for name in bads}
    column = {name.casefold(): i for i, name in enumerate(ch_names) if name.casefold() not in without}
    matrix = np.zeros((signal.n_chans, len(ch_names)))
    rows = [i for i, name in enumerate(signal.ch_names) if name.casefold() in column]
    missing = [i for i in range(signal.n_chans) if i not in rows]
    for i in rows:
        matrix[i, column[signal.ch_names[i].casefold()]] = 1.0
    if not missing:
        return matrix, ()
    names = tuple(signal.ch_names[i] for i in missing)
    if signal.positions is None:
        raise StreamError(
            f"{listed(names)} cannot be interpolated: the bundle holds no positions.", "Export it with `--montage`."
        )
    placed = on_sphere(signal.positions)
    if len(rows) >= LEAST_GOOD:
        names_of_sources, sources = [signal.ch_names[i].casefold() for i in rows], placed[rows]
    else:
        template = read_montage("standard_1005")
        known = dict(zip(map(str.casefold, template.ch_names), template.positions, strict=True))
        names_of_sources = [name for name in column if name in known]
        if len(names_of_sources) < LEAST_GOOD:
            raise StreamError(
                f"Only {len(names_of_sources)} good channels of the stream have a position, by the names of the model or of the "
                "10-05 system.",
                f"At least {LEAST_GOOD} are needed to interpolate the others.",
            )
        sources = on_sphere([known[name] for name in names_of_sources])
    matrix[np.ix_(missing, [column[name] for name in names_of_sources])] = spline_weights(sources, placed[missing])
    return matrix, names


def match_channels(
    signal: SignalSpec, info: StreamInfo, *, interpolate: float, bads: Sequence[str]
) -> tuple[NDArray[np.intp], tuple[str, ...], tuple[str, ...]]:
    """Compare a stream's channels with a model's by name, see `sjepa_deploy.eeg.names.find_channels`.

    Parameters
    ----------
    signal : SignalSpec
        The signal of the model.
    info : StreamInfo
        The stream.
    interpolate : float
        Largest share of the model's channels, 0 to 1, that is interpolated.
    bads : sequence of str
        Channels of the stream that are not to be used.

    Returns
    -------
    columns : ndarray of int
        Columns of the stream that are used.
    ch_names : tuple of str
        Their names. A name that is written in another way than in the model becomes the model's.
    missing : tuple of str
        Channels of the model that are not among them.

    Raises
    ------
    StreamError
        If names are missing or twice, more channels of the model are not there than may be interpolated, or one that is used is
        in no voltage.
    """
    if signal.ch_names is None:
        raise StreamError(
            "The model has no channel names, so the stream's channels cannot be checked against it.",
            "Export the bundle with `--montage` or `--channels`.",
        )
    folded = [name.casefold() for name in info.ch_names]
    without = {name.casefold() for name in bads}
    if unknown := sorted(without - set(folded)):
        raise StreamError(f"{info.name} has no channels {listed(unknown)}, which were named as bad.", "Mend `--bads`.")
    good = [i for i, name in enumerate(folded) if name not in without]
    match = find_channels(signal.ch_names, [info.ch_names[i] for i in good])
    if twice := sorted({name for _, several in match.doubtful for name in several if folded.count(name.casefold()) > 1}):
        raise StreamError(
            f"{info.name} has the channels {listed(twice)} twice.", "Give every channel of the stream its own name."
        )
    found = {mine: good[i] for mine, i in zip(signal.ch_names, match.columns, strict=True) if i is not None}
    missing = tuple(name for name in signal.ch_names if name not in found)
    there = f"it has {listed(info.ch_names, 64)}" + "".join(
        f"; {name} could be each of {listed(several)}" for name, several in match.doubtful
    )
    if missing and not interpolate:
        raise StreamError(
            f"{info.name} lacks {len(missing)} of the model's {signal.n_chans} channels: {listed(missing)}; {there}.",
            "Name its channels as the model does, give them these names with `--rename THEIRS=MINE`, or make them from the "
            "others with `--interpolate`.",
        )
    if len(missing) > interpolate * signal.n_chans + 1e-9:
        share = math.ceil(100 * len(missing) / signal.n_chans) / 100
        raise StreamError(
            f"{len(missing)} of {signal.n_chans} channels of the model would be interpolated, more than {interpolate:g}; "
            f"{there}.",
            f"Use a model of the stream's channels, `--rename`, or `--interpolate {share:g}` to take such EEG all the same.",
        )
    columns = list(found.values())
    if missing and len(columns) < LEAST_GOOD:  # mixing_matrix takes all channels whose names have a position
        columns = [i for i in good if i in columns or not says_other_than_eeg(info.ch_names[i])]
    columns += [i for i in good if i not in columns and signal.uses(info.ch_names[i], says_other_than_eeg(info.ch_names[i]))]
    if wrong := [info.ch_names[i] for i in columns if info.ch_names[i] in info.other_units]:
        raise StreamError(
            f"{info.name} states for {listed(wrong)} another unit than {info.unit}, or none.",
            "State the unit of all its channels with `--unit`.",
        )
    mine = {i: name for name, i in found.items() if folded[i] != name.casefold()}
    return np.array(columns, dtype=np.intp), tuple(mine.get(i, info.ch_names[i]) for i in columns), missing
