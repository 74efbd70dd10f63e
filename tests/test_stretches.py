"""A recording that is read stretch by stretch gives what the whole one gives, in memory that does not grow with its length."""

import itertools
import math
import re
import tracemalloc
from dataclasses import dataclass
from typing import ClassVar

import mne
import numpy as np
import pytest
from edf_files import eeg, write_edf
from hypothesis import given, settings
from hypothesis import strategies as st
from sincs import sinc_sums

from sjepa_deploy.eeg import readers
from sjepa_deploy.eeg.chain import ZeroPhase, flows_of
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.steps import (
    BandPass,
    Channels,
    Clip,
    ExponentialStandardise,
    Notch,
    Reference,
    Resample,
    RunningAlignment,
    Scale,
)
from sjepa_deploy.eeg.steps.base import Flow, StreamStep
from sjepa_deploy.eeg.stretches import fit_stretches
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.spec import SignalSpec

NAMES = ("Fz", "Cz", "Pz", "Oz")
ORDER = [3, 1, 0, 2]
STANDARD = (BandPass(l_freq=0.5, h_freq=40.0), Resample(), Channels(), Reference())


@dataclass(frozen=True, kw_only=True)
class Whole(StreamStep):
    """Divides by the spread of the whole stretch: a step that cannot run on a part."""

    name: ClassVar[str] = "whole"

    def causal(self, flow):
        raise NotImplementedError

    def offline(self, data, flow):
        return data / data.std()


anywhere = [
    BandPass(l_freq=1.0, h_freq=30.0),
    BandPass(l_freq=None, h_freq=20.0),
    BandPass(l_freq=None, h_freq=None),
    Notch(freq=24.0),
    Reference(),
    ExponentialStandardise(factor_new=1e-2),
    Clip(limit=2e4),
    Scale(factors=(0.5,)),
    RunningAlignment(block=0.4, half_life=2.0),
    Whole(),
]
chains = st.lists(st.sampled_from(anywhere), max_size=4).flatmap(lambda steps: st.permutations([*steps, Resample(), Channels()]))
rates = st.sampled_from([100.0, 128.0, 250.0, 500.0, 1000 / 3, 256.00000001, 127.9, 99.95])


def signal_of(*steps, phase="zero-phase"):
    return SignalSpec(n_chans=4, n_times=150, sfreq=100.0, ch_names=NAMES, steps=tuple(steps), phase=phase)


def brain(n_samples, seed):
    """Return EEG in microvolts with a drift, an offset and hum, shape (4, n_samples)."""
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.normal(size=(4, n_samples)), axis=1)
    hum = 30 * np.sin(np.arange(n_samples) * rng.uniform(0.5, 1.5))
    return 10 * rng.normal(size=(4, n_samples)) + drift + hum + rng.uniform(-1e4, 1e4, (4, 1))


def raw_of(microvolts, sfreq, pauses=()):
    raw = mne.io.RawArray(microvolts * 1e-6, mne.create_info(list(NAMES), sfreq, "eeg"), verbose="error")
    return raw.set_annotations(mne.Annotations(np.array(pauses) / sfreq, 0.0, ["BAD boundary"] * len(pauses)))


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@settings(deadline=None, max_examples=60)
@given(chains, rates, st.integers(3000, 9000), st.data())
def test_steps_on_pieces_give_what_they_give_on_the_whole_stretch(steps, sfreq, n_samples, data):
    """The oracle runs each step on the whole stretch."""
    signal, x = signal_of(*steps), brain(n_samples, seed=n_samples)
    flow = Flow(ch_names=("Pz", "Cz", "Oz", "Fz"), sfreq=sfreq, goal=signal.goal)
    whole = x
    for step, at in zip(signal.steps, flows_of(signal, flow), strict=True):
        whole = whole[ORDER] if isinstance(step, Channels) else step.offline(whole, at)
    cuts = sorted({0, n_samples, *data.draw(st.lists(st.integers(1, n_samples - 1), max_size=12))})
    chain = ZeroPhase(signal, flow, lambda samples, _: samples[ORDER])
    pieces = [chain(x[:, a:b].copy(), last=b == n_samples) for a, b in itertools.pairwise(cuts)]
    joined = np.concatenate(pieces, axis=1)
    assert joined.shape == whole.shape
    assert np.abs(joined - whole).max() < 1e-6 * rms(whole - whole.mean(axis=1, keepdims=True))


@settings(deadline=None, max_examples=40)
@given(
    phase=st.sampled_from(["causal", "zero-phase"]),
    sfreq=st.sampled_from([100.0, 128.0, 250.0, 1000 / 3]),
    n_samples=st.integers(3000, 20_000),
    pauses=st.lists(st.floats(0.05, 0.95), max_size=3, unique=True),
    n_values=st.integers(1, 30_000),
    hop=st.integers(1, 400),
    n=st.integers(1, 9),
)
def test_windows_of_stretches_are_those_of_the_whole_recording(phase, sfreq, n_samples, pauses, n_values, hop, n):
    raw = raw_of(brain(n_samples, seed=hop), sfreq, sorted(round(p * n_samples) for p in pauses))
    signal = signal_of(BandPass(l_freq=2.0, h_freq=40.0), Notch(freq=25.0), Resample(), Channels(), Reference(), phase=phase)
    try:
        whole = fit_recording(raw, signal)
    except RecordingError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            fit_stretches(raw, signal, n_values=n_values)
        return
    fitted = fit_stretches(raw, signal, n_values=n_values)
    assert (fitted.segments, fitted.n_found, fitted.n_settling) == (whole.segments, whole.n_found, whole.n_settling)
    starts = fitted.window_starts(hop)
    batches = list(fitted.cut(starts, n))
    assert all(len(batch) == n for batch in batches[:-1])
    found, wanted = np.concatenate(batches), whole.cut(starts)
    assert found.dtype == np.float32
    assert (*fitted.steps, *fitted.changes.told) == whole.steps
    if phase == "causal":
        np.testing.assert_array_equal(found, wanted)
    else:
        assert np.abs(found - wanted).max() < 1e-6 * rms(wanted)


def test_a_fitted_stretch_is_what_mne_and_sums_of_sincs_make_of_the_whole_file():
    """The oracle knows no stretches, and none of the steps."""
    x = brain(40_000, seed=1)
    data = mne.filter.filter_data(x, 250.0, 0.5, 40.0, verbose="error")
    data = sinc_sums(data, 250.0, 100.0)
    data -= data.mean(axis=0)
    fitted = fit_stretches(raw_of(x, 250.0), signal_of(*STANDARD), n_values=12_000)
    pieces = list(fitted.pieces())
    assert len(pieces) > 10
    found = np.concatenate(pieces, axis=1)
    assert found.shape == data.shape
    assert np.abs(found - data).max() < 1e-5 * rms(data)


@pytest.mark.parametrize("phase", ["causal", "zero-phase"])
def test_what_only_the_whole_file_shows_is_refused_or_told_before_the_first_piece(phase):
    signal = signal_of(*STANDARD, phase=phase)
    x = brain(30_000, seed=2)
    broken = x.copy()
    broken[2, 29_990] = np.nan
    broken[1, 12_000] = np.inf
    flat = x.copy()
    flat[:, 20_000:21_000] = 3.0
    for data, n_refused in ((broken, 2), (x * 1e6, 2), (x * 1e-6, 2), (np.full_like(x, 4.0), 0 if phase == "causal" else 2)):
        raw, refused = raw_of(data, 250.0), []
        for fit in (fit_recording, lambda raw, signal: fit_stretches(raw, signal, n_values=4096)):
            try:
                fit(raw, signal)
            except RecordingError as error:
                refused.append(str(error))
        assert refused == refused[:1] * n_refused
    assert "is flat in 4 of its 120 seconds, the first of them number 80" in fit_stretches(raw_of(flat, 250.0), signal).steps


def files(written, tmp_path):
    """Yield recordings of each format that is left on the disk, in several units, and one that is not."""
    for name in ("biosig16.edf", "biosemi17.bdf", "testbva.vhdr", "eeg_raw.fif", "eeglab_data.set"):
        yield written(name).path, None
    for unit in ("nV", "mV", "V", "uV"):
        yield write_edf(tmp_path / f"{unit}.edf", NAMES, eeg(4, 2560), [256] * 4, dims=[unit] * 4), None
    yield write_edf(tmp_path / "nothing.edf", NAMES, eeg(4, 2560), [256] * 4, dims=[""] * 4), "nV"
    yield write_edf(tmp_path / "one.edf", NAMES, eeg(4, 2560), [256] * 4, dims=["uV", "degC", "mV", "uV"]), None


@pytest.mark.parametrize("seconds", [0.7, 3.0])
def test_samples_left_in_their_file_are_those_that_are_loaded(written, tmp_path, seconds):
    left = 0
    for path, unit in files(written, tmp_path):
        loaded, lazy = (read_recording(path, unit=unit, preload=preload) for preload in (True, False))
        left += not lazy.preload
        assert lazy.ch_names == loaded.ch_names
        assert [*lazy.annotations.onset] == [*loaded.annotations.onset]
        assert [*lazy.annotations.description] == [*loaded.annotations.description]
        assert lazy.info["temp"] == loaded.info["temp"]
        data, step = loaded.get_data(), round(seconds * loaded.info["sfreq"])
        for start in range(0, loaded.n_times, step):
            part = lazy.get_data(start=start, stop=min(start + step, loaded.n_times))
            np.testing.assert_allclose(part, data[:, start : start + step], rtol=1e-12, atol=0)
    assert left >= 9


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=30), st.integers(1, 9))
def test_triggers_are_found_across_stretches(runs, n):
    """The oracle is MNE on the whole channel."""
    values = np.repeat(*np.array(runs).T).astype(float)
    info = mne.create_info(["Cz", "STI"], 100.0, ["eeg", "stim"])
    raw = mne.io.RawArray(np.stack([values * 0, values]), info, first_samp=17, verbose="error")
    events = mne.find_events(raw, stim_channel="STI", shortest_event=1, verbose="error")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_TRIGGERS", n)
        readers._mark_triggers(raw)
    np.testing.assert_allclose(raw.annotations.onset, events[:, 0] / 100.0)
    assert [*raw.annotations.description] == [str(value) for value in events[:, 2]]


def long_edf(path, n_minutes, sfreq=100):
    """Write one minute of EEG over and over."""
    write_edf(path, NAMES, eeg(4, 60 * sfreq), [sfreq] * 4)
    written, head = path.read_bytes(), 256 * (len(NAMES) + 2)
    with path.open("wb") as file:
        file.write(written[:236] + str(60 * n_minutes).encode().ljust(8) + written[244:head])
        for _ in range(n_minutes):
            file.write(written[head:])
    return path


@pytest.mark.parametrize("phase", ["causal", "zero-phase"])
def test_memory_does_not_grow_with_the_recording(tmp_path, phase):
    """A stretch of 2^16 samples has 0.5 MiB. The whole recordings would have 2.9 and 23 MB in float64."""
    peaks = []
    signal = signal_of(*STANDARD, phase=phase)
    for n_minutes in (15, 120):
        path = long_edf(tmp_path / "long.edf", n_minutes)
        fit_stretches(read_recording(path, preload=False), signal)  # what is imported now is not measured
        raw = read_recording(path, preload=False)
        tracemalloc.start()
        fitted = fit_stretches(raw, signal, n_values=1 << 16)
        starts = fitted.window_starts(1000)
        n_windows = sum(len(batch) for batch in fitted.cut(starts, 8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert n_windows == math.floor((n_minutes * 6000 - 150) / 1000) + 1
    assert peaks[1] < 10 * (1 << 19)
    assert peaks[1] < peaks[0] + (1 << 20)
