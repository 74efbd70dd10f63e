"""Gives TensorRT 8.6, 10, 11 and TensorRT-RTX one interface. This file holds every difference between the versions.

=====================  ======================  =======================  ====================  ======================
                       8.6                     10                       11                    RTX 1
=====================  ======================  =======================  ====================  ======================
types                  FP16 flag, constraints  strongly typed           strongly typed        strongly typed
bf16                   no                      yes                      yes                   yes
explicit batch         a flag                  always                   always                always
tactic sources         set to none             default                  default               default
timing cache           yes                     yes                      yes                   no
other machines         no                      no                       no                    yes
progress, time limit   no                      IProgressMonitor         IProgressMonitor      IProgressMonitor
context without        own function,           strategy,                strategy,             runtime config,
its memory             device_memory           set_device_memory        set_device_memory     set_device_memory
profile of a context   shared by a preview,    the first                the first             the first
                       set for each
lean runtime           tensorrt_lean           tensorrt_lean            tensorrt_lean         no
=====================  ======================  =======================  ====================  ======================
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sjepa_deploy.errors import BackendError, EngineError, MissingDependencyError, install_line
from sjepa_deploy.runtime.backends.engines import BuildSettings, numbers_of
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)

MODULES = {"tensorrt": ("tensorrt", "gpu"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
"""Python module and extra of each flavour."""

LEAN_MODULE = "tensorrt_lean"
"""Python module of the lean runtime, which runs version-compatible engines of TensorRT and builds none."""

Step = Callable[[str, float], bool]
"""Takes the phase of a build and the finished share of the phase. Returns whether the build goes on."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """Holds the result of a build.

    Attributes
    ----------
    plan : bytes
        The engine.
    timings : bytes
        The timings of kernels with what this build added; empty where this TensorRT keeps none.
    """

    plan: bytes
    timings: bytes


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Describes one input or output of an engine."""

    shape: tuple[int, ...]
    dtype: str
    is_input: bool


class TensorRT:
    """Builds and runs engines with one installed TensorRT.

    Parameters
    ----------
    flavour : {"tensorrt", "tensorrt-rtx"}
        Kind of TensorRT.
    runs_only : bool
        Whether nothing is built, so that the lean runtime will do where TensorRT is not installed.
    engines_of : str or None
        Version of TensorRT that built the engines, None for this version. A later version runs an engine with the calls that both
        versions have: 10.16 ended the process when it was asked for the `device_memory_size_v2` of an engine of 8.6.
    host_code : bool
        Whether engines may bring a runtime of their own, as version-compatible engines do.
    module : module or None
        Python module to use in place of the installed module.

    Raises
    ------
    MissingDependencyError
        If TensorRT is not installed.
    BackendError
        If TensorRT does not load. The message gives the reason.
    """

    def __init__(
        self,
        flavour: str,
        *,
        runs_only: bool = False,
        engines_of: str | None = None,
        host_code: bool = False,
        module: Any = None,
    ) -> None:
        self.flavour = flavour
        self.module = trt = module or _load(flavour, runs_only)
        self.version = str(trt.__version__)
        self.strongly_typed = hasattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED")
        self._host_code = host_code
        self._calls_of_8 = flavour == "tensorrt" and numbers_of(engines_of or self.version) < (10,)
        self.has_progress = hasattr(trt, "IProgressMonitor")
        self.keeps_timings = flavour == "tensorrt"
        self._log = _log_of(trt)
        self._runtime: Any = None

    @property
    def precisions(self) -> tuple[RunPrecision, ...]:
        """Precisions of the engines that this version can build."""
        return ("fp32", "tf32", "fp16", "bf16") if self.strongly_typed else ("fp32", "tf32", "fp16")

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities of other machines that this version can build for, e.g. "8.6"; empty if it cannot."""
        if self.flavour != "tensorrt-rtx":
            return ()
        numbers = (name.removeprefix("SM") for name in self.module.ComputeCapability.__members__)
        return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(filter(str.isdigit, numbers), key=int))

    # ---- building ----------------------------------------------------------------------------------------------------------

    def flags(self, precision: RunPrecision, settings: BuildSettings) -> tuple[str, ...]:
        """Return the names of the builder's and the network's flags for an engine."""
        flags = ["STRONGLY_TYPED"] if self.strongly_typed else ["EXPLICIT_BATCH"]
        if precision == "tf32":
            flags.append("TF32")
        if not self.strongly_typed and precision == "fp16":
            flags += ["FP16"] if settings.held_types == "none" else ["FP16", "PREFER_PRECISION_CONSTRAINTS"]
        if settings.refittable:
            flags.append("REFIT")
        if settings.version_compatible:
            flags.append("VERSION_COMPATIBLE")
        return tuple(flags)

    def build(
        self,
        onnx: bytes,
        precision: RunPrecision,
        settings: BuildSettings,
        *,
        target: str | None = None,
        timings: bytes = b"",
        step: Step | None = None,
    ) -> Built:
        """Build a plan.

        Parameters
        ----------
        onnx : bytes
            The typed graph.
        precision : {"fp32", "tf32", "fp16", "bf16"}
            Precision of the engine. The graph is of that type.
        settings : BuildSettings
            Profile and options.
        target : str or None
            Compute capability of other machines, one of `targets`. None builds for this machine.
        timings : bytes
            Timings of kernels from earlier builds.
        step : callable or None
            Progress, where this version reports any.

        Raises
        ------
        EngineError
            If this version cannot build the engine. The message ends with TensorRT's own message.
        """
        if precision not in self.precisions:
            raise EngineError(f"TensorRT {self.version} has no {precision}.", f"Use {', '.join(self.precisions)}.")
        builder, network, parser = self.parse(onnx, self.flags(precision, settings)[0])
        config = builder.create_builder_config()
        self.configure(config, network, precision, settings)
        if target is not None:
            config.num_compute_capabilities = 1
            known = config.set_compute_capability(getattr(self.module.ComputeCapability, f"SM{target.replace('.', '')}"), 0)
            assert known, "it is one of `targets`"
        self._set_profile(builder, network, config, settings)
        if step is not None and self.has_progress:
            config.progress_monitor = _monitor(self.module, step)
        cache = None
        if self.keeps_timings:
            cache = config.create_timing_cache(timings) or config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        self._log.errors.clear()
        plan = builder.build_serialized_network(network, config)
        del parser
        if plan is None:
            mend = "Allow more with --workspace." if settings.workspace_mib is not None else "Lower --max-batch."
            if "nvinfer_lean" in self.last_error:
                mend = f"Install TensorRT's lean runtime {self.version}, which a version-compatible engine holds."
            where = "" if target is None else f" for compute capability {target}"
            mend = mend if target is None else f"Leave {target} out of --for, or try another --precision."
            raise EngineError(f"TensorRT {self.version} could not build the {precision} engine{where}: {self.last_error}.", mend)
        timings = b"" if cache is None else bytes(config.get_timing_cache().serialize())
        return Built(plan=bytes(plan), timings=timings)

    def configure(self, config: Any, network: Any, precision: RunPrecision, settings: BuildSettings) -> None:
        """Pass `settings` to the builder."""
        trt, flags = self.module, self.flags(precision, settings)
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
        for flag in flags[1:]:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        assert config.get_flag(trt.BuilderFlag.TF32) == (precision == "tf32")
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the proof of precision reads the layers
        config.builder_optimization_level = settings.optimization_level
        if settings.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
        if not self.strongly_typed:
            config.set_tactic_sources(0)  # 8.6 would call cuBLAS and cuDNN, which decoding boxes lack
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
            if precision == "fp16" and settings.held_types != "none":
                hold_types(trt, network, half=settings.held_types == "all")

    def parse(self, onnx: bytes, typing: str) -> tuple[Any, Any, Any]:
        """Return a builder, the network of a graph, and the parser, which owns the weights until the network is built.

        `typing` is the network's flag.

        Raises
        ------
        EngineError
            If this version does not read the graph.
        """
        trt = self.module
        self._log.errors.clear()
        try:
            builder = trt.Builder(self._log)
        except TypeError as e:  # its bindings say so of a builder that TensorRT could not make
            raise EngineError(f"TensorRT {self.version} makes no builder: {self.last_error}.", "Free device memory.") from e
        network = builder.create_network(1 << int(getattr(trt.NetworkDefinitionCreationFlag, typing)))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse(onnx):
            reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise EngineError(f"TensorRT {self.version} does not read the graph: {reasons}.", "Export with --opset 17.")
        return builder, network, parser

    def _set_profile(self, builder: Any, network: Any, config: Any, settings: BuildSettings) -> None:
        tensor = network.get_input(0)
        batch, *window = tuple(tensor.shape)
        if batch > 0:  # the graph has one batch size only
            return
        profile = builder.create_optimization_profile()
        sizes = (settings.min_batch, settings.opt_batch, settings.max_batch)
        profile.set_shape(tensor.name, *[(size, *window) for size in sizes])
        config.add_optimization_profile(profile)

    # ---- running -----------------------------------------------------------------------------------------------------------

    def deserialize(self, plan: bytes) -> Any:
        """Return the engine of a plan. This call runs native code from the plan: verify the file first.

        Raises
        ------
        EngineError
            If TensorRT refuses it.
        """
        self._log.errors.clear()
        if self._runtime is None:
            self._runtime = self.module.Runtime(self._log)  # it must outlive its engines
            self._runtime.engine_host_code_allowed = self._host_code
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            short = any("memory" in error.lower() for error in self._log.errors)
            mend = "Free device memory." if short else "Build it again with sjepa-build --rebuild."
            raise EngineError(f"TensorRT {self.version} refuses the plan: {self.last_error}.", mend)
        return engine

    def tensors(self, engine: Any) -> dict[str, Tensor]:
        """Return the inputs and outputs of an engine by name."""
        trt = self.module
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        return {
            name: Tensor(
                shape=tuple(engine.get_tensor_shape(name)),
                dtype=engine.get_tensor_dtype(name).name,
                is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            )
            for name in names
        }

    def profile(self, engine: Any, name: str) -> tuple[int, int, int]:
        """Return the smallest, the optimal and the largest batch of an engine for its input `name`."""
        if engine.get_tensor_shape(name)[0] > 0:
            return (int(engine.get_tensor_shape(name)[0]),) * 3
        smallest, optimal, largest = engine.get_tensor_profile_shape(name, 0)
        return int(smallest[0]), int(optimal[0]), int(largest[0])

    def memory_size(self, engine: Any) -> int:
        """Return the bytes of device memory that a context needs for its activations."""
        return int(engine.device_memory_size if self._calls_of_8 else engine.device_memory_size_v2)

    def create_context(self, engine: Any, address: int, size: int, stream: int) -> Any:
        """Return an execution context for `stream` that uses our device memory for its activations.

        Raises
        ------
        EngineError
            If TensorRT cannot make one.
        """
        trt = self.module
        self._log.errors.clear()
        if self._calls_of_8:
            context = engine.create_execution_context_without_device_memory()
        elif hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            # The default swaps kernels in the middle of a run.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"TensorRT {self.version} makes no execution context: {self.last_error}.", "Free device memory.")
        if self._calls_of_8:
            context.device_memory = address
        else:
            context.set_device_memory(address, size)
        if self._calls_of_8 and not context.set_optimization_profile_async(0, stream):  # 8.6 does so in the first alone
            raise EngineError(
                f"TensorRT {self.version} refuses the profile: {self.last_error}.", "Build it again with sjepa-build --rebuild."
            )
        return context

    def inspect(self, engine: Any) -> str:
        """Return the engine inspector's description of every layer, as JSON."""
        text: str = engine.create_engine_inspector().get_engine_information(self.module.LayerInformationFormat.JSON)
        return text

    @property
    def last_error(self) -> str:
        """Last error message of TensorRT."""
        return str(self._log.errors[-1]) if self._log.errors else "no reason given"


def _load(flavour: str, runs_only: bool) -> Any:
    name, extra = MODULES[flavour]
    if runs_only and flavour == "tensorrt" and not importlib.util.find_spec(name) and importlib.util.find_spec(LEAN_MODULE):
        name = LEAN_MODULE
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name == name:
            raise MissingDependencyError(name, extra) from e
        raise BackendError(
            f"{name} does not load: {e}.", f"Install it again: {install_line(extra)} (the extra [{extra}])."
        ) from e
    except (ImportError, OSError, RuntimeError) as e:
        raise BackendError(
            f"{name} is installed and does not load: {str(e).splitlines()[0]}.", "Install the library that it names."
        ) from e


_LOGS: dict[int, Any] = {}


def _log_of(trt: Any) -> Any:
    """Return the logger of a TensorRT module. TensorRT wants one logger for the whole process."""
    if id(trt) not in _LOGS:

        class Log(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= int(trt.ILogger.Severity.ERROR):
                    self.errors.append(" ".join(message.split()))
                    del self.errors[:-8]
                level = logging.INFO if int(severity) <= int(trt.ILogger.Severity.WARNING) else logging.DEBUG
                logger.log(level, "%s", message)

        _LOGS[id(trt)] = Log()
    return _LOGS[id(trt)]


def _monitor(trt: Any, step: Step) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step_number: int) -> bool:
            return step(phase_name, (step_number + 1) / max(1, self._steps.get(phase_name, 1)))

    return Monitor()


UNTYPED_LAYERS = frozenset({"CONSTANT", "SHAPE", "SHUFFLE", "CAST", "IDENTITY", "SLICE", "CONCATENATION", "GATHER", "SELECT"})
"""Layers that move values and compute nothing."""


def graph_types(trt: Any, network: Any) -> list[Any]:
    """Return the type that the graph gives to the outputs of each layer.

    A weakly typed network does not tell these types: every tensor that no cast or constant made is float32 by default. So a
    layer has the type of its first input. The parser of 8.6 writes a cast as an identity whose output type is set.
    """
    types = {network.get_input(0).name: network.get_input(0).dtype}
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == "CAST":
            layer.__class__ = trt.ICastLayer
            dtype = layer.to_type
        elif layer.type.name == "IDENTITY" and layer.output_type_is_set(0):
            dtype = layer.get_output_type(0)
        elif layer.num_inputs == 0 or layer.type.name == "SHAPE":
            dtype = layer.get_output(0).dtype
        else:
            dtype = types[layer.get_input(0).name]
        types |= dict.fromkeys((layer.get_output(k).name for k in range(layer.num_outputs)), dtype)
        found.append(dtype)
    return found


def hold_types(trt: Any, network: Any, *, half: bool) -> None:
    """Ask layers of a weakly typed network for the type that the graph gives their outputs: float32 ones, and `half` ones."""
    held = (trt.DataType.FLOAT, trt.DataType.HALF) if half else (trt.DataType.FLOAT,)
    for i, dtype in enumerate(graph_types(trt, network)):
        layer = network.get_layer(i)
        if layer.type.name in UNTYPED_LAYERS or dtype not in held:
            continue
        layer.precision = dtype
        for k in range(layer.num_outputs):
            layer.set_output_type(k, dtype)
