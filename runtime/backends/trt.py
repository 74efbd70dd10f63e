"""TensorRT and TensorRT-RTX: engines that decode without torch, without a copy too many, and without an allocation per call."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError, EngineError, InputError
from sjepa_deploy.runtime.backend import Backend, BackendOptions, FloatArray, Split
from sjepa_deploy.runtime.backends.engines import EngineStore, Machine
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
from sjepa_deploy.runtime.gpu.backend import Turn
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, Gpu, Graph, HostBuffer, Stream, address_on_gpu, check
from sjepa_deploy.runtime.gpu.timing import split_calls
from sjepa_deploy.spec import ModelSpec, RunPrecision

MAX_GPU_ADDRESSES = 16
"""Arrays on the GPU whose graphs are kept; a producer that cycles through more of them is served without graphs."""

RTX_CAPABILITIES = frozenset({"7.5", "8.0", "8.6", "8.7", "8.9", "12.0", "12.1"})
"""GPUs that TensorRT-RTX makes engines for: not 9.0 (H100, H200) nor 10.x."""


def machine_of(api: TensorRT, gpu: Gpu) -> Machine:
    """Return what engines of `api` on `gpu` depend on."""
    return Machine(
        flavour=api.flavour,
        version=api.version,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
    )


class EngineRunner(Backend):
    """One engine on one GPU: buffers, a context and a graph for each batch size, made when it is first met.

    Nothing is allocated by a call at a batch size that was met before. One thread at a time: a second one gets an error. Open
    one runner (or `sjepa_deploy.load` once) for each thread; they share nothing but the GPU.

    Parameters
    ----------
    api : TensorRT
        What deserialises the plan.
    device : Device
        Where it runs.
    plan : bytes
        The engine. It is native code, and must come from a verified file.
    spec : ModelSpec
        Names and shapes that the engine must have.
    options : BackendOptions
        Memory, graph, wait.

    Raises
    ------
    EngineError
        If the engine is refused, or its inputs and outputs are not the model's.
    """

    def __init__(self, api: TensorRT, device: Device, plan: bytes, spec: ModelSpec, options: BackendOptions) -> None:
        self._api, self._device, self._spec, self._options = api, device, spec, options
        device.make_current()
        self._engine = api.deserialize(plan)
        check_tensors(api, self._engine, spec)
        self.min_batch, self.max_batch = api.batches(self._engine, spec.input_name)
        with contextlib.ExitStack() as opened:
            self._stream = opened.enter_context(closing(Stream(device, options.wait)))
            self._wait = self._stream.wait
            scratch = DeviceBuffer(device, api.memory_size(self._engine))  # shared: contexts run one after another
            self._scratch = opened.enter_context(closing(scratch))
            self._closing = opened.pop_all()
        self._lanes: dict[int, _Lane] = {}
        self._gpu_lanes: OrderedDict[tuple[int, int], _Launch] = OrderedDict()
        self._turn = Turn(device)
        self._unfinished = False

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the engine on `eeg`, shape (batch, n_chans, n_times). The result is overwritten by the next call.

        If `eeg` is `input_buffer(batch)` itself, nothing is copied.
        """
        self._turn.begin()
        try:
            lane = self._lane(len(eeg))
            if eeg is not lane.input:
                np.copyto(lane.input, eeg)
            self._unfinished = True
            result = lane.launch()
            if result[0]:
                check(result)
            self._wait()
            self._unfinished = False
            return lane.output
        finally:
            self._turn.end()

    def run_on_gpu(self, eeg: Any) -> FloatArray:
        """Run the engine on an array on the GPU (DLPack, CUDA array interface) without copying it.

        An address that is met again is served by a graph; its memory must stay as large as it was. The result is a NumPy array
        that the next call overwrites.
        """
        self._turn.begin()
        try:
            batch, address = address_on_gpu(eeg, self._stream, self._spec.input_shape)
            lane = self._lane(batch)
            launch = self._gpu_lanes.get((batch, address))
            if launch is None:
                launch = self._gpu_lanes[batch, address] = _Launch(self._stream, lane.enqueue_from(address))
                if len(self._gpu_lanes) > MAX_GPU_ADDRESSES:
                    self._gpu_lanes.popitem(last=False)[1].close()
            elif self._options.cuda_graph and launch.graph is None:
                launch.capture()
            self._unfinished = True
            check(launch())
            self._wait()
            self._unfinished = False
            return lane.output
        finally:
            self._turn.end()

    def input_buffer(self, batch: int) -> FloatArray:
        """Return the pinned buffer that `run` reads, shape (batch, n_chans, n_times): fill it in place and pass it to `run`."""
        self._turn.begin()
        try:
            return self._lane(batch).input
        finally:
            self._turn.end()

    def warmup(self, batches: tuple[int, ...] = (1,), n_runs: int = 10) -> None:
        """Make buffers, context and graph for each of `batches`, and run them so that the GPU's clock rises."""
        for batch in batches:
            buffer = self.input_buffer(batch)
            for _ in range(n_runs):
                self.run(buffer)

    def split(self, eeg: FloatArray, n: int) -> Split:
        """Return where the time of `n` calls on `eeg` goes."""
        self._turn.begin()
        try:
            lane = self._lane(len(eeg))
            steps, how = lane.steps()
            self._unfinished = True
            split = split_calls(self._device, self._stream, lambda: np.copyto(lane.input, eeg), steps, n, how)
            self._unfinished = False
            return split
        finally:
            self._turn.end()

    def close(self) -> None:
        """Release everything on the GPU."""
        self._device.make_current()
        self._stream.synchronize()
        for launch in self._gpu_lanes.values():
            launch.close()
        for lane in self._lanes.values():
            lane.close()
        self._gpu_lanes.clear()
        self._lanes.clear()
        self._closing.close()
        del self._engine

    def _lane(self, batch: int) -> _Lane:
        """Return what runs `batch` windows, once a call is over that was interrupted: its flag would end the next one early."""
        if self._unfinished:
            self._stream.synchronize()
            self._unfinished = False
        return self._lanes.get(batch) or self._open(batch)

    def _open(self, batch: int) -> _Lane:
        if not self.min_batch <= batch <= self.max_batch:
            raise InputError(
                f"The batch has {batch} windows, the engine's profile is {self.min_batch} to {self.max_batch}.",
                "Split it, or build an engine with sjepa-build --max-batch.",
            )
        context = self._api.create_context(self._engine, self._scratch.address, self._scratch.nbytes, self._stream.handle)
        lane = _Lane(self._device, self._stream, context, batch, self._spec, self._options, self._api)
        self._lanes[batch] = lane
        return lane


class CaptureError(BackendError):
    """An engine that TensorRT takes into no CUDA graph: 8.6 refuses some that are for large batches, at any batch size."""


class _Launch:
    """What starts one call: a function that enqueues, replaced by its graph once it is captured."""

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
    """One batch size: pinned input and output, a context of its own, and what starts a call.

    A context of its own, because a captured graph is only good for the shapes that its context had.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        context: Any,
        batch: int,
        spec: ModelSpec,
        options: BackendOptions,
        api: TensorRT,
    ) -> None:
        self._stream, self._context, self._spec, self._api = stream, context, spec, api
        with contextlib.ExitStack() as opened:
            self._in, self._out = (
                opened.enter_context(closing(HostBuffer(device, (batch, *shape))))
                for shape in (spec.input_shape, spec.output_shape)
            )
            self.input, self.output = self._in.array, self._out.array
            self._copies: tuple[DeviceBuffer, ...] = ()
            if options.memory == "copy":
                sizes = (self._in.nbytes, self._out.nbytes)
                self._copies = tuple(opened.enter_context(closing(DeviceBuffer(device, size))) for size in sizes)
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

    def enqueue_from(self, source: int) -> Callable[[], None]:
        """Return a function that enqueues one call on the input at the device address `source`."""
        target = self._copies[1].address if self._copies else self._out.address

        def enqueue() -> None:
            self._execute(source, target)
            if self._copies:
                self._stream.download(self._out, target)
            self._stream.finish()

        return enqueue

    def _enqueue_with_copies(self) -> None:
        source, target = self._copies
        self._stream.upload(source.address, self._in)
        self._execute(source.address, target.address)
        self._stream.download(self._out, target.address)
        self._stream.finish()

    def steps(self) -> tuple[dict[str, Callable[[], object]], str]:
        """Return what a call enqueues, step by step, and in which mode."""
        if not self._copies:
            return {"compute": lambda: check(self.launch())}, "as measured, in mapped memory"
        source, target = self._copies
        return {
            "h2d": lambda: self._stream.upload(source.address, self._in),
            "compute": lambda: self._execute(source.address, target.address),
            "d2h": lambda: self._stream.download(self._out, target.address),
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
        If they differ.
    """
    found = api.tensors(engine)
    wanted = {spec.input_name: spec.input_shape, spec.output_name: spec.output_shape}
    shapes = {name: tensor.shape[1:] for name, tensor in found.items()}
    floats = all(tensor.dtype == "FLOAT" for tensor in found.values())
    if shapes != wanted or not floats or not found[spec.input_name].is_input or found[spec.output_name].is_input:
        raise EngineError(f"The engine has {found}, the model {wanted} in float32.", "Build it again with sjepa-build --rebuild.")


class TensorRTBackend(EngineRunner):
    """The engine of a bundle for this machine.

    Raises
    ------
    EngineError
        If the bundle has no engine that fits this graph, TensorRT, GPU and driver, or its plan was changed.
    BackendError
        If TensorRT or the GPU are not usable.
    """

    name = "tensorrt"
    engine = "cached"

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        self.precision = precision
        bundle.graph(precision)
        api = TensorRT(self.name)
        with contextlib.ExitStack() as opened:
            device = opened.enter_context(closing(Device(options.device)))
            store = EngineStore(bundle=bundle)
            record = store.choose(precision, machine_of(api, device.gpu))
            super().__init__(api, device, store.plan(record), bundle.spec, options)
            opened.pop_all()
        self.build_seconds = record.build_seconds

    def close(self) -> None:
        """Release the engine and everything on the GPU."""
        with closing(self._device):
            super().close()


class TensorRTRTXBackend(TensorRTBackend):
    """The same with TensorRT-RTX."""

    name = "tensorrt-rtx"


def probe() -> None:
    """Raise what keeps TensorRT from running here."""
    TensorRT("tensorrt")
    Device().close()


def probe_rtx() -> None:
    """Raise what keeps TensorRT-RTX from running here."""
    TensorRT("tensorrt-rtx")
    device = Device()
    capability = device.gpu.compute_capability
    device.close()
    if capability not in RTX_CAPABILITIES:
        raise BackendError(f"TensorRT-RTX has no kernels for compute capability {capability}.", "Use the backend tensorrt.")
