"""ONNX Runtime's GPU backends: refusals here, and everything but the provider on a fake GPU whose memory is the host's."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import onnxruntime as ort
import pytest
from engine_bundles import small_bundle
from fake_gpu import FakeDriver, check_batch_sizes_share, check_nothing_is_left, in_another_thread

from sjepa_deploy.errors import BackendError
from sjepa_deploy.runtime.backend import BackendOptions, open_backend
from sjepa_deploy.runtime.backends import ort as ort_module
from sjepa_deploy.runtime.gpu import backend as gpu_backend
from sjepa_deploy.runtime.gpu import cuda


@pytest.fixture
def opened(monkeypatch):
    """Give the session's provider options, with the CPU provider in the place of CUDA's."""
    seen = {}
    real = ort_module.open_session

    def open_session(bundle, precision, settings, provider, options, *edit):
        if provider == "CPUExecutionProvider":
            return real(bundle, precision, settings, provider, options, *edit)
        seen.update(options, provider=provider, fallback=settings.get_session_config_entry("session.disable_cpu_ep_fallback"))
        return real(bundle, precision, ort.SessionOptions(), "CPUExecutionProvider", {}, *edit)

    driver = FakeDriver()
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(ort_module, "open_session", open_session)
    monkeypatch.setattr(ort_module, "probe_cuda", lambda: None)
    monkeypatch.setattr(ort_module, "probe_tensorrt", lambda: None)
    monkeypatch.setattr(ort_module.OrtCudaBackend, "memory_kind", "cpu")
    seen["driver"] = driver
    return seen


@pytest.mark.parametrize("memory", ["mapped", "copy"])
def test_bound_buffers_decode_and_nothing_is_allocated_per_call(opened, memory):
    bundle = small_bundle("prelocal")
    windows = bundle.reference().inputs
    backend = open_backend(bundle, "ort-cuda", "fp32", BackendOptions(memory=memory))
    on_cpu = open_backend(bundle, "ort-cpu", "fp32")
    backend.warmup((1, 3))
    allocated = opened["driver"].n_allocated
    for n in (1, 3, 1):
        np.testing.assert_array_equal(backend.run(windows[:n]), on_cpu.run(windows[:n]))
        buffer = backend.input_buffer(n)
        buffer[...] = windows[3 : 3 + n]
        np.testing.assert_array_equal(backend.run(buffer), on_cpu.run(windows[3 : 3 + n]))
    assert opened["driver"].n_allocated == allocated
    backend.close()
    assert not opened["driver"].allocations


@pytest.mark.parametrize("memory", ["mapped", "copy"])
def test_batch_sizes_share_their_buffers(opened, memory):
    bundle = small_bundle("prelocal")
    windows = bundle.reference().inputs[:8]
    backend = open_backend(bundle, "ort-cuda", "fp32", BackendOptions(memory=memory))
    on_cpu = open_backend(bundle, "ort-cpu", "fp32")

    def call(size):
        np.testing.assert_array_equal(backend.run(windows[:size]), on_cpu.run(windows[:size]))

    window = (windows[:1].nbytes + on_cpu.run(windows[:1]).nbytes) * (2 if memory == "copy" else 1)
    check_batch_sizes_share(opened["driver"], call, [3, *range(1, 9), 5, 2, 8], window)
    backend.close()
    assert not opened["driver"].allocations


@pytest.mark.parametrize("memory", ["mapped", "copy"])
def test_calls_are_split_with_events(opened, memory):
    bundle = small_bundle("prelocal")
    windows = bundle.reference().inputs[:2]
    backend = open_backend(bundle, "ort-cuda", "fp32", BackendOptions(memory=memory))
    split = backend.split(windows, 20)
    assert (split.h2d_us is None, split.d2h_us is None) == ((memory == "mapped"),) * 2
    assert 0 < split.compute_us < split.enqueue_us
    np.testing.assert_array_equal(backend.run(windows), open_backend(bundle, "ort-cpu", "fp32").run(windows))
    backend.close()


def test_arrays_on_the_gpu_are_bound_where_they_are(opened, monkeypatch):
    monkeypatch.setattr(gpu_backend, "address_on_gpu", lambda array, stream, window: (len(array), array.ctypes.data))
    bundle = small_bundle("prelocal")
    backend, on_cpu = open_backend(bundle, "ort-cuda", "fp32"), open_backend(bundle, "ort-cpu", "fp32")
    windows = bundle.reference().inputs[:2].copy()
    for _ in range(3):
        np.testing.assert_array_equal(backend.run_on_gpu(windows), on_cpu.run(windows))
        windows += 1
    backend.close()


@pytest.mark.parametrize("first", ["run", "run_on_gpu", "input_buffer", "warmup", "split"])
def test_a_thread_that_did_not_open_the_backend_may_call_it(opened, monkeypatch, first):
    monkeypatch.setattr(gpu_backend, "address_on_gpu", lambda array, stream, window: (len(array), array.ctypes.data))
    bundle = small_bundle("prelocal")
    windows = bundle.reference().inputs[:1].copy()
    backend = open_backend(bundle, "ort-cuda", "fp32")
    call = {"input_buffer": lambda: backend.input_buffer(1), "split": lambda: backend.split(windows, 1), "warmup": backend.warmup}
    call |= {name: functools.partial(getattr(backend, name), windows) for name in ("run", "run_on_gpu")}
    for _ in range(3):  # a later thread mostly gets the identifier of the one before
        in_another_thread(call[first])
    np.testing.assert_array_equal(backend.run(windows), open_backend(bundle, "ort-cpu", "fp32").run(windows))
    backend.close()


@pytest.mark.parametrize("memory", ["mapped", "copy"])
def test_out_of_memory_at_any_moment_keeps_nothing(opened, memory):
    bundle = small_bundle("prelocal")

    def decode():
        with contextlib.closing(open_backend(bundle, "ort-cuda", "fp32", BackendOptions(memory=memory))) as backend:
            backend.run(bundle.reference().inputs[:1])

    check_nothing_is_left(opened["driver"], decode)


def test_a_batch_that_does_not_run_is_an_error_and_keeps_nothing(opened, monkeypatch):
    bundle = small_bundle("prelocal")
    windows = bundle.reference().inputs
    backend = open_backend(bundle, "ort-cuda", "fp32")
    first = backend.run(windows[:1]).copy()
    held = len(opened["driver"].allocations)

    class Full:
        def run_with_iobinding(self, *arguments):
            raise RuntimeError("Failed to allocate memory for requested buffer of size 6604800\nmore")

        def __getattr__(self, name):
            return getattr(session, name)

    session, backend._session = backend._session, Full()
    with pytest.raises(BackendError, match=r"cannot run 3 windows .*: Failed to allocate memory .* 6604800 Free device memory"):
        backend.run(windows[:3])
    assert len(opened["driver"].allocations) == held
    backend._session = session
    np.testing.assert_array_equal(backend.run(windows[:1]), first)
    backend.run(windows[:3])
    backend.close()


def test_what_onnx_runtime_would_do_silently_is_named(opened):
    for precision, tf32 in (("fp32", "0"), ("tf32", "1"), ("fp16", "0")):
        open_backend(small_bundle("prelocal"), "ort-cuda", precision).close()
        assert opened["provider"] == "CUDAExecutionProvider"
        assert (opened["use_tf32"], opened["enable_cuda_graph"], opened["fallback"]) == (tf32, "1", "1")
    with pytest.raises(BackendError, match="cannot switch TensorFloat-32 off"):
        open_backend(small_bundle("prelocal"), "ort-tensorrt", "fp32")
    open_backend(small_bundle("prelocal"), "ort-tensorrt", "fp16").close()
    assert opened["trt_profile_max_shapes"] == "eeg:8x10x200"


CUBLAS_SAYS = "[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 3: the resource allocation failed ; GPU=0 ; expr=cublasCreate(&h);"
"""What ONNX Runtime 1.31 raised on an H100 whose memory was taken."""


def test_a_session_without_memory_says_so_and_keeps_nothing(monkeypatch):
    def session(*arguments, **options):
        raise RuntimeError(CUBLAS_SAYS)

    driver = FakeDriver()
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(ort_module, "probe_cuda", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(BackendError, match=r"too little memory for ONNX Runtime .* to load model.fp32.onnx .*CUBLAS failure 3"):
        open_backend(small_bundle("prelocal"), "ort-cuda", "fp32")
    assert not driver.allocations


@pytest.mark.parametrize("name", ["ort-cuda", "ort-tensorrt"])
def test_a_build_without_the_provider_is_refused(name):
    with pytest.raises(BackendError, match=r"was built without \w+ExecutionProvider. Replace it: pip uninstall onnxruntime"):
        open_backend(small_bundle("prelocal"), name, "fp32")


def test_a_provider_that_falls_back_is_refused(monkeypatch):
    """A session that was asked for CUDA and got the CPU, as ONNX Runtime does when CUDA's libraries do not load."""
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda path, settings, providers: real(path, providers=["CPUExecutionProvider"]))
    with pytest.raises(BackendError, match="did not load CUDAExecutionProvider, and would have used CPUExecutionProvider"):
        ort_module.open_session(small_bundle("prelocal"), "fp32", ort.SessionOptions(), "CUDAExecutionProvider", {})


def test_a_node_that_falls_to_the_cpu_is_refused():
    """ONNX Runtime itself refuses it with the entry that we set: no provider but the CPU's is here to take a node."""
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider = "AzureExecutionProvider"
    if provider not in ort.get_available_providers():
        provider = next(p for p in ort.get_available_providers() if p != "CPUExecutionProvider")
    with pytest.raises(BackendError, match="(?i)cannot load .*fallback"):
        ort_module.open_session(small_bundle("prelocal"), "fp32", settings, provider, {})


def test_tf32_is_refused_on_the_cpu():
    with pytest.raises(BackendError, match="no tf32 kernels on the CPU"):
        open_backend(small_bundle("prelocal"), "ort-cpu", "tf32")
