"""A smoke test for machines with an NVIDIA GPU: `make test-gpu`. Every backend that runs here must build, judge and decode."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import EngineError, InputError, SjepaError
from sjepa_deploy.files import bytes_hash
from sjepa_deploy.parity import batch_sizes, check_parity
from sjepa_deploy.runtime.backend import BACKENDS, BackendOptions, open_backend, why_not
from sjepa_deploy.runtime.backends.engines import BuildSettings, EngineStore
from sjepa_deploy.runtime.bench.baselines import BASELINES
from sjepa_deploy.runtime.gpu.cuda import Device, DeviceBuffer, HostBuffer, Stream

pytestmark = pytest.mark.gpu
GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "ort-cuda", "cuda")
VARIANTS = ("prelocal", "postlocal", "contextual")


@pytest.fixture(scope="module", params=VARIANTS)
def bundle(request, tmp_path_factory):
    """Bundles of the folder SJEPA_BUNDLES (benchmarks/pack_bundles.py), or small ones exported here."""
    folder = tmp_path_factory.mktemp("bundles") / request.param
    if ready := os.environ.get("SJEPA_BUNDLES"):
        shutil.copytree(Path(ready) / request.param, folder, ignore=shutil.ignore_patterns("engines"))
    else:
        from engine_bundles import small_bundle

        shutil.copytree(small_bundle(request.param).path, folder)
    return Bundle.open(folder)


@pytest.fixture(scope="module", params=GPU_BACKENDS)
def backend(request):
    """Every GPU backend that runs on this machine; at least one must."""
    runs = [name for name in GPU_BACKENDS if BACKENDS[name].why_not() is None]
    assert runs, {name: str(BACKENDS[name].why_not()) for name in GPU_BACKENDS}
    if request.param not in runs:
        pytest.skip(str(BACKENDS[request.param].why_not()))
    return request.param


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def ready(request, bundle, backend):
    """Bundle, backend and precision, with the engine built."""
    if backend.startswith("tensorrt"):
        from sjepa_deploy.export.to_tensorrt import build_engine

        record = build_engine(bundle, request.param, flavour=backend)
        assert all(result.passed for result in record.parity)
        if record.computes_in != request.param:
            pytest.skip(record.evidence)
    elif reason := why_not(bundle, backend, request.param):
        assert "memory" not in reason, "a test before this one did not give it back"
        pytest.skip(reason)
    return bundle, backend, request.param


class OnGpu:
    """Windows in device memory, as the CUDA array interface shows them."""

    def __init__(self, device: Device, windows: np.ndarray) -> None:
        stream, host = Stream(device), HostBuffer(device, windows.shape)
        host.array[...] = windows
        self.memory = DeviceBuffer(device, host.nbytes)
        stream.upload(self.memory.address, host)
        stream.synchronize()
        host.close()
        self.__cuda_array_interface__ = {
            "shape": windows.shape,
            "typestr": "<f4",
            "data": (self.memory.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }


@pytest.mark.parametrize(
    "options", [BackendOptions(), BackendOptions(memory="copy"), BackendOptions(cuda_graph=False, wait="block")]
)
def test_parity_and_no_growth(ready, options):
    bundle, name, precision = ready
    backend = open_backend(bundle, name, precision, options)
    graph = bundle.graph(precision)
    result = check_parity(
        backend.run, bundle.reference(), backend=name, precision=precision, sizes=batch_sizes(graph.max_batch, graph.static_batch)
    )
    assert result.passed, result
    device = Device()
    window = bundle.reference().inputs[:1]
    first = backend.run(window).copy()
    free = device.free_memory()
    for _ in range(1000):
        np.testing.assert_array_equal(backend.run(window), first)
    assert device.free_memory() == free
    backend.close()
    device.close()


def test_arrays_on_the_gpu(ready):
    bundle, name, precision = ready
    windows = bundle.reference().inputs[:2]
    backend = open_backend(bundle, name, precision)
    device = Device()
    array = OnGpu(device, windows)
    want = backend.run(windows).copy()
    for _ in range(3):
        np.testing.assert_array_equal(backend.run_on_gpu(array), want)
    array.memory.close()
    backend.close()
    device.close()


def test_torch_tensors_on_the_gpu(ready):
    """They are read where they are: a change of the tensor changes the next output."""
    torch = pytest.importorskip("torch")
    bundle, name, precision = ready
    windows = bundle.reference().inputs[:2]
    backend = open_backend(bundle, name, precision)
    tensor = torch.from_numpy(windows).to("cuda")
    for _ in range(3):
        for order in (slice(None), slice(None, None, -1)):
            tensor.copy_(torch.from_numpy(windows[order].copy()))
            np.testing.assert_array_equal(backend.run_on_gpu(tensor), backend.run(windows[order].copy()))
    with pytest.raises(InputError, match="not C-contiguous"):
        backend.run_on_gpu(tensor.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(InputError, match="not float32 of shape"):
        backend.run_on_gpu(tensor.double())
    backend.close()


@pytest.mark.parametrize("options", [BackendOptions(), BackendOptions(memory="copy"), BackendOptions(persistent=True)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_new_samples_give_the_bits_of_the_whole_window(bundle, precision, options):
    if reason := why_not(bundle, "cuda", precision):
        pytest.skip(reason)
    n_chans, n_times = bundle.spec.input_shape
    hops = [n_times, *[1] * 100, *[10] * 50, n_times - 1, *[7] * 49]
    samples = eeg_windows(1, n_chans, sum(hops), bundle.spec.sfreq, np.random.default_rng(0))[0]
    stops = np.cumsum(hops)
    with contextlib.closing(open_backend(bundle, "cuda", precision)) as whole:
        want = [whole.run(samples[None, :, stop - n_times : stop].copy()).copy() for stop in stops]
    rolling, device, free = open_backend(bundle, "cuda", precision, options), Device(), []
    for _ in range(2):
        for n, stop, outputs in zip(hops, stops, want, strict=True):
            np.testing.assert_array_equal(rolling.roll(samples[:, stop - n : stop].copy()), outputs)
        free.append(device.free_memory())
    assert free[0] == free[1]
    rolling.close()
    device.close()


def test_graphs_of_pytorch_outlive_those_captured_after_them(bundle):
    """A capture empties PyTorch's cache of memory: what an earlier graph reads must not be in it."""
    pytest.importorskip("torch")
    name = "torch-cuda-graph"
    if reason := BASELINES[name].why_not():
        pytest.skip(str(reason))
    windows = bundle.reference().inputs
    backend = open_backend(bundle, name, "fp32", among=BASELINES)
    want = {n: backend.run(windows[:n]).copy() for n in (1, 3, 8)}
    for n, outputs in want.items():
        np.testing.assert_array_equal(backend.run(windows[:n]), outputs)
    backend.close()


# ---- what goes wrong on a GPU ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def all_memory_taken():
    """Leave no more than a few KiB of device memory free: small models need little."""
    device, taken = Device(), []
    size = device.free_memory()
    try:
        while size > 1 << 12:
            try:
                taken.append(DeviceBuffer(device, size))
            except SjepaError:
                size //= 2
        yield
    finally:
        for buffer in taken:
            buffer.close()
        device.close()


def test_out_of_device_memory_is_told_and_passes(ready):
    bundle, name, precision = ready
    windows = np.resize(bundle.reference().inputs[:1], (bundle.graph(precision).max_batch, *bundle.spec.input_shape))

    def decode():
        with contextlib.closing(open_backend(bundle, name, precision, BackendOptions(memory="copy"))) as backend:
            return backend.run(windows).copy()

    with all_memory_taken(), pytest.raises(SjepaError, match="(?i)memory"):
        decode()
    assert np.isfinite(decode()).all()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A bundle with an fp32 engine of TensorRT, and its record."""
    if missing := BACKENDS["tensorrt"].why_not():
        pytest.skip(str(missing))
    from sjepa_deploy.export.to_tensorrt import build_engine

    folder = tmp_path_factory.mktemp("engine") / "prelocal"
    if ready := os.environ.get("SJEPA_BUNDLES"):
        shutil.copytree(Path(ready) / "prelocal", folder, ignore=shutil.ignore_patterns("engines"))
    else:
        from engine_bundles import small_bundle

        shutil.copytree(small_bundle("prelocal").path, folder)
    bundle = Bundle.open(folder)
    return bundle, build_engine(bundle, "fp32")


def test_batches_above_the_profile_are_refused_and_the_engine_goes_on(engine):
    bundle, record = engine
    windows = bundle.reference().inputs
    backend = open_backend(bundle, "tensorrt", "fp32")
    above = np.ascontiguousarray(np.resize(windows, (record.identity.settings.max_batch + 1, *windows.shape[1:])))
    first = backend.run(windows[:1]).copy()
    with pytest.raises(InputError, match="the engine's profile is 1 to"):
        backend.run(above)
    np.testing.assert_array_equal(backend.run(windows[:1]), first)
    backend.close()


def test_a_plan_that_tensorrt_refuses_is_an_error(engine, tmp_path):
    """Half a plan whose hash is right: what is there of it is no engine, and the process lives on."""
    bundle, record = engine
    shutil.copytree(bundle.path, tmp_path / "b")
    store = EngineStore(bundle=Bundle.open(tmp_path / "b"))
    half = store.plan(record)[: record.plan_bytes // 2]
    bad = dataclasses.replace(record, plan_sha256=bytes_hash(half))
    store.add(bad, half, lambda plan: bad)
    with pytest.raises(EngineError, match=r"refuses the plan: .*--rebuild"):
        open_backend(store.bundle, "tensorrt", "fp32")


def test_engines_of_another_machine_are_refused(engine, tmp_path):
    bundle, record = engine
    shutil.copytree(bundle.path, tmp_path / "b")
    store = EngineStore(bundle=Bundle.open(tmp_path / "b"))
    elsewhere = dataclasses.replace(record.identity.machine, gpu="NVIDIA Other", version="8.5.3")
    other = dataclasses.replace(record, identity=dataclasses.replace(record.identity, machine=elsewhere))
    plan = store.plan(record)
    shutil.rmtree(store.folder)
    store.folder.mkdir()
    store.add(other, plan, lambda _: other)
    with pytest.raises(EngineError, match=r"stale: version is '8.5.3' in the engine and .*gpu is 'NVIDIA Other'"):
        open_backend(store.bundle, "tensorrt", "fp32")


def test_a_small_workspace_gives_a_good_engine_or_an_error_that_says_so(engine):
    from sjepa_deploy.export.to_tensorrt import build_engine

    bundle, _ = engine
    settings = BuildSettings(max_batch=bundle.graph("fp32").max_batch, workspace_mib=1)
    try:
        record = build_engine(bundle, "fp32", settings=settings)
    except EngineError as e:
        assert "--workspace" in str(e)  # noqa: PT017 - either outcome is right
    else:
        assert all(result.passed for result in record.parity)


def test_two_processes_that_build_at_once_make_one_engine(engine, tmp_path):
    bundle, record = engine
    shutil.copytree(bundle.path, tmp_path / "b", ignore=shutil.ignore_patterns("engines"))
    start = "from sjepa_deploy.cli.build import main; main()"
    command = [sys.executable, "-c", start, str(tmp_path / "b"), "--precision", "fp32", "--json"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1]
    store = EngineStore(bundle=Bundle.open(tmp_path / "b"))
    (only,) = store.records()
    assert only.identity == record.identity
    assert len(list(store.folder.glob("*.plan"))) == 1
    open_backend(store.bundle, "tensorrt", "fp32").close()
