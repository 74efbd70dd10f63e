"""Gives every GPU backend its skeleton: one thread at a time, buffers made once, windows on the GPU read in place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from sjepa_deploy.runtime.backend import Backend, FloatArray, Split, Turn
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, HostBuffer, HostPart, Stream, address_on_gpu, current
from sjepa_deploy.runtime.gpu.timing import Step, split_calls
from sjepa_deploy.spec import ModelSpec


class GpuTurn(Turn):
    """Lets one thread at a time call a backend on a GPU, sets the GPU's context in that thread, and refuses forked children.

    Parameters
    ----------
    device : Device
        The GPU.
    keeps : object
        What a forked child must never free.
    """

    def __init__(self, device: Device, keeps: object) -> None:
        super().__init__(forks=False, keeps=keeps)
        self._device = device

    def begin(self) -> None:
        """Begin a call, as `Turn.begin` does."""
        super().begin()
        try:
            if current.device is not self._device:
                self._device.make_current()
        except BaseException:
            self.end()
            raise


class Lane(Protocol):
    """Runs the calls of one batch size. A lane keeps pinned input and output, and starts each call.

    Attributes
    ----------
    input, output : array of float32, shape (batch, ...)
        Pinned memory that a call reads and writes.
    """

    input: FloatArray
    output: FloatArray

    def run(self) -> None:
        """Run on the content of `input`, and return when `output` is complete."""

    def run_from(self, address: int) -> None:
        """Run on windows at the device address `address`, and return when `output` is complete."""

    def steps(self) -> tuple[dict[str, Step], str] | None:
        """Return the steps of a call and their mode (see `split_calls`), or None if a call cannot be split."""

    def close(self) -> None:
        """Release what is not shared with other lanes."""


L = TypeVar("L", bound=Lane)


@dataclass(frozen=True, kw_only=True)
class LaneBuffers:
    """Holds the buffers of one batch size.

    Attributes
    ----------
    input, output : HostPart
        Pinned windows and predictions.
    copies : tuple of int or None
        Device addresses for copies of both. None: kernels read and write the pinned memory.
    """

    input: HostPart
    output: HostPart
    copies: tuple[int, int] | None


class SharedBuffers:
    """Makes the buffers of batch sizes. All sizes above one power of two, up to the next one, share the same buffers.

    So the buffers of all sizes together are smaller than four times those of the largest batch so far. Buffers stay where they
    are, since captured graphs hold their addresses, and callers may hold the arrays.

    Parameters
    ----------
    device : Device
        The GPU.
    spec : ModelSpec
        The model.
    max_batch : int
        Largest batch.
    copies : bool
        Whether there is device memory for copies.
    """

    def __init__(self, device: Device, spec: ModelSpec, max_batch: int, *, copies: bool) -> None:
        self._device, self._spec, self._max_batch, self._copies = device, spec, max_batch, copies
        self._made: dict[int, tuple[ExitStack, HostBuffer, HostBuffer, tuple[int, int] | None]] = {}

    @contextmanager
    def opening(self, batch: int) -> Iterator[LaneBuffers]:
        """Give the buffers of `batch` windows to a lane that opens. If the lane fails, buffers that are new are freed."""
        size = min(1 << (batch - 1).bit_length(), self._max_batch)
        is_new = size not in self._made
        if is_new:
            with ExitStack() as opened:
                shapes = ((size, *shape) for shape in (self._spec.input_shape, self._spec.output_shape))
                into, out = (opened.enter_context(closing(HostBuffer(self._device, shape))) for shape in shapes)
                copies = None
                if self._copies:
                    on_gpu = (opened.enter_context(closing(DeviceBuffer(self._device, host.nbytes))) for host in (into, out))
                    copies = next(on_gpu).address, next(on_gpu).address
                self._made[size] = (opened.pop_all(), into, out, copies)
        _, into, out, copies = self._made[size]
        try:
            yield LaneBuffers(input=into.first(batch), output=out.first(batch), copies=copies)
        except BaseException:
            if is_new:
                self._made.pop(size)[0].close()
            raise

    def close(self) -> None:
        """Free all buffers, after the lanes."""
        for closing_all, *_ in self._made.values():
            closing_all.close()
        self._made.clear()


class GpuBackend(Backend, Generic[L]):
    """Runs a model on a GPU. A subclass opens a `Lane` for each new batch size (`_open`).

    A call at a known batch size allocates nothing. Batch sizes share buffers (`SharedBuffers`). A second thread that calls at the
    same time gets an error: load the bundle once in each thread.

    Parameters
    ----------
    device, stream : Device, Stream
        GPU and stream of the calls.
    buffers : SharedBuffers
        Buffers of the lanes.
    spec : ModelSpec
        The model.
    closing : ExitStack
        Resources that `close` closes last.
    keeps : object
        What a forked child must never free.
    """

    def __init__(
        self, device: Device, stream: Stream, buffers: SharedBuffers, spec: ModelSpec, closing: ExitStack, keeps: object = None
    ) -> None:
        self._device, self._stream, self._buffers, self._spec, self._closing = device, stream, buffers, spec, closing
        self._lanes: dict[int, L] = {}  # by batch size
        self._turn = GpuTurn(device, keeps)

    @abstractmethod
    def _open(self, batch: int) -> L:
        """Return a new lane for `batch` windows."""

    def _lane(self, batch: int) -> L:
        """Return the lane for `batch` windows. First wait for an interrupted call, which could end the next call early."""
        if self._stream.unfinished:
            self._stream.settle()
        lane = self._lanes.get(batch)
        if lane is None:
            lane = self._lanes[batch] = self._open(batch)
        return lane

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The next call overwrites the result.

        If `eeg` is `input_buffer(batch)` itself, nothing is copied.
        """
        self._turn.begin()
        try:
            lane = self._lane(len(eeg))
            if eeg is lane.input:
                lane.run()
            else:
                self._copy_and_run(lane, eeg)
            return lane.output
        finally:
            self._turn.end()

    def _copy_and_run(self, lane: L, eeg: FloatArray) -> None:
        """Run `lane` on windows of the caller's own array."""
        np.copyto(lane.input, eeg)
        lane.run()

    def run_on_gpu(self, eeg: Any) -> FloatArray:
        """Run the model on an array on the GPU (DLPack, CUDA array interface) without copying it.

        The result is a NumPy array that the next call overwrites.
        """
        self._turn.begin()
        try:
            batch, address = address_on_gpu(eeg, self._stream, self._spec.input_shape)
            lane = self._lane(batch)
            lane.run_from(address)
            return lane.output
        finally:
            self._turn.end()

    def input_buffer(self, batch: int) -> FloatArray:
        """Return the pinned buffer that `run` reads, shape (batch, n_chans, n_times). Fill the buffer and pass it to `run`.

        Buffers of other batch sizes may share this memory: pass one to `run` before another one is filled.
        """
        self._turn.begin()
        try:
            return self._lane(batch).input
        finally:
            self._turn.end()

    def warmup(self, batches: tuple[int, ...] = (1,), n_runs: int = 10) -> None:
        """Make a lane for each of `batches`, and run the lane so that the GPU's clock rises."""
        for batch in batches:
            buffer = self.input_buffer(batch)
            for _ in range(n_runs):
                self.run(buffer)

    def split(self, eeg: FloatArray, n: int) -> Split | None:
        """Return the time of each step of a call, measured over `n` calls on `eeg`."""
        self._turn.begin()
        try:
            lane = self._lane(len(eeg))
            found = lane.steps()
            if found is None:
                return None
            steps, how = found
            return split_calls(self._device, self._stream, lambda: np.copyto(lane.input, eeg), steps, n, how)
        finally:
            self._turn.end()

    def close(self) -> None:
        """Release everything on the GPU, once."""
        if self._turn.closed:
            return
        self._turn.close()
        self._device.make_current()
        self._stream.synchronize()
        self._release()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._buffers.close()
        self._closing.close()

    def _release(self) -> None:
        """Release, before the lanes, what a subclass holds beside them."""
