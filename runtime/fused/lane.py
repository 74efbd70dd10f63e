"""Runs the calls of one size of the fused backend in a lane.

A lane serves one batch size, or one number of new samples of a stream. It has pinned input and output, scratch memory and a
captured graph, so that a call allocates nothing.

A call starts with a launch, mostly from a CUDA graph, or with a number that the host writes for a kernel that stays on the GPU.
The call ends when the host sees the call's number beside every output. With many outputs the kernel writes the number once, in
one word after the outputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from sjepa_deploy.errors import BackendError, InputError
from sjepa_deploy.runtime.backend import BackendOptions, FloatArray
from sjepa_deploy.runtime.fused.program import LINE, Program
from sjepa_deploy.runtime.gpu.backend import LaneBuffers
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, Graph, HostBuffer, HostPart, Stream, check
from sjepa_deploy.spec import ModelSpec

logger = logging.getLogger(__name__)

POLLS = 20_000
"""The host reads a word in host memory this often before it asks the driver whether the GPU failed."""

MOST_MARKED = 8
"""At most so many outputs carry the call's number: reading more of them takes longer than one word behind a fence."""

LEAVE = 1 << 32
"""This bit, above the number of a call, tells the kernel that stays to end."""

STRONGLY_ORDERED = ("x86_64", "AMD64")
"""These processors make stores visible in order. Python can hand a window to a running kernel on no other processor."""


def refuse_persistent(options: BackendOptions) -> None:
    """Raise an error if the options or the processor do not allow a kernel that stays.

    Raises
    ------
    BackendError
        If a kernel that stays cannot be used. The message gives the reason.
    """
    if not options.persistent:
        return
    if options.memory != "mapped":
        raise BackendError("A persistent kernel reads the window in host memory: there is no copy.", 'Use memory="mapped".')
    if options.wait == "block":
        raise BackendError("A persistent kernel ends no call with an interrupt that a call could sleep for.", 'Use wait="spin".')
    if platform.machine() not in STRONGLY_ORDERED:
        raise BackendError(f"A persistent kernel is not for {platform.machine()}, which may reorder stores.", "Leave it out.")


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Holds the loaded program that all lanes of a backend launch.

    Attributes
    ----------
    device, stream : Device, Stream
        GPU and stream of the launches.
    program : Program
        The program.
    function : CUfunction
        The program's kernel, loaded.
    threads, shared_bytes : int
        Threads and shared memory of a block.
    blocks_at_once : int
        Blocks that the GPU holds at once.
    weights : DeviceBuffer
        Weights of the program.
    max_batch : int
        Windows that the program's counters are for.
    history : DeviceBuffer or None
        Newest window of a stream. None if the program does not roll.
    """

    device: Device
    stream: Stream
    program: Program
    function: Any
    threads: int
    shared_bytes: int
    blocks_at_once: int
    weights: DeviceBuffer
    max_batch: int
    history: DeviceBuffer | None = None


class Lane:
    """Runs the calls of one batch size, or of one number of new samples.

    Parameters
    ----------
    launcher : Launcher
        The loaded program.
    spec : ModelSpec
        The model.
    options : BackendOptions
        The lane reads `memory`, `cuda_graph`, `wait` and `persistent`.
    batch : int
        Windows of a call.
    buffers : LaneBuffers or None
        Buffers of this batch size. None: the lane makes its own.
    fresh : int
        New samples of a call, for a program that rolls. 0 for whole windows.

    Attributes
    ----------
    input, output : array of float32
        Windows, or new samples, and predictions.
    persistent : bool
        Whether a kernel that stays answers the calls. Only calls of one window can have such a kernel.
    grid : int
        Blocks of a launch.
    buffers : dict of str to DeviceBuffer
        Scratch memory.
    """

    def __init__(
        self,
        launcher: Launcher,
        spec: ModelSpec,
        options: BackendOptions,
        batch: int,
        buffers: LaneBuffers | None = None,
        fresh: int = 0,
    ) -> None:
        self._cu, self._stream = launcher.device.cu, launcher.stream
        self.persistent = options.persistent and batch == 1
        self._alignment = 16 if spec.n_times % 4 == 0 else 1  # the kernels then load four samples at once
        self._number = self._residency = 0
        self._unfinished = self._staying = False
        self._graph: Graph | None = None
        self._closing = contextlib.ExitStack()
        try:
            self._allocate(launcher, spec, options, batch, buffers, fresh)
            self._prepare(launcher, options, batch)
            self._begin(options, fresh)
        except BaseException:
            self._release()
            raise

    def _allocate(
        self,
        launcher: Launcher,
        spec: ModelSpec,
        options: BackendOptions,
        batch: int,
        buffers: LaneBuffers | None,
        fresh: int,
    ) -> None:
        device, program, keep = launcher.device, launcher.program, self._closing.enter_context
        self._in: HostBuffer | HostPart
        self._out: HostBuffer | HostPart
        if buffers is None:
            shape = (spec.n_chans, -(-fresh // LINE) * LINE) if fresh else (batch, *spec.input_shape)
            self._in, self._out = (keep(closing(HostBuffer(device, s))) for s in (shape, (batch, *spec.output_shape)))
        else:
            self._in, self._out = buffers.input, buffers.output
        self.input = self._in.array[:, :fresh] if fresh else self._in.array
        n_outputs = self._out.nbytes // 4
        self._report_buffer, request = (keep(closing(HostBuffer(device, (2,)))) for _ in range(2))
        self._report = keep(_words(self._report_buffer, np.uint32))
        self._request_address, self._request = request.address, keep(_words(request, np.uint64))
        self._values = self._out.array
        self.output: FloatArray = self._out.array
        self._marked: HostBuffer | None = None
        self._ends, self._end_words = self._report, range(1)
        if program.marks and n_outputs <= MOST_MARKED:
            self._marked = keep(closing(HostBuffer(device, (n_outputs, 2))))
            self._values = self._marked.array[:, 0].reshape(self._out.array.shape)
            self.output = np.zeros_like(self._out.array)
            self._ends, self._end_words = keep(_words(self._marked, np.uint32)), range(1, 2 * n_outputs, 2)
        words = {"counters": 4 + launcher.max_batch}
        words |= {name: size * batch for name, size in program.buffers}
        self.buffers = {name: keep(closing(DeviceBuffer(device, 4 * n))) for name, n in words.items() if n}
        for buffer in self.buffers.values():  # counters begin at zero, and no old mark is taken for a new one
            check(self._cu.cuMemsetD8(self._cu.CUdeviceptr(buffer.address), 0, buffer.nbytes))
        device.synchronize()  # it may return before, and our stream does not wait for the default one
        self._upload: int | None = None  # device address
        if options.memory == "copy":
            known = buffers.copies if buffers is not None else None
            self._upload = known[0] if known else keep(closing(DeviceBuffer(device, self._in.nbytes))).address

    def _prepare(self, launcher: Launcher, options: BackendOptions, batch: int) -> None:
        """Lay out the arguments of a launch."""
        program = launcher.program
        self._arguments = program.arguments()(
            input=self._upload or self._in.address,
            output=self._out.address,
            weights=launcher.weights.address,
            marked=self._marked.address if self._marked else 0,
            report=self._report_buffer.address,
            batch=batch,
            **{name: buffer.address for name, buffer in self.buffers.items()},
            **({"history": launcher.history.address} if launcher.history else {}),
        )
        self._params = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self.grid = program.grid(batch, launcher.blocks_at_once)
        shape = (self.grid, 1, 1, launcher.threads, 1, 1, launcher.shared_bytes, self._stream.stream)
        self._kernel = (launcher.function, *shape, ctypes.addressof(self._params))
        self._cooperative = program.cooperative
        self._together = program.cooperative or program.cluster == 1  # if it stays; the blocks of a cluster are resident anyway
        self._start: Callable[[], Any] = self._enqueue
        self._finish = self._watch if options.wait != "block" else self._block

    def _begin(self, options: BackendOptions, fresh: int) -> None:
        """Make the first call, which loads the code and takes no sample of a stream. Then choose how later calls start."""
        self.run()
        if fresh:
            self._arguments.fresh = fresh
        if self.persistent:
            self._start = self._ask
        elif options.cuda_graph:
            self._graph = self._capture()
            self._start = self._graph.launch if self._graph else self._enqueue

    def _capture(self) -> Graph | None:
        try:
            return self._closing.enter_context(closing(self._stream.capture(lambda: check(self._enqueue()))))
        except BackendError as e:  # older drivers capture no cooperative launch
            logger.warning("The driver takes the fused kernel into no CUDA graph, so each call launches it: %s", e)
            return None

    def run(self) -> None:
        """Run on what is in `input`."""
        self._settle()
        number = (self._number + 1) & 0xFFFFFFFF
        self._unfinished = True
        check(self._start())
        self._number = number
        self._finish(number)
        self._unfinished = False

    def run_from(self, address: int) -> None:
        """Run on windows in device memory."""
        if address % self._alignment:
            raise InputError("The input on the GPU does not start at a multiple of 16 bytes.", "Copy it on the GPU.")
        self._settle()
        self.leave()
        usual = self._arguments.input
        self._arguments.input = address
        self._unfinished = True
        check(self._launch())  # copies the arguments
        self._arguments.input = usual
        self._number = (self._number + 1) & 0xFFFFFFFF
        self._finish(self._number)
        self._unfinished = False

    def steps(self) -> None:
        """Return None: a call is one kernel and has no steps to measure apart."""

    def leave(self) -> None:
        """End the kernel that stays, if there is one."""
        if self._staying:
            self._request[0] = LEAVE | self._number
            self._stream.synchronize()
            self._staying = False

    def _settle(self) -> None:
        """Wait for the end of an interrupted call, and read whether the GPU answered the call."""
        if self._unfinished:
            self.leave()
            self._stream.synchronize()
            self._number = self._ends[self._end_words[0]]
            self._unfinished = False

    def _enqueue(self) -> tuple[Any]:
        if self._upload:
            self._stream.upload(self._upload, self._in)
        return self._launch()

    def _launch(self) -> tuple[Any]:
        if self._cooperative:
            result: tuple[Any] = self._cu.cuLaunchCooperativeKernel(*self._kernel)
        else:
            result = self._cu.cuLaunchKernel(*self._kernel, 0)
        check(result)
        return result

    def _ask(self) -> tuple[int]:
        self._request[0] = (self._number + 1) & 0xFFFFFFFF
        if not self._staying:
            self._stay()
        return (0,)

    def _stay(self) -> None:
        """Launch the kernel that stays. The kernel answers the call that is asked for and all later calls."""
        self._residency += 1
        arguments = self._arguments
        arguments.request, arguments.last = self._request_address, (self._request[0] - 1) & 0xFFFFFFFF
        arguments.residency = self._residency
        usual, self._cooperative = self._cooperative, self._together
        try:
            check(self._launch())
        finally:
            arguments.request, self._cooperative = 0, usual
        self._staying = True

    def _watch(self, number: int) -> None:
        words = self._ends
        for word in self._end_words:
            while words[word] != number:
                for _ in range(POLLS):
                    if words[word] == number:
                        break
                else:
                    self._look_after(words, word, number)
        self._take()

    def _look_after(self, words: memoryview, word: int, number: int) -> None:
        """Ask the driver whether the kernel still runs: after an error the kernel writes nothing."""
        (error,) = self._cu.cuStreamQuery(self._stream.stream)
        if error == self._cu.CUresult.CUDA_ERROR_NOT_READY:
            return
        check((error,))
        if words[word] == number:
            return
        if not self._staying:
            raise BackendError("A kernel ended without its result.", "Report this with the bundle.")
        self._stay()  # the host was silent for so long that it had left

    def _block(self, number: int) -> None:
        self._stream.wait()
        self._take()

    def _take(self) -> None:
        if self._report[1]:
            raise BackendError(
                "The blocks of a kernel waited for each other for more than a second.",
                "Load the bundle again; if it happens again, use another backend on this GPU.",
            )
        if self._marked:
            np.copyto(self.output, self._values)

    def close(self) -> None:
        """End the kernel and free the buffers."""
        self._release()
        del self.input, self.output, self._values

    def _release(self) -> None:
        self.leave()
        self._stream.synchronize()
        self._closing.close()


def _words(buffer: HostBuffer, dtype: type[np.unsignedinteger[Any]]) -> memoryview:
    return memoryview(buffer.array.reshape(-1).view(dtype))  # type: ignore[arg-type]
