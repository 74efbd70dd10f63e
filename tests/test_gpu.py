"""A smoke test for machines with an NVIDIA GPU: `make test-gpu`. Every backend that runs here must build, judge and decode."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.runtime.backend import BACKENDS, BackendOptions, open_backend, why_not
from sjepa_deploy.runtime.cuda import Device, DeviceBuffer, HostBuffer, Stream
from sjepa_deploy.runtime.parity import batch_sizes, check_parity

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
