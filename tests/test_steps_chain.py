"""A chain of steps is its steps one after the other, whatever they are, however the samples come."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sjepa_deploy.eeg.chain import Chain, algorithmic_delay, finish_windows, flows_of, settling_time
from sjepa_deploy.eeg.steps import (
    BandPass,
    Baseline,
    Channels,
    Clip,
    ExponentialStandardise,
    Notch,
    Reference,
    Resample,
    RunningAlignment,
    Scale,
    ZScore,
)
from sjepa_deploy.eeg.steps.base import Flow, Goal
from sjepa_deploy.eeg.steps.channels import Mixer
from sjepa_deploy.errors import SpecError
from sjepa_deploy.spec import EventWindow, SignalSpec

MODEL, STREAM = ("Fz", "Cz", "Pz", "Oz"), ("Cz", "Oz", "M1", "Fz", "Pz")
MATRIX = np.array([[name == wanted for name in STREAM] for wanted in MODEL], dtype=float)
MATRIX[3] = [0.25, 0.0, 0.0, 0.25, 0.5]  # one channel is interpolated

anywhere = [
    BandPass(l_freq=1.0, h_freq=30.0),
    BandPass(l_freq=None, h_freq=20.0, order=4, design="bessel"),
    Notch(freq=24.0),
    Reference(),
    ExponentialStandardise(factor_new=1e-2),
    Clip(limit=8.0),
    Scale(factors=(0.5,)),
    RunningAlignment(block=0.4, half_life=2.0),
]
chains = st.lists(st.sampled_from(anywhere), max_size=5).flatmap(lambda steps: st.permutations([*steps, Resample(), Channels()]))


def signal_of(*steps):
    return SignalSpec(
        n_chans=4, n_times=100, sfreq=100.0, ch_names=MODEL, steps=tuple(steps), event_window=EventWindow(start=-0.2)
    )


def stream(n_samples, seed):
    rng = np.random.default_rng(seed)
    return 10 * rng.normal(size=(n_samples, 5)) + np.cumsum(rng.normal(size=(n_samples, 5)), axis=0) + rng.uniform(-1e3, 1e3, 5)


@settings(deadline=None, max_examples=60)
@given(
    steps=chains,
    sfreq=st.sampled_from([100.0, 128.0, 500.0, 512.0, 1000 / 3]),
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 700), max_size=8),
)
def test_a_chain_is_its_steps_one_after_the_other(steps, sfreq, seed, cuts):
    signal, samples = signal_of(*steps), stream(700, seed)
    chain = Chain(signal, STREAM, sfreq, MATRIX)
    chain.start(samples[0])
    whole, rows = chain(samples)

    cut = Chain(signal, STREAM, sfreq, MATRIX)
    cut.start(samples[0])
    edges = [0, *sorted(cuts), 700]
    pieces = [cut(samples[start:stop]) for start, stop in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate([made for made, _ in pieces]), whole)
    assert [start + row for start, (_, of_piece) in zip(edges[:-1], pieces, strict=True) for row in of_piece] == rows

    expected, first = samples, samples[0]
    for step, flow in zip(signal.steps, flows_of(signal, Flow(ch_names=STREAM, sfreq=sfreq, goal=signal.goal)), strict=True):
        running = Mixer(MATRIX) if isinstance(step, Channels) else step.causal(flow)
        first, expected = running.start(first), running(expected)
    np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@settings(deadline=None, max_examples=20)
@given(steps=chains, seed=st.integers(0, 2**32 - 1))
def test_a_chain_starts_anew_as_a_new_one(steps, seed):
    signal, samples = signal_of(*steps), stream(500, seed)
    used, fresh = (Chain(signal, STREAM, 250.0, MATRIX) for _ in range(2))
    used.start(samples[3])
    used(samples)
    used.start(samples[0])
    fresh.start(samples[0])
    np.testing.assert_array_equal(used(samples)[0], fresh(samples)[0])


def test_a_chain_settles_and_delays_as_its_steps_together():
    steps = (BandPass(), Notch(), Resample(), Channels(), ExponentialStandardise())
    signal = signal_of(*steps)
    fast, slow = (Flow(ch_names=MODEL, sfreq=sfreq, goal=signal.goal) for sfreq in (500.0, 100.0))
    each = [step.settling(fast) for step in steps[:3]] + [steps[4].settling(slow)]
    assert settling_time(signal, 500.0) == pytest.approx(sum(each))
    for hertz, late in algorithmic_delay(signal, 500.0).at_hz:
        assert late == pytest.approx(sum(step.delay(hertz, fast) for step in steps[:3]))


def test_steps_on_windows_follow_each_other():
    signal = signal_of(Resample(), Channels(), Baseline(), ZScore(start=0.0, stop=0.5))
    windows = stream(400, 0)[:, :4].T.reshape(4, 4, 100).swapaxes(0, 1).astype(np.float32)
    expected = windows.astype(float) - windows[..., :21].mean(axis=-1, keepdims=True, dtype=float)
    expected = (expected - expected[..., :50].mean(axis=-1, keepdims=True)) / expected[..., :50].std(axis=-1, keepdims=True)
    np.testing.assert_allclose(finish_windows(signal, windows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((Resample(),), "channels"),
        ((Resample(), Resample(), Channels()), "resample"),
        ((Channels(), ZScore(), Resample()), "z-score"),
        ((Resample(), Channels(), Baseline(tmin=-0.5)), "baseline"),
    ],
)
def test_a_signal_refuses_a_chain_that_cannot_be(steps, words):
    with pytest.raises(SpecError, match=words):
        signal_of(*steps)


def test_a_goal_is_what_the_signal_ends_with():
    assert signal_of(Resample(), Channels()).goal == Goal(n_chans=4, n_times=100, sfreq=100.0, ch_names=MODEL, start=-0.2)
