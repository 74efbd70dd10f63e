"""Judging whether the outputs of a backend equal those of the PyTorch model in float64."""

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
from sjepa_deploy.spec import RunPrecision

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
"""Largest allowed error of an output, relative to the outputs' scale (`ParityResult.scale`).

Measured over all variants, 1 to 129 channels, 1 to 15 time tokens (benchmarks/results/parity_*.md): fp32 up to 3.9e-6, fp16 up to
3.4e-3, bf16 up to 3.5e-2; tf32 up to 3.5e-3 in TensorRT 8.6 on an H200 (benchmarks/results/gpu_engines_*.md).
"""


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
    """

    kinds: tuple[str, ...]
    inputs: FloatArray
    outputs: NDArray[np.float64]

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
                return cls(kinds=kinds, inputs=arrays["inputs"], outputs=arrays["outputs"])
        except UNREADABLE_NPZ as e:
            raise BundleError(f"{path} holds no parity reference.", "Export the bundle again.") from e


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """How one backend compares with the float64 reference.

    Attributes
    ----------
    backend, precision : str
        What was judged.
    passed : bool
        Whether the largest error is within the tolerance and NaN windows give NaN and nothing else does.
    tolerance : float
        Allowed `max_error`.
    n_windows, n_rows : int
        Windows of the reference, and rows compared over all batch sizes.
    batch_sizes : tuple of int
        Batch sizes that were run.
    max_abs : float
        Largest absolute error.
    max_error : float
        Largest absolute error over `scale`.
    max_relative_to_spread : float
        Largest absolute error over `spread`.
    scale : float
        Root mean square of the reference outputs.
    spread : float
        Standard deviation of the reference outputs over windows, averaged (root mean square) over outputs.
    cosine : float
        Cosine between all outputs and the reference.
    nan_agrees : bool
        Whether outputs are NaN exactly where the reference is.
    worst : str
        Kind and batch size of the row with the largest error.
    decision_flips : int or None
        Rows whose largest output is another one than the reference's. None for a single output.
    flip_margin : float or None
        Largest margin in the reference between its two largest outputs among the flips, over `spread`.
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


def batch_sizes(max_batch: int, static_batch: int | None = None) -> tuple[int, ...]:
    """Return the batch sizes that parity is judged at: 1, 2, 3 and the largest, or the only one."""
    if static_batch is not None:
        return (static_batch,)
    return tuple(sorted({min(size, max_batch) for size in (1, 2, 3, max_batch)}))


def check_parity(
    predict: Predict, reference: Reference, *, backend: str, precision: RunPrecision, sizes: tuple[int, ...]
) -> ParityResult:
    """Run every window of `reference` through `predict` at every batch size and judge each row.

    Parameters
    ----------
    predict : callable
        Takes float32 windows (batch, n_chans, n_times) and returns the outputs (batch, ...).
    reference : Reference
        What must come out.
    backend, precision : str
        Names for the result; the precision chooses the tolerance.
    sizes : tuple of int
        Batch sizes. Every window stands in at least one batch of each size; the last batch is filled from the start.
    """
    n_windows = len(reference.inputs)
    expected_of = reference.outputs.reshape(n_windows, -1)
    real = np.asarray(np.isfinite(expected_of).all(axis=1))
    scale = _rms(expected_of[real])
    spread = _rms(expected_of[real] - expected_of[real].mean(axis=0))
    scale, spread = scale or 1.0, spread or scale or 1.0

    rows, expected, actual, labels = 0, [], [], []
    nan_agrees = True
    for size in sizes:
        for start in range(0, n_windows, size):
            index = np.arange(start, start + size) % n_windows
            out = np.asarray(predict(np.ascontiguousarray(reference.inputs[index]))).reshape(size, -1)
            nan_agrees &= np.array_equal(~np.isfinite(out), ~np.isfinite(expected_of[index]))
            keep = real[index]
            expected.append(expected_of[index][keep])
            actual.append(out[keep].astype(np.float64))
            labels += [row_label(reference.kinds[i], size) for i in index[keep]]
            rows += size
    want, got = np.concatenate(expected), np.concatenate(actual)
    error = np.abs(got - want)
    error[np.isnan(error)] = np.inf
    per_row = error.max(axis=1)
    max_abs = float(per_row.max())
    is_decision = reference.outputs.ndim == 2 and want.shape[1] > 1
    flips, margin = _decision_flips(want, got, spread) if is_decision else (None, None)
    max_error = max_abs / scale
    return ParityResult(
        backend=backend,
        precision=precision,
        passed=bool(nan_agrees and max_error <= TOLERANCE[precision]),
        tolerance=TOLERANCE[precision],
        n_windows=n_windows,
        n_rows=rows,
        batch_sizes=sizes,
        max_abs=_finite(max_abs),
        max_error=_finite(max_error),
        max_relative_to_spread=_finite(max_abs / spread),
        scale=scale,
        spread=spread,
        cosine=_cosine(want, got),
        nan_agrees=bool(nan_agrees),
        worst=labels[int(per_row.argmax())],
        decision_flips=flips,
        flip_margin=margin,
    )


def row_label(kind: str, batch: int) -> str:
    """Return what `ParityResult.worst` calls a window of `kind` that was run in a batch of `batch` windows."""
    return f"{kind} at batch {batch}"


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _cosine(want: NDArray[np.float64], got: NDArray[np.float64]) -> float:
    """Return the cosine between all values: 1 if both are all zeros, 0 if one is or something is not finite."""
    if not np.isfinite(got).all():
        return 0.0
    norm = float(np.linalg.norm(want) * np.linalg.norm(got))
    return float((want * got).sum() / norm) if norm else float(not want.any() and not got.any())


def _finite(value: float) -> float:
    return value if np.isfinite(value) else NOT_FINITE


def _decision_flips(want: NDArray[np.float64], got: NDArray[np.float64], spread: float) -> tuple[int, float | None]:
    flipped = want.argmax(axis=1) != got.argmax(axis=1)
    if not flipped.any():
        return 0, None
    top = np.sort(want[flipped], axis=1)
    return int(flipped.sum()), float((top[:, -1] - top[:, -2]).max() / spread)
