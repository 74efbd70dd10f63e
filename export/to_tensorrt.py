"""Builds an engine from a bundle's typed graph. Parity judges the engine here, or on another machine at its first load there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import closing

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, EngineError, MissingDependencyError
from sjepa_deploy.files import bytes_hash, now
from sjepa_deploy.parity import ParityResult
from sjepa_deploy.runtime.backends.engine_judge import EngineJudge, EngineParityError
from sjepa_deploy.runtime.backends.engines import (
    ANY,
    BuildSettings,
    EngineRecord,
    EngineStore,
    Machine,
    read_timing_cache,
    write_timing_cache,
)
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
from sjepa_deploy.runtime.backends.trt import machine_of
from sjepa_deploy.runtime.gpu.cuda import Device
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


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
    target: str | None = None,
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
    target : str or None
        Compute capability of other machines, e.g. "8.6", for which no GPU is needed here. Such an engine is unproven: parity
        judges it at its first load there. None builds for this machine's GPU.
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
    api = TensorRT(flavour, host_code=settings.version_compatible)
    if time_limit is not None and not api.has_progress:
        raise EngineError(
            f"TensorRT {api.version} cannot stop a build.", "Leave --time-limit out, or lower --optimization-level."
        )
    with contextlib.ExitStack() as opened:
        if target is None:
            device = opened.enter_context(closing(_device(ordinal, api)))
            machine = machine_of(api, device.gpu)
        else:
            device, machine = None, other_machine(flavour, target)
        store = EngineStore(bundle=bundle)
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
                built = api.build(onnx, precision, settings, target=target, timings=read_timing_cache(machine), step=step)
            except EngineError:
                if step.stopped:
                    raise EngineError(
                        f"The build took longer than {time_limit:g} s.", "Raise --time-limit, or lower --optimization-level."
                    ) from None
                raise
            record = EngineRecord(
                identity=identity,
                computes_in=precision,
                evidence="the network is strongly typed; the engine is judged at its first load on a GPU",
                layers=None,
                parity=(),
                plan_sha256=bytes_hash(built.plan),
                plan_bytes=len(built.plan),
                build_seconds=round(time.monotonic() - started, 1),
                created=now(),
            )
            if device is None:
                return store.add(record, built.plan, lambda reloaded: record)
            if api.keeps_timings:
                _keep_timings(lambda: write_timing_cache(machine, built.timings))
            judge = EngineJudge(bundle, precision, settings, api, device)
            types = judge.types(built.plan)
            progress("comparing with the PyTorch model")
            before = _passed(judge, built.plan, "after the build")
            progress("comparing again after reading it back")

            def judged(reloaded: bytes) -> EngineRecord:
                after = _passed(judge, reloaded, "after it was read back")
                kept = dataclasses.replace(record, layers=types.layers, computes_in=types.computes_in, evidence=types.evidence)
                return dataclasses.replace(kept, parity=(before, after))

            return store.add(record, built.plan, judged)


def _device(ordinal: int, api: TensorRT) -> Device:
    """Open the GPU. Without one, say how engines are built for other machines, if this TensorRT can."""
    try:
        return Device(ordinal)
    except BackendError as e:
        if not api.targets:
            raise
        others = f"build for other machines with --for, e.g. --for {api.targets[-1]}"
        raise BackendError(e.problem, f"{e.mend.rstrip('.')}, or {others}.") from e


def other_machine(flavour: str, target: str) -> Machine:
    """Return what stands for every machine with a GPU of compute capability `target`.

    Raises
    ------
    EngineError
        If this TensorRT cannot build for such machines.
    """
    if flavour != "tensorrt-rtx":
        raise EngineError("TensorRT builds for the GPU of its own machine.", "Build there, or use --flavour tensorrt-rtx.")
    api = TensorRT(flavour)
    if target not in api.targets:
        raise EngineError(
            f"TensorRT-RTX {api.version} builds nothing for compute capability {target}.", f"Use {', '.join(api.targets)}."
        )
    return Machine(flavour=api.flavour, version=api.version, gpu=ANY, compute_capability=target, driver=ANY)


def _passed(judge: EngineJudge, plan: bytes, when: str) -> ParityResult:
    result = judge.parity(plan)
    if not result.passed:
        raise EngineParityError(result, when)
    return result


def default_settings(bundle: Bundle, precision: RunPrecision) -> BuildSettings:
    """Return the settings whose profile is that of the graph."""
    graph = bundle.graph(precision)
    if graph.static_batch is not None:
        return BuildSettings(min_batch=graph.static_batch, opt_batch=graph.static_batch, max_batch=graph.static_batch)
    return BuildSettings(max_batch=graph.max_batch)


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
