"""Runs the ONNX graphs of bundles with ONNX Runtime, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.backend import Backend, BackendOptions, FloatArray, Turn
from sjepa_deploy.runtime.gpu.backend import GpuBackend, LaneBuffers, SharedBuffers
from sjepa_deploy.runtime.gpu.cuda import Device, Stream
from sjepa_deploy.runtime.gpu.timing import Step
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Most CUDA graphs of a session: ONNX Runtime never frees a graph. Further batches and addresses run without a graph."""

ALLOCATION_FAILED = re.compile("allocation failed|ALLOC_FAILED|out of memory|bad_alloc|allocate memory", re.IGNORECASE)
"""Matches the messages of CUDA, cuBLAS, cuDNN and ONNX Runtime that say that memory is short."""


def _skip_destructors() -> None:
    """End a forked child without C++ destructors: ONNX Runtime's destructors wait for threads that no child has."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # of glibc; Python's own clean-up is done by then
        libc.on_exit(libc._exit, None)


os.register_at_fork(after_in_child=_skip_destructors)


def open_session(
    bundle: Bundle,
    precision: RunPrecision,
    settings: Any,
    provider: str,
    options: dict[str, str],
    edit: Callable[[bytes], bytes] = lambda onnx: onnx,
) -> Any:
    """Open the graph of `precision` on one provider, and refuse a graph that ONNX Runtime would silently run elsewhere.

    `edit` may change the graph's file before it is opened.

    Raises
    ------
    BackendError
        If the provider does not load, or does not take all nodes.
    """
    graph = bundle.graph(precision)
    try:
        content = edit(bundle.graph_path(precision).read_bytes())  # ONNX Runtime opens no path that is not UTF-8
        session = ort.InferenceSession(content, settings, providers=[(provider, options)])
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
    return session


class OrtCpuBackend(Backend):
    """Runs the graph with ONNX Runtime on the CPU.

    Input and output buffers are made once for the largest batch so far, and bound to the session. A call of a known batch size
    allocates nothing. Only one thread may call at a time.

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
        # Threads that spin between calls save 1.6 ms of 7.1 at 10 windows a second on 16 idle cores, and take 7.8 of the cores;
        # on busy cores they are slower (benchmarks/results/spinning_*).
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.log_severity_level = 3  # fp16 on a CPU casts node by node; that is known and no news to a user
        self._spec = spec
        self._session = open_session(bundle, precision, settings, "CPUExecutionProvider", {}, self._edited)
        self._bound: dict[int, tuple[Any, FloatArray, FloatArray]] = {}  # by batch size: parts of the two arrays below
        self._inputs: FloatArray = np.zeros((1, *spec.input_shape), np.float32)
        self._outputs: FloatArray = np.zeros((1, *spec.output_shape), np.float32)
        self._turn = Turn(keeps=self._session._sess)

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times). The result is overwritten by the next call."""
        self._turn.begin()
        try:
            binding, inputs, outputs = self._bound.get(len(eeg)) or self._bind(len(eeg))
            np.copyto(inputs, eeg)
            self._session.run_with_iobinding(binding)
            return outputs
        except Exception as e:  # ONNX Runtime raises its own kinds, which share no base
            if isinstance(e, MemoryError) or ALLOCATION_FAILED.search(str(e)):
                raise BackendError(
                    f"There is too little memory for a batch of {len(eeg)} windows.", "Use smaller batches."
                ) from e
            raise
        finally:
            self._turn.end()

    def _bind(self, batch: int) -> tuple[Any, FloatArray, FloatArray]:
        if batch > len(self._inputs):
            self._bound.clear()
            self._inputs, self._outputs = (
                np.zeros((batch, *shape), np.float32) for shape in (self._spec.input_shape, self._spec.output_shape)
            )
        inputs, outputs = self._inputs[:batch], self._outputs[:batch]
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._spec.input_name, ort.OrtValue.ortvalue_from_numpy(inputs))
        binding.bind_output(self._spec.output_name, "cpu", 0, np.float32, outputs.shape, outputs.ctypes.data)
        self._bound[batch] = (binding, inputs, outputs)
        return self._bound[batch]

    def _edited(self, onnx: bytes) -> bytes:
        """Return the graph that is run."""
        return onnx

    def close(self) -> None:
        """Release the session and its buffers."""
        if not self._turn.closed:
            self._turn.close()
            self._bound.clear()
            del self._session


class OrtCudaBackend(GpuBackend["_Lane"]):
    """Runs every node of the graph with ONNX Runtime on an NVIDIA GPU.

    With `BackendOptions.cuda_graph` a call replays ONNX Runtime's graph. ONNX Runtime waits in its own way:
    `BackendOptions.wait` has no effect.

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
        max_batch = bundle.graph(precision).max_batch
        self.precision = precision
        self._spec, self._options = bundle.spec, options
        self._probe()
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        with contextlib.ExitStack() as opened:
            device = opened.enter_context(closing(Device(options.device)))
            stream = opened.enter_context(closing(Stream(device)))
            provider_options = {
                "device_id": str(options.device),
                "user_compute_stream": str(stream.handle),
                **self._provider_options(bundle),
            }
            self._session = open_session(bundle, precision, settings, self.provider, provider_options)
            buffers = SharedBuffers(device, bundle.spec, max_batch, copies=options.memory == "copy")
            super().__init__(device, stream, buffers, bundle.spec, opened.pop_all(), keeps=self._session._sess)
        self._from_gpu: dict[tuple[int, int], tuple[Any, Any]] = {}  # by batch and address
        self._n_graphs = 0

    def _probe(self) -> None:
        probe_cuda()

    def _provider_options(self, bundle: Bundle) -> dict[str, str]:
        return {
            "use_tf32": str(int(self.precision == "tf32")),  # on by default
            "enable_cuda_graph": str(int(self._options.cuda_graph)),
        }

    def _open(self, batch: int) -> _Lane:
        with self._buffers.opening(batch) as buffers:
            lane = _Lane(self, batch, buffers)
            try:
                for _ in range(3):  # ONNX Runtime runs once, then captures, then replays
                    lane.run()
            except Exception as e:  # ONNX Runtime raises its own kinds, which share no base
                lane.close()
                raise BackendError(
                    f"ONNX Runtime {ort.__version__} cannot run {batch} windows on {self.provider}: {str(e).splitlines()[0]}",
                    "Free device memory, or use smaller batches.",
                ) from e
            return lane

    def _io_binding(self, batch: int, source: int, target: int) -> Any:
        spec, device = self._spec, self._options.device
        binding = self._session.io_binding()
        binding.bind_input(spec.input_name, self.memory_kind, device, np.float32, (batch, *spec.input_shape), source)
        binding.bind_output(spec.output_name, self.memory_kind, device, np.float32, (batch, *spec.output_shape), target)
        return binding

    def _run_options(self) -> Any:
        """Return run options with a CUDA graph of their own, or without a graph if the session holds too many."""
        options = ort.RunOptions()
        if self._options.cuda_graph:
            self._n_graphs += 1
            options.add_run_config_entry("gpu_graph_id", str(self._n_graphs if self._n_graphs <= MAX_GRAPHS else -1))
        return options

    def _release(self) -> None:
        self._from_gpu.clear()
        del self._session


class _Lane:
    """Holds the session's binding to the buffers of one batch size."""

    def __init__(self, backend: OrtCudaBackend, batch: int, buffers: LaneBuffers) -> None:
        self._backend, self._batch, self._stream = backend, batch, backend._stream
        self._in, self._out = buffers.input, buffers.output
        self.input, self.output = self._in.array, self._out.array
        self._copies = buffers.copies is not None
        self._source, self._target = buffers.copies or (self._in.address, self._out.address)
        self._binding = backend._io_binding(batch, self._source, self._target)
        self._options = backend._run_options()

    def run(self) -> None:
        """Run on what is in `input`."""
        if self._copies:
            self._upload()
        self._compute()
        if self._copies:
            self._download()
        self._stream.synchronize()

    def run_from(self, address: int) -> None:
        """Run on windows in device memory."""
        backend, key = self._backend, (self._batch, address)
        known = backend._from_gpu.get(key)
        if known is None:
            known = (backend._io_binding(self._batch, address, self._target), backend._run_options())
            if len(backend._from_gpu) < MAX_GRAPHS:
                backend._from_gpu[key] = known
        backend._session.run_with_iobinding(*known)
        if self._copies:
            self._download()
        self._stream.synchronize()

    def steps(self) -> tuple[dict[str, Step], str]:
        """Return the steps that a call enqueues, and their mode."""
        if not self._copies:
            return {"compute": self._compute}, "as measured, in mapped memory"
        return {"h2d": self._upload, "compute": self._compute, "d2h": self._download}, "as measured, with copies"

    def _upload(self) -> None:
        self._stream.upload(self._source, self._in)

    def _compute(self) -> None:
        self._backend._session.run_with_iobinding(self._binding, self._options)

    def _download(self) -> None:
        self._stream.download(self._out, self._target)

    def close(self) -> None:
        """Release the binding."""
        del self._binding


class OrtTensorRTBackend(OrtCudaBackend):
    """Runs the graph with TensorRT inside ONNX Runtime.

    Opening the backend builds the engine, which may use TensorFloat-32 in float32.
    """

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
    """Raise an error if ONNX Runtime cannot use the GPU here."""
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
    """Raise an error if ONNX Runtime cannot use TensorRT here."""
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
