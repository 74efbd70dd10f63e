"""Defines what a backend is, lists the backends and opens them."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.bundle import Bundle, replaced
from sjepa_deploy.errors import BackendError, InputError, MissingDependencyError, SjepaError
from sjepa_deploy.last_layer import LastLayer
from sjepa_deploy.spec import RunPrecision

FloatArray = NDArray[np.float32]

Wait = Literal["spin", "flag", "block"]
"""Ways in which a call waits for the GPU.

"spin" asks the driver in a loop. "flag" looks at a word in host memory that the GPU writes last: this takes neither the driver's
lock nor a system call. "block" sleeps until the GPU interrupts: this costs some 10 us and no processor time.
"""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Holds the options that a user may set for a backend.

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
    kernels : {"auto", "window", "batch"}
        Backend "cuda": "window" spread one window over the whole GPU, one after the other; "batch" take many windows at a time.
        Their outputs differ within the tolerance of the precision, and neither's depend on the batch. "auto" takes those of one
        window for one, and for each batch size the faster ones, which its first call measures and the bundle keeps.
    """

    n_threads: int | None = None
    device: int = 0
    memory: Literal["mapped", "copy"] = "mapped"
    cuda_graph: bool = True
    wait: Wait = "spin"
    persistent: bool = False
    kernels: Literal["auto", "window", "batch"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Split:
    """Says where the time of a call goes, in microseconds.

    The values are medians of calls that were split, apart from the calls of the percentiles. GPU backends are split with CUDA
    events on their stream. With mapped memory there are no copies: h2d and d2h are None.

    Attributes
    ----------
    n : int
        Calls that were split.
    enqueue_us : float
        Until everything was handed to the GPU.
    h2d_us, d2h_us : float or None
        Copies of input and output between the events.
    compute_us : float
        The model.
    host_us : float
        The call less what the GPU took.
    overhead_us : float
        Time that the events add to a call.
    how : str
        In which mode the call was split, e.g. "stream, copies" where the measured calls replay a graph.
    """

    n: int
    enqueue_us: float
    h2d_us: float | None
    compute_us: float
    d2h_us: float | None
    host_us: float
    overhead_us: float
    how: str


class Backend(ABC):
    """Runs the graph of one bundle. Every backend derives from this class.

    A backend has a name, a precision and `run`. All else is optional: the defaults below say that it is not offered, and nobody
    asks a backend for more than stands here. `open_backend` calls a backend's class with a bundle, a precision and
    `BackendOptions`. See docs/extending.md for the steps, and `sjepa_deploy.runtime.gpu.backend.GpuBackend` for what backends on
    a GPU share.

    Attributes
    ----------
    name : str
        Name in the table of backends.
    precision : {"fp32", "tf32", "fp16", "bf16"}
        Precision in which the backend computes.
    engine : {"cached", "built"} or None
        Whether opening the backend reads an engine that was built before, or builds one. None: it has no engine.
    build_seconds : float or None
        Seconds that the cached engine took to build.
    setting : str
        Choices that the speed depends on, as a report of a benchmark tells them; empty where the name says all.
    """

    name: str
    precision: RunPrecision
    engine: Literal["cached", "built"] | None = None
    build_seconds: float | None = None
    setting: str = ""

    @property
    def finishes(self) -> bool:
        """Return whether `run_unfinished` is offered."""
        return False

    @property
    def batch_invariant(self) -> bool:
        """Return whether the bits of a window's outputs are known to depend neither on its batch nor on its place there."""
        return False

    @abstractmethod
    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on windows after all steps of the signal.

        A backend may refuse a second thread that calls at the same time (`Turn`).

        Parameters
        ----------
        eeg : array of float32, shape (batch, n_chans, n_times)
            C-contiguous windows of a batch size that the graph allows.

        Returns
        -------
        array of float32, shape (batch, ...)
            The outputs. Every call may return the same buffer.
        """

    def run_unfinished(self, eeg: FloatArray) -> FloatArray:
        """Run the model on windows before the signal's steps on windows, which the backend does, as a server can. Else see `run`.

        Raises
        ------
        BackendError
            If the backend does no steps.
        """
        raise BackendError(f"The backend {self.name} does no steps on windows.", "Give it windows after all steps.")

    def run_on_gpu(self, eeg: Any) -> FloatArray:
        """Run the model on windows on the GPU (DLPack, CUDA array interface), in place. The next call may overwrite the result.

        Raises
        ------
        InputError
            If the backend reads no arrays on the GPU.
        """
        raise InputError(
            f"The backend {self.name} does not read arrays on the GPU.",
            "Copy the windows to a NumPy array, or use a GPU backend.",
        )

    def input_buffer(self, batch: int) -> FloatArray | None:
        """Return the buffer that `run` reads, shape (batch, n_chans, n_times), or None if there is none.

        Windows that are written there and passed to `run` are not copied.
        """
        return None

    def warmup(self, batches: tuple[int, ...] = (1,), n_runs: int = 10) -> None:  # noqa: B027 a backend may have nothing to do
        """Prepare calls of each of `batches`, so that the first real call takes no longer than others."""

    def activate(self) -> None:  # noqa: B027 as above
        """Set what the backend needs for the whole process, e.g. a library's number of threads, before a series of calls."""

    def split(self, eeg: FloatArray, n: int) -> Split | None:
        """Return the split of the time of `n` calls on `eeg`, or None if the backend cannot tell."""
        return None

    def close(self) -> None:  # noqa: B027 as above
        """Release what the backend holds."""


class AdaptableBackend(Backend):
    """Gives what enters the last layer of a model, and runs another last layer in place of the model's.

    Attributes
    ----------
    last_layer : LastLayer or None
        What makes the outputs of the features. None: the last layer of the model, with the bits of its graph.
    """

    last_layer: LastLayer | None = None

    @property
    @abstractmethod
    def features(self) -> FloatArray:
        """What entered the last layer in the last call, shape (batch, n_features)."""


class RollingBackend(Backend):
    """Keeps the newest window of a stream, so that a call passes only the new samples.

    Attributes
    ----------
    persistent : bool
        Whether a kernel stays on the GPU and leaves it when a call of another size comes.
    """

    persistent: bool = False

    @abstractmethod
    def roll(self, eeg: FloatArray) -> FloatArray:
        """Run the model on the window that ends with new samples.

        Parameters
        ----------
        eeg : array of float32, shape (n_chans, n), 1 <= n <= n_times
            C-contiguous samples that follow those of the last `roll`. A whole window, n = n_times, need not follow anything.
            The first `roll` must be a whole window, and so must the next after `restart()` or an error.

        Returns
        -------
        array of float32, shape (1, ...)
            The same bits as `run` returns for the window that ends with `eeg`. The next call may overwrite them.

        Raises
        ------
        InputError
            If a whole window is due and n is less.
        """

    @abstractmethod
    def restart(self) -> None:
        """Forget the window: after `restart()` or an error, the next `roll` must be a whole window."""


class ClosedBackend(RollingBackend):
    """Stands for a backend that was closed: every call is an error that says so.

    Parameters
    ----------
    closed : Backend
        Backend that was closed.
    """

    def __init__(self, closed: Backend) -> None:
        self.name, self.precision = closed.name, closed.precision

    def run(self, eeg: FloatArray) -> FloatArray:
        """Raise BackendError."""
        raise _closed()

    def run_on_gpu(self, eeg: Any) -> FloatArray:
        """Raise BackendError."""
        raise _closed()

    def roll(self, eeg: FloatArray) -> FloatArray:
        """Raise BackendError."""
        raise _closed()

    def restart(self) -> None:
        """Do nothing: `roll` raises whatever it is given."""


class Turn:
    """Lets one thread at a time into a backend, and none once the backend is closed.

    A turn is the use of the backend by one thread: each call stands between `begin` and `end`.

    Parameters
    ----------
    forks : bool
        Whether a forked child may go on to call the backend.
    keeps : object
        Object that a forked child must never free, because that would wait for threads that it does not have.
    """

    def __init__(self, *, forks: bool = True, keeps: object = None) -> None:
        self._busy = threading.Lock()
        self._why: Callable[[], BackendError] = two_threads
        self._forks, self._keeps = forks, keeps
        self.end: Callable[[], None] = self._busy.release
        _turns.add(self)

    def begin(self) -> None:
        """Begin a call.

        Raises
        ------
        BackendError
            If another thread is in a call, the backend was closed, or this process is a forked child.
        """
        if not self._busy.acquire(blocking=False):
            raise self._why()

    @property
    def closed(self) -> bool:
        """Return whether the backend is closed: no thread gets in any more."""
        return self._why is not two_threads

    def close(self) -> None:
        """Close the backend: no thread gets in any more.

        Raises
        ------
        BackendError
            If another thread is in a call.
        """
        self.begin()
        self._why, self._keeps = _closed, None

    def _enter_child(self) -> None:
        if self._keeps is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._keeps))
        if not self._forks and not self.closed:
            self._busy.acquire(blocking=False)  # if it fails, a thread that is not here holds it for good
            self._why = _forked


_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def _enter_child() -> None:
    for turn in _turns:
        turn._enter_child()


os.register_at_fork(after_in_child=_enter_child)


def two_threads() -> BackendError:
    """Return the error of a backend whose buffers a second thread would overwrite."""
    return BackendError("Two threads call one backend at once.", "Load the bundle once in each thread.")


def _closed() -> BackendError:
    return BackendError("The backend was closed.", "Load the bundle again, or leave the `with` block after the last call.")


def _forked() -> BackendError:
    return BackendError(
        "This process was forked from the one that opened the backend, and the GPU is not open here.",
        'Load the bundle in this process, or start it with multiprocessing\'s "spawn".',
    )


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Describes one backend of the table: where its class is and what the class needs.

    Attributes
    ----------
    target : str
        "module:Class", imported when the backend is asked for.
    package : str
        Package that must be importable.
    or_package : str
        Package that will do in its place.
    extra : str
        Extra of sjepa-deploy that installs it.
    probe : str
        "module:function" that raises what keeps the backend from running on this machine, whatever the bundle.
    depends_on : tuple of str
        Facts that the backend's speed depends on: names of packages, "processor", "cores", "gpu", "driver".
        `sjepa_deploy.runtime.backends.fastest` compares them.
    persistent : bool
        Whether it knows `BackendOptions.persistent`.
    adaptable : str
        "module:Class" of its `AdaptableBackend`; empty without one.
    """

    target: str
    package: str
    extra: str
    or_package: str = ""
    probe: str = ""
    depends_on: tuple[str, ...] = ()
    persistent: bool = False
    adaptable: str = ""

    @property
    def installed(self) -> str | None:
        """Package of the backend that is installed here."""
        return next((name for name in (self.package, self.or_package) if name and importlib.util.find_spec(name)), None)

    def why_not(self) -> SjepaError | None:
        """Return what keeps the backend from running on this machine, or None if nothing does."""
        if self.installed is None:
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
        adaptable="sjepa_deploy.runtime.backends.adaptable:AdaptableOrtBackend",
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
        or_package="tensorrt_lean",
        extra="gpu",
        probe="sjepa_deploy.runtime.backends.trt:probe",
        depends_on=(*_ON_GPU, "tensorrt", "tensorrt-lean"),
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
        persistent=True,
    ),
    "fastest": BackendEntry(target="sjepa_deploy.runtime.backends.fastest:FastestBackend", package="numpy", extra=""),
}
"""Every backend by name."""

DEFAULT_BACKEND = "ort-cpu"

FASTEST_BACKEND = "fastest"
"""Runs each batch size on the backend that was measured to be the fastest."""


SERVER_SCHEMES = ("triton", "triton-shm")
"""Schemes of servers, which are named SCHEME:HOST:PORT/MODEL: windows go over the wire, or through shared memory of one host."""


def is_server(name: str) -> bool:
    """Return whether `name` is the address of a server."""
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
        Bundle to run.
    name : str
        Name in the table of backends, or the address of a server.
    precision : {"fp32", "tf32", "fp16", "bf16"}
        Precision to compute in.
    options : BackendOptions or None
        Threads, GPU, memory and waiting. None: the defaults.
    among : dict of str to BackendEntry
        Table of backends. A benchmark knows more backends than decoding (`sjepa_deploy.runtime.bench.baselines`).

    Raises
    ------
    BundleError
        If another bundle took the place of `bundle` since it was opened.
    BackendError
        If there is no such backend, or the backend cannot run this graph here.
    MissingDependencyError
        If a package that the backend needs is not installed.
    """
    options = options or BackendOptions()
    if not is_server(name) and name not in among:
        raise BackendError(f"{name!r} is not a backend.", f"Use one of {', '.join(among)}, or triton:HOST:PORT/MODEL.")
    if options.persistent and (is_server(name) or not among[name].persistent):
        able = " or ".join(f'"{known}"' for known, entry in among.items() if entry.persistent)
        raise BackendError(f"The backend {name} keeps no kernel on the GPU.", f"Use the backend {able}, or leave persistent out.")
    if is_server(name):
        served: Backend = _find("sjepa_deploy.serving.client:connect")(bundle, name, precision)
        return served
    if missing := among[name].why_not():
        raise missing
    backend: Backend = _find(among[name].target)(bundle, precision, options)
    if not bundle.current:
        backend.close()
        raise replaced(bundle.path)
    return backend


def open_adaptable(bundle: Bundle, name: str, precision: RunPrecision, options: BackendOptions | None = None) -> AdaptableBackend:
    """Load the backend `name` with a last layer that can be replaced.

    Raises
    ------
    BackendError
        If the backend cannot replace it, or the model has no last layer.
    """
    if name not in BACKENDS or not BACKENDS[name].adaptable:
        able = " or ".join(known for known, entry in BACKENDS.items() if entry.adaptable)
        raise BackendError(f"The backend {name} cannot replace the last layer of a model.", f"Use the backend {able}.")
    backend: AdaptableBackend = _find(BACKENDS[name].adaptable)(bundle, precision, options or BackendOptions())
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
