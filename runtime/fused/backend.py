"""Runs bundles on the project's own kernels: those of one window, and those of many.

The kernels (runtime/fused/*.cu) are compiled for the GPU and the model at hand, and cached: those of one window when the backend
is opened, those of many at the first batch that they may serve. A call of one window writes it where the GPU reads it, launches
one kernel, and watches words in host memory that the kernel writes last (lane.py). Of a stream the GPU keeps the window, and a
call writes its newest samples alone. Many windows are copied in chunks (batch.py). Which kernels serve a batch is measured
(choice.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import closing

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, InputError
from sjepa_deploy.runtime.backend import BackendOptions, FloatArray, RollingBackend
from sjepa_deploy.runtime.fused.batch import BatchKernel, BatchLane
from sjepa_deploy.runtime.fused.batch_program import make_batch_program
from sjepa_deploy.runtime.fused.choice import Choices, KernelRecord, Kernels, key_of, size_for
from sjepa_deploy.runtime.fused.lane import Lane, Launcher, refuse_persistent
from sjepa_deploy.runtime.fused.module import Module
from sjepa_deploy.runtime.fused.program import Layout, best_layout, make_program, refuse_spec
from sjepa_deploy.runtime.gpu import nvrtc
from sjepa_deploy.runtime.gpu.backend import GpuBackend, SharedBuffers
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, Stream, check
from sjepa_deploy.spec import RunPrecision

OLDEST_CAPABILITY = 80
"""Compute capability 8.0, times 10: the first with asynchronous copies to shared memory and TensorFloat-32."""


MAX_ELEMENTS = 2**31
"""The kernels count in 32 bits."""

MOST_SCRATCH, LEAST_KEPT = 4, 64
"""Lanes of the kernels of one window keep scratch memory for at most 4 times the windows of the largest batch, or of 64."""


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


class FusedBackend(GpuBackend[Lane | BatchLane], RollingBackend):
    """Runs a bundle on the fused kernels.

    Buffers are made at the first call of a batch size or of a number of new samples, so that later calls allocate nothing. Only
    the kernels of one window need scratch memory for each batch size: if many sizes are called, those that were not called for
    longest are made again (`MOST_SCRATCH`).
    `BackendOptions.wait` "spin" and "flag" are the same here: both watch the word that the kernel writes. One thread at a time: a
    second one gets an error.

    Parameters
    ----------
    bundle : Bundle
        Whose checkpoint is run.
    precision : {"fp32", "tf32", "fp16", "bf16"}
        PreLocal and PostLocal are in float32. tf32 and fp16 are the types of the feed-forward products of the transformer. In
        fp32 these are three products of TensorFloat-32 parts, whose sum is as exact as float32. The kernels of many windows
        compute all products but those of the first convolution in fp16, or in fp32 and tf32 in three products of halves; bf16
        is theirs alone.
    options : BackendOptions
        GPU, memory, graph, wait, persistent, kernels.
    layout : Layout or None
        How the kernels of one window spread their work; None: as is best for the GPU.

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
        self._kernels = "batch" if precision == "bf16" and options.kernels == "auto" else options.kernels
        if self._kernels != "batch":
            refuse_spec(bundle.spec, precision)
        refuse_persistent(options)
        if options.persistent and self._kernels == "batch":
            raise BackendError("No kernel of many windows stays on the GPU.", 'Use kernels="window", or leave persistent out.')
        self.precision = precision
        self.persistent = options.persistent
        self._spec, self._options, self._folder = bundle.spec, options, bundle.path
        self._max_batch = bundle.graph(precision).max_batch
        self._weights = bundle.weights()
        self._launcher: Launcher | None = None
        with contextlib.ExitStack() as opened:
            device = self._device = opened.enter_context(closing(Device(options.device)))
            self._architecture = architecture_of(device)
            stream = opened.enter_context(closing(Stream(device, "block" if options.wait == "block" else "spin")))
            if self._kernels != "batch":
                self._launcher = self._load(stream, layout, opened)
            copies = self._kernels != "window" or options.memory == "copy"
            buffers = SharedBuffers(device, self._spec, self._max_batch, copies=copies)
            super().__init__(device, stream, buffers, self._spec, opened.pop_all())
        self._batches: BatchKernel | BackendError | None = None  # or why there is none
        self._choices: Choices | None = None
        self._rolling: dict[int, Lane] = {}  # by number of new samples
        self._roller: Launcher | None = None
        self._follows = False  # whether the window that the GPU keeps is the stream's newest
        self._latest: Lane | BatchLane | None = None
        if self._kernels == "batch":
            try:
                self._batch_kernel()
            except BaseException:
                self.close()
                raise

    def _load(self, stream: Stream, layout: Layout | None, opened: contextlib.ExitStack) -> Launcher:
        """Compile and load the program of one window, with less of the weights in shared memory if there is too little of it."""
        device = self._device
        layout = layout or best_layout(self._spec, self.precision, device.attribute("MULTIPROCESSOR_COUNT"), self._architecture)
        most = device.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        for smaller in ({}, {"qkv_in_shared": False}, {"qkv_in_shared": False, "encoder_in_shared": False}):
            self.layout = dataclasses.replace(layout, **smaller)
            program = self.program = make_program(self._spec, self._weights, self.precision, self._max_batch, self.layout)
            module = self.module = Module(device, program.name, program.source, self.layout.threads, self._architecture)
            if module.blocks_at_once:
                break
            module.close()
        else:
            raise BackendError(
                f"The fused kernels need {module.shared_bytes / 1024:.0f} KiB of shared memory for this model, and a block "
                f"has {most / 1024:.0f} on this GPU.",
                "Use another backend, or shorter windows.",
            )
        opened.callback(module.close)
        if program.cooperative and module.blocks_at_once < program.least_blocks:
            raise BackendError("The GPU does not hold the fused kernels' blocks at once.", "Use another backend.")
        uploaded = opened.enter_context(closing(DeviceBuffer(device, program.weights.nbytes)))
        host = program.weights
        check(device.cu.cuMemcpyHtoD(device.cu.CUdeviceptr(uploaded.address), host.ctypes.data, host.nbytes))
        device.synchronize()  # it may return before, and our stream does not wait for the default one
        return Launcher(
            device=device,
            stream=stream,
            program=program,
            function=module.function,
            threads=self.layout.threads,
            shared_bytes=module.shared_bytes,
            blocks_at_once=module.blocks_at_once,
            weights=uploaded,
            max_batch=self._max_batch,
        )

    @property
    def batch_invariant(self) -> bool:
        """Return whether one kind of kernels serves all batches: the outputs of both kinds differ within the tolerance."""
        return self._kernels != "auto"

    def roll(self, eeg: FloatArray) -> FloatArray:
        """Run the model on the window that ends with new samples of a stream, shape (n_chans, n), 1 <= n <= n_times.

        The samples follow those of the last `roll`; a whole window, n = n_times, need not follow anything. `run` may be called in
        between. The first call of all compiles a program of its own, and the first of each n makes buffers.

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
            if self._launcher is None:  # no kernel of many windows keeps one
                lane: Lane | BatchLane = self._lane(1)
                lane.input[0, :, : n_times - n] = lane.input[0, :, n:].copy()
                lane.input[0, :, n_times - n :] = eeg
            else:
                rolling = self._rolling.get(n)
                if rolling is None or rolling is not self._latest:
                    self._enter(rolling, lambda: self._open_rolling(n))
                lane = self._rolling[n]
                np.copyto(lane.input, eeg)
            lane.run()
            self._follows = True
            return lane.output
        finally:
            self._turn.end()

    def _copy_and_run(self, lane: Lane | BatchLane, eeg: FloatArray) -> None:
        if isinstance(lane, BatchLane):
            lane.run_on(eeg)
        else:
            super()._copy_and_run(lane, eeg)

    def restart(self) -> None:
        """Let the next `roll` be one of a whole window: samples were left out."""
        self._follows = False

    def close(self) -> None:
        """Release everything on the GPU, once."""
        if self._latest is not None and not self._turn.closed:
            self._device.make_current()
            self._latest.leave()  # a kernel that stays, before anything waits for the stream
        super().close()

    def _release(self) -> None:
        for lane in self._rolling.values():
            lane.close()
        self._rolling.clear()
        self._follows = False
        self._latest = None

    def _lane(self, batch: int) -> Lane | BatchLane:
        """Return what runs `batch` windows, with no kernel of another lane on the GPU."""
        if self._stream.unfinished:
            self._stream.settle()
        lane = self._lanes.get(batch)
        if lane is None or lane is not self._latest:
            lane = self._enter(lane, lambda: self._open(batch))
            self._lanes[batch] = self._lanes.pop(batch)  # the least recently used stands first
        return lane

    def _enter(self, lane: Lane | BatchLane | None, opened: Callable[[], Lane | BatchLane]) -> Lane | BatchLane:
        """Let the kernel of the latest lane leave, and make another one the latest."""
        if self._latest is not None:
            self._latest.leave()
        self._latest = lane or opened()
        return self._latest

    def _open(self, batch: int) -> Lane | BatchLane:
        if not 1 <= batch <= self._max_batch:
            raise InputError(f"The batch has {batch} windows, the bundle's are 1 to {self._max_batch}.", "Split it.")
        if batch * self._spec.n_chans * self._spec.n_times >= MAX_ELEMENTS:
            raise _too_large(batch)
        lane = self._lanes[batch] = self._open_with(self._kernels_for(batch), batch)
        with_scratch = [size for size, known in self._lanes.items() if isinstance(known, Lane)]
        too_many = sum(with_scratch) - MOST_SCRATCH * max([LEAST_KEPT, *with_scratch])
        for size in with_scratch[:-1]:
            if too_many <= 0:
                break
            self._lanes.pop(size).close()
            too_many -= size
        return lane

    def _open_with(self, kernels: Kernels, batch: int) -> Lane | BatchLane:
        if kernels == "batch":
            kernel = self._batch_kernel()
            with self._buffers.opening(batch) as buffers:
                return BatchLane(kernel, buffers, self._options, batch)
        assert self._launcher is not None
        if batch * max(size for _, size in self._launcher.program.buffers) >= MAX_ELEMENTS:
            raise _too_large(batch)
        with self._buffers.opening(batch) as buffers:
            return Lane(self._launcher, self._spec, self._options, batch, buffers)

    def _kernels_for(self, batch: int) -> Kernels:
        """Return which kernels serve `batch` windows; the first call of a size measures."""
        if self._kernels != "auto":
            return self._kernels
        if batch == 1:
            return "window"
        try:
            kernel = self._batch_kernel()
        except BackendError:
            return "window"
        size = size_for(batch, self._max_batch)
        choices = self._choices = self._choices or self._load_choices(kernel)
        return choices.at(size) or self._measure(choices, size)

    def _measure(self, choices: Choices, size: int) -> Kernels:
        with contextlib.ExitStack() as opened:
            lanes: dict[Kernels, Lane | BatchLane] = {"batch": opened.enter_context(closing(self._open_with("batch", size)))}
            try:
                lanes["window"] = opened.enter_context(closing(self._open_with("window", size)))
            except (BackendError, InputError):
                return "batch"  # more memory than there is
            noise = np.random.default_rng(0).standard_normal(self._spec.input_shape, np.float32)
            for lane in lanes.values():
                np.copyto(lane.input, noise)
            return choices.settle(size, {kernels: lane.run for kernels, lane in lanes.items()})

    def _batch_kernel(self) -> BatchKernel:
        """Return the program of many windows, compiled and loaded at the first call.

        Raises
        ------
        BackendError
            If it cannot compute the model.
        """
        if self._batches is None:
            try:
                program = make_batch_program(self._spec, self._weights, self.precision)
                kernel = BatchKernel(self._device, self._stream, program, self._architecture)
                if not kernel.fits:
                    kernel.close()
                    problem = "The kernels for batches need more shared memory than this GPU has."
                    raise BackendError(problem, "Use those of one window.")
                self._batches = kernel
                self._closing.callback(kernel.close)
            except BackendError as e:
                self._batches = e
        if isinstance(self._batches, BackendError):
            raise self._batches
        return self._batches

    def _load_choices(self, kernel: BatchKernel) -> Choices:
        assert self._launcher is not None
        gpu, one = self._device.gpu, self._launcher.program
        key = key_of(one.source, kernel.program.source, one.weights.tobytes(), gpu.name, gpu.driver, repr(self._options))
        empty = KernelRecord(precision=self.precision, gpu=gpu.name, driver=gpu.driver, choices=(), created="")
        return Choices(self._folder, empty, key)

    def _open_rolling(self, n: int) -> Lane:
        self._roller = self._roller or self._load_rolling()
        lane = self._rolling[n] = Lane(self._roller, self._spec, self._options, 1, fresh=n)
        return lane

    def _load_rolling(self) -> Launcher:
        """Compile and load the program of streams, and make room for their newest window."""
        assert self._launcher is not None
        program = self._launcher.program.rolling()
        with contextlib.ExitStack() as opened:
            module = Module(self._device, program.name, program.source, self.layout.threads, self._architecture)
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


def _too_large(batch: int) -> InputError:
    return InputError(f"A batch of {batch} windows of this length is too large for the fused kernels.", "Split it.")
