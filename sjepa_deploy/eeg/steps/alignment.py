"""Aligns recordings with each other: Euclidean alignment, fitted from a recording or running.

Alignment makes the mean covariance of the channels the identity, so that people and days look alike to a model.

References
----------
H. He and D. Wu, Transfer Learning for Brain-Computer Interfaces: A Euclidean Space Data Alignment Approach, IEEE Transactions on
Biomedical Engineering 67(2), 2020, equations 14 to 16. The covariance of a window is divided by its number of samples here, which
the paper does not do: aligned channels then have a mean square of one for every length of window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sjepa_deploy.eeg.steps.base import SETTLED, FloatArray, Flow, Goal, Running, StreamStep, run_offline
from sjepa_deploy.eeg.steps.channels import Mixer
from sjepa_deploy.eeg.steps.checks import check_positive, check_same_channels
from sjepa_deploy.errors import DataError, SpecError

RANK_TOLERANCE = 1e-12
"""Directions whose variance is below this share of the largest hold no signal, only rounding: float32 leaves 4e-15 there."""

PIECE = 128
"""Samples whose products a running alignment adds up at once: the end of a block has no more to do than the end of a piece."""


def inverse_root(covariance: FloatArray, shrinkage: float = 0.0) -> FloatArray:
    """Return the pseudo-inverse of the symmetric square root of a covariance, shape (n_chans, n_chans).

    Directions without signal (see `RANK_TOLERANCE`) become zero: an average reference or an interpolated channel takes away one.

    Parameters
    ----------
    covariance : ndarray, shape (n_chans, n_chans)
        A symmetric matrix that is not zero.
    shrinkage : float
        Share of the mean variance on the diagonal that replaces as much of the covariance.
    """
    n = len(covariance)
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / n * np.eye(n)
    values, vectors = np.linalg.eigh(covariance)
    holds = values > RANK_TOLERANCE * values[-1]
    scale = np.where(holds, 1 / np.sqrt(np.where(holds, values, 1.0)), 0.0)
    root: FloatArray = (vectors * scale) @ vectors.T
    return root


@dataclass(frozen=True, kw_only=True)
class Alignment(StreamStep):
    """Aligns by a matrix that was fitted from a recording, see `Alignment.fit`.

    Attributes
    ----------
    ch_names : tuple of str
        Channels of the matrix, in its order.
    matrix : tuple of tuples of float, shape (n_chans, n_chans)
        What each sample is multiplied by.
    """

    name: ClassVar[str] = "alignment"
    changes_unit: ClassVar[bool] = True
    memory: ClassVar[bool] = False

    ch_names: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        n = len(self.ch_names)
        if not n or len(self.matrix) != n or any(len(row) != n for row in self.matrix):
            raise SpecError(
                f"The matrix of the alignment is not one of {n} x {n}, which its channels ask for.",
                "Fit the alignment again (`Alignment.fit`).",
            )
        if not all(math.isfinite(value) for row in self.matrix for value in row):
            raise SpecError("The matrix of the alignment holds values that are no numbers.", "Fit the alignment again.")

    @classmethod
    def fit(cls, windows: FloatArray, ch_names: Sequence[str], *, shrinkage: float = 0.0) -> Alignment:
        """Return the alignment of a recording: the inverse root of the mean covariance of its windows.

        Windows of the calibration, in the order of the channels, after the steps that come before the alignment. Their means are
        taken as zero, as in the paper: a high-pass must come before.

        Parameters
        ----------
        windows : ndarray, shape (n_windows, n_chans, n_times)
            The windows.
        ch_names : sequence of str
            Names of the channels.
        shrinkage : float
            See `inverse_root`; 0 is the paper's.

        Raises
        ------
        DataError
            If there are no windows, other channels than names, values that are not finite, or no signal.
        """
        _check_shrinkage(shrinkage)
        windows = np.asarray(windows, np.float64)
        if windows.ndim != 3 or not windows.size or windows.shape[1] != len(ch_names):
            raise DataError(
                f"Windows of shape {windows.shape} do not fit {len(ch_names)} channels.",
                "Give windows of shape (n_windows, n_chans, n_times), with one name for each channel.",
            )
        covariance = np.mean([window @ window.T for window in windows], axis=0) / windows.shape[2]
        if not np.isfinite(covariance).all() or not covariance.any():
            raise DataError(
                "The windows hold no signal, or values that are no numbers.", "Fit the alignment from a recording of EEG."
            )
        matrix = inverse_root(covariance, shrinkage)
        return cls(ch_names=tuple(ch_names), matrix=tuple(tuple(map(float, row)) for row in matrix))

    def check(self, goal: Goal) -> None:
        """Refuse the matrix of other channels than the model's."""
        if goal.ch_names is not None:
            check_same_channels(self.ch_names, goal.ch_names, "The alignment")
        elif len(self.ch_names) != goal.n_chans:
            raise SpecError(
                f"The alignment is for {len(self.ch_names)} channels, the model for {goal.n_chans}.",
                "Fit the alignment from a recording with the model's channels.",
            )

    def told(self, flow: Flow) -> str:
        """Return that a matrix aligns."""
        return "aligned by a fitted matrix"

    def causal(self, flow: Flow) -> Running:
        """Return the product with the matrix, which has no memory."""
        check_same_channels(self.ch_names, flow.ch_names, "The alignment")
        return Mixer(np.array(self.matrix))

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the same product."""
        return run_offline(self.causal(flow), data)


@dataclass(frozen=True, kw_only=True)
class RunningAlignment(StreamStep):
    """Aligns by the covariance of the blocks that have ended, with exponential forgetting.

    At the end of each block the covariance of its samples, less their mean, enters the moving covariance, and the matrix is made
    anew (`inverse_root`). The new matrix holds from the next sample on: no sample is looked at ahead of time. Samples pass
    unchanged until the first block has ended. A block in which no channel moves does not count. Both forms are causal.

    Runs that begin at other places of a block differ by what a part of a block weighs, also after they have settled.
    LAPACK makes the matrix: bits are the same where NumPy's BLAS has the same number of threads. Otherwise float64 outputs differ
    by 1e-14 (129 channels, 1 and 2 threads), before they are rounded to float32.

    Attributes
    ----------
    block : float
        Length of a block in seconds.
    half_life : float
        Time in seconds in which a block's weight halves.
    shrinkage : float
        Share of the mean variance on the diagonal, 0 to 1: it keeps directions that hold little from being blown up. 0.05 limits
        the gain to 4.5 times that of a mean channel; it is a choice and not measured.
    """

    name: ClassVar[str] = "running-alignment"
    causal_only: ClassVar[bool] = True
    changes_unit: ClassVar[bool] = True

    block: float = 10.0
    half_life: float = 60.0
    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        check_positive(self.block, "The block of the running alignment in seconds")
        check_positive(self.half_life, "The half-life of the running alignment in seconds")
        _check_shrinkage(self.shrinkage)

    def told(self, flow: Flow) -> str:
        """Return block and half-life."""
        return f"aligned by the covariance of blocks of {self.block:g} s with a half-life of {self.half_life:g} s"

    def settling(self, flow: Flow) -> float:
        """Return the time of the first whole blocks after which what came before a start would weigh less than `SETTLED`.

        A block of b s weighs 2 ^ (-k b / half_life) after k blocks more; k + 1 blocks, as the first one must end.
        Weights are those of blocks of equal variance: stronger ones before the start, such as artefacts, keep their mark longer.
        """
        n_block = self._n_block(flow)
        return (1 + math.ceil(math.log2(1 / SETTLED) * self.half_life * flow.sfreq / n_block)) * n_block / flow.sfreq

    def causal(self, flow: Flow) -> Running:
        """Return the moving covariance with its matrix."""
        n_block = self._n_block(flow)
        decay = 0.5 ** (n_block / flow.sfreq / self.half_life)
        return _RunningAligner(len(flow.ch_names), n_block, decay, self.shrinkage)

    def offline(self, data: FloatArray, flow: Flow) -> FloatArray:
        """Return the causal form: there is no other."""
        return run_offline(self.causal(flow), data)

    def _n_block(self, flow: Flow) -> int:
        n_block = round(self.block * flow.sfreq)
        if n_block < 2:
            raise SpecError(
                f"A block of {self.block:g} s holds no two samples at {flow.sfreq:g} Hz.",
                "Use a longer block: seconds, not samples.",
            )
        return n_block


class _RunningAligner(Running):
    """Multiplies samples by a matrix, and makes the matrix anew at the end of each block.

    Products are added up for `PIECE` samples at once, cut at the same samples of a block however the samples come.
    """

    def __init__(self, n_chans: int, n_block: int, decay: float, shrinkage: float) -> None:
        self._n_chans, self._n_block, self._decay, self._shrinkage = n_chans, n_block, decay, shrinkage
        self._piece = np.empty((min(PIECE, n_block), n_chans))
        self._mixer = Mixer(np.eye(n_chans))
        self._begin()

    def start(self, sample: FloatArray) -> FloatArray:
        """Start without a past: samples pass as they are."""
        self._mixer.set_matrix(np.eye(self._n_chans))
        self._begin()
        return sample.copy()

    def __call__(self, samples: FloatArray) -> FloatArray:
        """Align samples of shape (n_samples, n_chans)."""
        aligned, done = np.empty_like(samples), 0
        while done < len(samples):
            room = min(len(self._piece), self._n_block - self._n_added) - self._n_piece
            taken = samples[done : done + room]
            aligned[done : done + room] = self._mixer(taken)
            self._piece[self._n_piece : self._n_piece + len(taken)] = taken
            self._n_piece += len(taken)
            done += len(taken)
            if len(taken) == room:
                self._end_piece()
        return aligned

    def _begin(self) -> None:
        """Forget everything."""
        self._covariance = np.zeros((self._n_chans, self._n_chans))
        self._weight = 0.0
        self._n_piece = 0
        self._begin_block()

    def _begin_block(self) -> None:
        self._n_added = 0
        self._sum, self._products = np.zeros(self._n_chans), np.zeros((self._n_chans, self._n_chans))

    def _end_piece(self) -> None:
        """Add up the products of a piece, and end the block if it is full."""
        piece = self._piece[: self._n_piece]
        if not self._n_added:
            self._first = piece[0].copy()  # counted from here, an offset costs no digits, and a constant has no variance at all
        moved = piece - self._first
        self._sum += moved.sum(axis=0)
        self._products += moved.T @ moved
        self._n_added, self._n_piece = self._n_added + self._n_piece, 0
        if self._n_added < self._n_block:
            return
        mean = self._sum / self._n_block
        covariance = self._products / self._n_block - np.outer(mean, mean)
        self._begin_block()
        if not (np.trace(covariance) > 0):
            return
        self._covariance = covariance + self._decay * self._covariance
        self._weight = 1 + self._decay * self._weight
        self._mixer.set_matrix(inverse_root(self._covariance / self._weight, self._shrinkage))


def _check_shrinkage(shrinkage: float) -> None:
    if not 0 <= shrinkage < 1:
        raise SpecError(f"The shrinkage of the alignment is {shrinkage:g}.", "Use a share from 0 to below 1.")
