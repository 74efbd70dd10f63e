"""The fused backend: its real kernels on a fake GPU, thread by thread (kernels_on_cpu.py), and through the real NVRTC."""

import contextlib
import ctypes
import dataclasses
import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from bundles import small_spec
from fake_gpu import check_nothing_is_left, in_another_thread
from kernels_on_cpu import compiled_for_cpu
from safetensors.numpy import load_file
from streams import decode_samples, eeg, info_of

from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import BackendError, InputError, MissingDependencyError
from sjepa_deploy.export.rewrite import rewrite
from sjepa_deploy.files import cache_folder
from sjepa_deploy.parity import Reference, check_parity
from sjepa_deploy.runtime.backend import BACKENDS, BackendOptions, open_backend
from sjepa_deploy.runtime.backends.reference import run_reference
from sjepa_deploy.runtime.fused import backend as fused
from sjepa_deploy.runtime.fused import program as fused_program
from sjepa_deploy.runtime.fused.program import Layout, best_layout, make_program
from sjepa_deploy.runtime.fused.weights import _tiles, pack
from sjepa_deploy.runtime.gpu import backend as gpu_backend
from sjepa_deploy.runtime.gpu import cuda, nvrtc
from sjepa_deploy.runtime.live import calls
from sjepa_deploy.runtime.live.check import causal_preprocessing
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.safetensors_file import read_safetensors
from sjepa_deploy.spec import EncoderSpec

SMALL = EncoderSpec(conv_layers=((8, 32, 8), (12, 2, 2), (16, 3, 3), (32, 2, 2)), spat_dim=6, time_dim=10, n_layers=2, n_heads=4)
BLOCKS = {"prelocal": 4, "postlocal": 3, "contextual": 17, "base": 33}
"""Multiprocessors of the fake GPU: enough for the transformer's slices, and for none to have the same work as another."""


@pytest.fixture
def staying_gpu(gpu, monkeypatch):
    """A GPU that runs kernels in a thread, and a kernel that stays 100 s: here only the host ends it."""
    gpu.asynchronous = True
    monkeypatch.setattr(fused_program, "IDLE_MS", 100_000)
    return gpu


def backend_for(gpu, bundle, precision="fp32", options=None, **layout):
    gpu.multiprocessors = BLOCKS[bundle.spec.variant]
    chosen = Layout(n_multiprocessors=gpu.multiprocessors, **layout) if layout else None
    options = dataclasses.replace(options or BackendOptions(), kernels="window")  # the others: test_batches.py
    return fused.FusedBackend(bundle, precision, options, chosen)


SPECS = {
    "prelocal": small_spec("prelocal"),
    "prelocal, odd sizes": small_spec("prelocal", n_chans=5, n_times=155, n_outputs=1, n_spat_filters=3, ch_names=None,
                                      positions=None),
    "prelocal, two tokens, another encoder": small_spec("prelocal", n_times=282, n_spat_filters=5, encoder=SMALL),
    "prelocal, one channel": small_spec("prelocal", n_chans=1, ch_names=None, positions=None),
    "postlocal": small_spec("postlocal"),
    "postlocal, odd sizes": small_spec("postlocal", n_chans=3, n_times=281, n_outputs=11, ch_names=None, positions=None),
    "contextual": small_spec("contextual"),
    "contextual, two tokens, another encoder": small_spec("contextual", n_times=282, n_outputs=1, encoder=SMALL),
    "base": small_spec("base"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_parity(gpu, make_model, name):
    bundle, reference, _ = make_model(SPECS[name])
    backend = backend_for(gpu, bundle)
    sizes = (3,) if bundle.spec.needs_positions else (1, 3)
    result = check_parity(backend.run, reference, backend="cuda", precision="fp32", sizes=sizes)
    backend.close()
    assert result.passed, result


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_parity_of_other_precisions(gpu, make_model, precision):
    bundle, reference, _ = make_model(SPECS["contextual"])
    backend = backend_for(gpu, bundle, precision)
    result = check_parity(backend.run, reference, backend="cuda", precision=precision, sizes=(3,))
    backend.close()
    assert result.passed, result
    assert result.max_error > 1e-5, "the products were not rounded"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("prelocal", {"cluster": False}),
        ("prelocal", {"cluster": False, "blocks": 3, "threads": 128}),
        ("prelocal", {"blocks": 2, "threads": 512, "encoder_in_shared": False}),
        ("postlocal", {"threads": 512, "encoder_in_shared": False}),
        ("contextual", {"threads": 512, "qkv_in_shared": False}),
    ],
)
def test_parity_of_other_layouts(gpu, make_model, name, layout):
    bundle, reference, _ = make_model(SPECS[name])
    backend = backend_for(gpu, bundle, **layout)
    result = check_parity(backend.run, reference, backend="cuda", precision="fp32", sizes=(1,))
    backend.close()
    assert result.passed, result


@pytest.mark.parametrize(
    ("name", "layout"), [("prelocal", {}), ("prelocal", {"cluster": False}), ("postlocal", {}), ("contextual", {})]
)
def test_the_order_of_threads_changes_no_bit(gpu, make_model, name, layout):
    bundle, reference, _ = make_model(SPECS[name])
    backend = backend_for(gpu, bundle, **layout)
    ascending = backend.run(reference.inputs[:2]).copy()
    gpu.descending = True
    descending = backend.run(reference.inputs[:2]).copy()
    backend.close()
    np.testing.assert_array_equal(ascending, descending)


def test_a_missing_barrier_is_found(gpu, make_model, monkeypatch):
    """The comparison of the two orders can fail: without the barrier behind the first convolution it does."""
    convolution = "s.one[i] = sum[0] + sum[1];\n  }\n  __syncthreads();"

    def without(source, architecture):
        assert source.count(convolution) == 1
        return compiled_for_cpu(source.replace(convolution, convolution.replace("  __syncthreads();", "")), architecture)

    monkeypatch.setattr(nvrtc, "compiled", without)
    bundle, reference, _ = make_model(SPECS["postlocal"])
    backend = backend_for(gpu, bundle)
    ascending = backend.run(reference.inputs[:1]).copy()
    gpu.descending = True
    descending = backend.run(reference.inputs[:1]).copy()
    backend.close()
    assert not np.array_equal(ascending, descending)


def test_a_wait_that_never_ends_is_given_up(gpu, make_model, monkeypatch):
    handed_on = "store_whole(a.attended"

    def without(source, architecture):
        assert source.count(handed_on) == 1
        return compiled_for_cpu(source.replace(handed_on, f"if (false) {handed_on}"), architecture)

    monkeypatch.setattr(nvrtc, "compiled", without)
    bundle, reference, _ = make_model(SPECS["contextual"])
    backend = backend_for(gpu, bundle)
    with pytest.raises(BackendError, match="waited for each other"):
        backend.run(reference.inputs[:1])
    backend.close()


# ---- calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        BackendOptions(cuda_graph=False),
        BackendOptions(memory="copy"),
        BackendOptions(memory="copy", cuda_graph=False),
        BackendOptions(wait="block"),
    ],
)
def test_options_change_no_bit(gpu, make_model, options):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    usual, other = backend_for(gpu, bundle), backend_for(gpu, bundle, options=options)
    for window in reference.inputs[:3]:
        np.testing.assert_array_equal(usual.run(window[None]), other.run(window[None]))
    usual.close()
    other.close()


def test_the_input_buffer_is_read_in_place(gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    want = backend.run(reference.inputs[:2]).copy()
    buffer = backend.input_buffer(2)
    buffer[...] = reference.inputs[:2][::-1]
    np.testing.assert_array_equal(backend.run(buffer), want[::-1])
    backend.close()


def test_windows_on_the_gpu(gpu, make_model, monkeypatch):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    want = backend.run(reference.inputs[:1]).copy()
    memory = cuda.HostBuffer(backend._device, reference.inputs[:1].shape)
    memory.array[...] = reference.inputs[:1]
    # cuda.core asks the real driver
    monkeypatch.setattr(gpu_backend, "address_on_gpu", lambda offset, stream, window: (1, memory.address + offset))
    np.testing.assert_array_equal(backend.run_on_gpu(0), want)
    other = backend.run(reference.inputs[1:2]).copy()
    np.testing.assert_array_equal(backend.run_on_gpu(0), want)
    np.testing.assert_array_equal(backend.run(reference.inputs[1:2]), other)
    with pytest.raises(InputError, match="multiple of 16"):
        backend.run_on_gpu(4)
    memory.close()
    backend.close()


def test_a_call_allocates_nothing(gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    backend.warmup((1, 2), n_runs=1)
    before = gpu.n_allocated
    for size in (1, 2, 1):
        backend.run(reference.inputs[:size])
    assert gpu.n_allocated == before
    backend.close()


@pytest.mark.parametrize("memory", ["mapped", "copy"])
def test_batch_sizes_share_their_buffers_and_scratch_memory_is_bounded(gpu, make_model, monkeypatch, memory):
    """A lane that was closed for others is made again. Its buffers stay where callers may hold them."""
    monkeypatch.setattr(fused, "LEAST_KEPT", 2)
    bundle, reference, _ = make_model(SPECS["prelocal"])
    bundle = SimpleNamespace(**vars(bundle) | {"graph": lambda precision: SimpleNamespace(max_batch=8)})
    backend = backend_for(gpu, bundle, options=BackendOptions(memory=memory))
    windows = np.resize(reference.inputs, (8, *reference.inputs.shape[1:]))
    alone = np.concatenate([backend.run(window[None]).copy() for window in windows])
    first = backend.input_buffer(1)
    addresses = {size: backend.input_buffer(size).ctypes.data for size in range(1, 9)}
    for size in (8, 1, 7, 6, 5, 4, 3, 2, 8, 1):
        np.testing.assert_array_equal(backend.run(windows[:size]), alone[:size])
        buffer = backend.input_buffer(size)
        assert buffer.ctypes.data == addresses[size]
        lanes = backend._lanes
        assert sum(lanes) <= 4 * max(lanes)
    first[...] = windows[3]
    np.testing.assert_array_equal(backend.run(first), alone[3:4])
    backend.close()


def test_a_second_thread_is_refused_while_the_first_is_inside(gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    backend._turn.begin()
    with pytest.raises(BackendError, match="Two threads"):
        backend.run(reference.inputs[:1])
    backend._turn.end()
    backend.close()


@pytest.mark.parametrize("first", ["run", "run_on_gpu", "input_buffer", "warmup", "roll"])
def test_a_thread_that_did_not_open_the_backend_may_call_it(gpu, make_model, monkeypatch, first):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    memory = cuda.HostBuffer(backend._device, reference.inputs[:1].shape)
    memory.array[...] = reference.inputs[:1]
    monkeypatch.setattr(gpu_backend, "address_on_gpu", lambda address, stream, window: (1, address))
    call = {"input_buffer": lambda: backend.input_buffer(1), "warmup": lambda: backend.warmup(n_runs=1)}
    call |= {"roll": lambda: backend.roll(memory.array[0])}
    call |= {"run": lambda: backend.run(memory.array), "run_on_gpu": lambda: backend.run_on_gpu(memory.address)}
    for _ in range(3):  # a later thread mostly gets the identifier of the one before
        in_another_thread(call[first])
    np.testing.assert_array_equal(backend.run_on_gpu(memory.address), backend.run(memory.array))
    memory.close()
    backend.close()


def test_the_count_of_launches_survives_an_interrupted_wait(gpu, make_model, monkeypatch):
    """A late answer to an interrupted call is not taken for that of the next."""
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    want = [backend.run(window[None]).copy() for window in reference.inputs[:2]]
    lane = backend._lanes[1]

    def interrupted(number):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lane, "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.run(reference.inputs[:1])
    np.testing.assert_array_equal(backend.run(reference.inputs[1:2]), want[1])
    backend.close()


@pytest.mark.parametrize("options", [BackendOptions(), BackendOptions(persistent=True)])
@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupted_start_leaves_no_call_uncounted(staying_gpu, make_model, monkeypatch, options, begun):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(staying_gpu, bundle, options=options)
    want = [backend.run(window[None]).copy() for window in reference.inputs[:3]]
    lane = backend._lanes[1]
    start = lane._start

    def interrupted():
        if begun:
            start()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lane, "_start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.run(reference.inputs[:1])
    for i in (1, 2):
        np.testing.assert_array_equal(backend.run(reference.inputs[i : i + 1]), want[i])
    backend.close()


def test_batches_beyond_the_bundles_are_refused(gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    with pytest.raises(InputError, match="1 to 4"):
        backend.run(np.repeat(reference.inputs[:1], 5, axis=0))
    backend.close()


def test_a_kernel_that_fails_is_an_error(gpu, make_model, monkeypatch):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    backend.run(reference.inputs[:1])
    monkeypatch.setattr(backend._lanes[1], "_start", lambda: (0,))
    with pytest.raises(BackendError, match="ended without its result"):
        backend.run(reference.inputs[:1])
    gpu.failed = True
    with pytest.raises(BackendError, match="LAUNCH_FAILED"):
        backend.run(reference.inputs[:1])
    gpu.failed = False
    backend.close()


@pytest.mark.parametrize("options", [BackendOptions(), BackendOptions(memory="copy")])
def test_out_of_memory_at_any_moment_keeps_nothing(gpu, make_model, options):
    bundle, reference, _ = make_model(SPECS["prelocal"])

    def decode():
        with contextlib.closing(backend_for(gpu, bundle, options=options)) as backend:
            backend.run(reference.inputs[:1])

    check_nothing_is_left(gpu, decode)


# ---- a kernel that stays ---------------------------------------------------------------------------------------------------


PERSISTENT = BackendOptions(persistent=True)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("prelocal", {}), ("prelocal", {"cluster": False, "threads": 128}), ("postlocal", {"threads": 128})],
)
@pytest.mark.parametrize("descending", [False, True])
def test_a_kernel_that_stays_answers_as_launches_do(staying_gpu, make_model, name, layout, descending):
    """Whether the block that looks at host memory begins before the others or after them."""
    staying_gpu.descending = descending
    check_staying(staying_gpu, make_model, name, layout)


@pytest.mark.parametrize("name", ["contextual", "base"])
def test_a_transformer_that_stays_answers_as_launches_do(staying_gpu, make_model, name):
    """In the harder order alone, as these take a minute."""
    staying_gpu.descending = True
    check_staying(staying_gpu, make_model, name, {}, order=(0, 1, 0))


def check_staying(staying_gpu, make_model, name, layout, order=(0, 1, 2, 1, 1, 0)):
    bundle, reference, _ = make_model(SPECS[name])
    launched = backend_for(staying_gpu, bundle, **layout)
    want = [launched.run(window[None]).copy() for window in reference.inputs[: max(order) + 1]]
    launched.close()
    backend = backend_for(staying_gpu, bundle, options=PERSISTENT, **layout)
    backend.run(reference.inputs[:1])
    before = staying_gpu.n_kernels
    for i in order:
        np.testing.assert_array_equal(backend.run(reference.inputs[i : i + 1]), want[i])
    assert staying_gpu.n_kernels == before, "it was launched anew"
    assert staying_gpu.running.is_alive()
    backend.close()
    assert not staying_gpu.running.is_alive()


@pytest.mark.parametrize("layout", [{}, {"cluster": False, "threads": 128}])
def test_a_kernel_that_stays_makes_room_for_other_calls(staying_gpu, make_model, monkeypatch, layout):
    staying_gpu.descending = True  # blocks that do not look at host memory begin first
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(staying_gpu, bundle, options=PERSISTENT, **layout)
    one = backend.run(reference.inputs[:1]).copy()
    two = backend.run(reference.inputs[:2]).copy()
    np.testing.assert_allclose(two[:1], one, rtol=1e-5)
    np.testing.assert_array_equal(backend.run(reference.inputs[:1]), one)
    monkeypatch.setattr(gpu_backend, "address_on_gpu", lambda address, stream, window: (1, address))
    np.testing.assert_array_equal(backend.run_on_gpu(backend.input_buffer(1).ctypes.data), one)
    np.testing.assert_array_equal(backend.run(reference.inputs[:1]), one)
    backend.close()


def test_a_kernel_that_stays_leaves_a_silent_host_and_comes_back(gpu, make_model, monkeypatch):
    gpu.asynchronous = True
    monkeypatch.setattr(fused_program, "IDLE_MS", 200)
    bundle, reference, _ = make_model(SPECS["postlocal"])
    backend = backend_for(gpu, bundle, options=PERSISTENT, threads=128)
    want = backend.run(reference.inputs[:1]).copy()
    gpu.running.join(timeout=30)
    assert not gpu.running.is_alive(), "it waits for ever"
    np.testing.assert_array_equal(backend.run(reference.inputs[:1]), want)
    assert gpu.running.is_alive()
    backend.close()


def test_a_kernel_that_stays_survives_an_interrupted_wait(staying_gpu, make_model, monkeypatch):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(staying_gpu, bundle, options=PERSISTENT)
    want = [backend.run(window[None]).copy() for window in reference.inputs[:2]]

    def interrupted(number):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend._lanes[1], "_finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.run(reference.inputs[:1])
    np.testing.assert_array_equal(backend.run(reference.inputs[1:2]), want[1])
    backend.close()


@pytest.mark.parametrize(
    ("change", "match"),
    [({"memory": "copy"}, "no copy"), ({"wait": "block"}, "interrupt")],
)
def test_what_a_kernel_that_stays_cannot_do_is_refused(gpu, make_model, change, match):
    bundle, _, _ = make_model(SPECS["prelocal"])
    with pytest.raises(BackendError, match=match):
        backend_for(gpu, bundle, options=dataclasses.replace(PERSISTENT, **change))


def test_a_kernel_that_stays_needs_ordered_stores(gpu, make_model, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    bundle, _, _ = make_model(SPECS["prelocal"])
    with pytest.raises(BackendError, match="aarch64"):
        backend_for(gpu, bundle, options=PERSISTENT)


def test_the_number_of_a_call_may_wrap(staying_gpu, make_model):
    bundle, reference, _ = make_model(SPECS["prelocal"])
    backend = backend_for(staying_gpu, bundle, options=PERSISTENT)
    want = backend.run(reference.inputs[:1]).copy()
    lane = backend._lanes[1]
    lane.leave()
    lane._number = 0xFFFFFFFE
    for _ in range(4):
        np.testing.assert_array_equal(backend.run(reference.inputs[:1]), want)
    assert lane._number == 2
    backend.close()


# ---- streams --------------------------------------------------------------------------------------------------------------


def in_pieces(backend, *pieces):
    """Return a `run` that takes each window in pieces, and the rest of it, after another window."""

    def run(windows):
        outputs = []
        for window in windows:
            backend.roll(window[:, ::-1].copy())
            edges = [0, *np.cumsum(pieces), window.shape[1]]
            for start, stop in itertools.pairwise(edges):
                output = backend.roll(window[:, start:stop].copy())
            outputs.append(output.copy())
        return np.concatenate(outputs)

    return run


@pytest.mark.parametrize("name", SPECS)
def test_parity_of_windows_that_come_in_pieces(gpu, make_model, name):
    bundle, reference, _ = make_model(SPECS[name])
    backend = backend_for(gpu, bundle)
    run = in_pieces(backend, 1, 7)
    if bundle.spec.needs_positions:  # half a second a launch
        few = [reference.kinds.index(kind) for kind in ("eeg with 20 mV offsets", "one NaN")]
        reference = Reference(
            kinds=tuple(reference.kinds[i] for i in few), inputs=reference.inputs[few], outputs=reference.outputs[few]
        )
    result = check_parity(run, reference, backend="cuda", precision="fp32", sizes=(1,))
    backend.close()
    assert result.passed, result


def stream_of(spec, n_samples):
    """EEG with electrode offsets of up to 20 mV, shape (n_chans, n_samples)."""
    offsets = np.linspace(-20_000, 20_000, spec.n_chans)[:, None]
    return np.float32(eeg_windows(1, spec.n_chans, n_samples, spec.sfreq, np.random.default_rng(3))[0] + offsets)


def check_rolls(backend, spec, hops, run, among=lambda: None):
    """Compare `roll` with `run` of the whole window, to the bit. `among` is called before each."""
    samples = stream_of(spec, sum(hops))
    stop = 0
    for n in hops:
        among()
        stop += n
        rolled = backend.roll(samples[:, stop - n : stop].copy()).copy()
        window = samples[None, :, stop - spec.n_times : stop].copy()
        assert rolled.tobytes() == run(window).tobytes(), (n, stop)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("prelocal", {}),
        ("prelocal", {"cluster": False}),
        ("prelocal", {"cluster": False, "blocks": 3, "threads": 128}),
        ("prelocal, odd sizes", {}),
        ("prelocal, two tokens, another encoder", {"cluster": False}),
        ("prelocal, one channel", {}),
        ("postlocal", {}),
        ("postlocal, odd sizes", {"threads": 128, "encoder_in_shared": False}),
    ],
)
def test_new_samples_give_the_bits_of_the_whole_window(gpu, make_model, name, layout):
    """Of any number, whether it came before or not, and whatever is called in between."""
    bundle, reference, _ = make_model(SPECS[name])
    n_times = bundle.spec.n_times
    backend = backend_for(gpu, bundle, **layout)
    hops = (n_times, 1, 7, 1, 1, n_times - 1, 7, n_times, n_times, 1)
    check_rolls(backend, bundle.spec, hops, backend.run, lambda: backend.run(reference.inputs[:2]))
    backend.close()


@pytest.mark.parametrize(("name", "precision"), [("contextual", "fp32"), ("contextual", "fp16"), ("base", "fp32")])
def test_new_samples_give_the_bits_of_the_whole_window_with_a_transformer(gpu, make_model, name, precision):
    bundle, _, _ = make_model(SPECS[name])
    backend = backend_for(gpu, bundle, precision)
    check_rolls(backend, bundle.spec, (bundle.spec.n_times, 7, 1, bundle.spec.n_times - 1), backend.run)
    backend.close()


@pytest.mark.parametrize(
    "options", [BackendOptions(cuda_graph=False), BackendOptions(memory="copy"), BackendOptions(wait="block")]
)
def test_options_change_no_bit_of_a_stream(gpu, make_model, options):
    bundle, _, _ = make_model(SPECS["prelocal"])
    usual, other = backend_for(gpu, bundle), backend_for(gpu, bundle, options=options)
    check_rolls(other, bundle.spec, (200, 7, 7, 1), usual.run)
    usual.close()
    other.close()


@pytest.mark.parametrize(("name", "layout"), [("prelocal", {}), ("prelocal", {"cluster": False}), ("postlocal", {})])
def test_the_order_of_threads_changes_no_bit_of_a_stream(gpu, make_model, name, layout):
    bundle, _, _ = make_model(SPECS[name])
    backend = backend_for(gpu, bundle, **layout)

    def other_order():
        gpu.descending = not gpu.descending

    check_rolls(backend, bundle.spec, (200, 7, 7, 150, 1), backend.run, other_order)
    backend.close()


def test_a_window_that_is_overwritten_while_it_is_read_is_found(gpu, make_model, monkeypatch):
    """The comparison above can fail: with the barrier between reading and writing behind both it does."""
    barrier, write = "  __syncthreads();\n", "  for (int i = thread(); i < n; i += THREADS) history[i] = shared[i];\n"

    def without(source, architecture):
        assert source.count(barrier + write) == 1
        return compiled_for_cpu(source.replace(barrier + write, write + barrier), architecture)

    monkeypatch.setattr(nvrtc, "compiled", without)
    bundle, _, _ = make_model(SPECS["postlocal"])
    backend = backend_for(gpu, bundle)
    gpu.descending = True
    with pytest.raises(AssertionError, match="7, 207"):
        check_rolls(backend, bundle.spec, (200, 7), backend.run)
    backend.close()


@pytest.mark.parametrize(
    ("name", "layout"),
    [("prelocal", {}), ("prelocal", {"cluster": False, "threads": 128}), ("postlocal", {"threads": 128})],
)
@pytest.mark.parametrize("descending", [False, True])
def test_a_kernel_that_stays_takes_new_samples(staying_gpu, make_model, name, layout, descending):
    staying_gpu.descending = descending
    check_rolls_of_a_kernel_that_stays(staying_gpu, make_model, name, (200, 7, 7, 7, 1, 1, 7, 7, 200, 200), **layout)


def test_a_transformer_that_stays_takes_new_samples(staying_gpu, make_model):
    staying_gpu.descending = True
    check_rolls_of_a_kernel_that_stays(staying_gpu, make_model, "contextual", (200, 7, 7))


def check_rolls_of_a_kernel_that_stays(staying_gpu, make_model, name, hops, **layout):
    """It leaves for another number of samples alone."""
    bundle, _, _ = make_model(SPECS[name])
    launched = backend_for(staying_gpu, bundle, **layout)
    backend = backend_for(staying_gpu, bundle, options=PERSISTENT, **layout)
    samples, stop, n_kernels = stream_of(bundle.spec, sum(hops)), 0, []
    want = []
    for n in hops:
        stop += n
        want.append(launched.run(samples[None, :, stop - 200 : stop].copy()).tobytes())
    launched.close()
    stop = 0
    for n, bits in zip(hops, want, strict=True):
        stop += n
        assert backend.roll(samples[:, stop - n : stop].copy()).tobytes() == bits, stop
        n_kernels.append(staying_gpu.n_kernels)
    for i in range(1, len(hops)):
        assert (n_kernels[i] == n_kernels[i - 1]) == (hops[i] == hops[i - 1])
    assert staying_gpu.running.is_alive()
    backend.close()
    assert not staying_gpu.running.is_alive()


@pytest.mark.parametrize("first", ["a stream", "another batch"])
def test_closing_asks_the_kernel_that_stays_to_leave(staying_gpu, make_model, first):
    """It does not wait until the kernel leaves by itself, which takes 100 s here."""
    bundle, reference, _ = make_model(SPECS["postlocal"])
    backend = backend_for(staying_gpu, bundle, options=PERSISTENT, threads=128)
    backend.run(reference.inputs[:2] if first == "another batch" else reference.inputs[:1])
    if first == "another batch":
        backend.run(reference.inputs[:1])
    else:
        backend.roll(reference.inputs[0])
    assert staying_gpu.running.is_alive()
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("moment", ["before the start", "after the start", "while it waits", "while it copies"])
def test_an_interrupted_call_asks_for_a_whole_window(staying_gpu, make_model, monkeypatch, persistent, moment):
    bundle, _, _ = make_model(SPECS["postlocal"])
    backend = backend_for(staying_gpu, bundle, options=BackendOptions(persistent=persistent), threads=128)
    samples = stream_of(bundle.spec, 250)
    want = [backend.run(samples[None, :, i : i + 200].copy()).tobytes() for i in (0, 7, 21, 28)]
    assert backend.roll(samples[:, :200].copy()).tobytes() == want[0]
    assert backend.roll(samples[:, 200:207].copy()).tobytes() == want[1]
    lane = backend._rolling[7]
    start = lane._start

    def interrupted(*arguments):
        if moment == "after the start":
            start()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "while it copies":
            patch.setattr(np, "copyto", interrupted)
        else:
            patch.setattr(lane, "_finish" if moment == "while it waits" else "_start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.roll(samples[:, 207:214].copy())
    for _ in range(2):  # and the error is one too
        with pytest.raises(InputError, match="no window that 7 new samples could follow"):
            backend.roll(samples[:, 214:221].copy())
    assert backend.roll(samples[:, 21:221].copy()).tobytes() == want[2]
    assert backend.roll(samples[:, 221:228].copy()).tobytes() == want[3]
    backend.close()


def test_a_stream_begins_with_a_whole_window(gpu, make_model):
    bundle, _, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    samples = stream_of(bundle.spec, 210)
    with pytest.raises(InputError, match="Give the whole window of 200 first"):
        backend.roll(samples[:, :7].copy())
    backend.roll(samples[:, :200].copy())
    backend.restart()
    with pytest.raises(InputError, match="Give the whole window of 200 first"):
        backend.roll(samples[:, 200:207].copy())
    for n in (0, 201):
        backend.roll(samples[:, :200].copy())
        with pytest.raises(InputError, match=f"There are {n} new samples"):
            backend.roll(samples[:, :n].copy())
        with pytest.raises(InputError, match="Give the whole window"):
            backend.roll(samples[:, :1].copy())
    backend.close()


def test_a_roll_allocates_nothing(gpu, make_model):
    bundle, _, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    check_rolls(backend, bundle.spec, (200, 7), backend.run)
    before, n_modules = gpu.n_allocated, len(gpu.modules)
    check_rolls(backend, bundle.spec, (200, 7, 7, 200, 7), backend.run)
    assert gpu.n_allocated == before
    assert len(gpu.modules) == n_modules == 2
    backend.close()


@pytest.mark.parametrize("options", [BackendOptions(), BackendOptions(memory="copy")])
def test_out_of_memory_at_any_moment_of_a_stream_keeps_nothing(gpu, make_model, options):
    bundle, _, _ = make_model(SPECS["prelocal"])
    samples = stream_of(bundle.spec, 207)

    def decode():
        with contextlib.closing(backend_for(gpu, bundle, options=options)) as backend:
            backend.roll(samples[:, :200].copy())
            backend.roll(samples[:, 200:].copy())

    check_nothing_is_left(gpu, decode)
    assert not gpu.modules


def test_a_stream_goes_on_after_memory_was_short(gpu, make_model):
    bundle, _, _ = make_model(SPECS["prelocal"])
    backend = backend_for(gpu, bundle)
    backend.run(stream_of(bundle.spec, 200)[None])
    samples = stream_of(bundle.spec, 200)
    for i in range(30):
        gpu.fails_at = gpu.n_allocated + i
        try:
            backend.roll(samples)
        except BackendError as e:
            assert "out of memory" in str(e)  # noqa: PT017 - at each allocation in turn
        else:
            break
    assert i > 5
    gpu.fails_at = None
    check_rolls(backend, bundle.spec, (200, 7), backend.run)
    backend.close()


def test_a_decoder_sends_new_samples_alone_and_decides_the_same(gpu, make_model, monkeypatch):
    bundle, _, model = make_model(SPECS["postlocal"])
    bundle.graph = lambda precision: SimpleNamespace(max_batch=4, static_batch=None)
    samples = eeg(240)
    monkeypatch.setattr(calls, "N_WARM_UP", 1)
    backend = backend_for(gpu, bundle, threads=128)
    predict = Predictor(bundle, backend, check_unit=False)
    sizes = []
    monkeypatch.setattr(backend, "roll", lambda eeg: [sizes.append(eeg.shape[1]), fused.FusedBackend.roll(backend, eeg)][1])
    _, decisions, _ = decode_samples(predict, samples, hop=0.1, late="queue", roll=True)
    backend.close()
    assert sizes == [200, 10, 200, 10, 10, 10, 10]  # the first two warm up
    filtered = causal_preprocessing(samples, info_of(bundle.spec), bundle.spec.signal)
    windows = np.stack([filtered[:, 10 * i : 10 * i + 200] for i in range(5)])
    np.testing.assert_allclose([d.prediction for d in decisions], run_reference(model.double(), windows), rtol=1e-4, atol=1e-5)


# ---- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "precision", "match"),
    [
        (small_spec("prelocal"), "fp16", "feed-forward alone"),
        (small_spec("contextual"), "bf16", "no bf16"),
        (small_spec("postlocal", encoder=dataclasses.replace(SMALL, conv_layers=((8, 32, 8), (16, 3, 2)))), "fp32", "stride"),
        (small_spec("contextual", encoder=dataclasses.replace(SMALL, conv_layers=((8, 32, 8), (24, 2, 2)))), "fp32", "of 24"),
        (small_spec("base", encoder=dataclasses.replace(SMALL, conv_layers=((8, 32, 8), (144, 2, 2)))), "fp32", "of 144"),
        (
            small_spec("base", encoder=dataclasses.replace(SMALL, conv_layers=((8, 32, 8), (80, 2, 2)), n_heads=1)),
            "fp32",
            "heads",
        ),
    ],
)
def test_what_the_kernels_cannot_compute_is_refused(spec, precision, match):
    bundle = SimpleNamespace(spec=spec)
    with pytest.raises(BackendError, match=match):
        fused.FusedBackend(bundle, precision, BackendOptions(kernels="window"))


def test_a_window_too_long_for_shared_memory_is_refused(gpu, make_model):
    bundle, _, _ = make_model(small_spec("prelocal", n_times=20_000))
    with pytest.raises(BackendError, match="KiB of shared memory"):
        backend_for(gpu, bundle)


def test_little_shared_memory_is_made_do_with(gpu, make_model):
    """A GPU of compute capability 8.6 gives a block 99 KiB."""
    gpu.shared, gpu.capability = 99 * 1024, (8, 6)
    bundle, reference, _ = make_model(SPECS["contextual"])
    backend = backend_for(gpu, bundle)
    assert not backend.layout.qkv_in_shared
    assert not backend.layout.cluster
    assert check_parity(backend.run, reference, backend="cuda", precision="fp32", sizes=(3,)).passed
    backend.close()


def test_a_gpu_with_too_few_multiprocessors_is_refused(gpu, make_model):
    bundle, _, _ = make_model(SPECS["contextual"])
    gpu.multiprocessors = 8
    with pytest.raises(BackendError, match="blocks at once"):
        fused.FusedBackend(bundle, "fp32", BackendOptions())


@pytest.mark.parametrize(
    ("change", "match"),
    [({"capability": (7, 5)}, "compute capability 8.0"), ({"cuda": 12080}, "driver .* is for CUDA 12.8")],
)
def test_old_gpus_and_drivers_are_refused(gpu, change, match):
    for name, value in change.items():
        setattr(gpu, name, value)
    with pytest.raises(BackendError, match=match):
        fused.probe()
    assert BACKENDS["cuda"].why_not() is not None


def test_a_driver_that_refuses_the_code(gpu, make_model):
    gpu.load_error = 209
    bundle, _, _ = make_model(SPECS["prelocal"])
    with pytest.raises(BackendError, match="refuses the compiled kernels"):
        backend_for(gpu, bundle)


def test_without_nvrtc_other_backends_are_unaffected(monkeypatch, make_bundle):
    def missing():
        raise RuntimeError("Failed to dlopen libnvrtc")

    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", missing)
    bundle = make_bundle("prelocal")
    with pytest.raises(MissingDependencyError, match="nvidia-cuda-nvrtc"):
        open_backend(bundle, "cuda", "fp32")
    open_backend(bundle, "ort-cpu", "fp32").close()


# ---- the real compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("name", "precision"),
    [("prelocal", "fp32"), ("postlocal", "fp32"), ("contextual", "fp32"), ("contextual", "tf32"), ("contextual", "fp16"),
     ("base", "fp32")],
)  # fmt: skip
def test_nvrtc_compiles_without_spills(make_model, name, precision, architecture):
    bundle, _, _ = make_model(SPECS[name])
    weights = read_safetensors(bundle.checkpoint / "model.safetensors")
    layout = best_layout(bundle.spec, precision, 132, architecture)
    program = make_program(bundle.spec, weights, precision, 64, layout)
    for source in (program.source, program.rolling().source):
        code, log = nvrtc.compile_source(source, (f"--gpu-architecture=sm_{architecture}", *nvrtc.OPTIONS, "--ptxas-options=-v"))
        assert code[:4] == b"\x7fELF"
        assert "0 bytes spill stores" in log
        assert log.count("bytes spill stores") == log.count(" 0 bytes spill stores")
        assert "warning" not in log


def test_source_that_does_not_compile_is_shown_with_its_error():
    with pytest.raises(BackendError, match="nonsense"):
        nvrtc.compile_source("nonsense", nvrtc.OPTIONS)


KERNEL = 'extern "C" __global__ void nothing() {}'


def test_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = nvrtc.compiled(KERNEL, 90)
    (file,) = cache_folder("kernels").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compile_source", lambda *args: pytest.fail("compiled again"))
        assert nvrtc.compiled(KERNEL, 90) == code
    assert nvrtc.compiled(KERNEL, 80) != code
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert nvrtc.compiled(KERNEL, 90) == code
    assert bytes(content) != file.read_bytes()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="XDG_CACHE_HOME"):
        nvrtc.compiled(KERNEL, 90)


def test_a_gpu_newer_than_nvrtc(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BackendError, match=r"compute capability 99\.0"):
        nvrtc.compiled(KERNEL, 990)


# ---- weights --------------------------------------------------------------------------------------------------------------


def test_safetensors_are_read_as_their_library_reads_them(make_model):
    bundle, _, _ = make_model(SPECS["contextual"])
    file = bundle.checkpoint / "model.safetensors"
    ours, theirs = read_safetensors(file), load_file(file)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def test_rewrites_are_those_of_the_exporter(make_model):
    bundle, _, model = make_model(SPECS["contextual"])
    want = dict(rewrite(model.float()).named_parameters())
    packed, layer = pack(bundle.spec, read_safetensors(bundle.checkpoint / "model.safetensors"), half=False, slices=16)

    def ours(pack, name, shape):
        return pack.words()[pack.offsets[name] :][: np.prod(shape)].reshape(shape)

    first = "transformer.encoder.layers.0."
    for pack_, name, theirs in [
        (packed, "POSITIONS", want["pos_encoder.encoding"]),
        (packed, "HEAD", want["final_layer.weight"]),
        (packed, "BIAS", want["final_layer.bias"]),
        (layer, "QKV", want[first + "qkv.weight"].T),
        (layer, "QUERY_BIAS", want[first + "qkv.bias"][:64]),
        (layer, "OUT", want[first + "out.weight"].T),
        (layer, "OUT_BIAS", want[first + "out.bias"]),
    ]:
        theirs = theirs.detach().numpy()
        np.testing.assert_allclose(ours(pack_, name, theirs.shape), theirs, rtol=2e-7, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("half", "k"), [(False, 8), (True, 16)])
def test_tiles_lie_as_the_manual_of_ptx_says(half, k):
    """Fragment A of mma.m16n8k8 and mma.m16n8k16: lane, register (and half) to row and column."""
    weight = np.arange(32 * 2 * k).reshape(32, 2 * k).astype(np.float64)
    tiles = _tiles(weight, half).reshape(2, 2, 32, 4, -1)
    for row_tile in range(2):
        for column_tile in range(2):
            for lane in range(32):
                for register in range(4):
                    for part in range(tiles.shape[-1]):
                        row = lane // 4 + 8 * (register % 2)
                        column = (lane % 4 * 2 + part if half else lane % 4) + (k // 2) * (register // 2)
                        want = weight[16 * row_tile + row, k * column_tile + column]
                        assert tiles[row_tile, column_tile, lane, register, part] == want


@pytest.mark.parametrize("rolls", [False, True])
def test_the_argument_has_the_layout_of_the_kernel(make_model, rolls):
    """g++ and ctypes agree on its size, field by field in the same order: a pointer a buffer, then the batch."""
    for name in ("prelocal", "postlocal", "contextual"):
        bundle, _, _ = make_model(SPECS[name])
        weights = read_safetensors(bundle.checkpoint / "model.safetensors")
        program = make_program(bundle.spec, weights, "fp32", 4, Layout(n_multiprocessors=33))
        if rolls:
            program = program.rolling()
        library = ctypes.CDLL(compiled_for_cpu(program.source, 90).decode())
        assert ctypes.c_uint.in_dll(library, "argument_bytes").value == ctypes.sizeof(program.arguments())
        declared, calls = (program.source.split(f"struct {kind} {{")[1].split("};")[0] for kind in ("Arguments", "Calls"))
        assert declared.rstrip().endswith("Calls calls;")
        declared += calls
        fields = [field for field, _ in program.arguments()._fields_]
        places = [declared.index(f" {field};") for field in fields]
        assert places == sorted(places)
