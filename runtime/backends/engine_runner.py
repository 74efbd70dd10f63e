"""Runs engines of TensorRT or TensorRT-RTX without torch. A call allocates nothing."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from sjepa_deploy.errors import BackendError, EngineError, InputError, listed
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
from sjepa_deploy.runtime.gpu.backend import GpuBackend, LaneBuffers, SharedBuffers
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, Graph, Stream, check
from sjepa_deploy.runtime.gpu.timing import Step
from sjepa_deploy.spec import ModelSpec

MAX_GPU_ADDRESSES = 16
"""Most arrays on the GPU whose CUDA graphs are kept. A producer that cycles through more arrays runs without graphs."""


def suited(profiles: Sequence[tuple[int, int, int]], batch: int) -> int | None:
    """Return the index of the profile that suits `batch`, or None if none takes it.

    Of the profiles (smallest, optimal, largest batch) that take `batch`, the one whose optimal batch is nearest by ratio suits
    it. Of equally near ones it is the first.
    """
    able = [i for i, (low, _, high) in enumerate(profiles) if low <= batch <= high]
    return min(able, key=lambda i: abs(math.log(profiles[i][1] / batch)), default=None)


class EngineRunner(GpuBackend["_Lane"]):
    """Runs engines of one model on one GPU, with a context and a CUDA graph for each batch size.

    Each batch size runs on the engine whose profile suits it (`suited`).

    Parameters
    ----------
    api : TensorRT
        TensorRT that deserialises the plan.
    device : Device
        GPU that runs the engine.
    plans : sequence of bytes
        The engines, at least one. A plan is native code, and must come from a verified file.
    spec : ModelSpec
        Names and shapes that the engine must have.
    options : BackendOptions
        The runner reads `memory`, `cuda_graph` and `wait`.

    Raises
    ------
    EngineError
        If TensorRT refuses the engine, or its inputs and outputs are not the model's.
    """

    def __init__(self, api: TensorRT, device: Device, plans: Sequence[bytes], spec: ModelSpec, options: BackendOptions) -> None:
        self._api, self._options = api, options
        device.make_current()
        self._engines = [api.deserialize(plan) for plan in plans]
        for engine in self._engines:
            check_tensors(api, engine, spec)
        self._profiles = [api.profile(engine, spec.input_name) for engine in self._engines]
        with contextlib.ExitStack() as opened:
            stream = opened.enter_context(closing(Stream(device, options.wait)))
            size = max(api.memory_size(engine) for engine in self._engines)
            scratch = DeviceBuffer(device, size)  # shared: contexts run one after another
            self._scratch = opened.enter_context(closing(scratch))
            buffers = SharedBuffers(device, spec, max(high for _, _, high in self._profiles), copies=options.memory == "copy")
            super().__init__(device, stream, buffers, spec, opened.pop_all())
        self._from_gpu: OrderedDict[tuple[int, int], _Launch] = OrderedDict()

    def _release(self) -> None:
        for launch in self._from_gpu.values():
            launch.close()
        self._from_gpu.clear()

    def close(self) -> None:
        """Release everything on the GPU."""
        super().close()
        self._engines.clear()

    def _open(self, batch: int) -> _Lane:
        which = suited(self._profiles, batch)
        if which is None:
            takes = listed([f"{low} to {high}" for low, _, high in self._profiles])
            raise InputError(
                f"The batch has {batch} windows, the engine's profile is {takes}.",
                "Split it, or build an engine with sjepa-build --max-batch.",
            )
        with self._buffers.opening(batch) as buffers:
            engine = self._engines[which]
            context = self._api.create_context(engine, self._scratch.address, self._scratch.nbytes, self._stream.handle)
            return _Lane(buffers, self._stream, context, batch, self._spec, self._options, self._api, self._from_gpu)


class CaptureError(BackendError):
    """TensorRT cannot capture an engine in a CUDA graph. TensorRT 8.6 refuses some large-batch engines at every batch size."""


class _Launch:
    """Starts one call: first by a function that enqueues the call, then by the captured graph."""

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        self._stream, self._enqueue = stream, enqueue
        self.graph: Graph | None = None

    def __call__(self) -> tuple[Any]:
        if self.graph is not None:
            return self.graph.launch()
        self._enqueue()
        return (0,)

    def capture(self) -> None:
        self.graph = self._stream.capture(self._enqueue)

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()


class _Lane:
    """Runs one batch size with pinned input and output and a context of its own.

    Each batch size has its own context, because a captured graph is only valid for the shapes of its context.
    """

    def __init__(
        self,
        buffers: LaneBuffers,
        stream: Stream,
        context: Any,
        batch: int,
        spec: ModelSpec,
        options: BackendOptions,
        api: TensorRT,
        from_gpu: OrderedDict[tuple[int, int], _Launch],
    ) -> None:
        self._stream, self._context, self._spec, self._api = stream, context, spec, api
        self._batch, self._cuda_graph, self._wait = batch, options.cuda_graph, stream.wait
        self._from_gpu = from_gpu  # by batch and address, the least recently made first
        with contextlib.ExitStack() as opened:
            self._in, self._out = buffers.input, buffers.output
            self.input, self.output = self._in.array, self._out.array
            self._copies = buffers.copies
            if not context.set_input_shape(spec.input_name, self.input.shape):
                raise EngineError(
                    f"The engine refuses batch {batch}: {api.last_error}.", "Build it again with sjepa-build --rebuild."
                )
            start = _Launch(stream, self._enqueue_with_copies if self._copies else self.enqueue_from(self._in.address))
            opened.callback(start.close)
            opened.callback(stream.synchronize)
            check(start())  # TensorRT prepares itself in a first run, which must not be captured
            stream.wait()
            if options.cuda_graph:
                try:
                    start.capture()
                except BackendError as e:
                    raise CaptureError(
                        f"The engine cannot be captured in a CUDA graph at batch {batch}: {e.problem}",
                        "Load it with options=BackendOptions(cuda_graph=False), or build it with a smaller --max-batch.",
                    ) from e
                check(start())
                stream.wait()
            assert start.graph is not None or not options.cuda_graph
            self.launch: Callable[[], tuple[Any]] = start if start.graph is None else start.graph.launch
            self._closing = opened.pop_all()

    def run(self) -> None:
        """Run on what is in `input`."""
        self._stream.unfinished = True
        result = self.launch()
        if result[0]:
            check(result)
        self._wait()
        self._stream.unfinished = False

    def run_from(self, address: int) -> None:
        """Run on windows in device memory. The second call with an address captures a graph: keep that memory as large."""
        launch = self._from_gpu.get((self._batch, address))
        if launch is None:
            launch = self._from_gpu[self._batch, address] = _Launch(self._stream, self.enqueue_from(address))
            if len(self._from_gpu) > MAX_GPU_ADDRESSES:
                self._from_gpu.popitem(last=False)[1].close()
        elif self._cuda_graph and launch.graph is None:
            launch.capture()
        self._stream.unfinished = True
        check(launch())
        self._wait()
        self._stream.unfinished = False

    def enqueue_from(self, source: int) -> Callable[[], None]:
        """Return a function that enqueues one call on the input at the device address `source`."""
        target = self._copies[1] if self._copies else self._out.address

        def enqueue() -> None:
            self._execute(source, target)
            if self._copies:
                self._stream.download(self._out, target)
            self._stream.finish()

        return enqueue

    def _enqueue_with_copies(self) -> None:
        assert self._copies is not None
        source, target = self._copies
        self._stream.upload(source, self._in)
        self._execute(source, target)
        self._stream.download(self._out, target)
        self._stream.finish()

    def steps(self) -> tuple[dict[str, Step], str]:
        """Return the steps that a call enqueues, and their mode."""
        if not self._copies:
            return {"compute": lambda: check(self.launch())}, "as measured, in mapped memory"
        source, target = self._copies
        return {
            "h2d": lambda: self._stream.upload(source, self._in),
            "compute": lambda: self._execute(source, target),
            "d2h": lambda: self._stream.download(self._out, target),
        }, "step by step, without a graph"

    def _execute(self, source: int, target: int) -> None:
        context, spec = self._context, self._spec
        done = context.set_tensor_address(spec.input_name, source) and context.set_tensor_address(spec.output_name, target)
        # A refused enqueue would leave a graph that replays stale outputs.
        if not (done and context.execute_async_v3(self._stream.handle)):
            raise BackendError(f"TensorRT did not run the engine: {self._api.last_error}.", "Build it again with sjepa-build.")

    def close(self) -> None:
        self._closing.close()
        del self._context, self.launch, self.input, self.output


def check_tensors(api: TensorRT, engine: Any, spec: ModelSpec) -> None:
    """Compare an engine's inputs and outputs with the model's.

    Raises
    ------
    EngineError
        If the engine's inputs or outputs differ from the model's.
    """
    found = api.tensors(engine)
    wanted = {spec.input_name: spec.input_shape, spec.output_name: spec.output_shape}
    shapes = {name: tensor.shape[1:] for name, tensor in found.items()}
    floats = all(tensor.dtype == "FLOAT" for tensor in found.values())
    if shapes != wanted or not floats or not found[spec.input_name].is_input or found[spec.output_name].is_input:
        raise EngineError(f"The engine has {found}, the model {wanted} in float32.", "Build it again with sjepa-build --rebuild.")
