"""Opens the engine of a bundle that fits this machine: the backends "tensorrt" and "tensorrt-rtx"."""

from __future__ import annotations

import contextlib
from contextlib import closing

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.engine_judge import EngineJudge
from sjepa_deploy.runtime.backends.engine_runner import EngineRunner
from sjepa_deploy.runtime.backends.engines import EngineStore, Machine
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
    """Runs the engine of a bundle that fits this machine.

    Parity judges an engine that was built for other machines at its first load, and the proof is kept beside the engine.

    Raises
    ------
    EngineError
        If the bundle has no engine that fits this graph, TensorRT, GPU and driver, or its plan was changed.
    EngineParityError
        If an engine that was built for other machines differs from the PyTorch model on this one.
    BackendError
        If TensorRT or the GPU are not usable.
    """

    name = "tensorrt"
    engine = "cached"

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        self.precision = precision
        bundle.graph(precision)
        api = TensorRT(self.name)
        with contextlib.ExitStack() as opened:
            device = opened.enter_context(closing(Device(options.device)))
            store = EngineStore(bundle=bundle)
            machine = machine_of(api, device.gpu)
            record = store.choose(precision, machine)
            plan = store.plan(record)
            if record.for_others:
                prove(store, record, plan, machine, EngineJudge(bundle, precision, record.identity.settings, api, device))
            super().__init__(api, device, plan, bundle.spec, options)
            opened.pop_all()
        self.build_seconds = record.build_seconds
        profile = record.identity.settings
        self.setting = f"engine for {profile.min_batch} to {profile.max_batch} windows, kernels chosen for {profile.opt_batch}"

    def close(self) -> None:
        """Release the engine and everything on the GPU."""
        with contextlib.nullcontext() if self._turn.closed else closing(self._device):
            super().close()


class TensorRTRTXBackend(TensorRTBackend):
    """Runs the TensorRT-RTX engine of a bundle that fits this machine."""

    name = "tensorrt-rtx"


def probe() -> None:
    """Raise an error if TensorRT cannot run here."""
    TensorRT("tensorrt")
    Device().close()


def probe_rtx() -> None:
    """Raise an error if TensorRT-RTX cannot run here."""
    api = TensorRT("tensorrt-rtx")
    device = Device()
    capability = device.gpu.compute_capability
    device.close()
    if capability not in api.targets:
        raise BackendError(f"TensorRT-RTX has no kernels for compute capability {capability}.", "Use the backend tensorrt.")
