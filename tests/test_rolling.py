"""Streams whose backend keeps the window: the decoder sends new samples alone where it may, and no decision changes by a bit.

The backend is PyTorch in float64 on whole windows; that of the fused kernels is judged in tests/test_fused.py.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import ScriptedSource, assert_accounted, eeg, info_of, predictions

from sjepa_deploy.errors import BackendError, InputError, StreamError, UnansweredError
from sjepa_deploy.runtime.backend import BackendOptions, RollingBackend
from sjepa_deploy.runtime.backends.reference import TorchBackend
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.ring import Ring
from sjepa_deploy.runtime.live.sources import Chunk
from sjepa_deploy.runtime.predictor import Predictor

N_TIMES = 200
torch.set_num_threads(1)  # the tensors are small: see oracle.py


class Whole(TorchBackend):
    """PyTorch, with a call of whole windows. `before` is called before each result, and may raise."""

    def __init__(self, bundle):
        super().__init__(bundle, "fp32", BackendOptions())
        self.before = lambda: None

    def run(self, eeg):
        self.before()
        return super().run(eeg)


class Rolling(Whole, RollingBackend):
    """The same with a window that it keeps. `sizes` are the numbers of samples that it was given."""

    def __init__(self, bundle):
        super().__init__(bundle)
        self.sizes = []
        self._window = None

    def roll(self, eeg):
        n, window = eeg.shape[1], self._window
        self.sizes.append(n)
        self._window = None
        assert eeg.flags.c_contiguous
        if n < N_TIMES:
            if window is None:
                raise InputError("No window.", "Give one.")
            eeg = np.concatenate([window[:, n:], eeg], axis=1)
        outputs = self.run(eeg[None])
        self._window = eeg.copy()
        return outputs

    def restart(self):
        self._window = None


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle("prelocal")


def decoder_of(backend, source, **config):
    decoder = Decoder(Predictor(backend[0], backend[1], check_unit=False), source, StreamConfig(**config))
    if isinstance(backend[1], Rolling):
        backend[1].sizes.clear()
    return decoder


def source_of(bundle, samples, kept=None, sizes=(10,)):
    """Give the samples in chunks of `sizes` in turn; only those `kept`, with the stamps that they had among all."""
    kept = np.arange(len(samples)) if kept is None else kept
    chunks, start = [], 0
    while start < len(kept):
        part = kept[start : start + sizes[len(chunks) % len(sizes)]]
        chunks.append(Chunk(samples[part], part / 100, float(part[-1]) / 100, False))
        start += len(part)
    return ScriptedSource(info_of(bundle.spec), chunks)


# ---------------------------------------------------------------- the decoder


@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_decision_changes_by_a_bit(bundle, data):
    """However the stream is cut, whatever is lost, whichever windows are late and whichever calls fail."""
    n = 450
    sizes = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    hop = data.draw(st.sampled_from([2, 7, 30, 199, 200]))
    kept = np.ones(n, bool)
    for first, length in data.draw(st.lists(st.tuples(st.integers(0, n), st.integers(1, 60)), max_size=2)):
        kept[first : first + length] = False
    config = {
        "hop": hop / 100,
        "late": data.draw(st.sampled_from(["skip", "hold", "queue"])),
        "bridge": data.draw(st.sampled_from([0, 5, 40])),
    }
    lasts = data.draw(st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.5]), min_size=1, max_size=6))
    fails = data.draw(st.sets(st.integers(0, 40), max_size=4))
    kept = np.flatnonzero(kept)
    if not len(kept):
        return

    def decide(backend):
        source = source_of(bundle, eeg(n), kept, sizes)
        decoder = decoder_of((bundle, backend), source, **config)
        calls = iter(range(10_000))

        def before():
            call = next(calls)
            source.now += lasts[call % len(lasts)]
            if call in fails:
                raise UnansweredError("No answer.", "Wait.")

        backend.before = before
        decisions = list(decoder)
        assert_accounted(decoder.counters, decisions)
        return decoder.counters, [(d.index, d.prediction.tobytes(), d.decided, d.flags) for d in decisions]

    assert decide(Rolling(bundle)) == decide(Whole(bundle))


def sizes_of(bundle, samples, kept=None, **config):
    backend = Rolling(bundle)
    decisions = list(decoder_of((bundle, backend), source_of(bundle, samples, kept), **{"hop": 0.07, "late": "queue"} | config))
    return backend.sizes, decisions


def test_new_samples_alone_are_sent(bundle):
    sizes, decisions = sizes_of(bundle, eeg(300))
    assert sizes == [200, *[7] * 14]
    assert len(decisions) == 15


def test_after_a_gap_the_whole_window_is_sent(bundle):
    kept = np.r_[0:290, 320:600]
    sizes, _ = sizes_of(bundle, eeg(600), kept)
    assert sizes.count(200) == 2
    assert sizes[0] == sizes[13] == 200
    bridged, _ = sizes_of(bundle, eeg(600), kept, bridge=30)
    assert bridged.count(200) == 1


def test_after_a_late_window_the_whole_one_is_sent(bundle):
    backend, n_calls = Rolling(bundle), 0
    source = source_of(bundle, eeg(300))
    decoder = decoder_of((bundle, backend), source, hop=0.1)

    def before():
        nonlocal n_calls
        n_calls += 1
        source.now += 0.25 if n_calls == 3 else 0.0

    backend.before = before
    decisions = list(decoder)
    assert [d.index for d in decisions] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert backend.sizes == [200, 10, 10, 200, *[10] * 6]


@pytest.mark.parametrize("error", [BackendError("It failed.", "Mend it."), KeyboardInterrupt()])
def test_after_an_error_the_whole_window_is_sent(bundle, error):
    backend = Rolling(bundle)
    decoder = decoder_of((bundle, backend), source_of(bundle, eeg(300)), hop=0.1)
    decisions = iter(decoder)
    next(decisions)
    next(decisions)

    def fail():
        backend.before = lambda: None
        raise error

    backend.before = fail
    with pytest.raises(type(error)):
        next(decisions)
    assert len(list(decoder)) == 8
    assert backend.sizes == [200, 10, 10, 200, *[10] * 7]


def test_two_streams_on_one_predictor_do_not_see_each_other(bundle):
    alone = [sizes_of(bundle, eeg(300, seed=seed), hop=0.1)[1] for seed in (0, 1)]
    predict = Predictor(bundle, Rolling(bundle), check_unit=False)
    decoders = [Decoder(predict, source_of(bundle, eeg(300, seed=seed)), StreamConfig(hop=0.1)) for seed in (0, 1)]
    together = [[], []]
    for _ in range(40):
        for decoder, decisions in zip(decoders, together, strict=True):
            chunk = decoder.source.read(0)
            decisions += decoder.feed(chunk) if chunk is not None else []
    assert [predictions(d) for d in together] == [predictions(d) for d in alone]
    assert predictions(together[0]) != predictions(together[1])


@pytest.mark.parametrize(("persistent", "keep_warm"), [(True, None), (False, 0.01)])
def test_dummy_calls_of_whole_windows_may_stand_between(bundle, persistent, keep_warm):
    backend = Rolling(bundle)
    backend.persistent = persistent
    samples = eeg(230)
    decisions = list(decoder_of((bundle, backend), source_of(bundle, samples), hop=0.1, keep_warm=keep_warm))
    assert backend.sizes == [200, 10, 10, 10]
    whole = list(decoder_of((bundle, Whole(bundle)), source_of(bundle, samples), hop=0.1))
    assert predictions(decisions) == predictions(whole)


def test_whole_windows_are_sent_if_asked(bundle):
    sizes, decisions = sizes_of(bundle, eeg(230), roll=False)
    assert sizes == []
    assert predictions(decisions) == predictions(sizes_of(bundle, eeg(230))[1])


def test_what_cannot_be_given_new_samples_alone_is_refused(bundle):
    source = source_of(bundle, eeg(230))
    with pytest.raises(StreamError, match="The backend torch keeps no window of a stream"):
        decoder_of((bundle, Whole(bundle)), source, roll=True)
    backend = Rolling(bundle)
    backend.persistent = True
    with pytest.raises(StreamError, match="keep_warm"):
        decoder_of((bundle, backend), source, keep_warm=0.01, roll=True)


def test_whole_windows_are_sent_where_a_kernel_that_stays_is_kept_warm(bundle):
    backend = Rolling(bundle)
    backend.persistent = True
    samples = eeg(230)
    decisions = list(decoder_of((bundle, backend), source_of(bundle, samples), hop=0.1, keep_warm=0.01))
    assert backend.sizes == []
    assert predictions(decisions) == predictions(sizes_of(bundle, samples, hop=0.1)[1])


# ---------------------------------------------------------------- the predictor


def test_roll_is_offered_where_the_backend_has_it_and_no_unit_is_checked(bundle):
    assert isinstance(Rolling(bundle), RollingBackend)
    assert Predictor(bundle, Rolling(bundle), check_unit=False).rolling is not None
    new = np.zeros((8, 200), np.float32)
    for backend, check_unit, message in [(Rolling, True, "checks the unit"), (Whole, False, "keeps no window")]:
        predict = Predictor(bundle, backend(bundle), check_unit=check_unit)
        assert predict.rolling is None
        with pytest.raises(BackendError, match=message):
            predict.roll(new)


def with_one(value):
    new = np.zeros((8, 7), np.float32)
    new[3, 2] = value
    return new


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (np.zeros((8, 7)), "float64"),
        ([[0.0]], "list"),
        (np.zeros((1, 8, 7), np.float32), r"shape \(1, 8, 7\)"),
        (np.zeros((7, 7), np.float32), r"shape \(7, 7\)"),
        (np.zeros((8, 0), np.float32), r"shape \(8, 0\)"),
        (np.zeros((8, 201), np.float32), r"shape \(8, 201\)"),
        (with_one(np.nan), "1 samples that are NaN"),
        (with_one(np.inf), "1 samples that are NaN"),
    ],
)
def test_new_samples_that_break_the_contract_break_the_stream(bundle, new, message):
    """What was refused is missing, so that the next samples follow nothing."""
    predict = Predictor(bundle, Rolling(bundle), check_unit=False)
    samples = np.float32(eeg(207)).T
    predict.roll(samples[:, :200].copy())
    with pytest.raises(InputError, match=message):
        predict.roll(new)
    with pytest.raises(InputError, match="No window"):
        predict.roll(samples[:, 200:].copy())
    whole = predict.roll(samples[:, 7:]).copy()  # not contiguous
    assert whole.tobytes() == predict(samples[None, :, 7:].copy()).tobytes()


def test_what_was_returned_stays(bundle):
    predict = Predictor(bundle, Rolling(bundle), check_unit=False)
    samples, out = np.float32(eeg(214)).T, np.zeros((2, 1, 3), np.float32)
    spans = ((0, 200), (200, 207), (207, 214))
    kept = [predict.roll(samples[:, start:stop].copy()) for start, stop in spans]
    wanted = [predict(samples[None, :, stop - 200 : stop].copy()).tobytes() for _, stop in spans]
    assert [array.tobytes() for array in kept] == wanted
    predict.roll(samples[:, :200].copy(), out=out[0])
    assert np.shares_memory(predict.roll(samples[:, 200:207].copy(), out=out[1]), out)
    assert [array.tobytes() for array in out] == wanted[:2]
    with pytest.raises(InputError, match="out is float32 of shape"):
        predict.roll(samples[:, 207:].copy(), out=out[0, 0])
    with pytest.raises(InputError, match="No window"):  # what was refused is missing
        predict.roll(samples[:, 207:].copy())


def test_samples_that_are_not_finite_are_passed_on_request(bundle):
    predict = Predictor(bundle, Rolling(bundle), check_unit=False, non_finite="pass")
    predict.roll(np.float32(eeg(200)).T.copy())
    assert np.isnan(predict.roll(with_one(np.nan))).all()
    assert np.isfinite(predict.roll(np.float32(eeg(200)).T.copy())).all()


def test_large_samples_are_no_error(bundle):
    """Their energy overflows, as that of whole windows may."""
    predict = Predictor(bundle, Rolling(bundle), check_unit=False)
    predict.roll(np.full((8, 200), 1e30, np.float32))


# ---------------------------------------------------------------- the ring


@given(parts=st.lists(st.integers(1, 25), max_size=40), n=st.integers(1, 10))
@settings(deadline=None)
def test_the_newest_samples_of_the_ring(parts, n):
    ring, samples = Ring(3, 10), np.arange(3 * 1010, dtype=np.float64).reshape(1010, 3)
    stop = 10
    ring.extend(samples[:stop])
    for part in parts:
        ring.extend(samples[stop : stop + part])
        stop += part
        newest = ring.newest(n).copy()
        assert ring.newest(n).flags.c_contiguous
        np.testing.assert_array_equal(newest, samples[stop - n : stop].T)
        np.testing.assert_array_equal(ring.window(), samples[None, stop - 10 : stop].transpose(0, 2, 1))
