"""Every step of the table does what a step promises: one test a promise, all steps through each.

What a single step computes is compared with SciPy, MNE, braindecode and pyriemann in `test_steps_oracles.py`.
"""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sjepa_deploy.eeg.steps import STEPS
from sjepa_deploy.eeg.steps.alignment import Alignment, RunningAlignment
from sjepa_deploy.eeg.steps.amplitude import Clip, Scale
from sjepa_deploy.eeg.steps.base import SETTLED, Flow, Goal, Step, StreamStep, WindowStep, run_offline
from sjepa_deploy.eeg.steps.baseline import Baseline
from sjepa_deploy.eeg.steps.channels import Channels, Mixer
from sjepa_deploy.eeg.steps.filters import BandPass
from sjepa_deploy.eeg.steps.notch import Notch
from sjepa_deploy.eeg.steps.rate import Resample
from sjepa_deploy.eeg.steps.reference import Reference
from sjepa_deploy.eeg.steps.standardise import ExponentialStandardise, ZScore
from sjepa_deploy.errors import SpecError
from sjepa_deploy.serialize import decode, encode


def names(n_chans):
    return tuple(f"C{i}" for i in range(n_chans))


def fitted_alignment(n_chans):
    mixed = np.random.default_rng(n_chans).normal(size=(n_chans, n_chans)) @ noise(n_chans, 2000, n_chans)
    return Alignment.fit(mixed.reshape(n_chans, 10, 200).swapaxes(0, 1), names(n_chans))


def noise(n_chans, n_samples, seed):
    """Return what EEG looks like: more power at low frequencies, and an electrode offset."""
    rng = np.random.default_rng(seed)
    slow = np.cumsum(rng.normal(size=(n_chans, n_samples)), axis=1)
    slow -= np.cumsum(np.mean(np.diff(slow, axis=1, prepend=0), axis=1, keepdims=True) * np.ones(n_samples), axis=1)
    return 3 * rng.normal(size=(n_chans, n_samples)) + slow / np.sqrt(n_samples) * 10 + rng.uniform(-100, 100, (n_chans, 1))


# Every step of the table at least once, as a function of the number of channels.
EXAMPLES = {
    "band-pass": lambda n: BandPass(l_freq=1.0, h_freq=30.0),
    "high-pass of order 3": lambda n: BandPass(l_freq=2.0, h_freq=None, order=3),
    "bessel": lambda n: BandPass(l_freq=None, h_freq=20.0, design="bessel", order=4),
    "notch": lambda n: Notch(),
    "one notch": lambda n: Notch(freq=24.0, harmonics=1, quality=5.0),
    "resample": lambda n: Resample(),
    "channels": lambda n: Channels(),
    "average reference": lambda n: Reference(),
    "named reference": lambda n: Reference(channels=("C1",)),
    "exponential-standardise": lambda n: ExponentialStandardise(factor_new=5e-3),
    "z-score": lambda n: ZScore(),
    "z-score by a stretch": lambda n: ZScore(start=0.1, stop=0.5),
    "baseline": lambda n: Baseline(),
    "baseline over a stretch": lambda n: Baseline(tmin=0.1, tmax=0.3),
    "clip": lambda n: Clip(limit=5.0),
    "scale": lambda n: Scale(factors=(1e-6,)),
    "scale by channel": lambda n: Scale(factors=tuple(1.0 + i for i in range(n)), ch_names=names(n)),
    "alignment": fitted_alignment,
    "running-alignment": lambda n: RunningAlignment(block=0.7, half_life=1.0),
}
CAUSAL_ONLY = (ExponentialStandardise, RunningAlignment)
ON_STREAMS = [name for name, make in EXAMPLES.items() if not isinstance(make(3), WindowStep)]
WITH_BOTH_FORMS = [name for name, make in EXAMPLES.items() if isinstance(make(3), StreamStep)]
ON_WINDOWS = [name for name, make in EXAMPLES.items() if isinstance(make(3), WindowStep)]

n_channels = st.integers(2, 5)
rates = st.sampled_from([128.0, 250.0, 500.0, 512.0, 1000 / 3, 500.02])
seeds = st.integers(0, 2**32 - 1)


def flow_of(n_chans, sfreq):
    goal = Goal(n_chans=n_chans, n_times=100, sfreq=100.0, ch_names=names(n_chans), start=-0.2)
    return Flow(ch_names=names(n_chans), sfreq=sfreq, goal=goal)


def running_of(step, flow):
    """Return the causal form; that of the channels multiplies by weights that are known where electrodes are."""
    if isinstance(step, Channels):
        weights = np.random.default_rng(1).normal(size=(len(flow.ch_names), len(flow.ch_names)))
        weights[0] = np.arange(len(weights)) == 1  # a channel that is picked
        return Mixer(weights)
    return step.causal(flow)


def test_every_step_of_the_table_has_an_example():
    assert {type(make(3)) for make in EXAMPLES.values()} == set(STEPS.values())
    assert all(step.name == name for name, step in STEPS.items())


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_step_goes_to_json_and_back(name):
    step = EXAMPLES[name](3)
    stored = json.loads(json.dumps(encode(step)))
    assert stored["step"] == step.name
    assert decode(Step, stored) == step


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_step_fits_the_model_and_tells_what_it_does(name):
    step, flow = EXAMPLES[name](3), flow_of(3, 250.0)
    step.check(flow.goal)
    assert "\n" not in step.told(flow)
    assert step.memory or step.settling(flow) == 0
    assert not step.memory or 0 < step.settling(flow) < 30


@pytest.mark.parametrize("name", ON_STREAMS)
@settings(deadline=None, max_examples=25)
@given(n_chans=n_channels, sfreq=rates, seed=seeds, cuts=st.lists(st.integers(0, 900), max_size=12))
def test_the_causal_form_does_not_depend_on_the_chunks(name, n_chans, sfreq, seed, cuts):
    step, flow = EXAMPLES[name](n_chans), flow_of(n_chans, sfreq)
    samples = np.ascontiguousarray(noise(n_chans, 900, seed).T)
    whole, cut = running_of(step, flow), running_of(step, flow)
    np.testing.assert_array_equal(whole.start(samples[0]), cut.start(samples[0]))
    expected = whole(samples)
    edges = [0, *sorted(cuts), 900]
    pieces = [cut(samples[start:stop]) for start, stop in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(pieces), expected)
    single = running_of(step, flow)
    single.start(samples[0])
    np.testing.assert_array_equal(np.concatenate([single(samples[i : i + 1]) for i in range(900)]), expected)


@pytest.mark.parametrize("name", ON_STREAMS)
@settings(deadline=None, max_examples=10)
@given(n_chans=n_channels, sfreq=rates, seed=seeds)
def test_a_start_forgets_what_was_before_and_leaves_what_went_in(name, n_chans, sfreq, seed):
    step, flow = EXAMPLES[name](n_chans), flow_of(n_chans, sfreq)
    samples = np.ascontiguousarray(noise(n_chans, 500, seed).T)
    fresh, used, before = running_of(step, flow), running_of(step, flow), samples.copy()
    used.start(samples[7])
    used(samples)
    np.testing.assert_array_equal(used.start(samples[0]), fresh.start(samples[0]))
    np.testing.assert_array_equal(used(samples), fresh(samples))
    np.testing.assert_array_equal(samples, before)


@pytest.mark.parametrize("name", ON_STREAMS)
@settings(deadline=None, max_examples=10)
@given(n_chans=n_channels, sfreq=rates, seed=seeds)
def test_a_constant_gives_a_constant_from_the_start(name, n_chans, sfreq, seed):
    step, flow = EXAMPLES[name](n_chans), flow_of(n_chans, sfreq)
    running = running_of(step, flow)
    sample = np.random.default_rng(seed).uniform(-2e4, 2e4, n_chans)
    first = running.start(sample)
    out = running(np.tile(sample, (1000, 1)))
    assert len(out)
    np.testing.assert_allclose(out, np.tile(first, (len(out), 1)), rtol=0, atol=2e4 * 1e-9)


@pytest.mark.parametrize("name", [name for name in WITH_BOTH_FORMS if not EXAMPLES[name](3).memory])
@settings(deadline=None, max_examples=10)
@given(n_chans=n_channels, sfreq=rates, seed=seeds)
def test_the_forms_of_a_step_without_memory_are_one(name, n_chans, sfreq, seed):
    step, flow = EXAMPLES[name](n_chans), flow_of(n_chans, sfreq)
    data = noise(n_chans, 300, seed)
    causal = run_offline(step.causal(flow), data)
    np.testing.assert_allclose(step.offline(data, flow), causal, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(run_offline(step.causal(flow), data[:, 100:]), causal[:, 100:])


@pytest.mark.parametrize("name", [name for name in WITH_BOTH_FORMS if isinstance(EXAMPLES[name](3), CAUSAL_ONLY)])
@settings(deadline=None, max_examples=10)
@given(n_chans=n_channels, sfreq=rates, seed=seeds, cut=st.integers(0, 900))
def test_the_offline_form_of_a_causal_step_is_the_live_one(name, n_chans, sfreq, seed, cut):
    step, flow = EXAMPLES[name](n_chans), flow_of(n_chans, sfreq)
    data = noise(n_chans, 900, seed)
    live = step.causal(flow)
    live.start(data[:, 0])
    pieces = [live(np.ascontiguousarray(data[:, :cut].T)), live(np.ascontiguousarray(data[:, cut:].T))]
    np.testing.assert_array_equal(step.offline(data, flow), np.concatenate(pieces).T)


@pytest.mark.parametrize("name", ON_STREAMS)
@pytest.mark.parametrize("sfreq", [200.0, 500.0])
def test_a_run_that_joins_later_is_the_same_after_the_settling_time(name, sfreq):
    step, flow = EXAMPLES[name](4), flow_of(4, sfreq)
    joined = round(21 * sfreq)  # at whole blocks of a running alignment, and at a sample of the new rate
    settled = step.settling(flow)
    data = noise(4, joined + round((settled + 10) * sfreq), 5)
    early, late = running_of(step, flow), running_of(step, flow)
    early.start(data[:, 0])
    late.start(data[:, joined])
    sfreq_out = step.after(flow).sfreq
    expected = early(np.ascontiguousarray(data.T))[round(21 * sfreq_out) :]
    apart = np.abs(late(np.ascontiguousarray(data[:, joined:].T)) - expected)
    size = np.abs(expected - expected.mean(axis=0)).max()
    if step.memory:
        assert apart[: max(1, round(settled / 20 * sfreq_out))].max() > SETTLED * size, "there is something to settle"
    assert apart[int(np.ceil(settled * sfreq_out)) :].max() < SETTLED * size


@pytest.mark.parametrize("name", ["band-pass", "high-pass of order 3", "bessel", "notch", "one notch", "resample"])
@pytest.mark.parametrize("sfreq", [500.0, 128.0, 1000 / 3])
def test_the_delay_is_that_of_a_beat_through_the_causal_form(name, sfreq):
    """The envelope of two sines of nearly one frequency is late by the group delay."""
    step, flow = EXAMPLES[name](2), flow_of(2, sfreq)
    for hertz in (6.0, 11.0):
        t = np.arange(round((step.settling(flow) + 24) * sfreq)) / sfreq
        out = run_offline(
            step.causal(flow), np.tile(sum(np.sin(2 * np.pi * f * t) for f in (hertz - 0.125, hertz + 0.125)), (2, 1))
        )[0]
        rate = step.after(flow).sfreq
        n = np.arange(len(out) - round(16 * rate), len(out))  # whole periods of both
        basis = [np.exp(2j * np.pi * f * n / rate) for f in (hertz - 0.125, hertz + 0.125)]
        basis = np.stack([*basis, *map(np.conj, basis)])
        low, high, *_ = np.linalg.lstsq(basis.T, out[n], rcond=None)[0]
        late = -np.angle(high / low) / (2 * np.pi * 0.25)
        assert late == pytest.approx(step.delay(hertz, flow), abs=4e-4)


@pytest.mark.parametrize("name", ON_WINDOWS)
@settings(deadline=None, max_examples=25)
@given(n_chans=n_channels, n_windows=st.integers(1, 5), seed=seeds)
def test_a_window_does_not_depend_on_the_windows_beside_it(name, n_chans, n_windows, seed):
    step, goal = EXAMPLES[name](n_chans), flow_of(n_chans, 100.0).goal
    windows = noise(n_windows * n_chans, 100, seed).reshape(n_windows, n_chans, 100)
    together = step.on_windows(windows, goal)
    for window, expected in zip(windows, together, strict=True):
        np.testing.assert_array_equal(step.on_windows(window, goal), expected)
    turned = np.ascontiguousarray(windows.transpose(2, 0, 1)).transpose(1, 2, 0)  # the same values, elsewhere in memory
    np.testing.assert_array_equal(step.on_windows(turned, goal), together)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Notch(freq=0.0), "notch"),
        (lambda: Notch(freq=float("nan")), "notch"),
        (lambda: Notch(quality=-1.0), "quality"),
        (lambda: Notch(harmonics=0), "notch"),
        (lambda: ExponentialStandardise(factor_new=0.0), "weight"),
        (lambda: ExponentialStandardise(factor_new=1.0), "weight"),
        (lambda: ExponentialStandardise(factor_new=float("nan")), "weight"),
        (lambda: ExponentialStandardise(eps=0.0), "eps"),
        (lambda: ZScore(eps=float("inf")), "eps"),
        (lambda: ZScore(start=float("nan")), "z-score"),
        (lambda: Baseline(tmin=0.3, tmax=0.1), "baseline"),
        (lambda: Baseline(tmax=float("inf")), "baseline"),
        (lambda: Clip(limit=0.0), "clipping"),
        (lambda: Clip(limit=float("inf")), "clipping"),
        (lambda: Scale(factors=(0.0,)), "factor"),
        (lambda: Scale(factors=(float("nan"),)), "factor"),
        (lambda: Scale(factors=(1.0, 2.0)), "2 factors"),
        (lambda: Scale(factors=(1.0,), ch_names=("C0", "C1")), "1 factors"),
        (lambda: Scale(factors=()), "0 factors"),
        (lambda: Alignment(ch_names=("C0", "C1"), matrix=((1.0, 0.0),)), "2 x 2"),
        (lambda: Alignment(ch_names=(), matrix=()), "matrix"),
        (lambda: Alignment(ch_names=("C0",), matrix=((float("nan"),),)), "numbers"),
        (lambda: Alignment.fit(noise(2, 100, 0)[None], ("C0", "C1"), shrinkage=1.0), "shrinkage"),
        (lambda: RunningAlignment(block=0.0), "block"),
        (lambda: RunningAlignment(half_life=-3.0), "half-life"),
        (lambda: RunningAlignment(shrinkage=float("nan")), "shrinkage"),
        (lambda: RunningAlignment(block=1e-3).causal(flow_of(2, 500.0)), "block"),
        (lambda: Notch(freq=50.0).causal(flow_of(2, 100.0)), "50 Hz is not below half"),
    ],
)
def test_impossible_values_are_refused(make, words):
    with pytest.raises(SpecError, match=words):
        make()


GOAL = flow_of(3, 100.0).goal


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (ZScore(start=0.5, stop=0.5), "no two samples"),
        (ZScore(start=-0.1), "no two samples"),
        (ZScore(stop=1.2), "no two samples"),
        (Baseline(tmin=-0.3), "not inside"),
        (Baseline(tmin=0.0, tmax=1.0), "not inside"),
        (Baseline(tmin=0.003, tmax=0.004), "not inside"),
        (Scale(factors=(1.0, 2.0), ch_names=("C0", "C1")), "nothing for C2"),
        (Scale(factors=(1.0, 2.0, 3.0), ch_names=("C0", "C2", "C1")), "order"),
        (Alignment(ch_names=("Cz",), matrix=((1.0,),)), "Cz"),
        (fitted_alignment(4), "C3"),
    ],
)
def test_a_step_that_does_not_fit_the_model_is_refused(step, words):
    with pytest.raises(SpecError, match=words):
        step.check(GOAL)
    if isinstance(step, StreamStep):
        with pytest.raises(SpecError, match=words):
            step.causal(flow_of(3, 100.0))


def test_a_baseline_needs_windows_of_events():
    no_events = Goal(n_chans=3, n_times=100, sfreq=100.0)
    with pytest.raises(SpecError, match="belong to no events"):
        Baseline().check(no_events)
    with pytest.raises(SpecError, match="for 4 channels"):
        fitted_alignment(4).check(no_events)


def test_steps_are_read_without_scipy_and_torch():
    script = (
        "import sys\n"
        "for name in ('scipy', 'mne', 'torch'): sys.modules[name] = None\n"
        "from sjepa_deploy.eeg.steps import STEPS\n"
        "from sjepa_deploy.errors import MissingDependencyError\n"
        "from sjepa_deploy.eeg.steps.base import Flow, Goal, Step\n"
        "from sjepa_deploy.serialize import decode\n"
        "step = decode(Step, {'step': 'notch', 'freq': 60})\n"
        "flow = Flow(ch_names=('Cz',), sfreq=500.0, goal=Goal(n_chans=1, n_times=9, sfreq=100.0))\n"
        "print(step.told(flow))\n"
        "try: step.causal(flow)\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    told, missing = done.stdout.splitlines()
    assert told == "notch-filtered at 60, 120, 180, 240 Hz"
    assert "SciPy" in missing
