"""A GPU made of host memory, and a TensorRT of each version whose engines are ONNX graphs that ONNX Runtime runs.

The fake driver records what is captured and runs the rest at once; like the real one it keeps the current context of each thread,
and most of its calls fail without one. The fake TensorRT has the names that its version has and no
others (test_tensorrt_api.py compares them with the real bindings), so that code for another version fails.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import enum
import functools
import json
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from sjepa_deploy.errors import BackendError

OUT_OF_MEMORY = 2
INVALID_CONTEXT = 201
NOT_READY = 600
LAUNCH_FAILED = 719


Call = TypeVar("Call", bound=Callable[..., Any])


def needs_context(call: Call) -> Call:
    """Let a call of the driver fail in a thread that has no current context."""

    @functools.wraps(call)
    def checked(driver: FakeDriver, *arguments: Any) -> Any:
        return call(driver, *arguments) if driver.has_context() else (INVALID_CONTEXT,)

    return checked  # type: ignore[return-value]


@dataclasses.dataclass
class Captured:
    """What streams do in a graph, and after what."""

    works: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    after: list[set[int]] = dataclasses.field(default_factory=list)

    def before(self, last: set[int]) -> set[int]:
        """Return all that must be done for `last`, with `last`."""
        found: set[int] = set()
        waiting = list(last)
        while waiting:
            if (i := waiting.pop()) not in found:
                found.add(i)
                waiting += self.after[i]
        return found

    def in_an_order(self) -> list[Callable[[], None]]:
        """Return the works in the order that allows the latest ones first: what waits for nothing runs too early."""
        done: list[int] = []
        while len(done) < len(self.works):
            ready = [i for i in range(len(self.works)) if i not in done and self.after[i] <= set(done)]
            done.append(ready[-1])
        return [self.works[i] for i in done]


@dataclasses.dataclass
class Branch:
    """A stream in a capture: the graph, and what its next work comes after."""

    graph: Captured
    last: set[int]

    def add(self, work: Callable[[], None]) -> None:
        self.graph.works.append(work)
        self.graph.after.append(self.last)
        self.last = {len(self.graph.works) - 1}


class FakeDriver:
    """What the runtime uses of `cuda.bindings.driver`."""

    CU_MEMHOSTALLOC_DEVICEMAP = 2
    CU_MEMHOSTALLOC_PORTABLE = 1

    class CUdevice_attribute(enum.IntEnum):
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97

    class CUstream_flags(enum.IntEnum):
        CU_STREAM_NON_BLOCKING = 1

    class CUevent_flags(enum.IntEnum):
        CU_EVENT_DEFAULT = 0
        CU_EVENT_BLOCKING_SYNC = 1
        CU_EVENT_DISABLE_TIMING = 2

    class CUstreamWriteValue_flags(enum.IntEnum):
        CU_STREAM_WRITE_VALUE_DEFAULT = 0

    class CUstreamCaptureMode(enum.IntEnum):
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1

    class CUresult(enum.IntEnum):
        CUDA_SUCCESS = 0
        CUDA_ERROR_OUT_OF_MEMORY = OUT_OF_MEMORY
        CUDA_ERROR_INVALID_CONTEXT = INVALID_CONTEXT
        CUDA_ERROR_NOT_READY = NOT_READY
        CUDA_ERROR_LAUNCH_FAILED = LAUNCH_FAILED

    CUdeviceptr = int

    def __init__(self, *, name: str = "NVIDIA Fake 9000", capability: tuple[int, int] = (9, 0), memory: int = 1 << 32) -> None:
        self.name, self.capability, self.free = name, capability, memory
        self.multiprocessors, self.shared, self.cuda = 4, 227 * 1024, 13000
        self.allocations: dict[int, Any] = {}
        self.n_allocated = self.n_retained = 0
        self.fails_at: int | None = None  # which allocation finds no memory
        self.queues: dict[int, Branch | None] = {}  # of streams: where in a capture they are
        self.branches: dict[int, Branch] = {}  # of events that were recorded in a capture
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.n_launched = 0
        self.recorded: dict[int, float] = {}
        self.busy_polls = 2
        self.lags = False  # whether work is done only when it is asked for or waited for
        self.waiting: list[Callable[[], None]] = []
        self._thread = threading.local()
        self._next = 1000

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        queue = self.queues[int(stream)]
        if queue is not None:
            queue.add(work)
        elif self.lags:
            self.waiting.append(work)
        else:
            work()

    def catch_up(self) -> None:
        """Do what was submitted."""
        while self.waiting:
            self.waiting.pop(0)()

    def cuGetErrorName(self, error: int) -> tuple[int, bytes]:
        return 0, self.CUresult(error).name.encode()

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, 1

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        self.n_retained += 1
        return 0, 7

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[int]:
        self.n_retained -= 1
        return (0,)

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self._thread.context = context
        return (0,)

    def has_context(self) -> bool:
        return getattr(self._thread, "context", None) is not None

    @needs_context
    def cuCtxSynchronize(self) -> tuple[int]:
        return (0,)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, {75: self.capability[0], 76: self.capability[1], 16: self.multiprocessors, 97: self.shared}[int(attribute)]

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.cuda

    def cuDeviceGetName(self, size: int, device: int) -> tuple[int, bytes]:
        return 0, self.name.encode().ljust(size, b"\0")

    def cuDeviceGetPCIBusId(self, size: int, device: int) -> tuple[int, bytes]:
        return 0, b"0000:4B:00.0".ljust(size, b"\0")

    @needs_context
    def cuMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.free, 1 << 32

    def cuDeviceTotalMem(self, device: int) -> tuple[int, int]:
        return 0, 1 << 32

    def _alloc(self, size: int) -> int:
        memory = ctypes.create_string_buffer(size)
        address = ctypes.addressof(memory)
        self.allocations[address] = memory
        self.n_allocated += 1
        return address

    @needs_context
    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        assert flags == 3
        if self.n_allocated == self.fails_at:
            return OUT_OF_MEMORY, 0
        return 0, self._alloc(size)

    @needs_context
    def cuMemHostGetDevicePointer(self, pointer: int, flags: int) -> tuple[int, int]:
        return 0, pointer

    @needs_context
    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        if size > self.free or self.n_allocated == self.fails_at:
            return OUT_OF_MEMORY, 0
        self.free -= size
        return 0, self._alloc(size)

    @needs_context
    def cuMemFree(self, pointer: int) -> tuple[int]:
        self.free += len(self.allocations.pop(int(pointer)))
        return (0,)

    @needs_context
    def cuMemFreeHost(self, pointer: int) -> tuple[int]:
        del self.allocations[int(pointer)]
        return (0,)

    @needs_context
    def cuMemsetD8(self, target: int, value: int, size: int) -> tuple[int]:
        ctypes.memset(target, value, size)
        return (0,)

    @needs_context
    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[int]:
        self.submit(stream, lambda: ctypes.memmove(target, source, size))
        return (0,)

    cuMemcpyDtoHAsync = cuMemcpyHtoDAsync

    @needs_context
    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        handle = self._handle()
        self.queues[handle] = None
        return 0, handle

    @needs_context
    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        del self.queues[stream]
        return (0,)

    @needs_context
    def cuStreamQuery(self, stream: int) -> tuple[int]:
        self.busy_polls = (self.busy_polls + 1) % 3
        if self.busy_polls == 0:
            self.catch_up()
        return (0 if self.busy_polls == 0 else NOT_READY,)

    @needs_context
    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        assert self.queues[stream] is None
        self.catch_up()
        return (0,)

    @needs_context
    def cuStreamWriteValue32(self, stream: int, address: int, value: int, flags: int) -> tuple[int]:
        self.submit(stream, lambda: ctypes.memmove(address, np.uint32(value).tobytes(), 4))
        return (0,)

    @needs_context
    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.queues[stream] = Branch(Captured(), set())
        return (0,)

    @needs_context
    def cuStreamEndCapture(self, stream: int) -> tuple[int, int]:
        queue = self.queues[stream]
        assert queue is not None
        works = queue.graph.works
        joined = queue.graph.before(queue.last)
        assert len(joined) == len(works), "a stream was not joined to the one whose capture ends"
        for other, branch in self.queues.items():
            if branch is not None and branch.graph is queue.graph:
                self.queues[other] = None
        handle = self._handle()
        self.graphs[handle] = queue.graph.in_an_order()
        return 0, handle

    @needs_context
    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        seen, queue = self.branches.get(event), self.queues[int(stream)]
        if seen is None:
            assert queue is None, "a captured stream waits for what is outside"
        elif queue is None:
            self.queues[int(stream)] = Branch(seen.graph, set(seen.last))
        else:
            assert queue.graph is seen.graph
            queue.last |= seen.last
        return (0,)

    @needs_context
    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        handle = self._handle()
        self.graphs[handle] = self.graphs[graph]
        return 0, handle

    def cuGraphDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    cuGraphExecDestroy = cuGraphDestroy

    @needs_context
    def cuGraphUpload(self, graph: int, stream: int) -> tuple[int]:
        return (0,)

    @needs_context
    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        self.n_launched += 1
        for work in self.graphs[graph]:
            self.submit(stream, work)
        return (0,)

    @needs_context
    def cuEventCreate(self, flags: int) -> tuple[int, int]:
        assert flags in (0, 2, 3)
        return 0, self._handle()

    @needs_context
    def cuEventRecord(self, event: int, stream: int) -> tuple[int]:
        queue = self.queues[int(stream)]
        if queue is None:  # what ran before on this stream is done
            self.branches.pop(event, None)
            self.recorded[event] = time.perf_counter()
        else:
            self.branches[event] = Branch(queue.graph, set(queue.last))
        return (0,)

    @needs_context
    def cuEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return 0, (self.recorded[end] - self.recorded[start]) * 1e3

    @needs_context
    def cuEventSynchronize(self, event: int) -> tuple[int]:
        self.catch_up()
        return (0,)

    @needs_context
    def cuEventDestroy(self, event: int) -> tuple[int]:
        self.recorded.pop(event, None)
        self.branches.pop(event, None)
        return (0,)


def in_another_thread(call: Callable[[], Any]) -> None:
    """Call in a new thread, and raise here what it raises."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def check_batch_sizes_share(driver: FakeDriver, call: Callable[[int], object], sizes: Sequence[int], window: int) -> None:
    """Call a backend with batches of `sizes` windows, and fail if its buffers outgrow four times those of the largest.

    `window` is the size of a window and its outputs in all kinds of memory that the backend keeps for a window, in bytes.
    """
    call(sizes[0])
    others = sum(map(len, driver.allocations.values())) - sizes[0] * window
    largest = 0
    for size in sizes:
        call(size)
        largest = max(largest, size)
        held = sum(map(len, driver.allocations.values())) - others
        assert held < 4 * largest * window, f"{held / window:g} windows are kept for batches to {largest}"


def check_nothing_is_left(driver: FakeDriver, open_run_and_close: Callable[[], None]) -> None:
    """Let one allocation after the other find no memory: each is told, and all that was opened before it is given back."""
    driver.n_allocated = 0
    open_run_and_close()
    n_allocations = driver.n_allocated
    assert n_allocations >= 3
    for i in range(n_allocations):
        driver.n_allocated, driver.fails_at = 0, i
        with pytest.raises(BackendError, match="out of memory"):
            open_run_and_close()
        assert driver.n_allocated == i
        left = [driver.allocations, driver.queues, driver.graphs, driver.n_retained]
        assert not any(left), f"after allocation {i}: {left}"
    driver.fails_at = None
    open_run_and_close()


class Faults:
    """What the next engines do wrong."""

    def __init__(self) -> None:
        self.spoil: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] = lambda out: out
        self.refuse_enqueue = False
        self.refuse_capture_above: int | None = None  # batch
        self.layer_type: str | None = None
        self.no_plan: str | None = None
        self.n_builds = 0
        self.steps = 3


def fake_tensorrt(
    version: str, driver: FakeDriver, faults: Faults, *, rtx: bool = False, lean: bool = False
) -> types.SimpleNamespace:
    """Return the module `tensorrt` of `version`, or `tensorrt_rtx`, or `tensorrt_lean`."""
    major = int(version.split(".")[0])
    strong = major >= 10 or rtx

    def names(kind: str, *members: str) -> Any:
        return enum.IntEnum(kind, {name: i for i, name in enumerate(members)})

    network_flags = names("NetworkDefinitionCreationFlag", *(["STRONGLY_TYPED"] if strong else ["EXPLICIT_BATCH"]))
    builder_flags = names(
        "BuilderFlag",
        "TF32",
        "REFIT",
        "VERSION_COMPATIBLE",
        *([] if major >= 11 or rtx else ["FP16", "PREFER_PRECISION_CONSTRAINTS"]),
    )
    severity = names("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

    class ILogger:
        Severity = severity

    class OnnxParser:
        def __init__(self, network: Any, log: Any) -> None:
            self._network, self.num_errors = network, 0

        def parse(self, model: bytes) -> bool:
            try:
                self._network.proto = onnx.load_from_string(model)
            except Exception:  # noqa: BLE001 - TensorRT reports every failure so
                self.num_errors = 1
                return False
            self._network.onnx = model
            return True

        def get_error(self, index: int) -> Any:
            return types.SimpleNamespace(desc=lambda: "not a graph")

    class INetworkDefinition:
        num_layers = 0
        onnx: bytes
        proto: onnx.ModelProto

        def get_input(self, index: int) -> Any:
            value = self.proto.graph.input[index]
            return types.SimpleNamespace(
                name=value.name, shape=[d.dim_value or -1 for d in value.type.tensor_type.shape.dim], dtype="FLOAT"
            )

        def get_layer(self, index: int) -> Any: ...

    class IOptimizationProfile:
        def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
            self.shapes = (tuple(low), tuple(opt), tuple(high))

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return self.content + b"+"

    class IBuilderConfig:
        progress_monitor: Any = None
        profiling_verbosity: Any
        builder_optimization_level: int

        def __init__(self) -> None:
            self._set = {builder_flags.TF32}

        def set_flag(self, flag: Any) -> None:
            self._set.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self._set.discard(flag)

        def get_flag(self, flag: Any) -> bool:
            return flag in self._set

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.workspace = size

        def add_optimization_profile(self, profile: IOptimizationProfile) -> None:
            self.profile = profile

        def create_timing_cache(self, content: bytes) -> ITimingCache:
            return ITimingCache(content)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> None:
            self.cache = cache

        def get_timing_cache(self) -> ITimingCache:
            return self.cache

        if rtx:
            num_compute_capabilities = 0

            def set_compute_capability(self, capability: Any, index: int) -> bool:
                assert self.num_compute_capabilities == 1
                self.target = capability.name
                return index == 0

        def set_tactic_sources(self, sources: int) -> None:
            self.tactic_sources = sources

        def set_preview_feature(self, feature: Any, on: bool) -> None:
            self.shares_profile = on

    if strong:
        del IBuilderConfig.set_tactic_sources, IBuilderConfig.set_preview_feature  # there, but ours is for 8.6

    class Builder:
        def __init__(self, log: Any) -> None:
            self._log = log

        def create_network(self, flags: int) -> INetworkDefinition:
            assert flags == 1
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
            faults.n_builds += 1
            if faults.no_plan:
                self._log.log(severity.ERROR, faults.no_plan)
                return None
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("tactics", None, faults.steps)
                for step in range(faults.steps):
                    if not config.progress_monitor.step_complete("tactics", step):
                        self._log.log(severity.ERROR, "cancelled")
                        return None
                config.progress_monitor.phase_finish("tactics")
            profile = getattr(config, "profile", None) and config.profile.shapes
            set_flags = [flag.name for flag in config._set]
            target = getattr(config, "target", None)
            header = json.dumps({"version": version, "profile": profile, "target": target, "flags": set_flags})
            return f"{header}\n".encode() + network.onnx

    class EngineInspector:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def get_engine_information(self, form: Any) -> str:
            halves = any(t.data_type == onnx.TensorProto.FLOAT16 for t in self._engine._proto.graph.initializer)
            bfloats = any(t.data_type == onnx.TensorProto.BFLOAT16 for t in self._engine._proto.graph.initializer)
            kind = faults.layer_type or ("Half" if halves else "BFloat16" if bfloats else "Float")
            edge = {"Name": "eeg", "Dimensions": [1, 2], "Format/Datatype": "Row major linear FP32"}
            inner = {"Name": "x", "Format/Datatype": kind}
            layer = {"Name": "product", "LayerType": "gemm", "Inputs": [edge], "Outputs": [inner]}
            return json.dumps({"Layers": [layer, layer], "Bindings": ["eeg"]})

    class ICudaEngine:
        num_io_tensors = 2

        def __init__(self, plan: bytes, host_code: bool) -> None:
            header, self._onnx = plan.split(b"\n", 1)
            about = json.loads(header)
            self._profile = about["profile"]
            if about["target"] not in (None, "SM{}{}".format(*driver.capability)):
                raise ValueError(f"the plan is for {about['target']}")
            compatible = "VERSION_COMPATIBLE" in about["flags"]
            built = int(about["version"].split(".")[0])
            if about["version"] != version and not (compatible and (built, major) in ((8, 8), (8, 10), (10, 10), (10, 11))):
                raise ValueError(f"version tag does not match {version}: {about['version']}")
            if compatible and not host_code:
                raise ValueError("engine_host_code_allowed is false")
            assert compatible or not lean, "unexpected call to a stub"
            self._calls = 8 if not rtx and built < 10 else 10  # what both versions have
            self._proto = onnx.load_from_string(self._onnx)
            self._session = ort.InferenceSession(self._onnx, providers=["CPUExecutionProvider"])

        def _tensor(self, name: str) -> Any:
            return next(t for t in (*self._session.get_inputs(), *self._session.get_outputs()) if t.name == name)

        def get_tensor_name(self, index: int) -> str:
            return str((*self._session.get_inputs(), *self._session.get_outputs())[index].name)

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(d if isinstance(d, int) else -1 for d in self._tensor(name).shape)

        def get_tensor_dtype(self, name: str) -> Any:
            return types.SimpleNamespace(name="FLOAT")

        def get_tensor_mode(self, name: str) -> Any:
            return module.TensorIOMode.INPUT if name == "eeg" else module.TensorIOMode.OUTPUT

        def get_tensor_profile_shape(self, name: str, index: int) -> Any:
            return self._profile

        def create_engine_inspector(self) -> EngineInspector:
            assert not lean, "it shows no layers"
            return EngineInspector(self)

        if strong:

            @property
            def device_memory_size_v2(self) -> int:
                return 4096 if self._calls > 8 else 0

            def create_execution_context(self, how: Any) -> Any:
                if self._calls == 8:
                    return None
                strategy = how.strategy if rtx else how
                assert strategy == module.ExecutionContextAllocationStrategy.USER_MANAGED
                return IExecutionContext(self)

            if rtx:

                def create_runtime_config(self) -> Any:
                    return IRuntimeConfig()

        if major < 11 and not rtx:
            device_memory_size = 4096

            def create_execution_context_without_device_memory(self) -> Any:
                return IExecutionContext(self)

    class IRuntimeConfig:
        dynamic_shapes_kernel_specialization_strategy: Any

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self.strategy = strategy

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine, self._addresses, self._memory = engine, {}, 0

        if strong:

            def set_device_memory(self, address: int, size: int) -> None:
                assert size >= 4096
                assert self._engine._calls > 8
                self._memory = address

        if major < 11 and not rtx:

            @property
            def device_memory(self) -> int:
                return self._memory

            @device_memory.setter
            def device_memory(self, address: int) -> None:
                self._memory = address

            def set_optimization_profile_async(self, index: int, stream: int) -> bool:
                self._has_profile = index == 0
                return self._has_profile

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self._shape = shape
            low, _, high = self._engine._profile or ((shape,) * 3)
            return bool(low[0] <= shape[0] <= high[0])

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert driver.has_context(), "the calling thread has no current context"
            assert self._memory, "no memory for activations"
            assert self._engine._calls > 8 or self._has_profile, "8.6 gives the profile to the first context alone"
            largest = faults.refuse_capture_above
            captures = driver.queues[int(stream)] is not None
            if faults.refuse_enqueue or (captures and largest is not None and self._shape[0] > largest):
                return False
            addresses, shape, session = dict(self._addresses), self._shape, self._engine._session

            def work() -> None:
                (out_name,) = (t.name for t in session.get_outputs())
                source = (ctypes.c_char * (4 * int(np.prod(shape)))).from_address(addresses["eeg"])
                out = session.run(None, {"eeg": np.frombuffer(source, np.float32).reshape(shape)})[0]
                out = np.ascontiguousarray(faults.spoil(out), np.float32)
                ctypes.memmove(addresses[out_name], out.ctypes.data, out.nbytes)

            driver.submit(stream, work)
            return True

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
            try:
                return ICudaEngine(plan, self.engine_host_code_allowed)
            except Exception as e:  # noqa: BLE001 - likewise
                self._log.log(severity.ERROR, f"magic tag does not match: {e}")
                return None

    class IProgressMonitor:
        pass

    module = types.SimpleNamespace(
        __version__=version,
        NetworkDefinitionCreationFlag=network_flags,
        BuilderFlag=builder_flags,
        ProfilingVerbosity=names("ProfilingVerbosity", "DETAILED"),
        MemoryPoolType=names("MemoryPoolType", "WORKSPACE"),
        TensorIOMode=names("TensorIOMode", "NONE", "INPUT", "OUTPUT"),
        DataType=names("DataType", "FLOAT", "HALF"),
        LayerInformationFormat=names("LayerInformationFormat", "ONELINE", "JSON"),
        **{c.__name__: c for c in (ILogger, OnnxParser, INetworkDefinition, IOptimizationProfile, ITimingCache, IBuilderConfig)},
        **{c.__name__: c for c in (Builder, EngineInspector, ICudaEngine, IExecutionContext, Runtime)},
    )
    if not strong:
        module.PreviewFeature = names("PreviewFeature", "PROFILE_SHARING_0806")
    else:
        module.IProgressMonitor = IProgressMonitor
        module.ExecutionContextAllocationStrategy = names("ExecutionContextAllocationStrategy", "STATIC", "USER_MANAGED")
    if rtx:
        module.ComputeCapability = names("ComputeCapability", "NONE", "CURRENT", "SM86", "SM89", "SM120")
        module.DynamicShapesKernelSpecializationStrategy = names("DynamicShapesKernelSpecializationStrategy", "LAZY", "EAGER")
        module.IRuntimeConfig = IRuntimeConfig
    if lean:
        for name in ("Builder", "OnnxParser", "INetworkDefinition", "IBuilderConfig", "NetworkDefinitionCreationFlag"):
            delattr(module, name)
    return module
