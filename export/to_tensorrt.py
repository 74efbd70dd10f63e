"""Builds an engine from a bundle's typed graph on this machine. Parity judges the engine before and after a disk round trip."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, EngineError, MissingDependencyError, ParityError
from sjepa_deploy.files import bytes_hash, now
from sjepa_deploy.parity import ParityResult, Reference, check_parity
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.engine_precision import judge_types, stored_weights, summarise_layers, weight_samples
from sjepa_deploy.runtime.backends.engine_runner import CaptureError, EngineRunner
from sjepa_deploy.runtime.backends.engines import BuildSettings, EngineRecord, EngineStore, read_timing_cache, write_timing_cache
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
from sjepa_deploy.runtime.backends.trt import machine_of
from sjepa_deploy.runtime.gpu.cuda import Device
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


class EngineParityError(ParityError):
    """Reports that the outputs of an engine differ from the PyTorch model. The engine was deleted.

    Attributes
    ----------
    result : ParityResult
        Measured parity of the engine.
    """

    def __init__(self, result: ParityResult, when: str) -> None:
        super().__init__(
            f"The {result.precision} engine {result.failure}, {when}.",
            "It was not kept. Try --optimization-level 2, or another precision.",
        )
        self.result = result


def engine_batch_sizes(settings: BuildSettings) -> tuple[int, ...]:
    """Return the batch sizes that an engine is judged at: 1, 2, 3, 8 and the largest, within the profile."""
    low, high = settings.min_batch, settings.max_batch
    return tuple(sorted({min(max(size, low), high) for size in (1, 2, 3, 8, high)}))


def why_no_engines(flavour: str = "tensorrt") -> str | None:
    """Return the reason why no engine can be built here, or None if engines can be built."""
    try:
        TensorRT(flavour)
        Device().close()
    except (BackendError, MissingDependencyError) as e:
        return e.problem
    return None


def build_engine(
    bundle: Bundle,
    precision: RunPrecision,
    *,
    flavour: str = "tensorrt",
    settings: BuildSettings | None = None,
    ordinal: int = 0,
    rebuild: bool = False,
    time_limit: float | None = None,
    progress: Progress = lambda _: None,
) -> EngineRecord:
    """Build, judge and keep one engine, or return the record of an existing engine.

    Parameters
    ----------
    bundle : Bundle
        An opened bundle; the engine is written into its folder ``engines``.
    precision : {"fp32", "tf32", "fp16", "bf16"}
        Precision of the engine.
    flavour : {"tensorrt", "tensorrt-rtx"}
        Kind of TensorRT.
    settings : BuildSettings or None
        Profile and options; None for the batches of the graph.
    ordinal : int
        Number of the GPU.
    rebuild : bool
        Whether to build an existing engine again.
    time_limit : float or None
        Seconds after which the build is given up.
    progress : callable
        Receives a text on each step.

    Returns
    -------
    EngineRecord
        Record of the engine. `EngineRecord.computes_in` may be fp32 although fp16 was asked for.

    Raises
    ------
    EngineError
        If the engine cannot be built here, or an fp32 engine may use TensorFloat-32.
    EngineParityError
        If the engine's outputs differ from the PyTorch model's. The engine is then deleted.
    """
    graph = bundle.graph(precision)
    settings = settings or default_settings(bundle, precision)
    if settings.max_batch > graph.max_batch or graph.static_batch not in (None, settings.max_batch):
        raise EngineError(
            f"The graph takes {graph.static_batch or f'1 to {graph.max_batch}'} windows, not {settings.max_batch}.",
            "Lower --max-batch, or export with a larger one.",
        )
    api = TensorRT(flavour)
    if time_limit is not None and not api.has_progress:
        raise EngineError(
            f"TensorRT {api.version} cannot stop a build.", "Leave --time-limit out, or lower --optimization-level."
        )
    device = Device(ordinal)
    try:
        store = EngineStore(bundle=bundle)
        machine = machine_of(api, device.gpu)
        identity = store.identity(precision, machine, settings, api.flags(precision, settings))
        with store.lock(identity, waiting=lambda: progress("waiting for another process that builds the same engine")):
            found = store.find(identity)
            if found is not None and not rebuild:
                store.plan(found)
                return found
            started = time.monotonic()
            onnx = bundle.graph_path(precision).read_bytes()
            assert bytes_hash(onnx) == identity.onnx_sha256, "Bundle.open verified it"
            step = _Steps(progress, started, time_limit)
            progress("building")
            try:
                built = api.build(onnx, precision, settings, timings=read_timing_cache(machine), step=step)
            except EngineError:
                if step.stopped:
                    raise EngineError(
                        f"The build took longer than {time_limit:g} s.", "Raise --time-limit, or lower --optimization-level."
                    ) from None
                raise
            seconds = time.monotonic() - started
            if api.keeps_timings:
                _keep_timings(lambda: write_timing_cache(machine, built.timings))
            plan = built.plan
            layers = summarise_layers(api.inspect(api.deserialize(plan)))
            computes_in, evidence = judge_types(layers, precision, stored_weights(plan, weight_samples(onnx)))
            judge = _Judge(bundle.reference(), precision, bundle, api, device, settings)
            progress("comparing with the PyTorch model")
            before = judge(plan, "after the build")
            record = EngineRecord(
                identity=identity,
                computes_in=computes_in,
                evidence=evidence,
                layers=layers,
                parity=(before,),
                plan_sha256=bytes_hash(plan),
                plan_bytes=len(plan),
                build_seconds=round(seconds, 1),
                created=now(),
            )
            progress("comparing again after reading it back")
            return store.add(
                record,
                plan,
                lambda reloaded: dataclasses.replace(record, parity=(before, judge(reloaded, "after it was read back"))),
            )
    finally:
        device.close()


def default_settings(bundle: Bundle, precision: RunPrecision) -> BuildSettings:
    """Return the settings whose profile is that of the graph."""
    graph = bundle.graph(precision)
    if graph.static_batch is not None:
        return BuildSettings(min_batch=graph.static_batch, opt_batch=graph.static_batch, max_batch=graph.static_batch)
    return BuildSettings(max_batch=graph.max_batch)


class _Judge:
    """Runs a plan on the reference windows, and raises an error if the outputs differ."""

    def __init__(
        self,
        reference: Reference,
        precision: RunPrecision,
        bundle: Bundle,
        api: TensorRT,
        device: Device,
        settings: BuildSettings,
    ) -> None:
        self._reference, self._precision, self._bundle = reference, precision, bundle
        self._api, self._device, self._sizes = api, device, engine_batch_sizes(settings)

    def __call__(self, plan: bytes, when: str) -> ParityResult:
        try:
            result = self._compare(plan, BackendOptions())
        except CaptureError as e:
            logger.warning("%s It is judged without a graph.", e.problem)
            result = self._compare(plan, BackendOptions(cuda_graph=False))
        if not result.passed:
            raise EngineParityError(result, when)
        return result

    def _compare(self, plan: bytes, options: BackendOptions) -> ParityResult:
        runner = EngineRunner(self._api, self._device, plan, self._bundle.spec, options)
        try:
            return check_parity(
                runner.run, self._reference, backend=self._api.flavour, precision=self._precision, sizes=self._sizes
            )
        finally:
            runner.close()


class _Steps:
    """Reports the builder's steps as progress, and stops the builder when time is up."""

    def __init__(self, progress: Progress, started: float, time_limit: float | None) -> None:
        self._progress, self._started, self._limit = progress, started, time_limit
        self.stopped = False

    def __call__(self, phase: str, share: float) -> bool:
        elapsed = time.monotonic() - self._started
        self._progress(f"building, {elapsed:.0f} s: {phase} {share:.0%}")
        self.stopped = self._limit is not None and elapsed > self._limit
        return not self.stopped


def _keep_timings(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as e:
        logger.warning("The timing cache cannot be kept (%s); the next build takes as long as this one.", e)
