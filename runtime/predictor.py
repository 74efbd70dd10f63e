"""Opens a bundle on a backend and calls it on EEG windows."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn

import numpy as np

from sjepa_deploy.bundle import MAX_OPENINGS, Bundle
from sjepa_deploy.eeg.quality import ROUNDING_V
from sjepa_deploy.eeg.units import volts_in
from sjepa_deploy.errors import BackendError, InputError, SjepaError, listed
from sjepa_deploy.parity import rms_range
from sjepa_deploy.runtime.backend import (
    DEFAULT_BACKEND,
    AdaptableBackend,
    Backend,
    BackendOptions,
    ClosedBackend,
    FloatArray,
    RollingBackend,
    on_gpu,
    open_adaptable,
    open_backend,
)
from sjepa_deploy.spec import ModelSpec, RunPrecision

NonFinite = Literal["refuse", "pass"]

SMALLEST_RMS_V = 1e-7
"""Root mean square below which a window is no EEG in the unit of the spec.

Amplifiers alone make 0.3 uV, and volts taken for microvolts give values a million times too small (20 mV electrode offsets
in volts are 0.02).
"""

LARGEST_RMS_V = 1.0
"""Root mean square that no amplifier exceeds."""


class Predictor:
    """Decodes windows with a bundle on a backend.

    Made by `load`. A call of one window costs 3 to 8 us beyond the backend (benchmarks/call_overhead.py).

    Parameters
    ----------
    bundle : Bundle
        Bundle to run.
    backend : Backend
        Backend that runs the bundle.
    non_finite : {"refuse", "pass"}
        Windows with NaN or infinite samples are refused, or passed on: their outputs are NaN, as with PyTorch.
    check_unit : bool
        Whether to refuse windows whose amplitude is impossible in the unit of the spec. After steps that leave the unit, such as
        a standardisation, windows are judged by the range of those of the bundle's parity reference.

    Attributes
    ----------
    rolling : RollingBackend or None
        The backend if `roll` is offered, else None: it must keep windows, as "cuda" does, and `check_unit` be off, as the
        amplitude of a window is not to be had from its newest samples.
    n_rolls : int
        Calls of `roll` so far. Of several that share a predictor, each sees by it whether another has called since.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, non_finite: NonFinite = "refuse", check_unit: bool = True) -> None:
        self.bundle = bundle
        self.spec: ModelSpec = bundle.spec
        self.backend = backend
        graph = bundle.graph(backend.precision)
        self.max_batch = graph.max_batch
        self._batches = range(graph.static_batch or 1, graph.max_batch + 1)
        self._window = self.spec.input_shape
        self._non_finite: NonFinite = non_finite
        self._check_unit = check_unit
        n_samples = self.spec.n_chans * self.spec.n_times
        self._energy_from, self._energy_to = 0.0, float(np.finfo(np.float32).max)
        if check_unit:
            self._energy_from, self._energy_to = (n_samples * rms**2 for rms in self._rms_range())
        self.rolling = backend if isinstance(backend, RollingBackend) and not check_unit else None
        self.n_rolls = 0

    def _rms_range(self) -> tuple[float, float]:
        """Return between which root mean squares windows lie: EEG in its unit, or as the reference after steps that leave it."""
        if self.spec.signal.in_unit:
            return SMALLEST_RMS_V / volts_in(self.spec.unit), LARGEST_RMS_V / volts_in(self.spec.unit)
        return rms_range(self.bundle.reference().inputs)

    def __call__(self, eeg: FloatArray, out: FloatArray | None = None) -> FloatArray:
        """Decode one batch of windows.

        Parameters
        ----------
        eeg : array of float32, shape (batch, n_chans, n_times)
            Windows after the steps of the signal, 1 to `max_batch` of them. GPU backends take an array on the GPU as well (DLPack
            or the CUDA array interface, so a torch tensor), in place and without looking at its values.
        out : array of float32, shape (batch, n_outputs), or None
            Where to write the predictions. None: a new array. `backend.run` makes neither copy nor check: it returns a buffer
            that its next call overwrites.

        Returns
        -------
        array of float32, shape (batch, n_outputs)
            Predictions; for the base model features, shape (batch, n_chans * n_tokens, emb_dim). The array belongs to the
            caller: no later call writes to it.

        Raises
        ------
        InputError
            If shape or dtype of `eeg` or `out` are wrong, samples are not finite, or the amplitude is impossible in the unit of
            the spec.
        """
        outputs = self.backend.run(self.check(eeg)) if isinstance(eeg, np.ndarray) else self._run_on_gpu(eeg)
        if out is None:
            return outputs.copy()
        self._check_out(out, outputs.shape)
        np.copyto(out, outputs)
        return out

    def check(self, eeg: FloatArray) -> FloatArray:
        """Return `eeg` C-contiguous, or raise what a call would raise for it."""
        if eeg.dtype != np.float32:
            self._refuse_type(eeg)
        if eeg.ndim != 3 or eeg.shape[1:] != self._window or len(eeg) not in self._batches:
            self._refuse_shape(eeg.shape)
        if not eeg.flags.c_contiguous:
            eeg = np.ascontiguousarray(eeg)
        for row in eeg.reshape(len(eeg), -1):
            # One product tells both: it is not finite if a sample is not, and it is the energy that the unit must explain.
            energy = np.vdot(row, row)  # unlike dot, it overflows to infinity without a warning
            if not self._energy_from <= energy <= self._energy_to:
                self._judge(row)
        return eeg

    def roll(self, eeg: FloatArray, out: FloatArray | None = None) -> FloatArray:
        """Decode the window of a stream that ends with new samples. The backend has kept the other samples.

        Parameters
        ----------
        eeg : array of float32, shape (n_chans, n), 1 <= n <= n_times
            Samples that follow those of the last `roll`, in the unit of the spec. A whole window, n = n_times, need not follow
            anything.
        out : array of float32, shape (1, n_outputs), or None
            Array that receives the prediction. None: a new array.

        Returns
        -------
        array of float32, shape (1, n_outputs)
            The same bits as a call with the whole window gives. The array belongs to the caller: no later call writes to it.

        Raises
        ------
        InputError
            If shape or dtype of `eeg` or `out` are wrong, samples are not finite, or n is less than a window where a whole window
            is due: at the start, and after any error.
        BackendError
            If the backend keeps no window, or units are checked, see `rolling`.
        """
        self.n_rolls += 1
        if self.rolling is None:
            why = "checks the unit of whole windows" if isinstance(self.backend, RollingBackend) else "keeps no window"
            raise BackendError(
                f"The backend {self.backend.name} {why}.", 'Call it on whole windows, or load "cuda" with check_unit=False.'
            )
        try:
            eeg = self._check_new(eeg)
            if out is not None:
                self._check_out(out, (1, *self.spec.output_shape))
        except InputError:
            self.rolling.restart()  # these samples are missing now
            raise
        outputs = self.rolling.roll(eeg)
        if out is None:
            return outputs.copy()
        np.copyto(out, outputs)
        return out

    def _check_new(self, eeg: FloatArray) -> FloatArray:
        if not isinstance(eeg, np.ndarray) or eeg.dtype != np.float32:
            self._refuse_type(eeg)
        n_chans, n_times = self._window
        if eeg.ndim != 2 or eeg.shape[0] != n_chans or not 1 <= eeg.shape[1] <= n_times:
            raise InputError(
                f"The new samples have shape {eeg.shape}, not ({n_chans}, 1 to {n_times}).",
                "Give those of one stream without a batch axis.",
            )
        if not eeg.flags.c_contiguous:
            eeg = np.ascontiguousarray(eeg)
        if not np.vdot(eeg, eeg) <= self._energy_to:
            self._judge(eeg)
        return eeg

    def _run_on_gpu(self, eeg: object) -> FloatArray:
        if not on_gpu(eeg):
            self._refuse_type(eeg)
        return self.backend.run_on_gpu(eeg)

    def _check_out(self, out: FloatArray, shape: tuple[int, ...]) -> None:
        if out.dtype != np.float32 or out.shape != shape:
            raise InputError(f"out is {out.dtype} of shape {out.shape}, the outputs float32 of shape {shape}.", "Leave out= out.")

    def predict(self, eeg: FloatArray) -> FloatArray:
        """Decode any number of windows, shape (n, n_chans, n_times), in batches. The result is a new array."""
        size = self.max_batch
        out = np.empty((len(eeg), *self.spec.output_shape), np.float32)
        for start in range(0, len(eeg), size):
            batch = eeg[start : start + size]
            if len(batch) not in self._batches and batch.ndim == 3:  # the end of a static batch
                filled = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
                out[start:] = self(filled)[: len(batch)]
            else:
                self(batch, out=out[start : start + size])
        return out

    def adaptable(self, options: BackendOptions | None = None) -> AdaptableBackend:
        """Let the last layer be replaced, and return the backend that does so. Until then outputs are those of the model.

        Raises
        ------
        BackendError
            If the backend cannot replace it.
        """
        if not isinstance(self.backend, AdaptableBackend):
            opened = open_adaptable(self.bundle, self.backend.name, self.backend.precision, options)
            self.backend.close()
            self.backend, self.rolling = opened, None
        return self.backend

    def close(self) -> None:
        """Release the backend. Calls after it are errors that say so; a second `close` does nothing."""
        self.backend.close()
        self.backend = ClosedBackend(self.backend)
        self.rolling = None if self.rolling is None else self.backend

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _refuse_type(self, eeg: object) -> NoReturn:
        found = f"an array of {eeg.dtype}" if isinstance(eeg, np.ndarray) else f"a {type(eeg).__name__}"
        raise InputError(f"The input is {found}, not a NumPy array of float32.", "Convert it with eeg.astype(np.float32).")

    def _refuse_shape(self, shape: tuple[int, ...]) -> NoReturn:
        n_chans, n_times = self._window
        if len(shape) != 3:
            raise InputError(
                f"The input has shape {shape}, not (batch, {n_chans}, {n_times}).", "Add the batch axis with eeg[None]."
            )
        if shape[1] != n_chans:
            raise InputError(
                f"The windows have {shape[1]} channels, the model {n_chans}.", "Select the channels of spec.ch_names in order."
            )
        if shape[2] != n_times:
            raise InputError(
                f"The windows have {shape[2]} samples, the model {n_times} ({n_times / self.spec.sfreq:g} s at "
                f"{self.spec.sfreq:g} Hz).",
                "Resample or cut them.",
            )
        raise InputError(
            f"The batch has {shape[0]} windows, the graph takes {_range(self._batches)}.",
            "Use predict() for any number of windows.",
        )

    def _judge(self, row: FloatArray) -> None:
        """Raise for a window whose energy is out of bounds, unless that is allowed or the window is flat."""
        if not np.isfinite(row).all():
            if self._non_finite == "pass":
                return
            n_bad = int((~np.isfinite(row)).sum())
            raise InputError(
                f"A window holds {n_bad} samples that are NaN or infinite.",
                'Repair the channel, or load the bundle with non_finite="pass".',
            )
        rms = float(np.sqrt(np.mean(np.square(row, dtype=np.float64))))
        if rms * volts_in(self.spec.unit) < ROUNDING_V or not self._check_unit:  # flat, whatever the unit
            return
        unit = self.spec.unit
        if not self.spec.signal.in_unit:
            steps = listed([step.name for step in self.spec.signal.steps if step.changes_unit])
            raise InputError(
                f"A window has a root mean square of {rms:.3g}, which none has after the steps of this model ({steps}).",
                "Take the EEG through the steps (`sjepa_deploy.eeg.prepare`), or load the bundle with check_unit=False.",
            )
        raise InputError(
            f"A window has a root mean square of {rms:.3g} {unit}, which no EEG has: its values are probably not in {unit}.",
            f"Scale the data to {unit} (MNE gives volts), or load the bundle with check_unit=False.",
        )


def _range(batches: range) -> str:
    return str(batches[0]) if len(batches) == 1 else f"{batches[0]} to {batches[-1]}"


def load(
    bundle: Bundle | Path | str,
    *,
    backend: str = DEFAULT_BACKEND,
    precision: RunPrecision | None = None,
    n_threads: int | None = None,
    options: BackendOptions | None = None,
    non_finite: NonFinite = "refuse",
    check_unit: bool = True,
) -> Predictor:
    """Open a bundle for decoding.

    Parameters
    ----------
    bundle : Bundle, Path or str
        A bundle, or the folder of one, which is verified on opening.
    backend : str
        Name of a backend, see `sjepa_deploy.runtime.backend.BACKENDS`. This backend loads or the call fails: nothing falls back.
    precision : {"fp32", "tf32", "fp16", "bf16"} or None
        Precision to compute in; None takes the bundle's first graph.
    n_threads : int or None
        CPU threads of one call: short for ``options=BackendOptions(n_threads=n_threads)``.
    options : BackendOptions or None
        All that may be asked of a backend: threads, which GPU, copies or mapped memory, CUDA graph, how to wait.
    non_finite : {"refuse", "pass"}
        What to do with NaN and infinite samples.
    check_unit : bool
        Whether to refuse amplitudes that are impossible in the model's unit.

    Returns
    -------
    Predictor
        A callable on float32 arrays of shape (batch, n_chans, n_times).

    Raises
    ------
    BundleError
        If the bundle is missing, altered or has no such graph.
    BackendError
        If the backend does not exist or cannot run this graph here, or both `n_threads` and `options` are given.

    Examples
    --------
    >>> import sjepa_deploy
    >>> with sjepa_deploy.load("bundle") as predict:  # doctest: +SKIP
    ...     prediction = predict(eeg)
    """
    if n_threads is not None and options is not None:
        raise BackendError("Both n_threads and options are given.", "Use options=BackendOptions(n_threads=...).")
    options = options or BackendOptions(n_threads=n_threads)
    for attempt in range(MAX_OPENINGS):
        current = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        try:
            opened = open_backend(current, backend, precision or current.precisions[0], options)
            break
        except SjepaError:  # of a bundle that was replaced meanwhile, the new one is opened
            if isinstance(bundle, Bundle) or current.current or attempt == MAX_OPENINGS - 1:
                raise
    return Predictor(current, opened, non_finite=non_finite, check_unit=check_unit)
