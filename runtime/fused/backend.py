"""Runs a bundle with one fused kernel, from the window in pinned memory to the prediction in pinned memory.

The kernels (runtime/fused/*.cu) are compiled for the GPU and the model at hand when the backend is opened, and cached. A call
writes the window where the GPU reads it, launches, and watches words in host memory that the kernel writes last. Of a stream the
GPU keeps the window, and a call writes its newest samples alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable
from contextlib import closing

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, InputError
from sjepa_deploy.runtime.backend import BackendOptions, FloatArray, RollingBackend
from sjepa_deploy.runtime.fused.lane import Lane, Launcher, refuse_persistent
from sjepa_deploy.runtime.fused.program import Layout, Program, best_layout, make_program, refuse_spec
from sjepa_deploy.runtime.fused.weights import WEIGHTS_FILE, Weights, read_safetensors
from sjepa_deploy.runtime.gpu import nvrtc
from sjepa_deploy.runtime.gpu.backend import GpuBackend
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, HostBuffer, Stream, check
from sjepa_deploy.spec import RunPrecision

OLDEST_CAPABILITY = 80
"""Compute capability 8.0, times 10: the first with asynchronous copies to shared memory and TensorFloat-32."""


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
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            self.function = check(cu.cuModuleGetFunction(self._module, program.name.encode()))
            self.shared_bytes = self._ask_size(device)
            self.blocks_at_once = 0
            if self.shared_bytes <= device.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"):
                limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                check(cu.cuFuncSetAttribute(self.function, limit, self.shared_bytes))
                each = check(cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, self.shared_bytes))
                self.blocks_at_once = each * device.attribute("MULTIPROCESSOR_COUNT")
            opened.pop_all()

    def _ask_size(self, device: Device) -> int:
        with closing(HostBuffer(device, (1,))) as answer:
            address = ctypes.c_void_p(answer.address)
            params = (ctypes.c_void_p * 1)(ctypes.addressof(address))
            function = check(self._cu.cuModuleGetFunction(self._module, b"shared_bytes"))
            check(self._cu.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, ctypes.addressof(params), 0))
            device.synchronize()
            return int(answer.array.view(np.uint32)[0])

    def close(self) -> None:
        """Unload it."""
        check(self._cu.cuModuleUnload(self._module))


class FusedBackend(GpuBackend[Lane], RollingBackend):
    """Runs a bundle on the fused kernels.

    Buffers are made once for each batch size and each number of new samples, so that a call allocates nothing.
    `BackendOptions.wait` "spin" and "flag" are the same here: both watch the word that the kernel writes. One thread at a time: a
    second one gets an error.

    Parameters
    ----------
    bundle : Bundle
        Whose checkpoint is run.
    precision : {"fp32", "tf32", "fp16"}
        PreLocal and PostLocal are in float32. tf32 and fp16 are the types of the feed-forward products of the transformer. In
        fp32 these are three products of TensorFloat-32 parts, whose sum is as exact as float32.
    options : BackendOptions
        GPU, memory, graph, wait, persistent.
    layout : Layout or None
        How work is spread; None: as is best for the GPU.

    Attributes
    ----------
    persistent : bool
        Whether a kernel stays on the GPU, which another number of windows or of new samples makes leave.

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
        refuse_persistent(options)
        self.precision = precision
        self.persistent = options.persistent
        self._spec, self._options = bundle.spec, options
        self._max_batch = bundle.graph(precision).max_batch
        weights = read_safetensors(bundle.checkpoint / WEIGHTS_FILE)
        with contextlib.ExitStack() as opened:
            self._device = opened.enter_context(closing(Device(options.device)))
            self._load(weights, layout)
            opened.callback(self.module.close)
            stream = opened.enter_context(closing(Stream(self._device, "block" if options.wait == "block" else "spin")))
            uploaded = opened.enter_context(closing(DeviceBuffer(self._device, self.program.weights.nbytes)))
            cu = self._device.cu
            host = self.program.weights
            check(cu.cuMemcpyHtoD(cu.CUdeviceptr(uploaded.address), host.ctypes.data, host.nbytes))
            self._device.synchronize()  # it may return before, and our stream does not wait for the default one
            super().__init__(self._device, stream, self._spec, opened.pop_all())
        self._launcher = Launcher(
            device=self._device,
            stream=stream,
            program=self.program,
            function=self.module.function,
            threads=self.layout.threads,
            shared_bytes=self.module.shared_bytes,
            blocks_at_once=self.module.blocks_at_once,
            weights=uploaded,
            max_batch=self._max_batch,
        )
        self._rolling: dict[int, Lane] = {}  # by number of new samples
        self._roller: Launcher | None = None
        self._follows = False  # whether the window that the GPU keeps is the stream's newest
        self._latest: Lane | None = None

    def _load(self, weights: Weights, layout: Layout | None) -> None:
        """Compile and load the program, with less of the weights in shared memory if the GPU has too little of it."""
        architecture = self._architecture = architecture_of(self._device)
        layout = layout or best_layout(self._spec, self.precision, self._device.attribute("MULTIPROCESSOR_COUNT"), architecture)
        most = self._device.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        for smaller in ({}, {"qkv_in_shared": False}, {"qkv_in_shared": False, "encoder_in_shared": False}):
            self.layout = dataclasses.replace(layout, **smaller)
            self.program = make_program(self._spec, weights, self.precision, self._max_batch, self.layout)
            self.module = Module(self._device, self.program, self.layout.threads, architecture)
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

    def roll(self, eeg: FloatArray) -> FloatArray:
        """Run the model on the window that ends with new samples of a stream, shape (n_chans, n), 1 <= n <= n_times.

        The samples follow those of the last `roll`; a whole window, n = n_times, need not follow anything. `run` may be called in
        between. The
        first call of all compiles a program of its own, and the first of each n makes buffers.

        Parameters
        ----------
        eeg : array of float32, shape (n_chans, n)
            C-contiguous, in the unit of the spec.

        Returns
        -------
        array of float32, shape (1, n_outputs)
            The same bits as `run` gives of the whole window. The next call overwrites it.

        Raises
        ------
        InputError
            If n is out of range, or less than a window and no window is there: at the start, and after a `roll` that failed.
        """
        self._turn.begin()
        try:
            n, n_times = eeg.shape[1], self._spec.n_times
            follows, self._follows = self._follows, False
            if not 1 <= n <= n_times:
                raise InputError(f"There are {n} new samples, not 1 to {n_times}.", "Give at most a window at once.")
            if n < n_times and not follows:
                raise InputError(
                    f"There is no window that {n} new samples could follow.",
                    f"Give the whole window of {n_times} first, and after every error.",
                )
            lane = self._rolling.get(n)
            if lane is None or lane is not self._latest:
                lane = self._enter(lane, lambda: self._open_rolling(n))
            np.copyto(lane.input, eeg)
            lane.run()
            self._follows = True
            return lane.output
        finally:
            self._turn.end()

    def restart(self) -> None:
        """Let the next `roll` be one of a whole window: samples were left out."""
        self._follows = False

    def _release(self) -> None:
        if self._latest is not None:
            self._latest.leave()  # before another lane waits for the stream that they share
        for lane in self._rolling.values():
            lane.close()
        self._rolling.clear()
        self._follows = False
        self._latest = None

    def _lane(self, batch: int) -> Lane:
        """Return what runs `batch` windows, with no kernel of another lane on the GPU."""
        lane = self._lanes.get(batch)
        if lane is None or lane is not self._latest:
            lane = self._enter(lane, lambda: self._open(batch))
        return lane

    def _enter(self, lane: Lane | None, opened: Callable[[], Lane]) -> Lane:
        """Let the kernel of the latest lane leave, and make another one the latest."""
        if self._latest is not None:
            self._latest.leave()
        self._latest = lane or opened()
        return self._latest

    def _open(self, batch: int) -> Lane:
        if not 1 <= batch <= self._max_batch:
            raise InputError(f"The batch has {batch} windows, the bundle's are 1 to {self._max_batch}.", "Split it.")
        largest = max(max(size for _, size in self.program.buffers), self._spec.n_chans * self._spec.n_times)
        if batch * largest >= MAX_ELEMENTS:
            raise InputError(f"A batch of {batch} windows of this length is too large for the fused kernels.", "Split it.")
        lane = self._lanes[batch] = Lane(self._launcher, self._spec, self._options, batch)
        return lane

    def _open_rolling(self, n: int) -> Lane:
        self._roller = self._roller or self._load_rolling()
        lane = self._rolling[n] = Lane(self._roller, self._spec, self._options, 1, n)
        return lane

    def _load_rolling(self) -> Launcher:
        """Compile and load the program of streams, and make room for their newest window."""
        program = self.program.rolling()
        with contextlib.ExitStack() as opened:
            module = Module(self._device, program, self.layout.threads, self._architecture)
            opened.callback(module.close)
            history = opened.enter_context(closing(DeviceBuffer(self._device, 4 * self._spec.n_chans * self._spec.n_times)))
            check(self._device.cu.cuMemsetD8(self._device.cu.CUdeviceptr(history.address), 0, history.nbytes))
            self._device.synchronize()  # it may return before, and our stream does not wait for the default one
            self._closing.enter_context(opened.pop_all())
        return dataclasses.replace(
            self._launcher,
            program=program,
            function=module.function,
            shared_bytes=module.shared_bytes,
            blocks_at_once=module.blocks_at_once,
            history=history,
        )
