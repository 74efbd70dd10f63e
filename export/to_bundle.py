"""Exports a PyTorch model into a verified bundle. Every export ends with a parity check."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import importlib.metadata
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sjepa_deploy.bundle import (
    CHECKPOINT_FILES,
    CHECKPOINT_FOLDER,
    REFERENCE_FILE,
    SCHEMA_VERSION,
    Bundle,
    Graph,
    Manifest,
    Provenance,
    new_bundle,
    write_manifest,
)
from sjepa_deploy.eeg.amplitudes import check_amplitude
from sjepa_deploy.eeg.chain import Chain, finish_windows, settling_time
from sjepa_deploy.eeg.steps import Notch
from sjepa_deploy.eeg.steps import Reference as ReferenceStep
from sjepa_deploy.eeg.synthetic import hard_windows
from sjepa_deploy.eeg.units import conversion
from sjepa_deploy.errors import InputError, ParityError
from sjepa_deploy.export.emulate import emulate_bf16
from sjepa_deploy.export.overflow import check_weights_fit, overflowing
from sjepa_deploy.export.rewrite import rewrite
from sjepa_deploy.export.to_onnx import DEFAULT_OPSET, count_nodes, to_onnx
from sjepa_deploy.files import file_hash
from sjepa_deploy.models.checkpoint import write_checkpoint
from sjepa_deploy.models.networks import SignalJEPAModule
from sjepa_deploy.parity import ParityResult, Reference, batch_sizes, check_parity, rms_range
from sjepa_deploy.runtime.backend import BackendOptions, FloatArray
from sjepa_deploy.runtime.backends.ort import OrtCpuBackend
from sjepa_deploy.runtime.backends.reference import run_reference
from sjepa_deploy.spec import ModelSpec, Precision, SignalSpec

MAX_SETTLING = 20_000
"""Most samples before a synthetic window in which the steps settle."""

MAX_PARITY_WINDOWS = 64
"""Most windows of a user's EEG that a parity check keeps, evenly spaced."""


class ExportParityError(ParityError):
    """Reports that the graphs of an export differ from the PyTorch model. The export wrote nothing.

    Attributes
    ----------
    results : tuple of ParityResult
        Measured parity of the graphs.

    Parameters
    ----------
    results : tuple of ParityResult
        Measured parity of the graphs.
    causes : tuple of str
        Known causes, as parts of a sentence.
    """

    def __init__(self, results: tuple[ParityResult, ...], causes: tuple[str, ...] = ()) -> None:
        failed = [r for r in results if not r.passed]
        super().__init__(
            "; ".join([*(f"{r.precision} on {r.backend} {r.failure}" for r in failed), *causes]) + ".",
            "Leave these precisions out with --precision, or report this with the checkpoint."
            if not causes
            else f"Use --precision {' or '.join(r.precision for r in results if r.passed) or 'bf16 or fp32'}.",
        )
        self.results = results


def to_bundle(
    model: SignalJEPAModule,
    path: Path,
    *,
    weights: Provenance,
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16"),
    opset: int = DEFAULT_OPSET,
    max_batch: int = 64,
    static_batch: int | None = None,
    parity_windows: FloatArray | None = None,
    check_unit: bool = True,
    seed: int = 0,
    force: bool = False,
    training: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export `model` into a bundle at `path`, judge every graph, and write nothing if one fails.

    Parameters
    ----------
    model : SignalJEPAModule
        The model.
    path : Path
        Folder of the bundle.
    weights : Provenance
        Origin of the weights.
    precisions : tuple of {"fp32", "fp16", "bf16"}
        Graphs to write. The first graph runs by default.
    opset, max_batch, static_batch
        See `sjepa_deploy.export.to_onnx.to_onnx`.
    parity_windows : array of float32, shape (n, n_chans, n_times), or None
        Windows of the user's own EEG to judge with, beside the synthetic ones.
    check_unit : bool
        Whether windows of the user are refused whose amplitudes no EEG has.
    seed : int
        Seed of the synthetic windows.
    force : bool
        Whether to replace a bundle at `path`.
    training : dict or None
        Record of the training for the bundle's checkpoint, see `sjepa_deploy.learning.origin.nameless`.
    progress : callable
        Receives a text on each step.

    Raises
    ------
    ExportError
        If the bundle cannot be written, or a graph is not what it must be.
    ExportParityError
        If a graph's outputs differ from the model's.
    """
    spec = model.spec
    with new_bundle(path, force=force) as folder:
        progress("writing the checkpoint")
        write_checkpoint(model, folder / CHECKPOINT_FOLDER, training=training)
        made_from = file_hash(folder / CHECKPOINT_FILES[1])
        rewritten = rewrite(model)
        check_weights_fit(rewritten, precisions)
        graphs = []
        for precision in precisions:
            progress(f"exporting the {precision} graph")
            proto = to_onnx(
                rewritten,
                precision=precision,
                opset=opset,
                max_batch=max_batch,
                static_batch=static_batch,
                weights=made_from,
            )
            file = f"model.{precision}.onnx"
            onnx.save(proto, folder / file)
            batch = static_batch or max_batch
            n_nodes = count_nodes(proto)
            graph = Graph(
                file=file,
                precision=precision,
                opset=opset,
                n_nodes=n_nodes,
                max_batch=batch,
                static_batch=static_batch,
                weights_sha256=made_from,
            )
            graphs.append(graph)
        progress("computing the float64 reference")
        reference = make_reference(model, parity_windows, seed=seed, check_unit=check_unit)
        reference.save(folder / REFERENCE_FILE)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            spec=spec,
            graphs=tuple(graphs),
            weights=weights,
            tools=tool_versions(),
            parity=(),
            files={},
        )
        results = []
        for graph in graphs:
            progress(f"judging the {graph.precision} graph")
            results.append(judge_graph(Bundle(path=folder, manifest=manifest), graph, reference))
        if not all(result.passed for result in results):
            infinite = [r.precision for r in results if not r.nan_agrees]
            causes = (overflowing(rewritten, graph.precision, reference) for graph in graphs if graph.precision in infinite)
            raise ExportParityError(tuple(results), tuple(cause for cause in causes if cause))
        manifest = write_manifest(folder, dataclasses.replace(manifest, parity=tuple(results)))
    return Bundle(path=path, manifest=manifest)


def make_reference(
    model: SignalJEPAModule, windows: FloatArray | None = None, *, seed: int = 0, check_unit: bool = True
) -> Reference:
    """Run the float64 model on synthetic windows and on the user's own.

    Parameters
    ----------
    model : SignalJEPAModule
        The model. It stays unchanged.
    windows : array of float32, shape (n, n_chans, n_times), or None
        Real windows in the unit of the spec; at most `MAX_PARITY_WINDOWS` are kept.
    seed : int
        Seed of the synthetic windows.
    check_unit : bool
        Whether real windows are refused whose amplitudes no EEG has.

    Raises
    ------
    InputError, RecordingError
        See `real_eeg`.
    """
    spec = model.spec
    synthetic = hard_windows(*spec.input_shape, spec.sfreq, np.random.default_rng(seed))
    kinds = list(synthetic)
    inputs = np.stack(list(synthetic.values())) * np.float32(conversion("uV", spec.unit))
    if not spec.signal.in_unit:
        inputs = through_steps(spec.signal, inputs)
    if windows is not None:
        windows = real_eeg(windows, spec, check_unit=check_unit, range_of_rms=rms_range(inputs))
        chosen = np.unique(np.linspace(0, len(windows) - 1, MAX_PARITY_WINDOWS).round().astype(int))
        kinds += [f"window {i} of the parity data" for i in chosen]
        inputs = np.concatenate([inputs, windows[chosen]])
    double = copy.deepcopy(model).double()
    outputs = np.concatenate([run_reference(double, window[None]) for window in inputs])
    return Reference(kinds=tuple(kinds), inputs=inputs, outputs=outputs, task=spec.task)


def through_steps(signal: SignalSpec, windows: FloatArray) -> FloatArray:
    """Return windows as the model gets them: each at the end of a recording that goes through the steps of the signal.

    The recording is the window and its mirror images, one after the other, so that it goes on without a jump until the steps have
    settled. Samples that are not finite are put back after the steps.

    Parameters
    ----------
    signal : SignalSpec
        The signal, whose steps leave its unit.
    windows : array of float32, shape (n, n_chans, n_times)
        Windows in the unit of the signal.
    """
    beyond = [step for step in signal.steps if isinstance(step, Notch) and step.freq >= signal.sfreq / 2]
    if beyond:  # windows at the model's rate hold nothing there
        signal = signal.replace(steps=tuple(step for step in signal.steps if step not in beyond))
    names = list(signal.ch_names or map(str, range(signal.n_chans)))
    outside = {name.casefold() for name in names}
    for step in signal.stream_steps:
        others = step.channels or () if isinstance(step, ReferenceStep) else ()
        names += [name for name in others if name.casefold() not in outside]
        outside |= {name.casefold() for name in others}
    matrix = np.eye(signal.n_chans, len(names))
    n_before = min(round(settling_time(signal, signal.sfreq) * signal.sfreq), MAX_SETTLING)
    repeats = 2 * math.ceil(n_before / (2 * signal.n_times)) + 1  # odd: the last one is the window itself
    made = np.empty_like(windows)
    for row, window in enumerate(windows):
        finite = np.isfinite(window)
        clean = np.where(finite, window, 0.0).astype(np.float64)
        recording = np.zeros((repeats * signal.n_times, len(names)))
        mirrored = [clean if i % 2 == 0 else clean[:, ::-1] for i in range(repeats)]
        recording[:, : signal.n_chans] = np.concatenate(mirrored, axis=1).T
        chain = Chain(signal, names, signal.sfreq, matrix)
        chain.start(recording[0])
        samples, _ = chain(recording)
        cut = finish_windows(signal, np.ascontiguousarray(samples[-signal.n_times :].T[None], dtype=np.float32))[0]
        made[row] = np.where(finite, cut, np.nan)
    return made


def real_eeg(
    windows: NDArray[Any], spec: ModelSpec, *, check_unit: bool = True, range_of_rms: tuple[float, float] | None = None
) -> FloatArray:
    """Return a user's windows for parity as float32. With `check_unit`, their amplitude must be that of EEG.

    Parameters
    ----------
    windows : array, shape (n, n_chans, n_times)
        The windows, after the steps of the signal.
    spec : ModelSpec
        The model.
    check_unit : bool
        Whether amplitudes are judged.
    range_of_rms : (float, float) or None
        Range of the root mean square of windows after steps that leave the unit.

    Raises
    ------
    InputError
        If the windows are no real numbers, have another shape, or hold NaN or infinity.
    RecordingError
        If the amplitude of the windows is not that of EEG in the unit of the spec.
    """
    shape = f"(n, {spec.n_chans}, {spec.n_times})"
    if windows.dtype.kind not in "fiu":
        raise InputError(
            f"Parity data of type {windows.dtype} are no real numbers.", f"Give float32 windows {shape} in {spec.unit}."
        )
    if windows.ndim != 3 or windows.shape[1:] != spec.input_shape or not len(windows):
        raise InputError(f"Parity data have shape {windows.shape}, not {shape}.", f"Give windows in {spec.unit}.")
    finite = np.isfinite(windows).all(axis=(1, 2))
    if not finite.all():
        raise InputError(
            f"{(~finite).sum()} of {len(windows)} windows of the parity data hold NaN or infinity.", "Leave them out."
        )
    if check_unit and not spec.signal.in_unit:
        rms = float(np.median(np.sqrt(np.mean(np.square(windows, dtype=np.float64), axis=(1, 2)))))
        if range_of_rms is not None and not range_of_rms[0] <= rms <= range_of_rms[1]:
            raise InputError(
                f"The median window of the parity data has a root mean square of {rms:.3g}, which is none after the steps of the "
                "signal.",
                "Take the windows through the steps (`sjepa_deploy.eeg.prepare`), or give the recording.",
            )
    elif check_unit:
        mend = f"Give windows in {spec.unit}, or take them as they are with `--no-check-unit`."
        check_amplitude(windows, spec.sfreq, mend, unit=spec.unit)
    return np.ascontiguousarray(windows, dtype=np.float32)


def judge_graph(bundle: Bundle, graph: Graph, reference: Reference) -> ParityResult:
    """Judge one graph on ONNX Runtime. The operations of a bf16 graph are emulated, as the CPU has no kernels for bf16."""
    sizes = batch_sizes(graph.max_batch, graph.static_batch)
    if graph.precision != "bf16":
        backend = OrtCpuBackend(bundle, graph.precision, BackendOptions(n_threads=0))
        return check_parity(backend.run, reference, backend=backend.name, precision=graph.precision, sizes=sizes)
    proto = emulate_bf16(onnx.load(bundle.graph_path("bf16")))
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would drop the rounding
    session = ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def predict(eeg: FloatArray) -> FloatArray:
        out: FloatArray = session.run(None, {bundle.spec.input_name: eeg})[0]
        return out

    return check_parity(predict, reference, backend="emulated", precision="bf16", sizes=sizes)


def tool_versions() -> dict[str, str]:
    """Return the versions of the software that an export depends on."""
    names = ("sjepa-deploy", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
