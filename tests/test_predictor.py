import gc
import os
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from bundles import small_spec

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import BackendError, BundleError, InputError, MissingDependencyError, SjepaError
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.parity import TOLERANCE
from sjepa_deploy.runtime.backend import Backend, BackendOptions, Turn, open_backend, why_not

VARIANTS = ("prelocal", "postlocal", "contextual", "base")


def eeg(n, *, spec=None):
    spec = spec or small_spec()
    return eeg_windows(n, *spec.input_shape, spec.sfreq, np.random.default_rng(0))


def in_pytorch(spec, windows):
    """Run the same random weights in float64, built from the seed, not from what the bundle stores."""
    with torch.no_grad():
        return build_model(spec, seed=0).double().eval()(torch.from_numpy(windows).double()).numpy()


@pytest.fixture
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal")) as predictor:
        yield predictor


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])  # those of GPUs: tests/test_gpu.py
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_backend_gives_what_the_pytorch_model_gives(make_bundle, variant, backend):
    bundle, windows = make_bundle(variant), eeg(4)
    wanted = in_pytorch(bundle.spec, windows)
    with sjepa_deploy.load(bundle, backend=backend) as predict:
        assert isinstance(predict.backend, Backend)
        assert predict.backend.name == backend
        for n in (1, 2, 3, 4):
            out = predict(windows[:n])
            assert (out.dtype, out.shape) == (np.float32, (n, *bundle.spec.output_shape))
            assert np.abs(out - wanted[:n]).max() < TOLERANCE["fp32"] * np.sqrt(np.mean(wanted**2))


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])
def test_what_was_returned_stays(make_bundle, backend):
    bundle, windows = make_bundle("prelocal"), eeg(4)
    wanted = in_pytorch(bundle.spec, windows)
    allowed = TOLERANCE["fp32"] * np.sqrt(np.mean(wanted**2))
    with sjepa_deploy.load(bundle, backend=backend) as predict:
        kept = [predict(window[None]) for window in windows]
        out = np.full((6, *bundle.spec.output_shape), 7, np.float32)
        given = [predict(windows[i : i + 2], out=out[i : i + 2]) for i in (0, 2)]
        for wrong in (out[:1], out[:, :2], out.astype(np.float64)):
            with pytest.raises(InputError, match="out is float.. of shape"):
                predict(windows, out=wrong)
    assert np.abs(np.concatenate(kept) - wanted).max() < allowed
    assert np.abs(out[:4] - wanted).max() < allowed
    assert (out[4:] == 7).all()
    assert all(np.shares_memory(g, out) for g in given)


def test_other_precisions_are_as_good_as_they_say(make_bundle):
    bundle, windows = make_bundle("prelocal", precisions=("fp32", "fp16", "bf16")), eeg(4)
    wanted = in_pytorch(bundle.spec, windows)
    with sjepa_deploy.load(bundle, precision="fp16") as predict:
        error = np.abs(predict(windows) - wanted).max() / np.sqrt(np.mean(wanted**2))
    assert TOLERANCE["fp32"] < error < TOLERANCE["fp16"]
    with sjepa_deploy.load(bundle) as predict:
        assert predict.backend.precision == "fp32"
    with pytest.raises(BackendError, match=r"no bf16 kernels on the CPU\. Use --precision fp32 or fp16, or a GPU backend"):
        sjepa_deploy.load(bundle, precision="bf16")
    with pytest.raises(BackendError, match=r"PyTorch reference does not run in fp16\. Use --precision fp32"):
        sjepa_deploy.load(bundle, backend="torch", precision="fp16")


@pytest.mark.parametrize("n", [0, 1, 4, 5, 11])
@pytest.mark.parametrize("options", [{}, {"static_batch": 4}])
def test_any_number_of_windows(make_bundle, n, options):
    bundle, windows = make_bundle("prelocal", **options), eeg(11)
    with sjepa_deploy.load(bundle) as predict:
        out = predict.predict(windows[:n])
    assert (out.dtype, out.shape) == (np.float32, (n, 3))
    np.testing.assert_allclose(out, in_pytorch(bundle.spec, windows)[:n], rtol=0, atol=1e-6)


def test_windows_of_a_recording_need_no_copy(predict):
    """Overlapping windows come as a read-only view with its strides."""
    recording = np.ascontiguousarray(eeg(3).transpose(1, 0, 2).reshape(8, 600))
    view = np.lib.stride_tricks.sliding_window_view(recording, 200, axis=1)[:, ::50].swapaxes(0, 1)
    assert not view.flags.c_contiguous
    one_by_one = np.concatenate([predict(window[None].copy()).copy() for window in view])
    np.testing.assert_allclose(predict.predict(view), one_by_one, rtol=0, atol=1e-7)
    fortran = np.asfortranarray(eeg(3))
    np.testing.assert_array_equal(predict(fortran).copy(), predict(eeg(3)))


def test_results_do_not_depend_on_the_batch_nor_on_earlier_calls(predict):
    windows = eeg(4)
    alone = np.concatenate([predict(window[None]).copy() for window in windows])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2], [0, 0, 0], [1, 3]):
        np.testing.assert_allclose(predict(windows[order]), alone[order], rtol=0, atol=1e-7)


def test_threads_change_nothing_but_rounding(make_bundle):
    bundle, windows = make_bundle("contextual"), eeg(2)
    outputs = []
    for n_threads in (None, 1, 2):
        with sjepa_deploy.load(bundle.path, n_threads=n_threads) as predict:
            outputs.append(predict(windows).copy())
    np.testing.assert_allclose(outputs[1:], outputs[:1] * 2, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (None, "The input is a NoneType, not a NumPy array of float32. Convert it"),
        (eeg(1).tolist(), "The input is a list, not a NumPy array"),
        (torch.zeros(1, 8, 200), "The input is a Tensor, not a NumPy array"),
        (eeg(1).astype(np.float64), "array of float64, not .* of float32. Convert it with eeg.astype.np.float32"),
        (eeg(1).astype(np.int16), "array of int16"),
        (eeg(1).astype(">f4"), "array of >f4"),
        (eeg(1)[0], r"shape \(8, 200\), not \(batch, 8, 200\)\. Add the batch axis with eeg\[None\]"),
        (eeg(1)[None], r"shape \(1, 1, 8, 200\)"),
        (eeg(1)[:, :7], r"have 7 channels, the model 8\. Select the channels of spec\.ch_names in order"),
        (eeg(1)[..., :199], r"have 199 samples, the model 200 \(2 s at 100 Hz\)\. Resample or cut them"),
        (eeg(1)[:0], r"batch has 0 windows, the graph takes 1 to 4\. Use predict\(\) for any number"),
        (eeg(5), "batch has 5 windows, the graph takes 1 to 4"),
        (eeg(2) * 1e-6, r"root mean square of .*e-05 uV, which no EEG has: .*\. Scale the data to uV \(MNE gives volts\)"),
        (eeg(2) * 1e6, r"root mean square of .*e\+07 uV, which no EEG has"),
        (eeg(2) * 1e30, r"root mean square of .*e\+31 uV, which no EEG has"),
    ],
)
def test_windows_that_break_the_contract(predict, windows, message):
    with pytest.raises(InputError, match=message):
        predict(windows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 2])
def test_samples_that_are_not_finite(make_bundle, predict, bad, row):
    windows, clean = eeg(3), predict(eeg(3)).copy()
    windows[row, 5, 100] = bad
    with pytest.raises(InputError, match=r'holds 1 samples that are NaN or infinite\. .* with non_finite="pass"'):
        predict(windows)
    with sjepa_deploy.load(make_bundle("prelocal"), non_finite="pass") as lenient:
        out = lenient(windows)
    others = np.arange(3) != row
    assert np.isnan(out[row]).all()
    np.testing.assert_allclose(out[others], clean[others], rtol=0, atol=1e-7)


def test_one_window_in_the_wrong_unit_among_good_ones(predict):
    windows = eeg(3)
    windows[1] *= 1e-6
    with pytest.raises(InputError, match="probably not in uV"):
        predict(windows)


def test_the_rounding_of_a_flat_window_is_no_other_unit(predict):
    """What a zero-phase filter and the average reference leave of a constant recording."""
    rounding = np.random.default_rng(0).normal(0, 2e-12, (1, 8, 200)).astype(np.float32)
    np.testing.assert_allclose(predict(rounding), predict(np.zeros_like(rounding)), rtol=0, atol=1e-6)


def test_volts_are_right_for_a_model_in_volts(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal", unit="V")) as predict:
        predict(eeg(2) * np.float32(1e-6))
        with pytest.raises(InputError, match=r"root mean square of .* V, which no EEG has"):
            predict(eeg(2))


def test_threads_are_given_once(make_bundle):
    with pytest.raises(BackendError, match=r"Both n_threads and options are given. Use options=BackendOptions\(n_threads"):
        sjepa_deploy.load(make_bundle("prelocal"), n_threads=1, options=sjepa_deploy.BackendOptions())


def test_the_check_of_the_unit_can_be_left_out(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal"), check_unit=False) as predict:
        for factor in (1e-6, 1e6, 1e18):
            assert np.isfinite(predict(eeg(1) * np.float32(factor))).all()
        with pytest.raises(InputError, match="NaN or infinite"):
            predict(eeg(1) * np.float32(np.nan))


def test_what_an_amplifier_gives_is_accepted(predict):
    offsets = np.random.default_rng(1).uniform(-20_000, 20_000, (2, 8, 1)).astype(np.float32)
    for windows in (np.zeros((2, 8, 200), np.float32), eeg(2) + offsets, eeg(2) / 50, np.full((1, 8, 200), 4e5, np.float32)):
        assert np.isfinite(predict(windows)).all()


def test_the_end_of_a_static_batch_is_checked_too(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal", static_batch=4)) as predict:
        with pytest.raises(InputError, match="The batch has 3 windows, the graph takes 4"):
            predict(eeg(3))
        with pytest.raises(InputError, match="have 7 channels"):
            predict.predict(eeg(3)[:, :7])
        with pytest.raises(InputError, match="array of float64"):
            predict.predict(eeg(3).astype(np.float64))


# ---------------------------------------------------------------- loading


def test_what_cannot_be_loaded(make_bundle, tmp_path):
    bundle = make_bundle("prelocal")
    with pytest.raises(BackendError, match=r"'tpu' is not a backend\. Use one of ort-cpu, torch"):
        sjepa_deploy.load(bundle, backend="tpu")
    with pytest.raises(BundleError, match="has no fp16 graph"):
        sjepa_deploy.load(bundle, precision="fp16")
    with pytest.raises(BundleError, match="There is no bundle at"):
        sjepa_deploy.load(tmp_path / "nowhere")
    assert issubclass(BackendError, SjepaError)


@pytest.mark.parametrize(
    ("package", "backend", "mend"),
    [
        ("torch", "torch", r": pip install 'torch.* \(the extra \[export\]\)"),
        ("onnxruntime", "ort-cpu", ": pip install onnxruntime"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(make_bundle, monkeypatch, package, backend, mend):
    bundle = make_bundle("prelocal")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"needs {package}, which is not installed\. Install it with{mend}"):
        sjepa_deploy.load(bundle, backend=backend)
    assert why_not(bundle, backend, "fp32") == f"This needs {package}, which is not installed."


def test_why_not(make_bundle):
    bundle = make_bundle("prelocal", precisions=("fp32", "fp16", "bf16"))
    assert why_not(bundle, "ort-cpu", "fp32") is None
    assert why_not(bundle, "ort-cpu", "bf16") == "ONNX Runtime has no bf16 kernels on the CPU."


@pytest.mark.parametrize("name", ["ort-cpu", "torch"])
def test_what_was_closed_says_so(make_bundle, name):
    closed = []
    with sjepa_deploy.load(make_bundle("prelocal"), backend=name) as predict:
        backend, close = predict.backend, predict.backend.close
        backend.close = lambda: closed.append(close())
    predict.close()
    close()
    assert closed == [None]
    assert (predict.backend.name, predict.backend.precision) == (name, "fp32")
    for call in (predict, predict.predict, predict.backend.run, backend.run):
        with pytest.raises(BackendError, match="was closed"):
            call(eeg(1))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_forked_child_decodes_and_leaves(make_bundle, n_threads):
    """ONNX Runtime's destructors wait for threads that a forked child does not have."""
    code = """
import os, signal, sys
import numpy as np
import sjepa_deploy

predict = sjepa_deploy.load(sys.argv[1], n_threads=int(sys.argv[2]))
windows = np.random.default_rng(0).normal(0, 20, (4, *predict.spec.input_shape)).astype("f4")
alone = predict(windows)
if os.fork() == 0:
    signal.alarm(60)
    own = sjepa_deploy.load(sys.argv[1], n_threads=int(sys.argv[2]))
    right = [np.allclose(p(windows), alone, atol=1e-5) for p in (predict, own)]
    sys.exit(7 if all(right) else 8)
print(os.waitstatus_to_exitcode(os.wait()[1]), np.allclose(predict(windows), alone, atol=1e-5))
"""
    command = [sys.executable, "-c", code, str(make_bundle("contextual").path), str(n_threads)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=200).stdout == "7 True\n"


def test_a_forked_child_is_told_that_it_has_no_gpu():
    turn = Turn(forks=False)
    reading, writing = os.pipe()
    if os.fork() == 0:  # pragma: no cover
        try:
            turn.begin()
        except BackendError as e:
            os.write(writing, str(e).encode())
        os._exit(0)
    os.wait()
    assert b"was forked" in os.read(reading, 1000)
    turn.begin()


def test_a_decoding_box_needs_neither_pytorch_nor_onnx_nor_mne(make_bundle):
    code = """
import sys
import numpy as np
import sjepa_deploy
with sjepa_deploy.load(sys.argv[1]) as predict:
    print(*predict(np.ones((2, *predict.spec.input_shape), np.float32)).shape)
import sjepa_deploy.cli.verify, sjepa_deploy.cli.doctor, sjepa_deploy.cli.run, sjepa_deploy.cli.bench
heavy = ["torch", "onnx", "onnxscript", "safetensors", "mne", "scipy", "braindecode"]
print(*[name for name in heavy if name in sys.modules])
"""
    command = [sys.executable, "-W", "error", "-c", code, str(make_bundle("prelocal").path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2 3\n\n", "")


# ---------------------------------------------------------------- cost


def test_a_call_allocates_nothing_that_grows_with_the_windows(make_bundle):
    predict = sjepa_deploy.load(make_bundle("prelocal", max_batch=64))
    windows = np.repeat(eeg(4), 16, axis=0)
    predict(windows)
    gc.collect()
    tracemalloc.start()
    try:
        kept = []
        for _ in range(6):
            for _ in range(200):
                predict(windows)
            now, peak = tracemalloc.get_traced_memory()
            kept.append(now)
    finally:
        tracemalloc.stop()
    assert windows.nbytes > 400_000
    assert peak < 50_000  # not one window of a batch is copied; headers of arrays and what the interpreter caches come to 8 kB
    assert kept[-1] - kept[0] < 16 * 1000  # no call keeps an object: the smallest has 16 bytes


def test_a_second_thread_gets_an_error_and_not_the_numbers_of_the_first(predict, monkeypatch):
    windows, refused = eeg(2), []
    alone = predict(windows[:1]).copy()
    run = predict.backend._session.run_with_iobinding

    def call_from_another_thread(binding):
        with ThreadPoolExecutor() as pool:
            refused.append(pool.submit(predict, windows[1:]).exception())
        run(binding)

    monkeypatch.setattr(predict.backend._session, "run_with_iobinding", call_from_another_thread)
    np.testing.assert_array_equal(predict(windows[:1]), alone)
    assert [type(error) for error in refused] == [BackendError]
    assert "Load the bundle once in each thread" in str(refused[0])


def test_the_same_buffer_is_returned_for_the_same_batch(make_bundle):
    backend = open_backend(make_bundle("prelocal"), "ort-cpu", "fp32", BackendOptions(n_threads=1))
    windows = eeg(4)
    backend.run(windows)
    two = backend.run(windows[:2])
    before = two.copy()
    assert backend.run(windows[2:]) is two
    assert not np.array_equal(two, before)
    backend.close()


def test_buffers_are_those_of_the_largest_batch_alone(make_bundle):
    bundle = make_bundle("prelocal", max_batch=64)
    windows = np.repeat(eeg(4), 16, axis=0)
    backend = open_backend(bundle, "ort-cpu", "fp32", BackendOptions(n_threads=1))
    alone = backend.run(windows).copy()
    tracemalloc.start()
    try:
        for n in (*range(1, 65), 1, 33, 64):
            np.testing.assert_allclose(backend.run(windows[:n]), alone[:n], atol=1e-5)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        backend.close()
    assert kept < windows.nbytes / 2  # buffers of every size would take 32 times the windows


def test_threads_do_not_spin_between_calls(make_bundle):
    """At ten windows a second, the threads of Contextual took as long as they were given."""
    with sjepa_deploy.load(make_bundle("contextual"), n_threads=2) as predict:
        windows = eeg(1)
        predict(windows)
        before, pauses = time.process_time(), 20
        for _ in range(pauses):
            predict(windows)
            time.sleep(0.05)
        spent = time.process_time() - before
    assert spent < 0.25 * pauses * 0.05


def test_too_little_memory_is_told(predict, monkeypatch):
    def fail(_):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(predict.backend._session, "run_with_iobinding", fail)
    with pytest.raises(BackendError, match="too little memory for a batch of 2 windows"):
        predict(eeg(2))


def test_the_input_is_left_as_it_is(predict):
    windows = eeg(2)
    predict(windows)
    np.testing.assert_array_equal(windows, eeg(2))


def test_bundles_and_paths_are_taken_alike(make_bundle):
    bundle = make_bundle("prelocal")
    for source in (bundle, bundle.path, str(bundle.path)):
        with sjepa_deploy.load(source) as predict:
            assert isinstance(predict.bundle, Bundle)
            assert predict.spec == bundle.spec
            assert predict.max_batch == 4
