"""Wraps the part of CUDA that decoding needs: one GPU, pinned memory, a stream, captured graphs, and two ways to wait.

All calls go through the driver API of `cuda.bindings`, and every call is checked. `cuda.core` only reads arrays of other
libraries on the GPU (DLPack, the CUDA array interface).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import BackendError, InputError, MissingDependencyError
from sjepa_deploy.runtime.backend import Wait

FloatArray = NDArray[np.float32]


@functools.lru_cache(maxsize=1)
def driver() -> Any:
    """Return `cuda.bindings.driver`, initialised.

    Raises
    ------
    MissingDependencyError
        If cuda-bindings is not installed.
    BackendError
        If there is no NVIDIA driver or it does not start.
    """
    try:
        cu = importlib.import_module("cuda.bindings.driver")
    except ModuleNotFoundError as e:
        raise MissingDependencyError("cuda-bindings", "gpu") from e
    try:
        (error,) = cu.cuInit(0)
    except Exception as e:  # what is raised without libcuda differs between versions of cuda-bindings
        raise BackendError("There is no NVIDIA driver here.", "Install the driver of your GPU, or use a CPU backend.") from e
    if error != 0:
        raise BackendError(f"The NVIDIA driver does not start ({_name(cu, error)}).", "See what nvidia-smi says.")
    return cu


def check(result: tuple[Any, ...]) -> Any:
    """Return the value of a driver call.

    Raises
    ------
    BackendError
        If the call failed.
    """
    error, *values = result
    if error != 0:
        name = _name(driver(), error)
        if name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise BackendError("The GPU is out of memory.", "Free some, or use a smaller --max-batch.")
        raise BackendError(f"CUDA failed with {name}.", "See sjepa-doctor; after a sticky error start the process again.")
    return values[0] if len(values) == 1 else tuple(values) or None


def _name(cu: Any, error: Any) -> str:
    status, name = cu.cuGetErrorName(cu.CUresult(int(error)))
    return name.decode() if status == 0 and name else str(error)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Describes one GPU.

    Attributes
    ----------
    name, compute_capability : str
        Name and compute capability from the driver, e.g. "NVIDIA H100 80GB HBM3", "9.0".
    driver : str
        Version of the driver, e.g. "580.159.04".
    cuda : str
        CUDA version of the driver, e.g. "13.0".
    memory : int
        Bytes of device memory.
    """

    name: str
    compute_capability: str
    driver: str
    cuda: str
    memory: int


class _Current(threading.local):
    device: Device | None = None


current = _Current()
"""Holds the `device` of the calling thread's context. A new thread has no device, even if it reuses an old identifier."""


class Device:
    """Holds the primary context of a GPU. PyTorch and other users of the runtime API in this process share this context.

    Parameters
    ----------
    ordinal : int
        Number of the GPU.

    Raises
    ------
    BackendError
        If there is none.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.cu = cu = driver()
        count = check(cu.cuDeviceGetCount())
        if ordinal >= count:
            raise BackendError(f"There is no GPU {ordinal}: the driver sees {count}.", "Look at CUDA_VISIBLE_DEVICES.")
        self.ordinal = ordinal
        self._device = check(cu.cuDeviceGet(ordinal))
        self._context = check(cu.cuDevicePrimaryCtxRetain(self._device))
        self.make_current()

    @property
    def gpu(self) -> Gpu:
        """Description of this GPU."""
        cu = self.cu
        major, minor = self.attribute("COMPUTE_CAPABILITY_MAJOR"), self.attribute("COMPUTE_CAPABILITY_MINOR")
        cuda = check(cu.cuDriverGetVersion())
        version = f"{cuda // 1000}.{cuda % 1000 // 10}"
        name = check(cu.cuDeviceGetName(128, self._device)).split(b"\0")[0].decode()
        return Gpu(
            name=name,
            compute_capability=f"{major}.{minor}",
            driver=driver_version() or f"of CUDA {version}",
            cuda=version,
            memory=check(cu.cuDeviceTotalMem(self._device)),
        )

    @property
    def bus_id(self) -> str:
        """PCI bus of this GPU, e.g. "0000:4B:00.0"."""
        text: bytes = check(self.cu.cuDeviceGetPCIBusId(32, self._device))
        return text.split(b"\0")[0].decode()

    def attribute(self, name: str) -> int:
        """Return an attribute by its name in the driver API, without ``CU_DEVICE_ATTRIBUTE_``."""
        key = getattr(self.cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(self.cu.cuDeviceGetAttribute(key, self._device)))

    def make_current(self) -> None:
        """Make this GPU's context the current context of the calling thread."""
        check(self.cu.cuCtxSetCurrent(self._context))
        current.device = self

    def free_memory(self) -> int:
        """Return the bytes of device memory that are free."""
        free, _ = check(self.cu.cuMemGetInfo())
        return int(free)

    def synchronize(self) -> None:
        """Wait for all work on this GPU."""
        check(self.cu.cuCtxSynchronize())

    def close(self) -> None:
        """Give the context back."""
        check(self.cu.cuDevicePrimaryCtxRelease(self._device))


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver as nvidia-smi prints it, or None if the version cannot be read."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, 96) == 0:
            return text.value.decode()
    except (OSError, AttributeError):
        pass  # Jetson has no NVML
    file = Path("/sys/module/nvidia/version")
    return file.read_text().strip() if file.is_file() else None


@dataclass(frozen=True, kw_only=True)
class HostPart:
    """Describes the first rows of a `HostBuffer`.

    Attributes
    ----------
    array : array of float32
        The rows as an array for the host.
    address, pointer : int
        Address of the rows for the GPU, and for the host.
    nbytes : int
        Size of the rows.
    """

    array: FloatArray
    address: int
    pointer: int
    nbytes: int


class HostBuffer:
    """Holds pinned host memory that the GPU reads and writes in place.

    Attributes
    ----------
    array : array of float32
        The memory as an array for the host.
    address : int
        Address of the memory for the GPU.
    """

    def __init__(self, device: Device, shape: tuple[int, ...]) -> None:
        self._cu = cu = device.cu
        self.nbytes = 4 * math.prod(shape)
        flags = cu.CU_MEMHOSTALLOC_DEVICEMAP | cu.CU_MEMHOSTALLOC_PORTABLE
        self.pointer = int(check(cu.cuMemHostAlloc(self.nbytes, flags)))
        self.address = int(check(cu.cuMemHostGetDevicePointer(self.pointer, 0)))
        memory = (ctypes.c_char * self.nbytes).from_address(self.pointer)
        self.array: FloatArray = np.frombuffer(memoryview(memory), np.float32).reshape(shape)
        self.array[...] = 0

    def first(self, n: int) -> HostPart:
        """Return the first `n` rows."""
        array = self.array[:n]
        return HostPart(array=array, address=self.address, pointer=self.pointer, nbytes=array.nbytes)

    def close(self) -> None:
        """Free the memory; `array` must not be used any more."""
        check(self._cu.cuMemFreeHost(self.pointer))


class DeviceBuffer:
    """Holds device memory.

    Attributes
    ----------
    address, nbytes : int
        Address and size of the memory.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self._cu = device.cu
        self.nbytes = max(nbytes, 256)
        self._pointer = check(self._cu.cuMemAlloc(self.nbytes))
        self.address = int(self._pointer)

    def close(self) -> None:
        """Free the memory."""
        check(self._cu.cuMemFree(self._pointer))


class Stream:
    """Holds a CUDA stream and one way to wait for the stream.

    Parameters
    ----------
    device : Device
        The GPU.
    wait : {"spin", "flag", "block"}
        See `Wait`.

    Attributes
    ----------
    unfinished : bool
        Whether a call was launched and its end was not seen. The caller sets `unfinished` at the launch and clears it after
        waiting, so that it stays set after an interrupt.
    """

    def __init__(self, device: Device, wait: Wait = "spin") -> None:
        self._cu = cu = device.cu
        self.unfinished = False
        self.mode = wait
        with contextlib.ExitStack() as opened:
            self.stream = check(cu.cuStreamCreate(int(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)))
            opened.callback(lambda: check(cu.cuStreamDestroy(self.stream)))
            self.handle = int(self.stream)
            self._flag_buffer = opened.enter_context(closing(HostBuffer(device, (1,))))
            self._flag = opened.enter_context(memoryview(self._flag_buffer.array.view(np.uint32)))  # type: ignore[arg-type]
            self._event = check(cu.cuEventCreate(_event_flags(cu)))
            opened.callback(lambda: check(cu.cuEventDestroy(self._event)))
            self._closing = opened.pop_all()
        self.wait: Callable[[], None] = {"spin": self._spin, "flag": self._watch, "block": self._block}[wait]

    def finish(self) -> None:
        """Enqueue what the chosen way of waiting needs after the work. A captured graph needs this step too."""
        if self.mode == "flag":
            cu = self._cu
            default = cu.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
            check(cu.cuStreamWriteValue32(self.stream, cu.CUdeviceptr(self._flag_buffer.address), 1, int(default)))

    def _spin(self) -> None:
        query, stream = self._cu.cuStreamQuery, self.stream
        while error := query(stream)[0]:
            if error != self._cu.CUresult.CUDA_ERROR_NOT_READY:
                check((error,))

    def _watch(self) -> None:
        flag = self._flag
        while True:
            for _ in range(20_000):
                if flag[0]:
                    flag[0] = 0
                    return
            (error,) = self._cu.cuStreamQuery(self.stream)  # after an error the GPU writes no flag
            if error != self._cu.CUresult.CUDA_ERROR_NOT_READY:
                check((error,))
                flag[0] = 0
                return

    def _block(self) -> None:
        check(self._cu.cuEventRecord(self._event, self.stream))
        check(self._cu.cuEventSynchronize(self._event))

    def synchronize(self) -> None:
        """Wait in any mode, also for work without `finish` at its end."""
        check(self._cu.cuStreamSynchronize(self.stream))
        self._flag[0] = 0  # of a launch that nothing else waited for

    def settle(self) -> None:
        """Wait for the end of an interrupted call."""
        self.synchronize()
        self.unfinished = False

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Return the graph of what `enqueue` puts into this stream. Nothing runs during the capture."""
        cu = self._cu
        check(cu.cuStreamBeginCapture(self.stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            enqueue()
        except BaseException:
            cu.cuStreamEndCapture(self.stream)  # its own error would hide the first
            raise
        return Graph(cu, check(cu.cuStreamEndCapture(self.stream)), self.stream)

    def upload(self, target: int, source: HostBuffer | HostPart) -> None:
        """Enqueue a copy to the device address `target`."""
        check(self._cu.cuMemcpyHtoDAsync(self._cu.CUdeviceptr(target), source.pointer, source.nbytes, self.stream))

    def download(self, target: HostBuffer | HostPart, source: int) -> None:
        """Enqueue a copy from the device address `source`."""
        check(self._cu.cuMemcpyDtoHAsync(target.pointer, self._cu.CUdeviceptr(source), target.nbytes, self.stream))

    def close(self) -> None:
        """Release the stream."""
        self._closing.close()


def _event_flags(cu: Any) -> int:
    flags = cu.CUevent_flags
    return int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING)


class Graph:
    """Holds a captured graph, ready to launch.

    Attributes
    ----------
    launch : callable
        Launches the graph and returns the driver's result, which the caller must `check`.
    """

    def __init__(self, cu: Any, graph: Any, stream: Any) -> None:
        self._cu = cu
        self._exec = check(cu.cuGraphInstantiate(graph, 0))
        check(cu.cuGraphDestroy(graph))
        check(cu.cuGraphUpload(self._exec, stream))
        self.launch: Callable[[], tuple[Any]] = functools.partial(cu.cuGraphLaunch, self._exec, stream)

    def close(self) -> None:
        """Release the graph."""
        check(self._cu.cuGraphExecDestroy(self._exec))


def address_on_gpu(array: Any, stream: Stream, window: tuple[int, int]) -> tuple[int, int]:
    """Return the batch size and device address of windows on the GPU. `stream` then waits for the work of their owner.

    Raises
    ------
    InputError
        If the windows are not C-contiguous float32 of shape (batch, n_chans, n_times).
    """
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_any_interface(array, stream_ptr=stream.handle)
    shape = tuple(view.shape)
    if view.dtype != np.float32 or len(shape) != 3 or shape[1:] != window:
        raise InputError(
            f"The input is {view.dtype} of shape {shape}, not float32 of shape (batch, {window[0]}, {window[1]}).",
            "Convert it on the GPU.",
        )
    strides = (window[0] * window[1], window[1], 1)
    if view.strides is not None and any(n > 1 and a != b for n, a, b in zip(shape, view.strides, strides, strict=True)):
        raise InputError("The input on the GPU is not C-contiguous.", "Call .contiguous() on it.")
    if not view.is_device_accessible:
        raise InputError("The input is not on the GPU.", "Give a NumPy array, or an array on the GPU.")
    return shape[0], int(view.ptr)
