"""Opens the engines of a bundle that fit this machine: the backends "tensorrt" and "tensorrt-rtx"."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import closing

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, listed
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.engine_judge import EngineJudge
from sjepa_deploy.runtime.backends.engine_runner import EngineRunner, suited
from sjepa_deploy.runtime.backends.engines import EngineRecord, EngineStore, Machine
from sjepa_deploy.runtime.backends.proofs import prove
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
from sjepa_deploy.runtime.gpu.cuda import Device, Gpu
from sjepa_deploy.spec import RunPrecision


def machine_of(api: TensorRT, gpu: Gpu) -> Machine:
    """Return the machine that engines of `api` on `gpu` depend on."""
    return Machine(
        flavour=api.flavour,
        version=api.version,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
    )


class TensorRTBackend(EngineRunner):
    """Runs the engines of a bundle that fit this machine.

    Each batch size runs on the engine whose profile suits it, see `sjepa_deploy.runtime.backends.engine_runner.suited`. Parity
    judges an engine that another machine or another version of TensorRT built at its first load here, and the proof is kept
    beside the engine. TensorRT's lean runtime will do for version-compatible engines.

    Raises
    ------
    EngineError
        If the bundle has no engine that fits this graph, TensorRT, GPU and driver, or its plan was changed.
    EngineParityError
        If an engine that was built elsewhere differs from the PyTorch model on this machine.
    BackendError
        If TensorRT or the GPU are not usable.
    """

    name = "tensorrt"
    engine = "cached"

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        self.precision = precision
        bundle.graph(precision)
        api = TensorRT(self.name, runs_only=True)
        with contextlib.ExitStack() as opened:
            device = opened.enter_context(closing(Device(options.device)))
            store = EngineStore(bundle=bundle)
            machine = machine_of(api, device.gpu)
            records = _needed(store.fitting(precision, machine), bundle.graph(precision).max_batch)
            built = records[0].identity.machine
            host_code = any(record.identity.settings.version_compatible for record in records)
            api = TensorRT(self.name, runs_only=True, engines_of=built.version, host_code=host_code)
            plans = [store.plan(record) for record in records]
            for record, plan in zip(records, plans, strict=True):
                if built != machine:
                    prove(store, record, plan, machine, EngineJudge(bundle, precision, record.identity.settings, api, device))
            super().__init__(api, device, plans, bundle.spec, options)
            opened.pop_all()
        self.build_seconds = sum(record.build_seconds for record in records)
        settings = [record.identity.settings for record in records]
        self.setting = "engine for " + listed(
            [f"{s.min_batch} to {s.max_batch} windows with kernels chosen for {s.opt_batch}" for s in settings]
        )

    def close(self) -> None:
        """Release the engine and everything on the GPU."""
        with contextlib.nullcontext() if self._turn.closed else closing(self._device):
            super().close()


def _needed(records: Sequence[EngineRecord], max_batch: int) -> list[EngineRecord]:
    """Return those of `records` that some batch size runs on, in their order."""
    profiles = [(s.min_batch, s.opt_batch, s.max_batch) for s in (record.identity.settings for record in records)]
    used = {suited(profiles, batch) for batch in range(1, max_batch + 1)}
    return [record for i, record in enumerate(records) if i in used]


class TensorRTRTXBackend(TensorRTBackend):
    """Runs the TensorRT-RTX engine of a bundle that fits this machine."""

    name = "tensorrt-rtx"


def probe() -> None:
    """Raise an error if TensorRT cannot run here."""
    TensorRT("tensorrt", runs_only=True)
    Device().close()


def probe_rtx() -> None:
    """Raise an error if TensorRT-RTX cannot run here."""
    api = TensorRT("tensorrt-rtx")
    device = Device()
    capability = device.gpu.compute_capability
    device.close()
    if capability not in api.targets:
        raise BackendError(f"TensorRT-RTX has no kernels for compute capability {capability}.", "Use the backend tensorrt.")
