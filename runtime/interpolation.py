"""Channels made from others by spherical splines, without MNE: what repairs a channel while decoding goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.polynomial.legendre import legval
from numpy.typing import NDArray

from sjepa_deploy.errors import StreamError, listed
from sjepa_deploy.montage import fit_sphere, read_montage
from sjepa_deploy.spec import ModelSpec, Position

Matrix = NDArray[np.float64]

_STIFFNESS, _N_TERMS, _REGULARISATION = 4, 50, 1e-5  # MNE's


def on_sphere(positions: Sequence[Position]) -> Matrix:
    """Return unit vectors to the positions from the centre of their best sphere, shape (n_chans, 3)."""
    centre, _ = fit_sphere(positions)
    away = np.asarray(positions, dtype=np.float64) - centre
    unit: Matrix = away / np.linalg.norm(away, axis=1, keepdims=True)
    return unit


def spline_weights(sources: Matrix, targets: Matrix) -> Matrix:
    """Return how each target is made of the sources, shape (n_targets, n_sources).

    Spherical splines (Perrin et al. 1989, Electroencephalogr. Clin. Neurophysiol. 72, 184-187) with MNE's stiffness, number of
    Legendre terms and regularisation.

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
    system[:-1, :-1] = legval(sources @ sources.T, terms) + _REGULARISATION * np.eye(n_sources)
    of_targets = np.column_stack([legval(targets @ sources.T, terms), np.ones(len(targets))])
    weights: Matrix = np.linalg.solve(system.T, of_targets.T).T[:, :-1]
    return np.ascontiguousarray(weights)


def mixing_matrix(ch_names: Sequence[str], spec: ModelSpec, bads: Sequence[str] = ()) -> tuple[Matrix, tuple[str, ...]]:
    """Return the matrix from a stream's channels to a model's, and the names of those that are interpolated.

    Parameters
    ----------
    ch_names : sequence of str
        The stream's channels.
    spec : ModelSpec
        The model.
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
    assert spec.ch_names is not None, "the contract was checked"
    without = {name.casefold() for name in bads}
    column = {name.casefold(): i for i, name in enumerate(ch_names) if name.casefold() not in without}
    matrix = np.zeros((spec.n_chans, len(ch_names)))
    rows = [i for i, name in enumerate(spec.ch_names) if name.casefold() in column]
    missing = [i for i in range(spec.n_chans) if i not in rows]
    for i in rows:
        matrix[i, column[spec.ch_names[i].casefold()]] = 1.0
    if not missing:
        return matrix, ()
    names = tuple(spec.ch_names[i] for i in missing)
    if spec.positions is None:
        raise StreamError(
            f"{listed(names)} cannot be interpolated: the bundle holds no positions.", "Export it with `--montage`."
        )
    placed = on_sphere(spec.positions)
    if len(rows) >= 4:
        names_of_sources, sources = [spec.ch_names[i].casefold() for i in rows], placed[rows]
    else:
        template = read_montage("standard_1005")
        known = dict(zip(map(str.casefold, template.ch_names), template.positions, strict=True))
        names_of_sources = [name for name in column if name in known]
        if len(names_of_sources) < 4:
            raise StreamError(
                f"Only {len(names_of_sources)} good channels of the stream have a position, by the names of the model or of the "
                "10-05 system.",
                "At least 4 are needed to interpolate the others.",
            )
        sources = on_sphere([known[name] for name in names_of_sources])
    matrix[np.ix_(missing, [column[name] for name in names_of_sources])] = spline_weights(sources, placed[missing])
    return matrix, names
