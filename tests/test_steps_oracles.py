"""Steps compute what SciPy, MNE, braindecode and pyriemann compute."""

import functools
import warnings

import mne
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import import_braindecode

from sjepa_deploy.eeg.steps.alignment import Alignment, RunningAlignment, inverse_root
from sjepa_deploy.eeg.steps.amplitude import Clip, Scale
from sjepa_deploy.eeg.steps.base import Flow, Goal, run_offline
from sjepa_deploy.eeg.steps.baseline import Baseline
from sjepa_deploy.eeg.steps.filters import BandPass
from sjepa_deploy.eeg.steps.notch import Notch
from sjepa_deploy.eeg.steps.rate import Resample
from sjepa_deploy.eeg.steps.reference import Reference
from sjepa_deploy.eeg.steps.standardise import ExponentialStandardise, ZScore
from sjepa_deploy.errors import DataError, SpecError

with warnings.catch_warnings():  # the dependencies of both warn about each other
    warnings.simplefilter("ignore")
    import pyriemann.utils.base
    import pyriemann.utils.covariance

    import_braindecode()
    from braindecode.preprocessing import exponential_moving_standardize


def flow_of(n_chans, sfreq):
    ch_names = tuple(f"C{i}" for i in range(n_chans))
    return Flow(ch_names=ch_names, sfreq=sfreq, goal=Goal(n_chans=n_chans, n_times=200, sfreq=sfreq, ch_names=ch_names))


def eeg(n_chans, n_samples, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n_chans, n_chans)) @ rng.normal(size=(n_chans, n_samples))
    return 10 * scipy.signal.lfilter([1], [1, -0.9], mixed, axis=1) + offset


# ---------------------------------------------------------------- band-pass, rate and reference


def lfiltered(data, *filters):
    """Return what SciPy's polynomial filters make of each channel, from the steady state of its first sample on."""
    out = data.copy()
    for b, a in filters:
        for channel in out:
            channel[:] = scipy.signal.lfilter(b, a, channel, zi=scipy.signal.lfilter_zi(b, a) * channel[0])[0]
    return out


@pytest.mark.parametrize("sfreq", [128.0, 500.0])
@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize(("l_freq", "h_freq"), [(1.0, 40.0), (2.0, None), (None, 30.0)])
def test_a_causal_band_pass_filters_as_scipy_does(sfreq, order, l_freq, h_freq):
    data, flow = eeg(3, 3000, offset=200.0), flow_of(3, sfreq)  # lfilter itself loses digits by large offsets
    for design, make in (("butterworth", scipy.signal.butter), ("bessel", functools.partial(scipy.signal.bessel, norm="mag"))):
        edges = [(edge, kind) for edge, kind in ((l_freq, "highpass"), (h_freq, "lowpass")) if edge is not None]
        expected = lfiltered(data, *(make(order, edge, kind, fs=sfreq) for edge, kind in edges))
        step = BandPass(l_freq=l_freq, h_freq=h_freq, order=order, design=design)
        np.testing.assert_allclose(run_offline(step.causal(flow), data), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("l_freq", "h_freq"), [(1.0, 40.0), (2.0, None), (None, 30.0)])
def test_a_band_pass_without_phase_is_mnes(l_freq, h_freq):
    data, step = eeg(3, 3000, offset=2e4), BandPass(l_freq=l_freq, h_freq=h_freq)
    raw = mne.io.RawArray(data.copy(), mne.create_info(3, 128.0, "eeg"), verbose="error").filter(l_freq, h_freq, verbose="error")
    np.testing.assert_allclose(step.offline(data, flow_of(3, 128.0)), raw.get_data(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("factor", [2, 4, 5])
def test_a_causal_reduction_of_the_rate_is_scipys_low_pass_and_every_nth_sample(factor):
    data, flow = eeg(3, 3000, offset=2e4), flow_of(3, 100.0).replace(sfreq=100.0 * factor)
    sos = scipy.signal.cheby2(8, 40.0, 50.0, "lowpass", fs=100.0 * factor, output="sos")
    zi = scipy.signal.sosfilt_zi(sos)
    expected = np.stack([scipy.signal.sosfilt(sos, channel, zi=zi * channel[0])[0][::factor] for channel in data])
    np.testing.assert_allclose(run_offline(Resample().causal(flow), data), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("named", [None, ("C1",), ("C0", "C3")])
def test_a_reference_is_mnes(named):
    data, flow, step = eeg(5, 400, offset=2e4), flow_of(5, 100.0), Reference(channels=named)
    raw = mne.io.RawArray(data.copy(), mne.create_info(list(flow.ch_names), 100.0, "eeg"), verbose="error")
    expected = raw.set_eeg_reference("average" if named is None else list(named), verbose="error").get_data()
    np.testing.assert_allclose(step.offline(data, flow), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(run_offline(step.causal(flow), data), expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- notch


@pytest.mark.parametrize(
    ("notch", "sfreq", "frequencies"),
    [
        (Notch(), 500.0, (50, 100, 150, 200)),  # 250 is the Nyquist frequency
        (Notch(freq=60.0), 1000.0, (60, 120, 180, 240, 300, 360, 420, 480)),
        (Notch(freq=60.0, harmonics=2), 256.0, (60, 120)),
        (Notch(harmonics=5), 128.0, (50,)),
    ],
)
def test_a_notch_filters_as_scipy_does_channel_by_channel(notch, sfreq, frequencies):
    data = eeg(3, 2000, offset=2e4)
    expected = lfiltered(data, *(scipy.signal.iirnotch(frequency, notch.quality, fs=sfreq) for frequency in frequencies))
    flow = flow_of(3, sfreq)
    np.testing.assert_allclose(run_offline(notch.causal(flow), data), expected, rtol=0, atol=1e-7)
    assert f"{', '.join(map(str, frequencies))} Hz" in notch.told(flow)


@pytest.mark.parametrize("sfreq", [500.0, 256.0])
def test_a_notch_without_phase_takes_the_mains_away_and_moves_nothing(sfreq):
    notch, flow = Notch(), flow_of(1, sfreq)
    t = np.arange(round(30 * sfreq)) / sfreq
    middle = slice(round(10 * sfreq), round(20 * sfreq))
    for frequency in (50.0, 100.0):
        out = notch.offline(np.sin(2 * np.pi * frequency * t)[None], flow)[0]
        assert np.abs(out[middle]).max() < 1e-6
    for frequency in (3.0, 10.0, 49.0, 51.5, 80.0):
        sine = np.sin(2 * np.pi * frequency * t)
        gain = 1.0
        for notched in notch.frequencies(sfreq):
            _, response = scipy.signal.freqz(*scipy.signal.iirnotch(notched, 30, fs=sfreq), worN=[frequency], fs=sfreq)
            gain *= abs(response[0]) ** 2
        np.testing.assert_allclose(notch.offline(sine[None], flow)[0][middle], gain * sine[middle], rtol=0, atol=1e-6)


def test_a_notch_without_phase_is_the_causal_one_there_and_back():
    notch, flow, data = Notch(), flow_of(2, 250.0), eeg(2, 4000)
    there = run_offline(notch.causal(flow), data)
    back = run_offline(notch.causal(flow), np.ascontiguousarray(there[:, ::-1]))[:, ::-1]
    np.testing.assert_allclose(notch.offline(data, flow)[:, 1000:-1000], back[:, 1000:-1000], rtol=0, atol=1e-3)


def test_a_notch_takes_a_short_stretch():
    assert Notch().offline(eeg(2, 7), flow_of(2, 500.0)).shape == (2, 7)
    assert Notch().offline(eeg(2, 1), flow_of(2, 500.0)).shape == (2, 1)


# ---------------------------------------------------------------- standardisation


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_chans=st.integers(1, 5),
    n_samples=st.integers(1, 3000),
    factor_new=st.sampled_from([1e-3, 1e-2, 0.3, 1e-4]),
    eps=st.sampled_from([1e-4, 1.0, 50.0]),
    offset=st.sampled_from([0.0, 2e4]),
)
def test_a_moving_standardisation_is_braindecodes(seed, n_chans, n_samples, factor_new, eps, offset):
    data = eeg(n_chans, n_samples, seed, offset)
    ours = ExponentialStandardise(factor_new=factor_new, eps=eps).offline(data, flow_of(n_chans, 250.0))
    theirs = exponential_moving_standardize(data, factor_new=factor_new, eps=eps, init_block_size=None)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_moving_standardisation_is_braindecodes_after_its_initial_block():
    data = eeg(4, 5000)
    ours = ExponentialStandardise().offline(data, flow_of(4, 250.0))
    theirs = exponential_moving_standardize(data, init_block_size=1000)
    np.testing.assert_allclose(ours[:, 1000:], theirs[:, 1000:], rtol=0, atol=1e-6)
    assert np.abs(ours[:, :1000] - theirs[:, :1000]).max() > 0.1  # the block looks ahead


def test_a_constant_is_standardised_to_zeros_whatever_the_electrode_offset():
    data = np.full((2, 50_000), 19_876.54321)
    np.testing.assert_array_equal(ExponentialStandardise().offline(data, flow_of(2, 500.0)), np.zeros_like(data))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_chans=st.integers(1, 5),
    stretch=st.tuples(st.integers(0, 150), st.integers(2, 50)) | st.none(),
)
def test_a_z_score_is_scipys(seed, n_chans, stretch):
    windows = np.stack([eeg(n_chans, 200, seed + i, 1e3) for i in range(3)])
    goal = flow_of(n_chans, 128.0).goal
    if stretch is None:
        np.testing.assert_allclose(ZScore().on_windows(windows, goal), scipy.stats.zscore(windows, axis=-1), rtol=0, atol=1e-9)
        return
    first, n = stretch
    step = ZScore(start=first / 128, stop=(first + n) / 128)
    step.check(goal)
    expected = scipy.stats.zmap(windows, windows[..., first : first + n], axis=-1)
    np.testing.assert_allclose(step.on_windows(windows, goal), expected, rtol=1e-9, atol=1e-9)


def test_a_flat_channel_has_a_z_score_of_zero():
    windows = np.full((2, 3, 200), 7.25)
    np.testing.assert_array_equal(ZScore().on_windows(windows, flow_of(3, 100.0).goal), np.zeros((2, 3, 200)))


# ---------------------------------------------------------------- baseline


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    sfreq=st.sampled_from([100.0, 128.0, 250.0, 1000 / 3]),
    start=st.integers(-300, 100).map(lambda ms: ms / 1000),
    tmin=st.none() | st.integers(-400, 900).map(lambda ms: ms / 1000),
    tmax=st.none() | st.integers(-400, 900).map(lambda ms: ms / 1000),
)
def test_a_baseline_is_mnes(seed, sfreq, start, tmin, tmax):
    assume(tmin is None or tmax is None or tmin <= tmax)
    assume(not (tmin is None and tmax == 0 and round(start * sfreq) == 0))  # MNE asks whether one sample is meant
    windows = np.stack([eeg(3, 120, seed + i, 100.0) for i in range(2)])
    info = mne.create_info(3, sfreq, "eeg")
    epochs = mne.EpochsArray(windows.copy(), info, tmin=round(start * sfreq) / sfreq, baseline=None, verbose="error")
    step, goal = Baseline(tmin=tmin, tmax=tmax), Goal(n_chans=3, n_times=120, sfreq=sfreq, start=start)
    try:
        expected = epochs.apply_baseline((tmin, tmax), verbose="error").get_data()
    except ValueError:
        with pytest.raises(SpecError):
            step.check(goal)
        return
    step.check(goal)
    np.testing.assert_allclose(step.on_windows(windows, goal), expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- amplitudes


def test_clipping_and_scaling():
    data = eeg(3, 500)
    flow = flow_of(3, 100.0)
    expected = np.minimum(np.maximum(data, -20.0), 20.0)
    np.testing.assert_array_equal(Clip(limit=20.0).offline(data, flow), expected)
    assert (expected != data).any()
    np.testing.assert_array_equal(Scale(factors=(0.5,)).offline(data, flow), data / 2)
    by_channel = Scale(factors=(1.0, 2.0, -4.0), ch_names=flow.ch_names).offline(data, flow)
    np.testing.assert_array_equal(by_channel, np.stack([data[0], 2 * data[1], -4 * data[2]]))


# ---------------------------------------------------------------- alignment


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), n_chans=st.integers(1, 8), n_windows=st.integers(1, 6))
def test_a_fitted_alignment_is_pyriemanns(seed, n_chans, n_windows):
    windows = eeg(n_chans, 200 * n_windows, seed).reshape(n_chans, n_windows, 200).swapaxes(0, 1)
    flow = flow_of(n_chans, 100.0)
    step = Alignment.fit(windows, flow.ch_names)
    mean = pyriemann.utils.covariance.covariances(windows, estimator="scm", assume_centered=True).mean(axis=0)
    expected = pyriemann.utils.base.invsqrtm(mean)
    np.testing.assert_allclose(step.matrix, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    aligned = np.stack([step.offline(window, flow) for window in windows])
    np.testing.assert_allclose(aligned, expected @ windows, rtol=0, atol=1e-7 * np.abs(expected @ windows).max())
    second = pyriemann.utils.covariance.covariances(aligned, estimator="scm", assume_centered=True).mean(axis=0)
    np.testing.assert_allclose(second, np.eye(n_chans), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("seed", range(6))
def test_an_average_reference_loses_a_rank_and_no_more(dtype, seed):
    data = eeg(6, 3000, seed)
    windows = (data - data.mean(axis=0)).reshape(6, 10, 300).swapaxes(0, 1).astype(dtype)
    flow = flow_of(6, 100.0)
    step = Alignment.fit(windows, flow.ch_names)
    aligned = np.stack([step.offline(window.astype(float), flow) for window in windows])
    second = pyriemann.utils.covariance.covariances(aligned, estimator="scm", assume_centered=True).mean(axis=0)
    np.testing.assert_allclose(second, np.eye(6) - 1 / 6, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.array(step.matrix) @ np.ones(6), 0, atol=1e-6 * np.abs(step.matrix).max())


def test_shrinkage_is_towards_the_mean_variance():
    covariance = np.cov(eeg(5, 100))
    shrunk = 0.7 * covariance + 0.3 * covariance.trace() / 5 * np.eye(5)
    np.testing.assert_allclose(inverse_root(covariance, 0.3), scipy.linalg.fractional_matrix_power(shrunk, -0.5), rtol=1e-9)


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        (np.zeros((3, 2, 50)), "no signal"),
        (np.full((3, 2, 50), np.nan), "no numbers"),
        (np.ones((3, 4, 50)), "shape"),
        (np.ones((2, 50)), "shape"),
        (np.ones((0, 2, 50)), "shape"),
    ],
)
def test_an_alignment_is_not_fitted_from_nothing(windows, words):
    with pytest.raises(DataError, match=words):
        Alignment.fit(windows, ("C0", "C1"))


@pytest.mark.parametrize("block", [0.5, 2.0])
def test_a_running_alignment_uses_the_blocks_that_have_ended(block):
    sfreq, n_chans, n_block = 200.0, 4, round(block * 200)
    step = RunningAlignment(block=block, half_life=3.0, shrinkage=0.1)
    data = eeg(n_chans, 5 * n_block + 37, offset=2e4)
    data[:, 3 * n_block :] *= 2.0
    aligned = step.offline(data, flow_of(n_chans, sfreq))
    matrix, blocks = np.eye(n_chans), []
    for start in range(0, data.shape[1], n_block):
        piece = data[:, start : start + n_block]
        np.testing.assert_allclose(aligned[:, start : start + n_block], matrix @ piece, rtol=1e-7, atol=1e-4)
        blocks.append(np.cov(piece, bias=True))
        weights = 0.5 ** (np.arange(len(blocks))[::-1] * block / 3.0)
        mean = np.average(blocks, axis=0, weights=weights)
        shrunk = 0.9 * mean + 0.1 * mean.trace() / n_chans * np.eye(n_chans)
        matrix = scipy.linalg.fractional_matrix_power(shrunk, -0.5)


def test_a_running_alignment_survives_a_flat_beginning():
    data = eeg(3, 4000)
    data[:, :1000] = 5.0
    step, flow = RunningAlignment(block=2.0, half_life=10.0), flow_of(3, 200.0)
    aligned = step.offline(data, flow)
    np.testing.assert_array_equal(aligned[:, :1200], data[:, :1200])  # the first block that moves ends at 1200
    assert np.isfinite(aligned).all()
    assert np.abs(aligned[:, 1200:] - data[:, 1200:]).max() > 1
