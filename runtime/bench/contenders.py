"""Opens the contenders of a benchmark: every bundle on every backend that runs here, judged before it is timed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.eeg.units import conversion, volts_in
from sjepa_deploy.errors import BackendError, SjepaError
from sjepa_deploy.parity import ParityResult, Reference, batch_sizes, check_parity, row_label
from sjepa_deploy.runtime.backend import FASTEST_BACKEND, Backend, BackendOptions, FloatArray, open_backend
from sjepa_deploy.runtime.bench.baselines import ALL_BACKENDS, REFERENCE_BACKEND
from sjepa_deploy.runtime.bench.cells import HARNESS
from sjepa_deploy.runtime.bench.results import BundleFacts, Judgement, LeftOut, Setting
from sjepa_deploy.runtime.gpu.cuda import Device
from sjepa_deploy.spec import RUN_PRECISIONS, ModelSpec, RunPrecision, graph_precision

logger = logging.getLogger(__name__)

N_WINDOWS = 64
"""Windows that calls cycle through."""

OFFSET_V = 1e-3
"""A channel whose mean is larger has an electrode offset: 1 mV is ten times what EEG reaches."""

TOO_LATE = "Opening what came before it took half of the time limit."

N_TURNS = 8
"""Different inputs of a small batch: a live window was written a moment ago, so that it is warm in the cache."""


@functools.lru_cache(maxsize=8)
def example_windows(spec: ModelSpec, n: int, seed: int) -> FloatArray:
    """Return `n` windows of synthetic EEG in the unit of `spec`, the same array each time."""
    eeg = eeg_windows(n, spec.n_chans, spec.n_times, spec.sfreq, np.random.default_rng(seed))
    return eeg * np.float32(conversion("uV", spec.unit))


def without_offsets(reference: Reference, spec: ModelSpec) -> Reference | None:
    """Return the windows of `reference` in which no channel's mean is as large as an electrode offset; None without one."""
    largest = np.abs(np.nan_to_num(reference.inputs).mean(axis=2, dtype=np.float64)).max(axis=1) * volts_in(spec.unit)
    keep = largest < OFFSET_V
    if not np.isfinite(reference.outputs[keep]).all(axis=tuple(range(1, reference.outputs.ndim))).any():
        return None
    kinds = tuple(kind for kind, kept in zip(reference.kinds, keep, strict=True) if kept)
    return Reference(kinds=kinds, inputs=reference.inputs[keep], outputs=reference.outputs[keep])


class NothingBackend(Backend):
    """Does nothing: the latencies of this backend are the cost of measuring."""

    name = HARNESS
    precision: RunPrecision = "fp32"

    def __init__(self, spec: ModelSpec) -> None:
        self._output = np.zeros((1, *spec.output_shape), np.float32)

    def run(self, eeg: FloatArray) -> FloatArray:
        """Return zeros."""
        return self._output

    def close(self) -> None:
        """Release nothing."""


class Contender:
    """Runs one bundle on one backend in one precision; what a benchmark compares.

    Attributes
    ----------
    bundle : str
        Label of the bundle.
    path : Path
        Its folder.
    backend : Backend
        What runs it.
    judgement : Judgement or None
        Whether it gives the reference outputs; None for the backend that does nothing.
    device_bytes : int or None
        Device memory that it took, where it runs on a GPU of ours.
    sizes : range
        Batch sizes that it takes.
    """

    def __init__(self, label: str, bundle: Bundle, backend: Backend, *, seed: int, in_place: bool = False) -> None:
        self.bundle, self.path, self.backend = label, bundle.path, backend
        self.spec, self._seed, self._in_place = bundle.spec, seed, in_place
        graph = bundle.graph(backend.precision)
        self.sizes = range(graph.static_batch or 1, graph.max_batch + 1)
        self.judgement: Judgement | None = None
        self.device_bytes: int | None = None
        self._pool = example_windows(self.spec, N_WINDOWS, seed)

    @property
    def label(self) -> str:
        """Return a readable name."""
        return f"{self.bundle} on {self.backend.name} {self.backend.precision}"

    def judge(self, bundle: Bundle) -> None:
        """Compare every row at every batch size with the float64 reference in the bundle."""
        graph = bundle.graph(self.backend.precision)
        sizes = batch_sizes(graph.max_batch, graph.static_batch)

        def judge(reference: Reference) -> ParityResult:
            backend = self.backend
            return check_parity(backend.run, reference, backend=backend.name, precision=backend.precision, sizes=sizes)

        reference = bundle.reference()
        result, without = judge(reference), None
        rest = None if result.passed else without_offsets(reference, self.spec)
        if rest is not None and result.worst not in {row_label(kind, size) for kind in rest.kinds for size in sizes}:
            without = judge(rest)
        self.judgement = Judgement(bundle=self.bundle, result=result, without_offsets=without)

    def activate(self) -> None:
        """Set what the backend needs for the whole process."""
        self.backend.activate()

    def inputs(self, batch: int) -> list[FloatArray]:
        """Return different batches to call it with in turn; in place one, in the buffer that the backend reads."""
        buffer = self.backend.input_buffer(batch) if self._in_place else None
        if buffer is not None:
            buffer[...] = np.resize(self._pool, buffer.shape)
            return [buffer]
        n = max(2, min(N_TURNS, N_WINDOWS // batch))
        if n * batch > len(self._pool):
            self._pool = example_windows(self.spec, n * batch, self._seed)
        return [self._pool[i * batch : (i + 1) * batch] for i in range(n)]

    def close(self) -> None:
        """Release the backend."""
        self.backend.close()


def bundle_facts(bundles: tuple[Bundle, ...]) -> tuple[BundleFacts, ...]:
    """Return the facts that a report states of each bundle. Labels are the folders' names, with a number where two are equal."""
    facts: list[BundleFacts] = []
    for bundle in bundles:
        name = bundle.path.resolve().name
        taken = sum(fact.label == name or fact.label.startswith(f"{name}-") for fact in facts)
        facts.append(
            BundleFacts(
                label=f"{name}-{taken + 1}" if taken else name,
                variant=bundle.spec.variant,
                n_chans=bundle.spec.n_chans,
                n_times=bundle.spec.n_times,
                sfreq=bundle.spec.sfreq,
                digest=bundle.manifest.digest,
                weights=bundle.manifest.weights.source,
            )
        )
    return tuple(facts)


def settings_of(contenders: Sequence[Contender]) -> tuple[Setting, ...]:
    """Return the settings that the backends of `contenders` tell, each once."""
    found = ((c.backend.name, c.backend.precision, c.backend.setting) for c in contenders if c.backend.setting)
    return tuple(Setting(backend=name, precision=precision, setting=text) for name, precision, text in dict.fromkeys(found))


def open_contenders(
    bundles: tuple[Bundle, ...],
    facts: tuple[BundleFacts, ...],
    *,
    backends: tuple[str, ...],
    precisions: tuple[RunPrecision, ...],
    options: BackendOptions,
    seed: int,
    in_place: bool = False,
    late: Callable[[], bool] = lambda: False,
) -> Iterator[Contender | LeftOut]:
    """Open and judge every combination, one after the other; a combination that cannot be measured here comes as `LeftOut`.

    Parameters
    ----------
    bundles, facts : tuple
        What to run, and its labels.
    backends : tuple of str
        Names; empty for all that run here.
    precisions : tuple of str
        Empty for all that the graphs allow.
    options : BackendOptions
        For every backend.
    seed : int
        Of the windows.
    in_place : bool
        Whether windows stand in the buffer that a backend reads, where it has one, before a call.
    late : callable
        Asked before each is opened whether it is too late for that.

    Raises
    ------
    BackendError
        If a name is no backend's.
    """
    if unknown := [name for name in backends if name not in ALL_BACKENDS]:
        raise BackendError(f"{unknown[0]!r} is not a backend.", f"Use one of {', '.join(ALL_BACKENDS)}.")
    usable = []
    for name in backends or ALL_BACKENDS:
        error = ALL_BACKENDS[name].why_not()
        if name == REFERENCE_BACKEND and not backends:
            reason = f"The float64 reference is slow by design; ask for it with --backend {name}."
            yield LeftOut(what=(name,), reason=reason, kind="on request")
        elif name == FASTEST_BACKEND and not backends:
            reason = f"It runs others of these backends; ask for it with --backend {name}."
            yield LeftOut(what=(name,), reason=reason, kind="on request")
        elif error is not None:
            yield LeftOut(what=(name,), reason=str(error), kind="not here")
        else:
            usable.append(name)
    for bundle, fact in zip(bundles, facts, strict=True):
        wanted = precisions or tuple(p for p in RUN_PRECISIONS if graph_precision(p) in bundle.precisions)
        for precision in wanted:
            for name in usable:
                if late():
                    yield LeftOut(what=(f"{fact.label} on {name} {precision}",), reason=TOO_LATE, kind="too late")
                else:
                    yield _open(bundle, fact.label, name, precision, options, seed, in_place)


def _open(
    bundle: Bundle, label: str, name: str, precision: RunPrecision, options: BackendOptions, seed: int, in_place: bool
) -> Contender | LeftOut:
    what = f"{label} on {name} {precision}"
    contender = None
    try:
        free = _free_device_memory(options.device)
        backend = open_backend(bundle, name, precision, options, ALL_BACKENDS)
        contender = Contender(label, bundle, backend, seed=seed, in_place=in_place)
        contender.judge(bundle)
        left = _free_device_memory(options.device)
        if free is not None and left is not None:
            contender.device_bytes = max(0, free - left)
    except SjepaError as e:
        return _left_out(what, e, contender)
    except Exception as e:  # whatever a foreign library raises: the others are measured all the same
        logger.exception("%s failed", what)
        return _left_out(what, e, contender)
    return contender


def _left_out(what: str, error: Exception, contender: Contender | None) -> LeftOut:
    if contender is not None:
        close_contender(contender)
    return LeftOut(what=(what,), reason=first_line(error), kind="failed")


def close_contender(contender: Contender) -> LeftOut | None:
    """Close `contender`, and return what kept it from closing: after a CUDA error that stays, releasing fails like all else."""
    try:
        contender.close()
    except Exception as e:  # whatever a foreign library raises: the others are measured and reported all the same
        logger.exception("%s could not be closed", contender.label)
        return LeftOut(what=(f"closing: {contender.label}",), reason=first_line(e), kind="failed")
    return None


def first_line(error: Exception) -> str:
    """Return the reason that a report gives for `error`."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _free_device_memory(ordinal: int) -> int | None:
    """Return the free bytes of the GPU, None without one that answers."""
    try:
        with closing(Device(ordinal)) as device:
            return device.free_memory()
    except SjepaError:
        return None


def grouped(left_out: list[LeftOut]) -> tuple[LeftOut, ...]:
    """Return one entry for each reason."""
    by_reason: dict[str, LeftOut] = {}
    for entry in left_out:
        known = by_reason.setdefault(entry.reason, entry)
        by_reason[entry.reason] = replace(known, what=tuple(dict.fromkeys((*known.what, *entry.what))))
    return tuple(by_reason.values())


def harness(bundle: Bundle, label: str, *, seed: int) -> Contender:
    """Return the contender that does nothing, with the windows of `bundle`."""
    return Contender(label, bundle, NothingBackend(bundle.spec), seed=seed)
