"""Runs many windows at a time in chunks: the GPU computes one chunk while the next chunk is copied.

Chunks take the streams one after the other. A chunk's windows start as soon as they have arrived and a multiprocessor is free.
Windows of the caller's own array are copied into pinned memory by several threads, a chunk each, while the GPU works on the
chunks before.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any

import numpy as np

from sjepa_deploy.runtime.backend import BackendOptions, FloatArray
from sjepa_deploy.runtime.fused.batch_program import BatchProgram
from sjepa_deploy.runtime.fused.module import Module
from sjepa_deploy.runtime.gpu.backend import LaneBuffers
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, Graph, Stream, check
from sjepa_deploy.runtime.gpu.timing import Step

MOST_CHUNKS, LEAST_WINDOWS = 32, 16
"""Most chunks of a call, and fewest windows of a chunk: starting a smaller copy takes longer than the copy."""

WORKERS = 8
"""Number of streams that compute chunks. The chunks take the streams one after the other."""

MOST_COPIERS = 8
"""Most threads that copy windows into pinned memory: more are no faster on the host of an H100."""


class BatchKernel:
    """Holds the loaded program for many windows, and the streams that all batch sizes share.

    Parameters
    ----------
    device, stream : Device, Stream
        GPU of the calls, and the stream on which the host waits for a call.
    program : BatchProgram
        What is launched.
    architecture : int
        Compute capability of the GPU, times 10.

    Attributes
    ----------
    fits : bool
        Whether a block fits the GPU's shared memory.
    copiers : ThreadPoolExecutor
        Threads that copy the caller's windows into pinned memory.
    """

    def __init__(self, device: Device, stream: Stream, program: BatchProgram, architecture: int) -> None:
        self.device, self.stream, self.program = device, stream, program
        cu = device.cu
        with contextlib.ExitStack() as opened:
            module = Module(device, program.name, program.source, program.threads, architecture)
            self.module = opened.enter_context(closing(module))
            self.fits = self.module.blocks_at_once > 0
            weights = opened.enter_context(closing(DeviceBuffer(device, program.weights.nbytes)))
            check(cu.cuMemcpyHtoD(cu.CUdeviceptr(weights.address), program.weights.ctypes.data, program.weights.nbytes))
            device.synchronize()  # it may return before, and our streams do not wait for the default one
            self._weights = weights.address
            self.copies, *self.workers = (opened.enter_context(closing(Stream(device))) for _ in range(1 + WORKERS))
            self.copiers = opened.enter_context(ThreadPoolExecutor(max(1, min(MOST_COPIERS, (os.cpu_count() or 2) // 2))))
            self.close: Callable[[], None] = opened.pop_all().close

    def launch(self, stream: Stream, batch: int, source: int, target: int) -> None:
        """Enqueue a launch on `batch` windows at the device address `source`. The outputs go to `target`."""
        arguments = _Arguments(source, target, self._weights, batch)
        params = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))  # a launch copies them
        shape = (-(-batch // self.program.windows), 1, 1, self.program.threads, 1, 1, self.module.shared_bytes, stream.stream)
        check(self.device.cu.cuLaunchKernel(self.module.function, *shape, ctypes.addressof(params), 0))


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("batch", ctypes.c_uint),
    ]


def chunks_of(batch: int, at_once: int) -> list[tuple[int, int]]:
    """Return the start and end of each chunk of `batch` windows, for a GPU that computes `at_once` windows at once.

    A chunk holds at most a quarter of `at_once`, so that the GPU starts early. No chunk is so small that starting its copy takes
    longer than the copy.
    """
    size = max(LEAST_WINDOWS, min(-(-at_once // 4), -(-batch // 4)), -(-batch // MOST_CHUNKS))
    return [(first, min(first + size, batch)) for first in range(0, batch, size)]


class BatchLane:
    """Runs the calls of one batch size on the kernels of many windows.

    Parameters
    ----------
    kernel : BatchKernel
        What is launched.
    buffers : LaneBuffers
        Buffers of this batch size.
    options : BackendOptions
        Whether a call replays a graph.
    batch : int
        Windows of a call.

    Attributes
    ----------
    input, output : array of float32
        Pinned windows and predictions.
    """

    def __init__(self, kernel: BatchKernel, buffers: LaneBuffers, options: BackendOptions, batch: int) -> None:
        self._kernel, self._batch, self._cu = kernel, batch, kernel.device.cu
        self._graph: Graph | None = None
        assert buffers.copies is not None, "these kernels read device memory"
        self._host, self._out, (self._copy, _) = buffers.input, buffers.output, buffers.copies
        self.input: FloatArray = self._host.array
        self.output: FloatArray = self._out.array
        with contextlib.ExitStack() as opened:
            self._chunks = chunks_of(batch, kernel.module.blocks_at_once * kernel.program.windows)
            self._begun, self._copied = self._event(opened), [self._event(opened) for _ in self._chunks]
            self._computed = [self._event(opened) for _ in kernel.workers]
            self._start: Callable[[], object] = self._enqueue
            self.run()  # loads the code
            if options.cuda_graph:
                self._graph = opened.enter_context(closing(kernel.stream.capture(self._enqueue)))
                self._start = self._replay
            self.close: Callable[[], None] = opened.pop_all().close

    def _event(self, opened: contextlib.ExitStack) -> Any:
        event = check(self._cu.cuEventCreate(int(self._cu.CUevent_flags.CU_EVENT_DISABLE_TIMING)))
        opened.callback(lambda: check(self._cu.cuEventDestroy(event)))
        return event

    def _enqueue(self, ready: Callable[[int], object] = lambda chunk: None) -> None:
        """Enqueue all chunks, each once `ready` returns."""
        kernel, cu = self._kernel, self._cu
        window, outputs = self._host.nbytes // self._batch, self._out.nbytes // self._batch
        copies, workers = kernel.copies, kernel.workers[: len(self._chunks)]
        check(cu.cuEventRecord(self._begun, kernel.stream.stream))
        check(cu.cuStreamWaitEvent(copies.stream, self._begun, 0))
        for i, (first, end) in enumerate(self._chunks):
            ready(i)
            source, size = self._host.pointer + first * window, (end - first) * window
            check(cu.cuMemcpyHtoDAsync(cu.CUdeviceptr(self._copy + first * window), source, size, copies.stream))
            check(cu.cuEventRecord(self._copied[i], copies.stream))
            worker = workers[i % len(workers)]
            check(cu.cuStreamWaitEvent(worker.stream, self._copied[i], 0))
            kernel.launch(worker, end - first, self._copy + first * window, self._out.address + first * outputs)
        for worker, event in zip(workers, self._computed, strict=False):
            check(cu.cuEventRecord(event, worker.stream))
            check(cu.cuStreamWaitEvent(kernel.stream.stream, event, 0))
        kernel.stream.finish()

    def _replay(self) -> None:
        assert self._graph is not None
        check(self._graph.launch())

    def run(self) -> None:
        """Run on what is in `input`."""
        self._kernel.stream.unfinished = True
        self._start()
        self._kernel.stream.wait()
        self._kernel.stream.unfinished = False

    def run_on(self, eeg: FloatArray) -> None:
        """Run on windows of the caller, whose chunks are copied into `input` by several threads."""
        if len(self._chunks) == 1:
            np.copyto(self.input, eeg)
            self.run()
            return
        stream = self._kernel.stream
        copied = [self._kernel.copiers.submit(np.copyto, self.input[a:b], eeg[a:b]) for a, b in self._chunks]
        try:
            stream.unfinished = True
            self._enqueue(lambda chunk: copied[chunk].result())
            stream.wait()
            stream.unfinished = False
        finally:
            wait(copied)  # nothing is written into `input` after a call, however it ended

    def run_from(self, address: int) -> None:
        """Run on windows in device memory."""
        stream = self._kernel.stream
        stream.unfinished = True
        self._kernel.launch(stream, self._batch, address, self._out.address)
        stream.finish()
        stream.wait()
        stream.unfinished = False

    def leave(self) -> None:
        """Do nothing: these kernels never stay on the GPU."""

    def steps(self) -> tuple[dict[str, Step], str] | None:
        """Return the steps of a call, one after the other. In a real call, copies and kernels overlap."""
        stream, window = self._kernel.stream, self._copy
        steps: dict[str, Step] = {
            "h2d": lambda: stream.upload(window, self._host),
            "compute": lambda: self._kernel.launch(stream, self._batch, window, self._out.address),
        }
        return steps, "one copy, one launch"
