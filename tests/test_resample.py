"""Resampling against the signals themselves: sums of sines, which are known at every time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sincs import sinc_sums

from sjepa_deploy.eeg.steps.rate import PASS, check_rate, resample, resampled_n_times
from sjepa_deploy.errors import RecordingError

RATES = (200, 250, 256, 512, 1024, 2048, 500, 1000, 480, 300, 220, 128, 125, 600.614990234375, 500.02, 999.4121105232217)


def delay_ms(y, hertz, sfreq, start):
    """Return by how many milliseconds 2 s of a sine from sample `start` on come too late."""
    i = np.arange(start, start + round(2 * sfreq))
    return -(np.angle((y[i] * np.exp(-2j * np.pi * hertz * i / sfreq)).sum()) + np.pi / 2) / (2 * np.pi * hertz) * 1e3


@pytest.mark.parametrize("seconds", [12, 61.3, 211])
@pytest.mark.parametrize("sfreq", [*RATES, 1024 / 7, 511.9987])
def test_a_sine_stays_in_its_place_at_every_rate_and_length(sfreq, seconds):
    t = np.arange(int(seconds * sfreq)) / sfreq
    y = resample(2e-5 * np.sin(2 * np.pi * 10 * t)[None], sfreq, 100.0)[0]
    assert len(y) == np.count_nonzero(np.arange(len(t)) / 100 <= t[-1] + 1e-9)
    late = [delay_ms(y, 10, 100, start) for start in (300, len(y) // 2, len(y) - 500)]
    assert np.abs(late).max() < 1e-3  # 0.05 is asked for
    truth = 2e-5 * np.sin(2 * np.pi * 10 * np.arange(len(y)) / 100)
    np.testing.assert_allclose(y[100:-100], truth[100:-100], rtol=0, atol=2e-5 * 1e-4)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    sfreq_in=st.floats(100, 1200),
    sfreq_out=st.floats(60, 200),
    offset=st.floats(-2e4, 2e4),
)
def test_band_limited_signals_come_out_as_they_are_and_others_not_at_all(seed, sfreq_in, sfreq_out, offset):
    sfreq_out = min(sfreq_in, sfreq_out)
    rng = np.random.default_rng(seed)
    nyquist = sfreq_out / 2
    inside, phase = rng.uniform(0.5, PASS * nyquist, 5), rng.uniform(0, 2 * np.pi, 5)
    t_in = np.arange(round(6 * sfreq_in)) / sfreq_in

    def signal(t):
        return 10 * np.sin(2 * np.pi * inside[:, None] * t + phase[:, None]).sum(axis=0) + offset

    folded = 0.0
    if sfreq_in > 1.001 * sfreq_out:  # what would fold back below the new Nyquist frequency
        folded = 10 * np.sin(2 * np.pi * rng.uniform(nyquist, sfreq_in / 2) * t_in)
    y = resample((signal(t_in) + folded)[None], sfreq_in, sfreq_out)[0]
    t_out = np.arange(len(y)) / sfreq_out
    far = (t_out > 2) & (t_out < 4)
    np.testing.assert_allclose(y[far], signal(t_out)[far], rtol=0, atol=2e-3)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    sfreq=st.sampled_from([128.0, 250.0, 500.0, 500.02, 600.614990234375]),
    cut=st.floats(0.0, 5.0),
)
def test_a_sample_depends_on_its_surroundings_alone(seed, sfreq, cut):
    """Another file, of another length and with other EEG more than a second away, has the same sample."""
    rng = np.random.default_rng(seed)
    n = round(12 * sfreq)
    whole = rng.normal(0, 20, (2, n))
    other = whole[:, : round((6 + 1 + cut) * sfreq)].copy()
    other[:, : round(3 * sfreq)] = rng.normal(0, 500, (2, round(3 * sfreq)))
    a, b = resample(whole, sfreq, 100.0), resample(other, sfreq, 100.0)
    np.testing.assert_allclose(a[:, 400:600], b[:, 400:600], rtol=0, atol=1e-11)


@pytest.mark.parametrize("sfreq", [128.0, 250.0, 500.02, 1000 / 3])
def test_resampling_equals_sums_of_sincs_by_hand(sfreq):
    x = np.random.default_rng(3).normal(0, 20, (2, round(4 * sfreq)))
    np.testing.assert_allclose(resample(x, sfreq, 100.0), sinc_sums(x, sfreq, 100.0), rtol=0, atol=2e-6)


def test_the_same_rate_changes_nothing_and_ends_do_not_ring():
    x = np.random.default_rng(0).normal(0, 1, (3, 500))
    assert resample(x, 250.0, 250.0) is x
    ramp = 2e4 + 30 * np.arange(2000) / 500  # an electrode's offset and drift
    y = resample(np.tile(ramp, (2, 1)), 500.0, 100.0)
    np.testing.assert_allclose(y, np.tile(2e4 + 30 * np.arange(400) / 100, (2, 1)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("n_times", "sfreq_in", "sfreq_out", "n_out"),
    [(500, 500, 100, 100), (501, 500, 100, 101), (256, 128, 100, 200), (257, 128, 100, 201), (1, 500, 100, 1), (0, 500, 100, 0)],
)
def test_there_are_samples_from_the_first_to_the_last(n_times, sfreq_in, sfreq_out, n_out):
    assert resampled_n_times(n_times, sfreq_in, sfreq_out) == n_out
    assert resample(np.zeros((1, n_times)), sfreq_in, sfreq_out).shape == (1, n_out)


def test_a_rate_a_hair_below_the_models_is_the_crystals():
    check_rate(99.995, 100.0)
    t = np.arange(3000) / 99.995
    y = resample(np.sin(2 * np.pi * 10 * t)[None], 99.995, 100.0)[0]
    np.testing.assert_allclose(y[200:-200], np.sin(2 * np.pi * 10 * np.arange(len(y)) / 100)[200:-200], atol=1e-4)
    with pytest.raises(RecordingError, match=r"sampled at 99 Hz, the model at 100 Hz.*upsampling"):
        check_rate(99.0, 100.0)
