"""ONNX Runtime, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import re
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from sjepa_deploy.bundle import ONNX_CONTRACT_KEY, Bundle, graph_contract
from sjepa_deploy.errors import BackendError, BundleError
from sjepa_deploy.runtime.backend import Backend, BackendOptions, FloatArray, Split, two_threads
from sjepa_deploy.runtime.gpu.backend import Turn
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, HostBuffer, Stream, address_on_gpu
from sjepa_deploy.runtime.gpu.timing import split_calls
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""CUDA graphs that a session may hold: ONNX Runtime never frees one. Batches and addresses beyond it run without."""

ALLOCATION_FAILED = re.compile("allocation failed|ALLOC_FAILED|out of memory|bad_alloc|allocate memory", re.IGNORECASE)
"""How CUDA, cuBLAS, cuDNN and ONNX Runtime say that memory is short."""


def open_session(bundle: Bundle, precision: RunPrecision, settings: Any, provider: str, options: dict[str, str]) -> Any:
    """Open the graph of `precision` on one provider, and refuse what ONNX Runtime would silently run elsewhere.

    Raises
    ------
    BackendError
        If the provider does not load, or takes not all nodes.
    BundleError
        If the ONNX file carries another contract than the manifest.
    """
    graph = bundle.graph(precision)
    try:
        session = ort.InferenceSession(str(bundle.graph_path(precision)), settings, providers=[(provider, options)])
    except Exception as e:
        reason = str(e).splitlines()[0]
        if ALLOCATION_FAILED.search(reason):
            raise BackendError(
                f"There is too little memory for ONNX Runtime {ort.__version__} to load {graph.file} on {provider}: {reason}",
                "Free memory, on a GPU that of other programs.",
            ) from e
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load {graph.file} on {provider}: {reason}",
            "See sjepa-doctor for what is missing, or export with another --opset.",
        ) from e
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"ONNX Runtime did not load {provider}, and would have used {session.get_providers()[0]}.",
            "See sjepa-doctor for what is missing.",
        )
    contract = graph_contract(bundle.spec, precision=graph.precision, max_batch=graph.max_batch, static_batch=graph.static_batch)
    check_contract(session.get_modelmeta().custom_metadata_map, contract, graph.file)
    return session


class OrtCpuBackend(Backend):
    """ONNX Runtime on the CPU.

    Input and output buffers are made once for each batch size and bound, so that a call allocates nothing. One thread at a time.

    Raises
    ------
    BackendError
        If ONNX Runtime has no kernels for the precision, or places a node elsewhere.
    BundleError
        If the ONNX file carries another contract than the manifest.
    """

    name = "ort-cpu"

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        if precision in ("bf16", "tf32"):
            raise BackendError(
                f"ONNX Runtime has no {precision} kernels on the CPU.", "Use --precision fp32 or fp16, or a GPU backend."
            )
        self.precision = precision
        spec = bundle.spec
        n_threads = options.n_threads
        if n_threads is None:
            n_threads = 0 if spec.needs_positions else 1
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = n_threads
        settings.log_severity_level = 3  # fp16 on a CPU casts node by node; that is known and no news to a user
        self._session = open_session(bundle, precision, settings, "CPUExecutionProvider", {})
        self._spec = spec
        self._bound: dict[int, tuple[Any, FloatArray, FloatArray]] = {}
        self._busy = threading.Lock()

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The result is overwritten by the next call."""
        if not self._busy.acquire(blocking=False):
            raise two_threads()
        try:
            binding, inputs, outputs = self._bound.get(len(eeg)) or self._bind(len(eeg))
            np.copyto(inputs, eeg)
            self._session.run_with_iobinding(binding)
            return outputs
        finally:
            self._busy.release()

    def _bind(self, batch: int) -> tuple[Any, FloatArray, FloatArray]:
        inputs = np.zeros((batch, *self._spec.input_shape), np.float32)
        outputs = np.zeros((batch, *self._spec.output_shape), np.float32)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._spec.input_name, ort.OrtValue.ortvalue_from_numpy(inputs))
        binding.bind_output(self._spec.output_name, "cpu", 0, np.float32, outputs.shape, outputs.ctypes.data)
        self._bound[batch] = (binding, inputs, outputs)
        return self._bound[batch]

    def close(self) -> None:
        """Release the session and its buffers."""
        self._bound.clear()
        del self._session


class OrtCudaBackend(Backend):
    """ONNX Runtime on an NVIDIA GPU, every node of the graph on it.

    Buffers are made once for each batch size and bound; with `BackendOptions.cuda_graph` a call replays ONNX Runtime's graph.
    ONNX Runtime waits in its own way: `BackendOptions.wait` has no effect. One thread at a time.

    Raises
    ------
    BackendError
        If the provider does not load, or a node would run on the CPU.
    BundleError
        If the ONNX file carries another contract than the manifest.
    """

    name = "ort-cuda"
    provider = "CUDAExecutionProvider"
    memory_kind = "cuda"

    def __init__(self, bundle: Bundle, precision: RunPrecision, options: BackendOptions) -> None:
        bundle.graph(precision)
        self.precision = precision
        self._spec, self._options = bundle.spec, options
        self._probe()
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        with contextlib.ExitStack() as opened:
            self._device = opened.enter_context(closing(Device(options.device)))
            self._stream = opened.enter_context(closing(Stream(self._device)))
            provider_options = {
                "device_id": str(options.device),
                "user_compute_stream": str(self._stream.handle),
                **self._provider_options(bundle),
            }
            self._session = open_session(bundle, precision, settings, self.provider, provider_options)
            self._closing = opened.pop_all()
        self._bound: dict[int, _Binding] = {}
        self._bound_on_gpu: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._n_graphs = 0
        self._turn = Turn(self._device)

    def _probe(self) -> None:
        probe_cuda()

    def _provider_options(self, bundle: Bundle) -> dict[str, str]:
        return {
            "use_tf32": str(int(self.precision == "tf32")),  # on by default
            "enable_cuda_graph": str(int(self._options.cuda_graph)),
        }

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The result is overwritten by the next call.

        If `eeg` is `input_buffer(batch)` itself, nothing is copied.
        """
        self._turn.begin()
        try:
            bound = self._bound.get(len(eeg)) or self._bind(len(eeg))
            if eeg is not bound.input.array:
                np.copyto(bound.input.array, eeg)
            self._run(bound)
            return bound.output.array
        finally:
            self._turn.end()

    def run_on_gpu(self, eeg: Any) -> FloatArray:
        """Run the model on an array on the GPU (DLPack, CUDA array interface) without copying it."""
        self._turn.begin()
        try:
            batch, address = address_on_gpu(eeg, self._stream, self._spec.input_shape)
            bound = self._bound.get(batch) or self._bind(batch)
            known = self._bound_on_gpu.get((batch, address))
            if known is None:
                known = (self._io_binding(batch, address, bound.target), self._run_options())
                if len(self._bound_on_gpu) < MAX_GRAPHS:
                    self._bound_on_gpu[batch, address] = known
            self._session.run_with_iobinding(*known)
            self._download(bound)
            self._stream.synchronize()
            return bound.output.array
        finally:
            self._turn.end()

    def input_buffer(self, batch: int) -> FloatArray:
        """Return the pinned buffer that `run` reads, shape (batch, n_chans, n_times): fill it in place and pass it to `run`."""
        self._turn.begin()
        try:
            return (self._bound.get(batch) or self._bind(batch)).input.array
        finally:
            self._turn.end()

    def warmup(self, batches: tuple[int, ...] = (1,), n_runs: int = 10) -> None:
        """Make buffers and graph for each of `batches`, and run them so that the GPU's clock rises."""
        for batch in batches:
            buffer = self.input_buffer(batch)
            for _ in range(n_runs):
                self.run(buffer)

    def split(self, eeg: FloatArray, n: int) -> Split:
        """Return where the time of `n` calls on `eeg` goes."""
        self._turn.begin()
        try:
            bound = self._bound.get(len(eeg)) or self._bind(len(eeg))
            steps: dict[str, Callable[[], object]] = {
                "compute": lambda: self._session.run_with_iobinding(bound.binding, bound.options)
            }
            how = "as measured, in mapped memory"
            if bound.device_buffers:
                steps = {
                    "h2d": lambda: self._stream.upload(bound.source, bound.input),
                    **steps,
                    "d2h": lambda: self._download(bound),
                }
                how = "as measured, with copies"
            return split_calls(self._device, self._stream, lambda: np.copyto(bound.input.array, eeg), steps, n, how)
        finally:
            self._turn.end()

    def _run(self, bound: _Binding) -> None:
        if bound.device_buffers:
            self._stream.upload(bound.source, bound.input)
        self._session.run_with_iobinding(bound.binding, bound.options)
        self._download(bound)
        self._stream.synchronize()

    def _download(self, bound: _Binding) -> None:
        if bound.device_buffers:
            self._stream.download(bound.output, bound.target)

    def _bind(self, batch: int) -> _Binding:
        bound = _Binding(self, self._device, batch)
        try:
            for _ in range(3):  # ONNX Runtime runs once, then captures, then replays
                self._run(bound)
        except Exception as e:  # ONNX Runtime raises its own kinds, which share no base
            bound.close()
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot run {batch} windows on {self.provider}: {str(e).splitlines()[0]}",
                "Free device memory, or use smaller batches.",
            ) from e
        self._bound[batch] = bound
        return bound

    def _io_binding(self, batch: int, source: int, target: int) -> Any:
        spec, device = self._spec, self._options.device
        binding = self._session.io_binding()
        binding.bind_input(spec.input_name, self.memory_kind, device, np.float32, (batch, *spec.input_shape), source)
        binding.bind_output(spec.output_name, self.memory_kind, device, np.float32, (batch, *spec.output_shape), target)
        return binding

    def _run_options(self) -> Any:
        """Return run options with a graph of their own, or with none when there are too many."""
        options = ort.RunOptions()
        if self._options.cuda_graph:
            self._n_graphs += 1
            options.add_run_config_entry("gpu_graph_id", str(self._n_graphs if self._n_graphs <= MAX_GRAPHS else -1))
        return options

    def close(self) -> None:
        """Release the session and its buffers."""
        self._device.make_current()
        self._stream.synchronize()
        self._bound_on_gpu.clear()
        del self._session
        for bound in self._bound.values():
            bound.close()
        self._bound.clear()
        self._closing.close()


class _Binding:
    """Buffers of one batch size, bound."""

    def __init__(self, backend: OrtCudaBackend, device: Device, batch: int) -> None:
        spec = backend._spec
        with contextlib.ExitStack() as opened:
            shapes = ((batch, *spec.input_shape), (batch, *spec.output_shape))
            self.input, self.output = (opened.enter_context(closing(HostBuffer(device, shape))) for shape in shapes)
            self.device_buffers: tuple[DeviceBuffer, ...] = ()
            self.source, self.target = self.input.address, self.output.address
            if backend._options.memory == "copy":
                sizes = (self.input.nbytes, self.output.nbytes)
                self.device_buffers = tuple(opened.enter_context(closing(DeviceBuffer(device, size))) for size in sizes)
                self.source, self.target = (buffer.address for buffer in self.device_buffers)
            self.binding = backend._io_binding(batch, self.source, self.target)
            self.options = backend._run_options()
            self._closing = opened.pop_all()

    def close(self) -> None:
        del self.binding
        self._closing.close()


class OrtTensorRTBackend(OrtCudaBackend):
    """TensorRT inside ONNX Runtime. It builds its engine when it is opened, and allows TensorFloat-32 in float32."""

    name = "ort-tensorrt"
    engine = "built"
    provider = "TensorrtExecutionProvider"

    def _probe(self) -> None:
        probe_tensorrt()

    def _provider_options(self, bundle: Bundle) -> dict[str, str]:
        if self.precision == "fp32":
            raise BackendError("ONNX Runtime cannot switch TensorFloat-32 off in TensorRT.", "Use tf32, or backend tensorrt.")
        graph, name = bundle.graph(self.precision), self._spec.input_name
        window = "x".join(map(str, self._spec.input_shape))
        low = graph.static_batch or 1
        profile = {"min": low, "opt": low, "max": graph.max_batch}
        return {
            "trt_cuda_graph_enable": str(int(self._options.cuda_graph)),
            "trt_fp16_enable": str(int(self.precision == "fp16")),
            "trt_bf16_enable": str(int(self.precision == "bf16")),
            **{f"trt_profile_{which}_shapes": f"{name}:{batch}x{window}" for which, batch in profile.items()},
        }


def probe_cuda() -> None:
    """Raise what keeps ONNX Runtime from the GPU here."""
    _probe_provider("CUDAExecutionProvider")
    if getattr(ort, "preload_dlls", None) is not None:
        said = io.StringIO()  # it prints what it does not find
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
        logger.debug("%s", said.getvalue())
    major = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    for library in (f"libcudart.so.{major}", f"libcublasLt.so.{major}", "libcudnn.so.9") if major else ():
        _probe_library(library, "Install the libraries with: pip install 'onnxruntime-gpu[cuda,cudnn]'.")


def probe_tensorrt() -> None:
    """Raise what keeps ONNX Runtime from TensorRT here."""
    _probe_provider("TensorrtExecutionProvider")
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    linked = sorted(
        {word for word in (b"libnvinfer.so.8", b"libnvinfer.so.10", b"libnvinfer.so.11") if word in provider.read_bytes()}
    )
    for library in linked:
        _probe_library(library.decode(), "Install that TensorRT, or use the backend tensorrt.")


def _probe_provider(provider: str) -> None:
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"This onnxruntime {ort.__version__} was built without {provider}.",
            "Replace it: pip uninstall onnxruntime, then pip install onnxruntime-gpu.",
        )
    Device().close()


def _probe_library(name: str, mend: str) -> None:
    try:
        ctypes.CDLL(name)
    except OSError as e:
        raise BackendError(f"ONNX Runtime needs {name}, which does not load here ({e}).", mend) from e


def check_contract(metadata: dict[str, str], contract: str, file: str) -> None:
    """Compare the contract in an ONNX file's metadata with the manifest's.

    Raises
    ------
    BundleError
        If they differ. The message names the first field.
    """
    stored = metadata.get(ONNX_CONTRACT_KEY, "")
    if stored == contract:
        return
    differs = "it has none"
    if stored:
        ours, theirs = json.loads(contract), json.loads(stored)
        ours, theirs = ours | ours.pop("spec"), theirs | theirs.pop("spec", {})
        differs = "it differs in " + ", ".join(sorted(k for k in ours if ours[k] != theirs.get(k)))
    raise BundleError(f"The contract inside {file} is not the manifest's: {differs}.", "Copy or export the bundle again.")
