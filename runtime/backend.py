"""The protocol of a backend, and the table of those that exist."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, MissingDependencyError, SjepaError
from sjepa_deploy.spec import RunPrecision

FloatArray = NDArray[np.float32]

Wait = Literal["spin", "flag", "block"]
"""How a call waits for the GPU. "spin" asks the driver in a loop; "flag" looks at a word in host memory that the GPU writes last,
which takes neither the driver's lock nor a system call; "block" sleeps until the GPU interrupts, which costs some 10 us and no
processor time."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What a user may ask of a backend.

    Attributes
    ----------
    n_threads : int or None
        Threads that one call may use on the CPU. None: one for PreLocal and PostLocal, which gain nothing from more, and all
        cores for models with the transformer.
    device : int
        Which GPU.
    memory : {"mapped", "copy"}
        GPU backends: whether kernels read the input and write the output in pinned host memory, or the windows are copied to
        device memory and the outputs back.
    cuda_graph : bool
        GPU backends: whether a call replays a captured graph, or enqueues kernel by kernel.
    wait : {"spin", "flag", "block"}
        GPU backends: how a call waits, see `sjepa_deploy.runtime.backend.Wait`.
    persistent : bool
        Backend "cuda": whether a kernel stays on the GPU and answers calls of one window without a launch. It keeps the GPU to
        itself until the host is silent for two seconds, a call of another size comes or the backend is closed.
    """

    n_threads: int | None = None
    device: int = 0
    memory: Literal["mapped", "copy"] = "mapped"
    cuda_graph: bool = True
    wait: Wait = "spin"
    persistent: bool = False


@runtime_checkable
class Backend(Protocol):
    """Something that runs the graph of one bundle.

    `run` takes C-contiguous float32 windows (batch, n_chans, n_times) of an allowed batch size and returns the outputs
    (batch, ...) in float32. It may return the same buffer at every call. A second thread at the same time gets an error.
    """

    name: str
    precision: RunPrecision

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`."""
        ...

    def close(self) -> None:
        """Release what the backend holds."""
        ...


@runtime_checkable
class RollingBackend(Backend, Protocol):
    """A backend that keeps the newest window of a stream, so that a call takes its newest samples alone.

    `roll` takes C-contiguous float32 samples (n_chans, n), 1 <= n <= n_times, that follow those of the last `roll`, and returns
    the bits that `run` returns for the window that ends with them. A whole window follows any. `restart`, and every error, let it
    be the only one that is taken next.

    Attributes
    ----------
    persistent : bool
        Whether a kernel stays on the GPU, which a call of another size makes leave.
    """

    persistent: bool

    def roll(self, eeg: FloatArray) -> FloatArray:
        """Run the model on the window that ends with `eeg`."""
        ...

    def restart(self) -> None:
        """Take a whole window next."""
        ...


def two_threads() -> BackendError:
    """Return the error of a backend whose buffers a second thread would overwrite."""
    return BackendError("Two threads call one backend at once.", "Load the bundle once in each thread.")


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Where a backend is found and what it needs.

    Attributes
    ----------
    target : str
        "module:Class", imported when the backend is asked for.
    package : str
        What must be importable.
    extra : str
        Extra of sjepa-deploy that installs it.
    probe : str
        "module:function" that raises what keeps the backend from running on this machine, whatever the bundle.
    depends_on : tuple of str
        What its speed depends on: names of packages, "processor", "cores", "gpu", "driver".
        `sjepa_deploy.runtime.backends.fastest` compares them.
    """

    target: str
    package: str
    extra: str
    probe: str = ""
    depends_on: tuple[str, ...] = ()

    def why_not(self) -> SjepaError | None:
        """Return what keeps the backend from running on this machine, or None if nothing does."""
        if importlib.util.find_spec(self.package) is None:
            return MissingDependencyError(self.package, self.extra)
        if self.probe:
            try:
                _find(self.probe)()
            except (BackendError, MissingDependencyError) as e:
                return e
        return None


def _find(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


_ON_CPU = ("processor", "cores")
_ON_GPU = ("gpu", "driver")

BACKENDS: dict[str, BackendEntry] = {
    "ort-cpu": BackendEntry(
        target="sjepa_deploy.runtime.backends.ort:OrtCpuBackend",
        package="onnxruntime",
        extra="",
        depends_on=(*_ON_CPU, "onnxruntime"),
    ),
    "torch": BackendEntry(
        target="sjepa_deploy.runtime.backends.reference:TorchBackend",
        package="torch",
        extra="export",
        depends_on=(*_ON_CPU, "torch"),
    ),
    "ort-cuda": BackendEntry(
        target="sjepa_deploy.runtime.backends.ort:OrtCudaBackend",
        package="onnxruntime",
        extra="gpu",
        probe="sjepa_deploy.runtime.backends.ort:probe_cuda",
        depends_on=(*_ON_GPU, "onnxruntime"),
    ),
    "ort-tensorrt": BackendEntry(
        target="sjepa_deploy.runtime.backends.ort:OrtTensorRTBackend",
        package="onnxruntime",
        extra="gpu",
        probe="sjepa_deploy.runtime.backends.ort:probe_tensorrt",
        depends_on=(*_ON_GPU, "onnxruntime"),
    ),
    "tensorrt": BackendEntry(
        target="sjepa_deploy.runtime.backends.trt:TensorRTBackend",
        package="tensorrt",
        extra="gpu",
        probe="sjepa_deploy.runtime.backends.trt:probe",
        depends_on=(*_ON_GPU, "tensorrt"),
    ),
    "tensorrt-rtx": BackendEntry(
        target="sjepa_deploy.runtime.backends.trt:TensorRTRTXBackend",
        package="tensorrt_rtx",
        extra="rtx",
        probe="sjepa_deploy.runtime.backends.trt:probe_rtx",
        depends_on=(*_ON_GPU, "tensorrt-rtx"),
    ),
    "cuda": BackendEntry(
        target="sjepa_deploy.runtime.fused.backend:FusedBackend",
        package="cuda",
        extra="gpu",
        probe="sjepa_deploy.runtime.fused.backend:probe",
        depends_on=(*_ON_GPU, "nvidia-cuda-nvrtc", "sjepa-deploy"),
    ),
    "fastest": BackendEntry(target="sjepa_deploy.runtime.backends.fastest:FastestBackend", package="numpy", extra=""),
}
"""Every backend by name."""

DEFAULT_BACKEND = "ort-cpu"

FASTEST_BACKEND = "fastest"
"""The one that runs each batch size on another of them, as was measured."""


SERVER_SCHEMES = ("triton", "triton-shm")
"""Backends that are a server, named SCHEME:HOST:PORT/MODEL: windows go over the wire, or through shared memory of one host."""


def is_server(name: str) -> bool:
    """Whether `name` is the address of a server."""
    return name.partition(":")[0] in SERVER_SCHEMES


def open_backend(
    bundle: Bundle,
    name: str,
    precision: RunPrecision,
    options: BackendOptions | None = None,
    among: dict[str, BackendEntry] = BACKENDS,
) -> Backend:
    """Load the backend `name` for the graph of `precision`; triton:HOST:PORT/MODEL is a server that has loaded this bundle.

    Parameters
    ----------
    bundle : Bundle
        What to run.
    name, precision : str
        On what, and in what.
    options : BackendOptions or None
        What may be asked of it.
    among : dict of str to BackendEntry
        Where to look it up: a benchmark knows more than those that decode (`sjepa_deploy.runtime.bench.baselines`).

    Raises
    ------
    BackendError
        If there is no such backend, or it cannot run this graph here.
    MissingDependencyError
        If what it needs is not installed.
    """
    options = options or BackendOptions()
    if options.persistent and name != "cuda":
        raise BackendError(f"The backend {name} keeps no kernel on the GPU.", 'Use the backend "cuda", or leave persistent out.')
    if is_server(name):
        served: Backend = _find("sjepa_deploy.serving.client:connect")(bundle, name, precision)
        return served
    if name not in among:
        raise BackendError(f"{name!r} is not a backend.", f"Use one of {', '.join(among)}, or triton:HOST:PORT/MODEL.")
    if missing := among[name].why_not():
        raise missing
    backend: Backend = _find(among[name].target)(bundle, precision, options)
    return backend


def why_not(bundle: Bundle, name: str, precision: RunPrecision) -> str | None:
    """Return why the backend `name` cannot run the graph of `precision` here, or None if it can."""
    try:
        open_backend(bundle, name, precision).close()
    except (BackendError, MissingDependencyError) as e:
        return e.problem
    return None


def on_gpu(array: object) -> bool:
    """Return whether `array` says that it lies on a CUDA GPU (DLPack, or the CUDA array interface)."""
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in (2, 3, 13)  # CUDA, pinned by CUDA, managed by CUDA
    return hasattr(array, "__cuda_array_interface__")
