"""Opens the engine of a bundle that fits this machine: the backends "tensorrt" and "tensorrt-rtx"."""

from __future__ import annotations

import contextlib
from contextlib import closing

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.engine_runner import EngineRunner
from sjepa_deploy.runtime.backends.engines import EngineStore, Machine
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
from sjepa_deploy.runtime.gpu.cuda import Device, Gpu
from sjepa_deploy.spec import RunPrecision

RTX_CAPABILITIES = frozenset({"7.5", "8.0", "8.6", "8.7", "8.9", "12.0", "12.1"})
"""Compute capabilities that TensorRT-RTX makes engines for. 9.0 (H100, H200) and 10.x are not among them."""


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

    Raises
    ------
    EngineError
        If the bundle has no engine that fits this graph, TensorRT, GPU and driver, or its plan was changed.
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
            record = store.choose(precision, machine_of(api, device.gpu))
            super().__init__(api, device, store.plan(record), bundle.spec, options)
            opened.pop_all()
        self.build_seconds = record.build_seconds

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
    TensorRT("tensorrt-rtx")
    device = Device()
    capability = device.gpu.compute_capability
    device.close()
    if capability not in RTX_CAPABILITIES:
        raise BackendError(f"TensorRT-RTX has no kernels for compute capability {capability}.", "Use the backend tensorrt.")
