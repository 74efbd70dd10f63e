"""Judges whether the outputs of a backend equal those of the PyTorch model in float64."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import BundleError
from sjepa_deploy.spec import RunPrecision, Task

UNREADABLE_NPZ = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy was seen to raise on truncated and altered .npz files, and on files of another kind."""

FloatArray = NDArray[np.float32]
Predict = Callable[[FloatArray], FloatArray]

TOLERANCE: dict[RunPrecision, float] = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 5e-2}
"""Largest allowed error of an output, relative to the outputs' scale: their root mean square over windows and outputs.

Measured over all variants, 1 to 129 channels, 1 to 15 time tokens (benchmarks/results/parity_*.md): fp32 up to 3.9e-6, fp16 up to
3.4e-3, bf16 up to 3.5e-2; tf32 up to 3.5e-3 in TensorRT 8.6 on an H200 (benchmarks/results/gpu_engines_*.md).
"""


SCALE_OF_ONE = 4.0
"""Where an output is smaller than the others, its scale counts as this many times its own root mean square, at most as theirs.

So an output in a small unit beside one in a large unit is judged by itself. Outputs of one unit whose mean is near zero were off
by up to 1.1e-5 of their own root mean square in fp32 (PostLocal, a saturated channel), and by 3.9e-6 of the outputs' scale.
"""

TOLERANCE_OF_SPREAD: dict[RunPrecision, float] = {"fp32": 1e-3, "tf32": 0.2, "fp16": 0.2, "bf16": 0.5}
"""Largest allowed error of an output on EEG windows, relative to the spread of that output: its standard deviation over them.

A graph that ignores the EEG is off by 1.5 spreads or more, also where the mean of an output is large beside its spread and the
error is small beside the scale. Measured on random weights, whose spread is smallest beside the scale, in Contextual: fp32 up to
5.6e-5, fp16 up to 4.3e-2, bf16 up to 0.21.

Features of a base model have one unit and are judged by their scale alone. The largest error of thousands of features in bf16 is
up to 0.6 of their spread; a graph that ignores the EEG is off by 0.2 of their scale.
"""

EEG_KINDS = ("eeg 0", "eeg 1", "eeg 2", "eeg 3", "eeg 4", "eeg 5", "window ")
"""How kinds of reference windows begin that are plain EEG: synthetic (`hard_windows`), or the user's own."""

LEAST_SPREAD = 1e-4
"""An output whose spread is less than this share of its scale does not depend on the EEG, and is judged by its scale alone."""

QUIETER, LOUDER = 100.0, 5.0
"""How much quieter and louder than the windows of the reference a window may be after steps that leave the unit.

Standardised EEG has a root mean square near 1 and artefacts a few times that. EEG in microvolts has 10 and more, in volts 1e-5.
"""

LARGEST_OUTPUT = float(np.finfo(np.float32).max)
"""No reference output is larger: graphs give float32."""

NOT_FINITE = float(np.finfo(np.float64).max)
"""Stands for infinity and NaN among errors, which JSON has no words for."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Inputs with the outputs that they must give.

    Attributes
    ----------
    kinds : tuple of str
        What each window is ("eeg", "noise", "flat channel", ...).
    inputs : array of float32, shape (n_windows, n_chans, n_times)
        In the unit of the spec.
    outputs : array of float64, shape (n_windows, ...)
        Outputs of the PyTorch model in float64.
    task : {"classification", "regression", "features"} or None
        What the outputs are for, which the bundle says: only decisions of classes flip. None takes several outputs for classes.
    """

    kinds: tuple[str, ...]
    inputs: FloatArray
    outputs: NDArray[np.float64]
    task: Task | None = None

    def save(self, path: Path) -> None:
        """Write the reference as ``.npz``."""
        np.savez_compressed(path, kinds=np.array(self.kinds), inputs=self.inputs, outputs=self.outputs)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote.

        Raises
        ------
        BundleError
            If the file does not hold a reference.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                kinds = tuple(map(str, arrays["kinds"]))
                reference = cls(kinds=kinds, inputs=arrays["inputs"], outputs=arrays["outputs"])
                plausible = not (np.abs(reference.outputs) > LARGEST_OUTPUT).any()
        except UNREADABLE_NPZ as e:
            raise BundleError(f"{path} holds no parity reference.", "Export the bundle again.") from e
        if not plausible:
            raise BundleError(f"{path} holds outputs that no float32 can be near.", "Export the bundle again.")
        return reference


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """How one backend compares with the float64 reference.

    Attributes
    ----------
    backend, precision : str
        What was judged.
    passed : bool
        Whether both errors are within their tolerances, and NaN windows give NaN and nothing else does.
    tolerance : float
        Allowed `max_error`.
    n_windows, n_rows : int
        Windows of the reference, and rows judged over all batch sizes.
    batch_sizes : tuple of int
        Batch sizes that were run.
    max_abs : float
        Largest absolute error.
    max_error : float
        Largest error of an output over `scale`, or over `SCALE_OF_ONE` times the root mean square of that output if less.
        Features have one unit, and one scale.
    max_relative_to_spread : float
        Largest error of an output on EEG windows over the standard deviation of that output over EEG windows.
    scale, spread : float
        Root mean square of all outputs of the reference, and of their standard deviations over EEG windows.
    cosine : float
        Cosine between all outputs and the reference.
    nan_agrees : bool
        Whether outputs are NaN exactly where the reference is.
    worst : str
        Kind and batch size of the row with the largest error.
    decision_flips : int or None
        Rows of another class than the reference's. None for numbers and features.
    flip_margin : float or None
        Largest margin in the reference between its two largest outputs among the flips, over `spread`.
    spread_tolerance : float or None
        Allowed `max_relative_to_spread`. None in results of releases that did not judge it.
    """

    backend: str
    precision: RunPrecision
    passed: bool
    tolerance: float
    n_windows: int
    n_rows: int
    batch_sizes: tuple[int, ...]
    max_abs: float
    max_error: float
    max_relative_to_spread: float
    scale: float
    spread: float
    cosine: float
    nan_agrees: bool
    worst: str
    decision_flips: int | None = None
    flip_margin: float | None = None
    spread_tolerance: float | None = None

    @property
    def failure(self) -> str:
        """What is wrong with outputs that did not pass, as the end of a sentence that begins with the graph."""
        if not self.nan_agrees:
            if self.max_error == NOT_FINITE:
                return f"gives NaN or infinity ({self.worst}) where PyTorch gives numbers"
            return "does not give NaN where PyTorch does"
        if self.max_error > self.tolerance:
            return f"is off by {self.max_error:.2g} of the outputs' scale ({self.worst}), allowed is {self.tolerance:g}"
        return (
            f"is off by {self.max_relative_to_spread:.2g} of the outputs' spread over EEG windows ({self.worst}), allowed is "
            f"{self.spread_tolerance:g}"
        )


def rms_range(windows: FloatArray) -> tuple[float, float]:
    """Return between which root mean squares windows like these lie, for signals that have left their unit.

    Parameters
    ----------
    windows : array of float32, shape (n_windows, n_chans, n_times)
        Windows of the reference; those that are not finite, or zero, do not count.
    """
    rms = np.sqrt(np.mean(np.square(windows, dtype=np.float64), axis=(1, 2)))
    rms = rms[np.isfinite(rms) & (rms > 0)]
    return (float(rms.min()) / QUIETER, float(rms.max()) * LOUDER) if len(rms) else (0.0, LARGEST_OUTPUT)


def batch_sizes(max_batch: int, static_batch: int | None = None) -> tuple[int, ...]:
    """Return the batch sizes that parity is judged at: small ones, one in between, the largest; or the only one."""
    if static_batch is not None:
        return (static_batch,)
    return tuple(sorted({min(size, max_batch) for size in (1, 2, 3, 7, max_batch // 4 + 1, max_batch)}))


def check_parity(
    predict: Predict, reference: Reference, *, backend: str, precision: RunPrecision, sizes: tuple[int, ...]
) -> ParityResult:
    """Run every window of `reference` through `predict` at every batch size and judge each row.

    No two windows of a batch are equal, so that a row with the answer of another row is found. Where a batch has more rows than
    the reference has windows, mixtures of its windows fill the batch. What they must give is what `predict` gives for them at the
    smallest batch size, in another order. A window with NaN is judged in a pass of its own, among windows without.

    Parameters
    ----------
    predict : callable
        Takes float32 windows (batch, n_chans, n_times) and returns the outputs (batch, ...).
    reference : Reference
        What must come out.
    backend, precision : str
        Names for the result; the precision chooses the tolerances.
    sizes : tuple of int
        Batch sizes. Every window stands in at least one batch of each size.
    """
    n_finite = int(np.isfinite(reference.outputs.reshape(len(reference.inputs), -1)).all(axis=1).sum())
    n_mixtures = max((-n_finite) % size for size in sizes)
    judge = _Judge(reference, precision, n_mixtures)
    smallest = min(sizes)
    # Backwards, so that each mixture stands in another row than below; windows of the reference fill the last batch.
    backwards = len(judge.windows) - 1 - np.arange(n_mixtures + (-n_mixtures) % smallest) % len(judge.windows)
    for start in range(0, len(backwards), smallest):
        index = backwards[start : start + smallest]
        judge.first(index, judge.run(predict, judge.windows[index]), smallest)
    for size in sizes:
        for start in range(0, n_finite, size):
            index = np.arange(start, start + size)
            judge.rows(index, judge.run(predict, judge.windows[index]), size)
    for size in {smallest, max(sizes)}:
        for window in judge.not_finite:
            for row in {0, size - 1}:
                index = np.arange(size) % len(judge.windows)
                batch = judge.windows[index]
                batch[row] = window
                out = judge.run(predict, batch)
                judge.nan_agrees &= not np.isfinite(out[row]).any()
                others = np.arange(size) != row
                judge.rows(index[others], out[others], size)
    return judge.result(backend, sizes)


class _Judge:
    """Knows what each window must give and what each output may be off by, and keeps what was found.

    Attributes
    ----------
    windows : array of float32
        The finite windows of the reference, and after them the mixtures.
    not_finite : array of float32
        The windows of the reference that give NaN.
    nan_agrees : bool
        Whether outputs were NaN where they must be, and nowhere else.
    """

    def __init__(self, reference: Reference, precision: RunPrecision, n_mixtures: int) -> None:
        outputs = reference.outputs.reshape(len(reference.inputs), -1)
        real = np.asarray(np.isfinite(outputs).all(axis=1))
        is_eeg = np.array([kind.startswith(EEG_KINDS) for kind in reference.kinds]) & real
        if is_eeg.sum() < 2:
            is_eeg = real
        eeg, mixed = reference.inputs[is_eeg], np.ones(n_mixtures, np.bool_)
        self.windows = np.concatenate([reference.inputs[real], _mixtures(eeg, n_mixtures)])
        self.not_finite = reference.inputs[~real]
        self.nan_agrees = True
        self._precision, self._n_windows = precision, len(outputs)
        kinds = [kind for kind, keep in zip(reference.kinds, real, strict=True) if keep]
        self._labels = kinds + [f"mixture {i} of EEG windows" for i in range(n_mixtures)]
        self._is_eeg, self._is_mixed = np.concatenate([is_eeg[real], mixed]), np.concatenate([~real[real], mixed])
        self._expected = np.concatenate([outputs[real], np.zeros((n_mixtures, outputs.shape[1]))])
        scale, spread = _rms(outputs[real]), _rms(outputs[is_eeg] - outputs[is_eeg].mean(axis=0))
        self._scale, self._spread = float(_rms(scale)) or 1.0, float(_rms(spread))
        if reference.outputs.ndim > 2:  # features, see TOLERANCE_OF_SPREAD
            scale, spread = np.full_like(scale, self._scale), np.zeros_like(spread)
        self._scales = np.where(scale > 0, np.minimum(SCALE_OF_ONE * scale, self._scale), self._scale)
        self._spreads = np.where(spread > LEAST_SPREAD * scale, spread, np.inf)
        several = reference.outputs.ndim == 2 and outputs.shape[1] > 1
        self._is_decision = several if reference.task is None else reference.task == "classification"
        self._n_rows, self._max_abs, self._of_scale, self._of_spread = 0, 0.0, 0.0, 0.0
        self._worst = (-1.0, "")
        self._want: list[NDArray[np.float64]] = []
        self._got: list[NDArray[np.float64]] = []

    def run(self, predict: Predict, batch: FloatArray) -> NDArray[np.float64]:
        """Return the outputs of a batch, one row a window."""
        self._n_rows += len(batch)
        return np.asarray(predict(np.ascontiguousarray(batch))).reshape(len(batch), -1).astype(np.float64)

    def first(self, index: NDArray[np.intp], got: NDArray[np.float64], size: int) -> None:
        """Take what mixtures give at the smallest batch size, and judge the windows of the reference among them."""
        mixed = self._is_mixed[index]
        self._expected[index[mixed]] = got[mixed]
        self.rows(index[~mixed], got[~mixed], size)

    def rows(self, index: NDArray[np.intp], got: NDArray[np.float64], size: int) -> None:
        """Judge the outputs of the windows `index`, which stood in a batch of `size`."""
        if not len(index):
            return
        want = self._expected[index]
        finite = np.isfinite(got) & np.isfinite(want)
        self.nan_agrees &= bool(finite.all())
        error = np.abs(np.where(finite, got, np.inf) - np.where(finite, want, 0.0))
        of_scale = (error / self._scales).max(axis=1)
        of_spread = np.where(self._is_eeg[index] & finite.all(axis=1), (error / self._spreads).max(axis=1), 0.0)
        over = np.maximum(of_scale / TOLERANCE[self._precision], of_spread / TOLERANCE_OF_SPREAD[self._precision])
        row = int(over.argmax())
        if over[row] > self._worst[0]:
            self._worst = float(over[row]), row_label(self._labels[index[row]], size)
        self._max_abs = max(self._max_abs, float(error.max()))
        self._of_scale, self._of_spread = max(self._of_scale, float(of_scale.max())), max(self._of_spread, float(of_spread.max()))
        known = ~self._is_mixed[index]
        self._want.append(want[known])
        self._got.append(got[known])

    def result(self, backend: str, sizes: tuple[int, ...]) -> ParityResult:
        """Return the verdict."""
        want, got = np.concatenate(self._want), np.concatenate(self._got)
        spread = self._spread or self._scale
        flips, margin = _decision_flips(want, got, spread) if self._is_decision else (None, None)
        allowed, allowed_of_spread = TOLERANCE[self._precision], TOLERANCE_OF_SPREAD[self._precision]
        return ParityResult(
            backend=backend,
            precision=self._precision,
            passed=self.nan_agrees and self._of_scale <= allowed and self._of_spread <= allowed_of_spread,
            tolerance=allowed,
            n_windows=self._n_windows,
            n_rows=self._n_rows,
            batch_sizes=sizes,
            max_abs=_finite(self._max_abs),
            max_error=_finite(self._of_scale),
            max_relative_to_spread=_finite(self._of_spread),
            scale=self._scale,
            spread=spread,
            cosine=_cosine(want, got),
            nan_agrees=self.nan_agrees,
            worst=self._worst[1],
            decision_flips=flips,
            flip_margin=margin,
            spread_tolerance=allowed_of_spread,
        )


def row_label(kind: str, batch: int) -> str:
    """Return what `ParityResult.worst` calls a window of `kind` that was run in a batch of `batch` windows."""
    return f"{kind} at batch {batch}"


def _mixtures(eeg: FloatArray, n: int) -> FloatArray:
    """Return `n` windows, each a weighted sum of two of `eeg`, no two alike."""
    rng = np.random.default_rng(0)
    mixed = np.empty((n, *eeg.shape[1:]), np.float32)
    for i in range(n):
        a, b = rng.choice(len(eeg), 2, replace=len(eeg) < 2)
        weight = rng.uniform(0.2, 1.0, 2).astype(np.float32)
        mixed[i] = weight[0] * eeg[a] + weight[1] * eeg[b]
    return mixed


def _rms(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square over the first axis."""
    return np.asarray(np.sqrt(np.mean(np.square(values), axis=0)))


def _cosine(want: NDArray[np.float64], got: NDArray[np.float64]) -> float:
    """Return the cosine between all values: 1 if both are all zeros, 0 if one is or something is not finite."""
    if not np.isfinite(got).all():
        return 0.0
    norm = float(np.linalg.norm(want) * np.linalg.norm(got))
    return float((want * got).sum() / norm) if norm else float(not want.any() and not got.any())


def _finite(value: float) -> float:
    return value if np.isfinite(value) else NOT_FINITE


def _decision_flips(want: NDArray[np.float64], got: NDArray[np.float64], spread: float) -> tuple[int, float | None]:
    if want.shape[1] == 1:  # of two classes: the second one for values above 0
        want, got = (np.column_stack([np.zeros(len(values)), values]) for values in (want, got))
    flipped = want.argmax(axis=1) != got.argmax(axis=1)
    if not flipped.any():
        return 0, None
    top = np.sort(want[flipped], axis=1)
    return int(flipped.sum()), float((top[:, -1] - top[:, -2]).max() / spread)
