"""Reads montages, the positions of electrodes, by name or from files. The two shipped ones need no MNE."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sjepa_deploy.errors import MissingDependencyError, MontageError
from sjepa_deploy.spec import Position

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SHIPPED_MONTAGES = ("GSN-HydroCel-129", "sjepa-62")
"""Montages that come with the package: the 129-channel net, and the 62 channels of the published pretraining."""

_HEADER = "name\tx\ty\tz"


@dataclass(frozen=True, kw_only=True)
class Montage:
    """Holds the names and positions of electrodes.

    Attributes
    ----------
    ch_names : tuple of str
        Names of the channels, each once (case is ignored).
    positions : tuple of (float, float, float)
        Their positions in metres.

    Raises
    ------
    MontageError
        If there are no channels, a name appears twice, or the positions are not as many finite triples.
    """

    ch_names: tuple[str, ...]
    positions: tuple[Position, ...]

    def __post_init__(self) -> None:
        if not self.ch_names or len({name.casefold() for name in self.ch_names}) != len(self.ch_names):
            raise MontageError("A montage has no channels, or one of them twice.", "Name every channel once.")
        triples = len(self.positions) == len(self.ch_names) and all(len(position) == 3 for position in self.positions)
        if not triples or not all(math.isfinite(x) for position in self.positions for x in position):
            raise MontageError(
                f"The positions of the {len(self.ch_names)} channels are not as many finite x, y, z.",
                "Give one position in metres a channel.",
            )

    def pick(self, ch_names: Iterable[str]) -> Montage:
        """Return the montage of `ch_names` alone, in this order and with the montage's spelling.

        Parameters
        ----------
        ch_names : iterable of str
            Channels to pick; case is ignored.

        Raises
        ------
        MontageError
            If the montage lacks channels (all are listed), or one is asked for twice.
        """
        ch_names = tuple(ch_names)
        index = {name.casefold(): i for i, name in enumerate(self.ch_names)}
        if missing := [name for name in ch_names if name.casefold() not in index]:
            raise MontageError(
                f"The montage has no channels {', '.join(missing)}.",
                f"Pick from its {len(self.ch_names)} channels: {', '.join(self.ch_names[:8])} ...",
            )
        picks = [index[name.casefold()] for name in ch_names]
        return Montage(ch_names=tuple(self.ch_names[i] for i in picks), positions=tuple(self.positions[i] for i in picks))


def read_montage(name_or_path: str) -> Montage:
    """Read a montage by its name or from a file.

    Positions are the montage's own, as MNE's ``get_positions()["ch_pos"]`` has them: they are not moved into the head
    frame, because those of the published models were not either. All they do in a model is initialise its embedding.

    Parameters
    ----------
    name_or_path : str
        "GSN-HydroCel-129" or "sjepa-62" (neither needs MNE), any standard montage of MNE (case is ignored), a
        tab-separated file with the columns name, x, y, z in metres, or a file for `mne.channels.read_custom_montage`.

    Raises
    ------
    MontageError
        If it is neither a montage nor a file that can be read as one.
    MissingDependencyError
        If the montage is not one of the shipped ones or tab-separated, and MNE is not installed.
    """
    for name in SHIPPED_MONTAGES:
        if name.casefold() == name_or_path.casefold():
            text = resources.files("sjepa_deploy").joinpath("assets", f"{name}.tsv").read_text(encoding="utf-8")
            return _parse(text, name)
    path = Path(name_or_path)
    return _read_file(path) if path.is_file() else _read_standard(name_or_path)


def fit_sphere(positions: ArrayLike) -> tuple[NDArray[np.float64], float]:
    """Return the centre, shape (3,), and the radius of the sphere that fits best: |p|^2 = 2 p.c + (r^2 - |c|^2) for all p.

    Parameters
    ----------
    positions : array-like, shape (n_chans, 3)
        Electrodes in metres. The radius is the head's as the electrodes see it.
    """
    points = np.asarray(positions, dtype=np.float64)
    equations = np.column_stack([2 * points, np.ones(len(points))])
    solution, *_ = np.linalg.lstsq(equations, (points**2).sum(axis=1), rcond=None)
    centre = solution[:3]
    return centre, math.sqrt(max(solution[3] + centre @ centre, 0.0))


def scalp_map(positions: ArrayLike) -> NDArray[np.float64]:
    """Return electrode positions on a flat head seen from above, nose up: the azimuthal equidistant map of topographies.

    Parameters
    ----------
    positions : array-like, shape (n_chans, 3)
        Electrodes in metres, x to the right and y to the front.

    Returns
    -------
    array of float64, shape (n_chans, 2)
        Distance from the vertex along the head in any direction; 1 is at the height of the head's centre.
    """
    points = np.asarray(positions, dtype=np.float64)
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    # a few electrodes in a plane tell no sphere: seen from the origin, as MNE does
    centre = fit_sphere(points)[0] if len(points) > 3 and spread[2] > 0.05 * spread[0] else np.zeros(3)
    x, y, z = (points - centre).T
    across = np.hypot(x, y)
    distance = np.arctan2(across, z) / (np.pi / 2)
    stretch = np.divide(distance, across, out=np.zeros_like(across), where=across > 0)
    return np.column_stack([x * stretch, y * stretch])


def require_mne() -> Any:
    """Return the module `mne`.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        import mne
    except ImportError as error:
        raise MissingDependencyError("MNE-Python", "eeg") from error
    return mne


def _parse(text: str, source: str) -> Montage:
    rows = [line.split("\t") for line in text.splitlines()[1:] if line.strip()]
    try:
        positions = tuple((float(x), float(y), float(z)) for _, x, y, z in rows)
    except ValueError as error:
        raise MontageError(
            f"{source} is not a table of names and positions ({error}).",
            "Give the columns name, x, y, z (in metres) on every line, separated by tabs.",
        ) from error
    return Montage(ch_names=tuple(row[0] for row in rows), positions=positions)


def _read_file(path: Path) -> Montage:
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.partition("\n")[0].strip() == _HEADER:
        return _parse(text, path.name)
    mne = require_mne()
    try:
        montage = mne.channels.read_custom_montage(path, verbose="error")
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, SyntaxError) as error:
        raise MontageError(
            f"{path.name} cannot be read as a montage ({type(error).__name__}: {error}).",
            "Give a tab-separated file with the header name, x, y, z, or one of the formats that MNE reads.",
        ) from error
    return _from_mne(montage)


def _read_standard(name: str) -> Montage:
    mne = require_mne()
    names = {builtin.casefold(): builtin for builtin in mne.channels.get_builtin_montages()}
    wanted = name.casefold()
    # MNE 1.13 renamed standard_1005 to colin27_1005 and its siblings alike: here both names work with any MNE.
    old_and_new = (wanted, wanted.replace("standard_", "colin27_"), wanted.replace("colin27_", "standard_"))
    builtin = next((names[key] for key in old_and_new if key in names), None)
    if builtin is None:
        close = [names[key] for key in difflib.get_close_matches(wanted, names)]
        raise MontageError(
            f"{name!r} is neither a montage nor a file.",
            (f"Did you mean {' or '.join(close)}? " if close else "")
            + f"There are {', '.join(SHIPPED_MONTAGES)}, standard_1005, biosemi64 and MNE's others.",
        )
    return _from_mne(mne.channels.make_standard_montage(builtin))


def _from_mne(montage: Any) -> Montage:  # mne.channels.DigMontage: MNE has no types
    ch_pos = montage.get_positions()["ch_pos"]
    positions = tuple((float(x), float(y), float(z)) for x, y, z in ch_pos.values())
    return Montage(ch_names=tuple(ch_pos), positions=positions)
