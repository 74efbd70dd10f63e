"""The kernels of many windows on a fake GPU, thread by thread (kernels_on_cpu.py): parity, bits, chunks, how they are chosen."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from bundles import small_spec
from fake_gpu import check_batch_sizes_share, check_nothing_is_left
from kernels_on_cpu import compiled_for_cpu

from sjepa_deploy.errors import BackendError, InputError
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.parity import check_parity
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.fused import backend as fused
from sjepa_deploy.runtime.fused import batch
from sjepa_deploy.runtime.fused.batch_program import MOST_OUTPUTS, _operands, make_batch_program, refuse_batches
from sjepa_deploy.runtime.fused.choice import records_of, size_for
from sjepa_deploy.runtime.gpu import cuda, nvrtc
from sjepa_deploy.safetensors_file import read_safetensors
from sjepa_deploy.spec import EncoderSpec

NAMELESS = {"ch_names": None, "positions": None}
NARROW = EncoderSpec(conv_layers=((8, 32, 8), (16, 2, 2), (16, 3, 3), (32, 2, 2)), spat_dim=6, time_dim=10, n_layers=1, n_heads=4)
SHALLOW = EncoderSpec(n_layers=1)

SPECS = {
    "prelocal": small_spec("prelocal"),
    "prelocal, odd sizes": small_spec("prelocal", n_chans=5, n_times=155, n_outputs=1, n_spat_filters=3, **NAMELESS),
    "prelocal, many filters, another encoder": small_spec("prelocal", n_times=282, n_spat_filters=9, encoder=NARROW),
    "postlocal": small_spec("postlocal"),
    "postlocal, odd sizes": small_spec("postlocal", n_chans=3, n_times=281, n_outputs=4, **NAMELESS),
    "contextual": small_spec("contextual", encoder=SHALLOW),
    "contextual, two tokens, another encoder": small_spec("contextual", n_times=282, n_outputs=6, encoder=NARROW),
    "base": small_spec("base", encoder=SHALLOW),
}


def batches_for(gpu, bundle, precision="fp32", **options):
    gpu.multiprocessors = 4
    return fused.FusedBackend(bundle, precision, BackendOptions(kernels="batch", **options))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of one window, or two."""
    monkeypatch.setattr(batch, "chunks_of", lambda n, at_once: [(i, min(i + 2, n)) for i in range(0, n, 2)])


PRECISIONS = [(name, "fp32") for name in SPECS]
PRECISIONS += [(name, precision) for name, spec in SPECS.items() if spec.needs_positions for precision in ("fp16", "bf16")]


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_parity(gpu, make_model, small_chunks, name, precision):
    bundle, reference, _ = make_model(SPECS[name])
    backend = batches_for(gpu, bundle, precision)
    result = check_parity(backend.run, reference, backend="cuda", precision=precision, sizes=(3,))
    backend.close()
    assert result.passed, result
    assert precision == "fp32" or result.max_error > 1e-5, "the products were not rounded"


def test_windows_that_threads_copy_give_the_bits_of_windows_in_place(gpu, make_model, small_chunks):
    bundle, reference, _ = make_model(SPECS["postlocal"])
    backend = batches_for(gpu, bundle)
    buffer = backend.input_buffer(4)
    for windows in (reference.inputs[:4], reference.inputs[4:8], reference.inputs[8:4:-1]):  # the last is not contiguous
        copied = backend.run(windows).copy()
        np.testing.assert_array_equal(buffer, windows)
        np.testing.assert_array_equal(backend.run(buffer), copied)
    backend.close()


def test_nothing_is_copied_after_a_call_that_failed(gpu, make_model, small_chunks, monkeypatch):
    bundle, reference, _ = make_model(SPECS["postlocal"])
    backend = batches_for(gpu, bundle)
    buffer = backend.input_buffer(4)
    with monkeypatch.context() as patch:
        patch.setattr(backend._lanes[4], "_enqueue", lambda ready: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            backend.run(reference.inputs[:4])
    np.testing.assert_array_equal(buffer, reference.inputs[:4])
    np.testing.assert_array_equal(backend.run(reference.inputs[4:8]), backend.run(buffer))
    backend.close()


@pytest.mark.parametrize("n_chans", [66, 80])
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_parity_of_a_tile_that_all_warps_share(gpu, make_model, precision, n_chans):
    spec = small_spec("contextual", n_chans=n_chans, n_times=200, encoder=SHALLOW, **electrodes(n_chans))
    bundle, reference, _ = make_model(spec)
    backend = batches_for(gpu, bundle, precision)
    got = backend.run(reference.inputs[:1])
    backend.close()
    error = np.abs(got - reference.outputs[:1]).max() / np.sqrt(np.mean(reference.outputs[:1] ** 2))
    assert error < (1e-5 if precision == "tf32" else 5e-3), "as exact as float32, or within the tolerance of float16"


def electrodes(n_chans):
    """Electrodes on a sphere."""
    points = np.random.default_rng(1).standard_normal((n_chans, 3))
    points /= 10 * np.linalg.norm(points, axis=1, keepdims=True)
    return {"ch_names": None, "positions": tuple(tuple(map(float, point)) for point in points)}


@pytest.mark.parametrize("name", ["prelocal", "postlocal", "contextual"])
def test_bits_depend_neither_on_the_batch_nor_on_the_order_of_threads(gpu, make_model, small_chunks, name):
    bundle, reference, _ = make_model(SPECS[name])
    backend = batches_for(gpu, bundle)
    windows = reference.inputs[:4]
    alone = np.concatenate([backend.run(window[None]).copy() for window in windows])
    np.testing.assert_array_equal(backend.run(windows), alone)
    np.testing.assert_array_equal(backend.run(windows[::-1].copy()), alone[::-1])
    gpu.descending = True
    np.testing.assert_array_equal(backend.run(windows), alone)
    backend.close()


@pytest.mark.parametrize(
    ("name", "barrier"),
    [
        ("postlocal", "    first_convolution(s, count);\n    __syncthreads();"),
        ("contextual", "    wait_copies<SLOTS - 2>();\n    __syncthreads();"),
        ("contextual", "    wait_copies<SLOTS - 2>();  // the layer's vectors\n    __syncthreads();"),
    ],
)
def test_a_missing_barrier_is_found(gpu, make_model, monkeypatch, name, barrier):
    def without(source, architecture):
        assert source.count(barrier) == 1
        return compiled_for_cpu(source.replace(barrier, barrier.rpartition("\n")[0]), architecture)

    monkeypatch.setattr(nvrtc, "compiled", without)
    bundle, reference, _ = make_model(SPECS[name])
    backend = batches_for(gpu, bundle)
    ascending = backend.run(reference.inputs[:1]).copy()
    gpu.descending = True
    descending = backend.run(reference.inputs[:1]).copy()
    backend.close()
    assert not np.array_equal(ascending, descending)


def test_a_missing_wait_for_a_copy_is_found(gpu, make_model, monkeypatch):
    wait = "    wait_copies<SLOTS - 2>();\n"

    def without(source, architecture):
        assert source.count(wait) == 1
        return compiled_for_cpu(source.replace(wait, ""), architecture)

    monkeypatch.setattr(nvrtc, "compiled", without)
    bundle, reference, _ = make_model(SPECS["contextual"])
    backend = batches_for(gpu, bundle)
    wrong = backend.run(reference.inputs[:1]).copy()
    backend.close()
    assert not np.allclose(wrong, reference.outputs[:1], rtol=1e-3)


# ---- calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"cuda_graph": False}, {"memory": "copy"}, {"wait": "block"}])
def test_options_change_no_bit(gpu, make_model, small_chunks, options):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    usual, other = batches_for(gpu, bundle), batches_for(gpu, bundle, **options)
    for _ in range(2):
        np.testing.assert_array_equal(usual.run(reference.inputs[:4]), other.run(reference.inputs[:4]))
    usual.close()
    other.close()


def test_a_chunk_that_is_not_waited_for_is_found(gpu, make_model, small_chunks, monkeypatch):
    """The fake GPU runs a graph in the least kind order that its edges allow: a kernel before its copy, if it may."""
    bundle, reference, _ = make_model(SPECS["prelocal"])
    want = reference.outputs[:4]

    skipped = set()

    def waits_not(stream, event, flags):
        seen = gpu.branches.get(event)
        if seen and stream in {worker.stream for worker in backend._batch_kernel().workers}:
            skipped.update(seen.last)
            if gpu.queues[int(stream)] is None:
                gpu.queues[int(stream)] = type(seen)(seen.graph, set())
            return (0,)
        status = type(gpu).cuStreamWaitEvent(gpu, stream, event, flags)
        if stream == backend._stream.stream and seen:
            gpu.queues[int(stream)].last |= skipped  # the copies are waited for, at the end
        return status

    backend = batches_for(gpu, bundle)
    monkeypatch.setattr(gpu, "cuStreamWaitEvent", waits_not, raising=False)
    lane = backend._lane(4)
    lane.input[...] = reference.inputs[:4]
    lane.run()
    wrong = lane.output.copy()
    backend.close()
    assert not np.allclose(wrong, want, rtol=1e-3)


def test_windows_on_the_gpu(gpu, make_model, monkeypatch):
    bundle, reference, _ = make_model(SPECS["postlocal"])
    backend = batches_for(gpu, bundle)
    want = backend.run(reference.inputs[:3]).copy()
    memory = cuda.HostBuffer(backend._device, reference.inputs[:3].shape)
    memory.array[...] = reference.inputs[:3]
    # cuda.core asks the real driver
    monkeypatch.setattr("sjepa_deploy.runtime.gpu.backend.address_on_gpu", lambda address, stream, window: (3, address))
    np.testing.assert_array_equal(backend.run_on_gpu(memory.address), want)
    np.testing.assert_array_equal(backend.run(reference.inputs[:3]), want)
    memory.close()
    backend.close()


def test_a_call_allocates_nothing(gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = batches_for(gpu, bundle)
    backend.warmup((1, 2), n_runs=1)
    before = gpu.n_allocated
    for size in (1, 2, 1):
        backend.run(reference.inputs[:size])
    assert gpu.n_allocated == before
    backend.close()


def test_batch_sizes_share_their_buffers(gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    bundle = SimpleNamespace(**vars(bundle) | {"graph": lambda precision: SimpleNamespace(max_batch=8)})
    backend = batches_for(gpu, bundle)
    windows = np.resize(reference.inputs, (8, *reference.inputs.shape[1:]))
    alone = np.concatenate([backend.run(window[None]).copy() for window in windows])

    def call(size):
        np.testing.assert_array_equal(backend.run(windows[:size]), alone[:size])

    check_batch_sizes_share(gpu, call, [3, *range(1, 9), 5, 2, 8], 2 * (windows[:1].nbytes + alone[:1].nbytes))
    backend.close()


def test_an_interrupted_call_is_not_taken_for_the_next(gpu, make_model, monkeypatch):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = batches_for(gpu, bundle)
    want = [backend.run(reference.inputs[i : i + 2]).copy() for i in (0, 2)]

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend._stream, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.run(reference.inputs[:2])
    np.testing.assert_array_equal(backend.run(reference.inputs[2:4]), want[1])
    backend.close()


def test_out_of_memory_at_any_moment_keeps_nothing(gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])

    def decode():
        backend = batches_for(gpu, bundle)
        try:
            backend.run(reference.inputs[:2])
        finally:
            backend.close()

    check_nothing_is_left(gpu, decode)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stream_gives_the_bits_of_whole_windows(gpu, make_model, precision):
    bundle, reference, _ = make_model(SPECS["contextual" if precision == "bf16" else "prelocal"])
    backend = batches_for(gpu, bundle, precision)
    samples = np.concatenate(reference.inputs[:2], axis=1)
    n_times = bundle.spec.n_times
    backend.roll(samples[:, :n_times].copy())
    for stop in (n_times + 3, n_times + 10):
        start = n_times if stop == n_times + 3 else n_times + 3
        rolled = backend.roll(samples[:, start:stop].copy()).copy()
        np.testing.assert_array_equal(rolled, backend.run(samples[None, :, stop - n_times : stop].copy()))
    backend.close()


@pytest.mark.parametrize("at_once", [4, 132, 264])
@pytest.mark.parametrize("n", [1, 2, 16, 17, 64, 129, 256, 1000, 1024, 5000])
def test_chunks_are_the_whole_batch(n, at_once):
    chunks = batch.chunks_of(n, at_once)
    assert [first for first, _ in chunks] == [0, *(end for _, end in chunks[:-1])]
    assert chunks[-1][1] == n
    assert len(chunks) <= batch.MOST_CHUNKS
    assert all(end - first >= batch.LEAST_WINDOWS for first, end in chunks[:-1])


# ---- what they do not take ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (small_spec("prelocal", n_outputs=MOST_OUTPUTS + 1), "outputs"),
        (small_spec("contextual", encoder=EncoderSpec(n_heads=4)), "4 heads"),
        (
            small_spec("postlocal", encoder=dataclasses.replace(NARROW, conv_layers=((8, 32, 8), (12, 2, 2), (32, 2, 2)))),
            "convol",
        ),
        (small_spec("contextual", n_times=5000), "tokens"),
    ],
)
def test_models_that_they_do_not_take(spec, match):
    with pytest.raises(BackendError, match=match) as error:
        refuse_batches(spec)
    assert "one window" in error.value.mend


@pytest.mark.parametrize("weight", ["linear1.weight", "norm1.weight", "self_attn.in_proj_bias"])
def test_numbers_beyond_halves_are_refused(make_model, weight):
    bundle, _, _ = make_model(SPECS["contextual"])
    weights = read_safetensors(bundle.checkpoint / "model.safetensors")
    make_batch_program(bundle.spec, weights, "fp16")
    weights[f"transformer.encoder.layers.0.{weight}"] = 1e6 * np.abs(weights[f"transformer.encoder.layers.0.{weight}"])
    for precision in ("fp32", "fp16"):
        with pytest.raises(BackendError, match="beyond float16"):
            make_batch_program(bundle.spec, weights, precision)
    make_batch_program(bundle.spec, weights, "bf16")


def test_a_gpu_with_too_little_shared_memory(gpu, make_model):
    bundle, _, _ = make_model(SPECS["contextual"])
    gpu.shared = 99 * 1024
    with pytest.raises(BackendError, match="shared memory"):
        batches_for(gpu, bundle)


def test_a_kernel_that_stays_is_one_of_one_window(gpu, make_model):
    bundle, _, _ = make_model(SPECS["prelocal"])
    with pytest.raises(BackendError, match="stays"):
        batches_for(gpu, bundle, persistent=True)


def test_bfloat16_is_of_the_kernels_of_many_windows(gpu, make_model):
    bundle, _, _ = make_model(SPECS["contextual"])
    with pytest.raises(BackendError, match="bf16"):
        fused.FusedBackend(bundle, "bf16", BackendOptions(kernels="window"))
    fused.FusedBackend(bundle, "bf16", BackendOptions()).close()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("variant", "precision"), [("contextual", "fp16"), ("contextual", "bf16"), ("postlocal", "fp32")])
def test_nvrtc_compiles_without_spills(variant, precision, architecture):
    """Contextual in fp32 spills some 100 bytes outside of its innermost loop, which takes all 255 registers."""
    pytest.importorskip("cuda.bindings.nvrtc")
    spec = small_spec(variant, encoder=SHALLOW, n_chans=129, n_times=200, **electrodes(129))
    model = {name: tensor.double().numpy() for name, tensor in build_model(spec, seed=0).state_dict().items()}
    source = make_batch_program(spec, model, precision).source
    _, log = nvrtc.compile_source(source, (f"--gpu-architecture=sm_{architecture}", *nvrtc.OPTIONS, "--ptxas-options=-v"))
    assert "0 bytes spill stores" in log
    assert log.count("bytes spill stores") == log.count(" 0 bytes spill stores")


def test_weights_as_operands():
    """Against the layout in the manual of PTX, "Matrix fragments for mma.m16n8k16"."""
    weight = np.random.default_rng(0).standard_normal((16, 32))
    for split, bfloat, bits in ((False, False, 11), (False, True, 8), (True, False, 22)):
        operands = _operands(weight, split=split, bfloat=bfloat)
        for tile, step, lane, register, half in np.ndindex(2, 2, 32, 2, 2):
            words = operands[tile, step, :, lane // 4, lane % 4, register, half]
            if bfloat:
                numbers = (words.astype(np.uint32) << 16).view(np.float32)
            else:
                numbers = words.view(np.float16).astype(np.float64) / (1024 if split else 1)
            want = weight[8 * tile + lane // 4, 16 * step + 8 * register + lane % 4 * 2 + half]
            assert abs(numbers.sum() - want) <= abs(want) * 2.0**-bits


# ---- which kernels are chosen ---------------------------------------------------------------------------------------------


@pytest.fixture
def own_folder(make_model, tmp_path):
    """A bundle in a folder of its own, where records are kept."""
    bundle, reference, _ = make_model(SPECS["prelocal"])
    bundle = type(bundle)(**{**vars(bundle), "path": tmp_path})
    return bundle, reference


def choose(monkeypatch, us):
    """Let kernels take as long as `us` says: by kind of lane."""
    monkeypatch.setattr("sjepa_deploy.runtime.fused.choice._median_us", lambda call: us[type(call.__self__).__name__])


@pytest.mark.parametrize(
    ("us", "chosen"), [({"Lane": 2.0, "BatchLane": 1.0}, "BatchLane"), ({"Lane": 1.0, "BatchLane": 2.0}, "Lane")]
)
def test_the_faster_kernels_serve_a_batch(gpu, own_folder, monkeypatch, us, chosen):
    bundle, reference = own_folder
    choose(monkeypatch, us)
    backend = fused.FusedBackend(bundle, "fp32", BackendOptions())
    want = backend.run(reference.inputs[:3]).copy()
    assert type(backend._lanes[3]).__name__ == chosen
    backend.run(reference.inputs[:1])
    assert type(backend._lanes[1]).__name__ == "Lane", "one window has kernels of its own"
    assert not backend.batch_invariant
    backend.close()
    pinned = fused.FusedBackend(bundle, "fp32", BackendOptions(kernels="batch" if chosen == "BatchLane" else "window"))
    np.testing.assert_array_equal(pinned.run(reference.inputs[:3]), want)
    assert pinned.batch_invariant
    pinned.close()
    (record,) = records_of(bundle.path)
    assert (record.precision, record.gpu) == ("fp32", gpu.name)
    (choice,) = record.choices
    assert (choice.batch, choice.medians_us) == (4, {"batch": us["BatchLane"], "window": us["Lane"]})


def test_a_choice_is_measured_once(gpu, own_folder, monkeypatch):
    bundle, reference = own_folder
    choose(monkeypatch, {"Lane": 2.0, "BatchLane": 1.0})
    for _ in range(2):
        backend = fused.FusedBackend(bundle, "fp32", BackendOptions())
        backend.run(reference.inputs[:2])
        assert type(backend._lanes[2]).__name__ == "BatchLane"
        backend.close()
        choose(monkeypatch, {})  # would fail


def test_a_choice_of_another_gpu_is_not_taken(gpu, own_folder, monkeypatch):
    bundle, reference = own_folder
    for name, us, chosen in (("one", 1.0, "BatchLane"), ("other", 3.0, "Lane")):
        gpu.name = name
        choose(monkeypatch, {"Lane": 2.0, "BatchLane": us})
        backend = fused.FusedBackend(bundle, "fp32", BackendOptions())
        backend.run(reference.inputs[:2])
        assert type(backend._lanes[2]).__name__ == chosen
        backend.close()


def test_a_damaged_record_is_measured_again(gpu, own_folder, monkeypatch, caplog):
    bundle, reference = own_folder
    choose(monkeypatch, {"Lane": 2.0, "BatchLane": 1.0})
    for damage in (b"", b"{", json.dumps({"precision": "fp32"}).encode()):
        backend = fused.FusedBackend(bundle, "fp32", BackendOptions())
        backend.run(reference.inputs[:2])
        backend.close()
        (file,) = (bundle.path / "engines" / "cuda").iterdir()
        assert len(records_of(bundle.path)) == 1
        file.write_bytes(damage)
    assert "measured again" in caplog.text


def test_a_bundle_that_cannot_be_written_is_measured_each_time(gpu, own_folder, monkeypatch, caplog):
    bundle, reference = own_folder
    (bundle.path / "engines").write_text("a file where the folder would be")
    choose(monkeypatch, {"Lane": 2.0, "BatchLane": 1.0})
    backend = fused.FusedBackend(bundle, "fp32", BackendOptions())
    backend.run(reference.inputs[:2])
    backend.close()
    assert "cannot be kept" in caplog.text


def test_what_the_kernels_of_many_windows_do_not_take_those_of_one_serve(gpu, make_model):
    bundle, reference, _ = make_model(small_spec("prelocal", n_outputs=MOST_OUTPUTS + 1))
    backend = fused.FusedBackend(bundle, "fp32", BackendOptions())
    result = check_parity(backend.run, reference, backend="cuda", precision="fp32", sizes=(2,))
    backend.close()
    assert result.passed, result


def test_batches_beyond_the_bundles_are_refused(gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = batches_for(gpu, bundle)
    with pytest.raises(InputError, match="1 to 4"):
        backend.run(np.repeat(reference.inputs[:1], 5, axis=0))
    backend.close()


@pytest.mark.parametrize(("batch_size", "size"), [(2, 2), (3, 4), (64, 64), (65, 100), (100, 100)])
def test_at_which_size_a_choice_is_measured(batch_size, size):
    assert size_for(batch_size, 100) == size
