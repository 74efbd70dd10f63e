"""The fused backend: one kernel launch from the window in pinned memory to the prediction in pinned memory.

The kernels (runtime/*.cu) are compiled for the GPU and the model at hand when the backend is opened, and cached. A call writes
the window where the GPU reads it, launches, and watches a word in host memory that the kernel writes last.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, InputError
from sjepa_deploy.runtime import nvrtc
from sjepa_deploy.runtime.backend import BackendOptions, FloatArray
from sjepa_deploy.runtime.cuda import Device, DeviceBuffer, Graph, HostBuffer, Stream, address_on_gpu, check
from sjepa_deploy.runtime.fused_program import Layout, Program, make_program, refuse_spec
from sjepa_deploy.runtime.fused_weights import WEIGHTS_FILE, Weights, read_safetensors
from sjepa_deploy.spec import RunPrecision

OLDEST_CAPABILITY = 80
"""Compute capability 8.0, times 10: the first with asynchronous copies to shared memory and TensorFloat-32."""

CLUSTER_CAPABILITY = 90
POLLS = 20_000
"""Looks at the word in host memory between two questions to the driver whether the GPU failed."""

MAX_ELEMENTS = 2**31
"""The kernels count in 32 bits."""


def probe() -> None:
    """Raise what keeps the fused kernels from running here."""
    nvrtc.version()
    device = Device()
    try:
        architecture_of(device)
    finally:
        device.close()


def architecture_of(device: Device) -> int:
    """Return the compute capability times 10 of a GPU that the kernels run on.

    Raises
    ------
    BackendError
        If the GPU or the driver is too old.
    """
    gpu = device.gpu
    architecture = round(float(gpu.compute_capability) * 10)
    if architecture < OLDEST_CAPABILITY:
        raise BackendError(
            f"The fused kernels need compute capability 8.0; the {gpu.name} has {gpu.compute_capability}.", "Use another backend."
        )
    major, minor = nvrtc.version()
    if int(gpu.cuda.partition(".")[0]) < major:
        raise BackendError(
            f"The driver {gpu.driver} is for CUDA {gpu.cuda}, and this NVRTC compiles for CUDA {major}.{minor}.",
            f"Install a newer driver, or nvidia-cuda-nvrtc of CUDA {gpu.cuda.partition('.')[0]}.",
        )
    return architecture


class Module:
    """One compiled program on the GPU.

    Attributes
    ----------
    shared_bytes : int
        Shared memory of a block.
    blocks_at_once : int
        Blocks that the whole GPU holds; none if they need more shared memory than it gives.
    """

    def __init__(self, device: Device, program: Program, threads: int, architecture: int) -> None:
        self._cu = cu = device.cu
        code = nvrtc.compiled(program.source, architecture)
        result = cu.cuModuleLoadData(code)
        if result[0]:
            raise BackendError(
                f"The driver {device.gpu.driver} refuses the compiled kernels ({result[0]!r}).",
                "Install a newer driver, or use another backend.",
            )
        self._module = result[1]
        self.function = check(cu.cuModuleGetFunction(self._module, program.name.encode()))
        self.shared_bytes = self._ask_size(device)
        self.blocks_at_once = 0
        if self.shared_bytes <= device.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"):
            limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(cu.cuFuncSetAttribute(self.function, limit, self.shared_bytes))
            each = check(cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, self.shared_bytes))
            self.blocks_at_once = each * device.attribute("MULTIPROCESSOR_COUNT")

    def _ask_size(self, device: Device) -> int:
        answer = HostBuffer(device, (1,))
        address = ctypes.c_void_p(answer.address)
        params = (ctypes.c_void_p * 1)(ctypes.addressof(address))
        function = check(self._cu.cuModuleGetFunction(self._module, b"shared_bytes"))
        check(self._cu.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, ctypes.addressof(params), 0))
        device.synchronize()
        size = int(answer.array.view(np.uint32)[0])
        answer.close()
        return size

    def close(self) -> None:
        """Unload it."""
        check(self._cu.cuModuleUnload(self._module))


class FusedBackend:
    """A bundle on the fused kernels.

    Buffers are made once for each batch size, so that a call allocates nothing. `BackendOptions.wait` "spin" and "flag" are the
    same here: both watch the word that the kernel writes. One thread at a time: a second one gets an error.

    Parameters
    ----------
    bundle : Bundle
        Whose checkpoint is run.
    precision : {"fp32", "tf32", "fp16"}
        PreLocal and PostLocal are in float32. tf32 and fp16 are the types of the feed-forward products of the transformer. In
        fp32 these are three products of TensorFloat-32 parts, whose sum is as exact as float32.
    options : BackendOptions
        GPU, memory, graph, wait.
    layout : Layout or None
        How work is spread; None: as is best for the GPU.

    Raises
    ------
    BackendError
        If the kernels cannot compute the model, or not on this GPU.
    MissingDependencyError
        If NVRTC is not installed.
    """

    name = "cuda"

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions, layout: Layout | None = None) -> None:
        refuse_spec(bundle.spec, precision)
        self.precision = precision
        self._spec, self._options = bundle.spec, options
        self._max_batch = bundle.graph(precision).max_batch
        weights = read_safetensors(bundle.checkpoint / WEIGHTS_FILE)
        self._device = Device(options.device)
        try:
            self._load(weights, layout)
        except BaseException:
            self._device.close()
            raise
        self._stream = Stream(self._device, "block" if options.wait == "block" else "spin")
        self._weights = DeviceBuffer(self._device, self.program.weights.nbytes)
        self._put(self._weights, self.program.weights)
        self._lanes: dict[int, _Lane] = {}
        self._busy = threading.Lock()
        self._thread = threading.get_ident()

    def _load(self, weights: Weights, layout: Layout | None) -> None:
        """Compile and load the program, with less of the weights in shared memory if the GPU has too little of it."""
        architecture = architecture_of(self._device)
        layout = layout or Layout(
            n_multiprocessors=self._device.attribute("MULTIPROCESSOR_COUNT"), cluster=architecture >= CLUSTER_CAPABILITY
        )
        most = self._device.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        for smaller in ({}, {"qkv_in_shared": False}, {"qkv_in_shared": False, "encoder_in_shared": False}):
            self.layout = dataclasses.replace(layout, **smaller)
            self.program = make_program(self._spec, weights, self.precision, self._max_batch, self.layout)
            self.module = Module(self._device, self.program, layout.threads, architecture)
            if self.module.blocks_at_once:
                break
            self.module.close()
        else:
            raise BackendError(
                f"The fused kernels need {self.module.shared_bytes / 1024:.0f} KiB of shared memory for this model, and a block "
                f"has {most / 1024:.0f} on this GPU.",
                "Use another backend, or shorter windows.",
            )
        if self.program.cooperative and self.module.blocks_at_once < self.program.least_blocks:
            self.module.close()
            raise BackendError("The GPU does not hold the fused kernels' blocks at once.", "Use another backend.")

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The result is overwritten by the next call.

        If `eeg` is `input_buffer(batch)` itself, nothing is copied.
        """
        self._begin()
        try:
            lane = self._lanes.get(len(eeg)) or self._open(len(eeg))
            if eeg is not lane.input:
                np.copyto(lane.input, eeg)
            lane.run()
            return lane.output
        finally:
            self._busy.release()

    def run_on_gpu(self, eeg: Any) -> FloatArray:
        """Run the model on an array on the GPU (DLPack, CUDA array interface) without copying it.

        The result is a NumPy array that the next call overwrites.
        """
        self._begin()
        try:
            batch, address = address_on_gpu(eeg, self._stream, self._spec.input_shape)
            if address % 16 and self._spec.n_times % 4 == 0:
                raise InputError("The input on the GPU does not start at a multiple of 16 bytes.", "Copy it on the GPU.")
            lane = self._lanes.get(batch) or self._open(batch)
            lane.run_from(address)
            return lane.output
        finally:
            self._busy.release()

    def input_buffer(self, batch: int) -> FloatArray:
        """Return the pinned buffer that `run` reads, shape (batch, n_chans, n_times): fill it in place and pass it to `run`."""
        return (self._lanes.get(batch) or self._open(batch)).input

    def warmup(self, batches: tuple[int, ...] = (1,), n_runs: int = 10) -> None:
        """Make the buffers for each of `batches`, and run them so that the GPU's clock rises."""
        for batch in batches:
            buffer = self.input_buffer(batch)
            for _ in range(n_runs):
                self.run(buffer)

    def close(self) -> None:
        """Release everything on the GPU."""
        self._device.make_current()
        self._stream.synchronize()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._weights.close()
        self._stream.close()
        self.module.close()
        self._device.close()

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise BackendError("Two threads call one backend at once.", "Load the bundle once in each thread.")
        if threading.get_ident() != self._thread:
            self._device.make_current()
            self._thread = threading.get_ident()

    def _open(self, batch: int) -> _Lane:
        if not 1 <= batch <= self._max_batch:
            raise InputError(f"The batch has {batch} windows, the bundle's are 1 to {self._max_batch}.", "Split it.")
        largest = max(max(size for _, size in self.program.buffers), self._spec.n_chans * self._spec.n_times)
        if batch * largest >= MAX_ELEMENTS:
            raise InputError(f"A batch of {batch} windows of this length is too large for the fused kernels.", "Split it.")
        lane = _Lane(self, batch)
        try:
            lane.run()  # the first launch loads the code
        except BaseException:
            lane.close()
            raise
        self._lanes[batch] = lane
        return lane

    def _put(self, buffer: DeviceBuffer, array: NDArray[Any]) -> None:
        check(self._device.cu.cuMemcpyHtoD(self._device.cu.CUdeviceptr(buffer.address), array.ctypes.data, array.nbytes))
        self._device.synchronize()  # it may return before, and our stream does not wait for the default one


class _Lane:
    """One batch size: pinned input and output, scratch memory, and what starts a call."""

    def __init__(self, backend: FusedBackend, batch: int) -> None:
        self._cu, self._stream, program = backend._device.cu, backend._stream, backend.program
        device, spec, module = backend._device, backend._spec, backend.module
        self._in, self._out = (HostBuffer(device, (batch, *shape)) for shape in (spec.input_shape, spec.output_shape))
        self.input, self.output = self._in.array, self._out.array
        self._report_buffer = HostBuffer(device, (2,))
        self._report = memoryview(self._report_buffer.array.view(np.uint32))  # type: ignore[arg-type]
        self._n_launches = 0
        words = {"counters": 2 + backend._max_batch, "ready": program.n_ready * batch}
        zeroed = {name: DeviceBuffer(device, 4 * n) for name, n in words.items() if n}
        for buffer in zeroed.values():
            backend._put(buffer, np.zeros(buffer.nbytes // 4, np.uint32))
        self.buffers = zeroed | {name: DeviceBuffer(device, 4 * size * batch) for name, size in program.buffers}
        self._upload = DeviceBuffer(device, self._in.nbytes) if backend._options.memory == "copy" else None
        self._arguments = program.arguments()(
            input=self._upload.address if self._upload else self._in.address,
            output=self._out.address,
            weights=backend._weights.address,
            report=self._report_buffer.address,
            batch=batch,
            **{name: buffer.address for name, buffer in self.buffers.items()},
        )
        self._params = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self.grid = program.grid(batch, module.blocks_at_once)
        shape = (self.grid, 1, 1, backend.layout.threads, 1, 1, module.shared_bytes, self._stream.stream)
        self._kernel = (module.function, *shape, ctypes.addressof(self._params))
        self._cooperative = program.cooperative
        self._graph: Graph | None = None
        self._launch: Callable[[], Any] = self._enqueue
        self._finish = self._watch if backend._options.wait != "block" else self._block
        if backend._options.cuda_graph and self._upload:  # a kernel alone starts sooner without a graph
            self._graph = self._stream.capture(lambda: check(self._enqueue()))
            self._launch = self._graph.launch

    def run(self) -> None:
        """Run on what is in `input`."""
        check(self._launch())
        self._n_launches += 1
        self._finish()

    def run_from(self, address: int) -> None:
        """Run on windows in device memory."""
        usual = self._arguments.input
        self._arguments.input = address
        check(self._launch_kernel())  # copies the arguments
        self._arguments.input = usual
        self._n_launches += 1
        self._finish()

    def _enqueue(self) -> tuple[Any]:
        if self._upload:
            self._stream.upload(self._upload.address, self._in)
        return self._launch_kernel()

    def _launch_kernel(self) -> tuple[Any]:
        if self._cooperative:
            result: tuple[Any] = self._cu.cuLaunchCooperativeKernel(*self._kernel)
        else:
            result = self._cu.cuLaunchKernel(*self._kernel, 0)
        check(result)
        return result

    def _watch(self) -> None:
        report, target = self._report, self._n_launches & 0xFFFFFFFF
        while True:
            for _ in range(POLLS):
                if report[0] == target:
                    self._judge()
                    return
            (error,) = self._cu.cuStreamQuery(self._stream.stream)  # after an error the kernel writes nothing
            if error != self._cu.CUresult.CUDA_ERROR_NOT_READY:
                check((error,))
                if report[0] != target:
                    raise BackendError("A kernel ended without its result.", "Report this with the bundle.")

    def _block(self) -> None:
        self._stream.wait()
        self._judge()

    def _judge(self) -> None:
        if self._report[1]:
            raise BackendError(
                "The blocks of a kernel waited for each other for more than a second.",
                "Load the bundle again; if it happens again, use another backend on this GPU.",
            )

    def close(self) -> None:
        """Free the buffers."""
        if self._graph:
            self._graph.close()
        self._report.release()
        del self.input, self.output
        for host in (self._in, self._out, self._report_buffer):
            host.close()
        for buffer in (*self.buffers.values(), *([self._upload] if self._upload else [])):
            buffer.close()
