"""The whole path from a bundle to an engine that decodes, on a fake GPU with a fake TensorRT of each version."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
from bundles import copy_bundle
from engine_bundles import small_bundle
from fake_gpu import LAUNCH_FAILED, check_batch_sizes_share, check_nothing_is_left, in_another_thread
from fake_machine import Rig, eeg, outputs
from hypothesis import given
from hypothesis import strategies as st

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.build import build
from sjepa_deploy.errors import BackendError, EngineError, InputError
from sjepa_deploy.export.to_tensorrt import build_engine
from sjepa_deploy.runtime.backend import BACKENDS, BackendOptions, open_backend
from sjepa_deploy.runtime.backends import tensorrt_api
from sjepa_deploy.runtime.backends.engine_judge import EngineParityError
from sjepa_deploy.runtime.backends.engine_runner import suited
from sjepa_deploy.runtime.backends.engines import BuildSettings, EngineStore, timing_cache_file
from sjepa_deploy.runtime.bench.baselines import ALL_BACKENDS
from sjepa_deploy.runtime.bench.run import BenchConfig, run_bench

ONE_THREAD = BackendOptions(n_threads=1)  # on busy cores, threads of small models wait for each other
VERSIONS = ("8.6.0", "10.9.0", "11.4.0")


@pytest.fixture
def rig(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Rig(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    shutil.copytree(small_bundle("prelocal").path, tmp_path / "b")
    return Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_builds_judges_keeps_and_decodes_on_every_version(rig, bundle, version, precision):
    rig.set(version)
    record = build_engine(bundle, precision)
    assert [r.passed for r in record.parity] == [True, True]
    assert record.parity[0].batch_sizes == (1, 2, 3, 8)
    assert record.computes_in == precision
    assert ("TF32" in record.identity.flags) == (precision == "tf32")
    assert Bundle.open(bundle.path).manifest == bundle.manifest, "the signed files stay as they are"
    windows = eeg(bundle, 3)
    want = outputs(bundle, "fp32" if precision == "tf32" else precision, windows)
    with sjepa_deploy.load(bundle, backend="tensorrt", precision=precision) as predict:
        np.testing.assert_array_equal(predict(windows), want)
    assert not rig.driver.allocations, "everything was released"
    assert not rig.driver.graphs


@pytest.mark.parametrize("memory", ["mapped", "copy"])
def test_out_of_memory_at_any_moment_keeps_nothing(rig, bundle, memory):
    build_engine(bundle, "fp32")

    def decode():
        with contextlib.closing(open_backend(bundle, "tensorrt", "fp32", BackendOptions(memory=memory))) as backend:
            backend.run(eeg(bundle, 1))

    check_nothing_is_left(rig.driver, decode)


def test_a_bundle_without_an_engine_keeps_no_context(rig, bundle):
    with pytest.raises(EngineError, match="has no fp32 engine"):
        open_backend(bundle, "tensorrt", "fp32")
    assert rig.driver.n_retained == 0


@pytest.mark.parametrize("variant", ["postlocal", "contextual", "base"])
def test_builds_every_variant(rig, tmp_path, variant):
    shutil.copytree(small_bundle(variant).path, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    build_engine(bundle, "fp16")
    with sjepa_deploy.load(bundle, backend="tensorrt", precision="fp16") as predict:
        np.testing.assert_array_equal(predict(eeg(bundle, 2)), outputs(bundle, "fp16", eeg(bundle, 2)))


@pytest.mark.parametrize("memory", ["mapped", "copy"])
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("wait", ["spin", "flag", "block"])
def test_every_way_to_run_gives_the_same_and_allocates_nothing(rig, bundle, memory, cuda_graph, wait):
    build_engine(bundle, "fp32")
    options = BackendOptions(memory=memory, cuda_graph=cuda_graph, wait=wait)
    want = {n: outputs(bundle, "fp32", eeg(bundle, n)) for n in (1, 3, 8)}
    backend = open_backend(bundle, "tensorrt", "fp32", options)
    backend.warmup((1, 3, 8), n_runs=2)
    allocated, launched = rig.driver.n_allocated, rig.driver.n_launched
    for n in (1, 3, 8, 3, 1):
        np.testing.assert_array_equal(backend.run(eeg(bundle, n)), want[n])
        buffer = backend.input_buffer(n)
        buffer[...] = eeg(bundle, n)[::-1]
        np.testing.assert_array_equal(backend.run(buffer), outputs(bundle, "fp32", eeg(bundle, n)[::-1].copy()))
    assert rig.driver.n_allocated == allocated
    assert (rig.driver.n_launched - launched) == (10 if cuda_graph else 0)
    backend.close()


@pytest.mark.parametrize("memory", ["mapped", "copy"])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_batch_sizes_share_their_buffers(rig, bundle, memory, cuda_graph):
    build_engine(bundle, "fp32")
    backend = open_backend(bundle, "tensorrt", "fp32", BackendOptions(memory=memory, cuda_graph=cuda_graph))

    def call(size):
        np.testing.assert_array_equal(backend.run(eeg(bundle, size)), outputs(bundle, "fp32", eeg(bundle, size)))

    window = (eeg(bundle, 1).nbytes + outputs(bundle, "fp32", eeg(bundle, 1)).nbytes) * (2 if memory == "copy" else 1)
    check_batch_sizes_share(rig.driver, call, [3, *range(1, 9), 5, 2, 8], window)
    backend.close()


@pytest.mark.parametrize("memory", ["mapped", "copy"])
@pytest.mark.parametrize("wait", ["spin", "flag"])
def test_calls_are_split_with_events_and_go_on_afterwards(rig, bundle, memory, wait):
    """The fake driver works while things are enqueued: its events then tell what the steps take, and wait for nothing."""
    build_engine(bundle, "fp32")
    backend = open_backend(bundle, "tensorrt", "fp32", BackendOptions(memory=memory, wait=wait))
    windows = eeg(bundle, 3)
    want = backend.run(windows).copy()
    rig.faults.spoil = lambda out: (time.sleep(0.01), out)[1]
    split = backend.split(windows, 5)
    rig.faults.spoil = lambda out: out
    assert split.n == 5
    assert 10_000 <= split.compute_us < split.enqueue_us
    if memory == "copy":
        assert 0 < split.h2d_us < 10_000
        assert 0 < split.d2h_us < 10_000
    else:
        assert (split.h2d_us, split.d2h_us) == (None, None)
    assert split.host_us < 10_000
    assert abs(split.overhead_us) < 10_000
    assert not rig.driver.recorded, "the events were released"
    np.testing.assert_array_equal(backend.run(windows), want)
    backend.run(windows[::-1].copy())
    np.testing.assert_array_equal(backend.run(windows), want)
    backend.close()


@pytest.mark.parametrize("wait", ["spin", "flag", "block"])
def test_an_interrupted_call_does_not_end_the_next_one_early(rig, bundle, monkeypatch, wait):
    """The GPU finishes it some time after the interrupt, and the next call's work only when that is waited for."""
    build_engine(bundle, "fp32")
    backend = open_backend(bundle, "tensorrt", "fp32", BackendOptions(wait=wait))
    windows = eeg(bundle, 3)
    want = {n: outputs(bundle, "fp32", windows[-n:]) for n in (1, 2, 3)}
    backend.warmup()
    lane = backend._lanes[1]
    launch = lane.launch

    def interrupted(*first):
        for call in first:
            call()
        raise KeyboardInterrupt

    monkeypatch.setattr("sjepa_deploy.runtime.gpu.backend.address_on_gpu", lambda array, stream, window: (1, array.ctypes.data))
    cases = [
        (backend.run, (lane, "launch"), interrupted, 1),
        (backend.run, (lane, "launch"), lambda: interrupted(launch), 1),
        (backend.run, (lane, "_wait"), interrupted, 1),
        (backend.run, (lane, "_wait"), interrupted, 2),  # a batch size that is new: its first call is not ended early either
        (backend.run_on_gpu, (lane, "_wait"), interrupted, 1),
        (lambda window: backend.split(window, 1), (lane, "steps"), lambda: ({"compute": lambda: interrupted(launch)}, ""), 3),
    ]
    rig.driver.lags = True
    for call, place, replacement, next_batch in cases:
        with monkeypatch.context() as patch:
            patch.setattr(*place, replacement)
            with pytest.raises(KeyboardInterrupt):
                call(windows[:1])
        rig.driver.catch_up()
        for n in (next_batch, 1):
            np.testing.assert_array_equal(backend.run(windows[-n:]), want[n])
            backend.run(windows[:n])
    backend.close()


@pytest.mark.parametrize("memory", ["mapped", "copy"])
def test_the_benchmark_measures_engines(rig, bundle, monkeypatch, memory):
    """Everything but the hardware: device memory, the split, energy and clocks from NVML."""
    build_engine(bundle, "fp32")
    monkeypatch.setitem(ALL_BACKENDS, "tensorrt", BACKENDS["tensorrt"])
    monkeypatch.setattr("sjepa_deploy.runtime.machine.Nvml._ask", lambda nvml, function, *which: next(ticks) * 1000)
    ticks = itertools.count()
    config = BenchConfig(
        backends=("tensorrt",),
        precisions=("fp32", "fp16"),
        scenarios=("back-to-back", "paced"),
        rates=(200.0,),
        seconds=0.1,
        n_blocks=5,
        options=BackendOptions(memory=memory),
    )
    report, _ = run_bench((bundle,), config)
    assert [c.key.backend for c in report.cells] == ["nothing", "nothing", "tensorrt", "tensorrt", "tensorrt"]
    closed = report.cells[2]
    assert closed.split.compute_us > 0
    assert (closed.split.h2d_us is None) == (memory == "mapped")
    assert closed.resources.device_bytes > 0
    assert closed.resources.joules_per_window > 0
    assert closed.after.gpu_mhz > closed.before.gpu_mhz
    assert "NVIDIA Fake 9000" in report.environment.gpu
    (entry,) = report.left_out
    assert entry.what == ("b on tensorrt fp16",)
    assert "engine" in entry.reason
    assert not rig.driver.allocations


def test_the_benchmark_names_the_gpu_that_it_was_asked_for(rig, bundle):
    rig.driver.cuDeviceGetCount = lambda: (0, 2)
    rig.driver.cuDeviceGetName = lambda size, device: (0, f"NVIDIA Fake {device}".encode().ljust(size, b"\0"))
    config = BenchConfig(
        **{"backends": ("ort-cpu",), "precisions": ("fp32",), "scenarios": ("back-to-back",), "seconds": 0.1, "n_blocks": 5},
        options=BackendOptions(n_threads=1, device=1),
    )
    report, _ = run_bench((bundle,), config)
    assert report.environment.gpu.startswith("NVIDIA Fake 1,")


def test_a_gpu_that_broke_costs_no_figures(rig, bundle, caplog):
    rig.driver.cuMemGetInfo = lambda: (LAUNCH_FAILED, 0, 0)
    rig.driver.cuDevicePrimaryCtxRelease = lambda device: (LAUNCH_FAILED,)
    config = BenchConfig(
        backends=("ort-cpu",), precisions=("fp32",), scenarios=("back-to-back",), seconds=0.1, n_blocks=5, options=ONE_THREAD
    )
    report, _ = run_bench((bundle,), config)
    assert [c.key.backend for c in report.cells] == ["nothing", "ort-cpu"]
    assert "GPU 0 could not be released" in caplog.text


class OnGpu:
    """An array of another library in the fake GPU's memory."""

    def __init__(self, array):
        self.array = array
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3, "stream": None}


def test_takes_arrays_on_the_gpu_in_place(rig, bundle, monkeypatch):
    def address(array, stream, window):
        assert array.array.shape[1:] == window
        return len(array.array), array.array.ctypes.data

    monkeypatch.setattr("sjepa_deploy.runtime.gpu.backend.address_on_gpu", address)  # cuda.core asks the real driver
    build_engine(bundle, "fp32")
    with sjepa_deploy.load(bundle, backend="tensorrt") as predict:
        windows = eeg(bundle, 2)
        want = [outputs(bundle, "fp32", windows), outputs(bundle, "fp32", windows[::-1].copy())]
        tensor = OnGpu(windows)
        for turn in range(4):
            np.testing.assert_array_equal(predict(tensor), want[turn % 2])
            windows[...] = windows[::-1].copy()
        for _ in range(40):  # more addresses than graphs are kept for
            np.testing.assert_array_equal(predict(OnGpu(eeg(bundle, 2))), want[0])
    with (
        sjepa_deploy.load(bundle, backend="ort-cpu") as predict,
        pytest.raises(InputError, match="ort-cpu does not read arrays on the GPU"),
    ):
        predict(tensor)


def test_an_engine_that_is_there_is_not_built_again(rig, bundle):
    first = build_engine(bundle, "fp32")
    assert build_engine(bundle, "fp32") == first
    assert rig.faults.n_builds == 1
    build_engine(bundle, "fp32", rebuild=True)
    build_engine(bundle, "fp32", settings=BuildSettings(max_batch=4))
    assert rig.faults.n_builds == 3
    assert len(list((bundle.path / "engines").glob("*.plan"))) == 2, "two identities never share a file"


def test_timings_are_kept_for_the_next_build(rig, bundle):
    record = build_engine(bundle, "fp32")
    build_engine(bundle, "fp32", rebuild=True)
    file = timing_cache_file(record.identity.machine)
    assert file.read_bytes() == b"++"


def among_numbers(spoil):
    """Spoil batches without NaN only, where a wrong number is no NaN in another row's place."""
    return lambda out: spoil(out) if np.isfinite(out).all() else out


def last_of_eight_is_zero(out):
    return np.concatenate([out[:-1], np.zeros_like(out[-1:])]) if len(out) == 8 else out


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda out: out + np.float32(np.inf), r"NaN or infinity \(.* at batch 1\)"),
        (lambda out: out * np.float32(1.01), r"off by .* at batch \d"),
        (among_numbers(lambda out: out[::-1]), r"off by .* at batch [2-8]\)"),
        (np.nan_to_num, "not give NaN"),
        (last_of_eight_is_zero, "not give NaN"),
        (among_numbers(last_of_eight_is_zero), r"off by .* at batch 8\)"),
    ],
    ids=("infinite", "scaled", "reversed", "numbers for NaN", "zeros", "zeros among numbers"),
)
def test_an_engine_that_differs_is_not_kept(rig, bundle, spoil, what):
    rig.faults.spoil = spoil
    with pytest.raises(EngineParityError, match=what):
        build_engine(bundle, "fp32")
    assert not list((bundle.path / "engines").glob("*.[pjc]*"))


def test_an_engine_that_differs_after_reloading_is_not_kept_and_the_old_one_stays(rig, bundle, monkeypatch):
    first = build_engine(bundle, "fp32")
    original, calls = sjepa_deploy.runtime.backends.engines.EngineStore.add, []

    def add(self, record, plan, judge):
        rig.faults.spoil = lambda out: out + 1
        calls.append(1)
        return original(self, record, plan, judge)

    monkeypatch.setattr(EngineStore, "add", add)
    with pytest.raises(EngineParityError, match="after it was read back"):
        build_engine(bundle, "fp32", rebuild=True)
    rig.faults.spoil = lambda out: out
    assert calls
    assert EngineStore(bundle=bundle).plan(first)
    sjepa_deploy.load(bundle, backend="tensorrt").close()


def test_a_record_that_cannot_be_written_leaves_the_engine_that_was_there(rig, bundle, monkeypatch):
    first = build_engine(bundle, "fp32")
    store = EngineStore(bundle=bundle)
    files = {file.name: file.read_bytes() for file in store.folder.iterdir()}
    written = []

    def full(handle):
        written.append(handle)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    other = dataclasses.replace(first, plan_sha256=sjepa_deploy.files.bytes_hash(b"another plan"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EngineError, match="cannot be written .No space left on device."):
            store.add(other, b"another plan", lambda plan: other)
    assert len(written) == 2, "the plan was written, and the record was not"
    assert {file.name: file.read_bytes() for file in store.folder.iterdir()} == files
    sjepa_deploy.load(bundle, backend="tensorrt").close()


def test_fp16_without_a_half_typed_layer_is_recorded_as_fp32_and_not_offered(rig, bundle):
    rig.faults.layer_type = "Float"
    record = build_engine(bundle, "fp16")
    assert record.computes_in == "fp32"
    with pytest.raises(EngineError, match=r"asked for in fp16 computes in fp32 \(none of its 2 layers"):
        sjepa_deploy.load(bundle, backend="tensorrt", precision="fp16")


def test_fp32_that_uses_tf32_fails(rig, bundle):
    rig.faults.layer_type = "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n"
    with pytest.raises(EngineError, match="2 layers of the fp32 engine use TensorFloat-32"):
        build_engine(bundle, "fp32")
    assert build_engine(bundle, "tf32").computes_in == "tf32"


def test_bf16_needs_more_than_8_6(rig, bundle):
    rig.set("8.6.0")
    with pytest.raises(EngineError, match=r"TensorRT 8.6.0 has no bf16. Use fp32, tf32, fp16"):
        build_engine(bundle, "bf16")


def test_time_limit(rig, bundle):
    with pytest.raises(EngineError, match=r"longer than 0 s. Raise --time-limit"):
        build_engine(bundle, "fp32", time_limit=0.0)
    rig.set("8.6.0")
    with pytest.raises(EngineError, match="cannot stop a build"):
        build_engine(bundle, "fp32", time_limit=10.0)


def test_two_builds_at_once_make_one_engine(rig, bundle):
    waited, records = [], []
    store, build_serialized = threading.Event(), threading.Event()

    def first(text):
        if text == "building":
            store.set()
            assert build_serialized.wait(20)

    def second(text):
        if text.startswith("waiting"):
            waited.append(text)
            build_serialized.set()

    threads = [
        threading.Thread(target=lambda p=p: records.append(build_engine(bundle, "fp32", progress=p))) for p in (first, second)
    ]
    threads[0].start()
    assert store.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert len(waited) == 1
    assert rig.faults.n_builds == 1
    assert records[0] == records[1]


# ---- refusals at loading --------------------------------------------------------------------------------------------------


def test_engines_of_another_machine_are_named(rig, bundle):
    with pytest.raises(EngineError, match=r"has no fp32 engine for tensorrt. Build one here with: sjepa-build"):
        sjepa_deploy.load(bundle, backend="tensorrt")
    build_engine(bundle, "fp32")
    for changes, words in (
        ({"name": "NVIDIA Other"}, "gpu is 'NVIDIA Fake 9000' in the engine and 'NVIDIA Other' here"),
        ({"capability": (8, 9)}, "compute_capability is '9.0' in the engine and '8.9' here"),
        ({"driver_version": "581.2"}, "driver is '580.1' in the engine and '581.2' here"),
        ({"version": "11.5.0"}, "version is '11.4.0' in the engine and '11.5.0' here"),
    ):
        rig.set(**changes)
        with pytest.raises(EngineError, match=words) as e:
            sjepa_deploy.load(bundle, backend="tensorrt")
        assert f"sjepa-build {bundle.path} --precision fp32" in str(e.value)


def test_a_stale_engine_beside_a_new_graph_is_refused(rig, bundle, make_bundle, tmp_path):
    build_engine(bundle, "fp32")
    copy_bundle(make_bundle("prelocal"), tmp_path / "new")
    shutil.copytree(bundle.path / "engines", tmp_path / "new" / "engines")
    with pytest.raises(EngineError, match="onnx_sha256 is .* in the engine and .* here"):
        sjepa_deploy.load(tmp_path / "new", backend="tensorrt")


def test_damaged_engines_are_refused(rig, bundle):
    record = build_engine(bundle, "fp32")
    plan = bundle.path / "engines" / f"{record.identity.key}.plan"
    whole = plan.read_bytes()
    for content in (whole[:-1], b"", bytes([whole[0] ^ 1]) + whole[1:]):
        plan.write_bytes(content)
        with pytest.raises(EngineError, match=r"was changed after it was built .*--rebuild"):
            sjepa_deploy.load(bundle, backend="tensorrt")
    plan.unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        sjepa_deploy.load(bundle, backend="tensorrt")
    build_engine(bundle, "fp32", rebuild=True)
    sjepa_deploy.load(bundle, backend="tensorrt").close()


def test_a_plan_that_tensorrt_refuses_is_an_error(rig, bundle):
    record = build_engine(bundle, "fp32")
    bad = dataclasses.replace(record, plan_sha256=sjepa_deploy.files.bytes_hash(b"nonsense"))
    store = EngineStore(bundle=bundle)
    store.add(bad, b"nonsense", lambda plan: bad)
    with pytest.raises(EngineError, match=r"TensorRT 11.4.0 refuses the plan: magic tag does not match"):
        sjepa_deploy.load(bundle, backend="tensorrt")


def test_damaged_records_are_refused(rig, bundle):
    record = build_engine(bundle, "fp32")
    file = bundle.path / "engines" / f"{record.identity.key}.json"
    data = json.loads(file.read_text())
    for change, words in (
        ({"computes_in": "fp8"}, "must be one of"),
        ({"plan_sha256": 3}, "must be of type string"),
        ({"identity": {**data["identity"], "precision": "fp16"}}, "describes another engine"),
    ):
        file.write_text(json.dumps(data | change))
        with pytest.raises(EngineError, match=words):
            sjepa_deploy.load(bundle, backend="tensorrt")
    file.write_text("{")
    with pytest.raises(EngineError, match="not readable as JSON"):
        sjepa_deploy.load(bundle, backend="tensorrt")


def test_batches_above_the_profile(rig, bundle):
    build_engine(bundle, "fp32", settings=BuildSettings(max_batch=2))
    words = "The batch has 3 windows, the engine's profile is 1 to 2"
    with sjepa_deploy.load(bundle, backend="tensorrt") as predict, pytest.raises(InputError, match=words):
        predict(eeg(bundle, 3))
    with pytest.raises(EngineError, match="The graph takes 1 to 8 windows, not 9"):
        build_engine(bundle, "fp32", settings=BuildSettings(max_batch=9))


@pytest.fixture
def a_build_a_day(monkeypatch):
    days = itertools.count(1)
    monkeypatch.setattr("sjepa_deploy.export.to_tensorrt.now", lambda: f"2026-01-{next(days):02}T00:00:00+00:00")


@pytest.mark.usefixtures("a_build_a_day")
def test_each_batch_runs_on_the_engine_whose_kernels_were_chosen_for_it(rig, bundle, monkeypatch):
    """The fake engines compute the same: which one is asked for a context tells."""
    for opt, largest in ((1, 8), (8, 8), (1, 2)):
        build_engine(bundle, "fp32", settings=BuildSettings(opt_batch=opt, max_batch=largest))
    made = []
    create = tensorrt_api.TensorRT.create_context

    def watched(api, engine, *rest):
        made.append(api.profile(engine, "eeg"))
        return create(api, engine, *rest)

    monkeypatch.setattr(tensorrt_api.TensorRT, "create_context", watched)
    with sjepa_deploy.load(bundle, backend="tensorrt") as predict:
        assert not made
        for n in (1, 2, 3, 5, 8):
            np.testing.assert_array_equal(predict(eeg(bundle, n)), outputs(bundle, "fp32", eeg(bundle, n)))
        assert "kernels chosen for 8" in predict.backend.setting
    assert [profile[1:] for profile in made] == [(1, 2), (1, 2), (8, 8), (8, 8), (8, 8)], "of equal ones the newest"
    assert not rig.driver.allocations, "everything was released"


@pytest.mark.usefixtures("a_build_a_day")
def test_engines_that_no_batch_runs_on_are_not_opened(rig, bundle, monkeypatch):
    build_engine(bundle, "fp32", settings=BuildSettings(max_batch=4))
    build_engine(bundle, "fp32", settings=BuildSettings(max_batch=8))  # newer, of the same kernels, and it takes more
    opened = []
    deserialize = tensorrt_api.TensorRT.deserialize
    monkeypatch.setattr(tensorrt_api.TensorRT, "deserialize", lambda api, plan: [opened.append(plan), deserialize(api, plan)][1])
    with sjepa_deploy.load(bundle, backend="tensorrt") as predict:
        predict(eeg(bundle, 8))
    assert len(opened) == 1


@given(
    st.lists(st.lists(st.integers(1, 1024), min_size=3, max_size=3).map(sorted).map(tuple), min_size=1, max_size=4),
    st.integers(1, 1024),
)
def test_the_profile_that_suits_a_batch_takes_it_and_no_other_is_nearer(profiles, batch):
    found = suited(profiles, batch)
    able = [profile for profile in profiles if profile[0] <= batch <= profile[2]]
    assert (found is None) == (not able)
    if able:
        ratio = lambda profile: max(profile[1], batch) / min(profile[1], batch)  # noqa: E731
        assert profiles[found] in able
        assert ratio(profiles[found]) <= min(map(ratio, able)) * (1 + 1e-12)


def test_too_small_a_workspace(rig, bundle):
    rig.faults.no_plan = "Could not find any implementation for node due to insufficient workspace"
    with pytest.raises(EngineError, match=r"insufficient workspace. Allow more with --workspace"):
        build_engine(bundle, "fp32", settings=BuildSettings(max_batch=8, workspace_mib=1))


def test_a_builder_that_tensorrt_does_not_make_is_an_error(rig, bundle, monkeypatch):
    def no_builder(log):
        log.log(1, "CUDA initialization failure with error: 2")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(tensorrt_api._load("tensorrt", False), "Builder", no_builder)
    with pytest.raises(EngineError, match="makes no builder: CUDA initialization failure with error: 2. Free device memory"):
        build_engine(bundle, "fp32")


def test_out_of_device_memory(rig, bundle):
    build_engine(bundle, "fp32")
    rig.set(memory=1000)
    with pytest.raises(BackendError, match="The GPU is out of memory"):
        sjepa_deploy.load(bundle, backend="tensorrt")


def test_a_refused_enqueue_is_an_error_and_no_stale_output(rig, bundle):
    build_engine(bundle, "fp32")
    with sjepa_deploy.load(bundle, backend="tensorrt") as predict:
        predict(eeg(bundle, 1))
        rig.faults.refuse_enqueue = True
        with pytest.raises(BackendError, match="TensorRT did not run the engine"):
            predict(eeg(bundle, 2))


def test_large_batches_that_no_graph_takes(rig, bundle, caplog):
    """As TensorRT 8.6 had with 1024 windows in fp16: the engine is judged and kept, and decodes them without a graph."""
    rig.faults.refuse_capture_above = 4
    record = build_engine(bundle, "fp32")
    assert 8 in record.parity[-1].batch_sizes
    assert all(result.passed for result in record.parity)
    assert "cannot be captured in a CUDA graph at batch 8" in caplog.text
    windows, want = eeg(bundle, 8), outputs(bundle, "fp32", eeg(bundle, 8))
    with sjepa_deploy.load(bundle, backend="tensorrt", check_unit=False) as predict:
        np.testing.assert_array_equal(predict(windows[:4]), want[:4])
        for _ in range(2):
            with pytest.raises(BackendError, match=r"in a CUDA graph at batch 8: .*BackendOptions\(cuda_graph=False\)"):
                predict(windows)
        np.testing.assert_array_equal(predict(windows[:4]), want[:4])
    options = BackendOptions(cuda_graph=False)
    with sjepa_deploy.load(bundle, backend="tensorrt", check_unit=False, options=options) as predict:
        np.testing.assert_array_equal(predict(windows), want)
    assert not rig.driver.allocations, "everything was released"


def test_two_threads_on_one_backend_are_told_apart(rig, bundle):
    build_engine(bundle, "fp32")
    backend = open_backend(bundle, "tensorrt", "fp32")
    backend._turn.begin()
    with pytest.raises(BackendError, match="Two threads call one backend at once"):
        backend.run(eeg(bundle, 1))
    backend._turn.end()
    backend.close()


@pytest.mark.parametrize("first", ["run", "run_on_gpu", "input_buffer", "warmup", "split"])
def test_a_thread_that_did_not_open_the_backend_may_call_it(rig, bundle, monkeypatch, first):
    address = lambda array, stream, window: (len(array), array.ctypes.data)  # noqa: E731
    monkeypatch.setattr("sjepa_deploy.runtime.gpu.backend.address_on_gpu", address)
    build_engine(bundle, "fp32")
    backend, windows = open_backend(bundle, "tensorrt", "fp32"), eeg(bundle, 1)
    call = {"input_buffer": lambda: backend.input_buffer(1), "split": lambda: backend.split(windows, 1), "warmup": backend.warmup}
    call |= {name: functools.partial(getattr(backend, name), windows) for name in ("run", "run_on_gpu")}
    for _ in range(3):  # a later thread mostly gets the identifier of the one before
        in_another_thread(call[first])
    np.testing.assert_array_equal(backend.run(windows), outputs(bundle, "fp32", windows))
    backend.close()


def test_the_command(rig, bundle, capsys):
    assert run_command(build, "sjepa-build", [str(bundle.path), "--precision", "fp32,fp16", "--max-batch", "4", "--json"]) == 0
    out = capsys.readouterr()
    engines = json.loads(out.out)
    assert [e["engine"]["computes_in"] for e in engines] == ["fp32", "fp16"]
    assert [e["engine"]["identity"]["settings"]["max_batch"] for e in engines] == [4, 4]
    profile = ["--min-batch", "2", "--opt-batch", "2", "--max-batch", "2"]
    assert run_command(build, "sjepa-build", [str(bundle.path), "--precision", "fp32", *profile, "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)
    assert engine["engine"]["parity"][0]["batch_sizes"] == [2]
    assert run_command(build, "sjepa-build", [str(bundle.path), "--precision", "fp8"]) == 2
    rig.faults.spoil = lambda out: out * 2
    assert run_command(build, "sjepa-build", [str(bundle.path), "--rebuild"]) == 1
    assert "It was not kept" in capsys.readouterr().err
