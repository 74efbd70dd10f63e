"""Names, units and rates of streams are understood as those of files are."""

import numpy as np
import pylsl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sjepa_deploy.eeg.chain import Chain
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.interpolation import match_channels
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.steps import Flow, Resample
from sjepa_deploy.eeg.steps.rate import HALF_TAPS
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.lsl import read_info
from sjepa_deploy.spec import Preprocessing, SignalSpec

NAMES = ("Fz", "T7", "Pz", "Oz")
UNTOUCHED = Preprocessing(reference="none", l_freq=None, h_freq=None)


def spec_of(ch_names=NAMES, **changes):
    return SignalSpec(n_chans=len(ch_names), n_times=200, sfreq=100.0, ch_names=tuple(ch_names), **changes)


def info_of(ch_names, **changes):
    return StreamInfo(**{"name": "amp", "ch_names": tuple(ch_names), "sfreq": 250.0, "unit": "uV"} | changes)


def described(labels, units):
    info = pylsl.StreamInfo("amp", "EEG", len(labels), 250.0, "float32", "id")
    channels = info.desc().append_child("channels")
    for label, unit in zip(labels, units, strict=True):
        channel = channels.append_child("channel")
        channel.append_child_value("label", label)
        if unit is not None:
            channel.append_child_value("unit", unit)
    return info


# ---------------------------------------------------------------- names


def test_other_spellings_of_a_stream_are_understood_and_get_the_models_names():
    columns, names, missing = match_channels(
        spec_of(), info_of(["TRG", "EEG T3-REF", "fz", "POL Pz", "Oz."]), interpolate=0.0, bads=()
    )
    assert (columns.tolist(), names, missing) == ([2, 1, 3, 4], ("fz", "T7", "Pz", "Oz"), ())


def test_an_unused_name_may_be_there_twice():
    info = info_of([*NAMES, "AUX", "AUX"])
    assert match_channels(spec_of(), info, interpolate=0.0, bads=())[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(StreamError, match="has the channels Fz twice"):
        match_channels(spec_of(), info_of([*NAMES, "Fz"]), interpolate=0.0, bads=())


def test_every_refusal_of_names_lists_the_streams_own():
    with pytest.raises(StreamError, match="lacks 1 of the model's 4 channels: Oz; it has Fz, T7, Pz, X1.*--rename"):
        match_channels(spec_of(), info_of(["Fz", "T7", "Pz", "X1"]), interpolate=0.0, bads=())
    with pytest.raises(StreamError, match="T7; it has Fz, Pz, Oz, T3-REF, T3-LE; T7 could be each of T3-REF, T3-LE"):
        match_channels(spec_of(), info_of(["Fz", "Pz", "Oz", "T3-REF", "T3-LE"]), interpolate=0.0, bads=())


def test_no_more_than_the_share_is_interpolated_live():
    montage = read_montage("sjepa-62")
    spec = spec_of(montage.ch_names, positions=montage.positions)
    info = info_of(montage.ch_names[:46])  # 16 of 62 are missing: 0.258
    with pytest.raises(StreamError, match="16 of 62 channels of the model would be interpolated.*`--interpolate 0.26`"):
        match_channels(spec, info, interpolate=0.25, bads=())
    assert len(match_channels(spec, info, interpolate=0.26, bads=())[2]) == 16


# ---------------------------------------------------------------- units


@pytest.mark.parametrize(
    ("labels", "units", "unit"),
    [
        ([*NAMES, "TRG"], ["microvolts"] * 4 + ["none"], "uV"),
        ([*NAMES, "Trigger"], ["uV"] * 4 + ["integer"], "uV"),
        (["Timestamp", *NAMES, "Marker"], ["seconds", *["microvolts"] * 4, ""], "uV"),
        ([*NAMES, "ACC_X", "Battery"], ["uV"] * 4 + ["g", "percent"], "uV"),
        (NAMES, ["0"] * 4, "V"),
        (NAMES, ["-6"] * 4, "uV"),
        (NAMES, ["nanovolts"] * 4, "nV"),
        (NAMES, ["uVolts"] * 4, "uV"),
        (NAMES, ["MicroVolts"] * 4, "uV"),
        (NAMES, ["\u00b5V"] * 4, "uV"),
        ([*NAMES, "Bip"], ["uV"] * 4 + ["mV"], "uV"),
    ],
)
def test_units_of_channels_that_are_not_used_do_not_matter(labels, units, unit):
    info = read_info(described(labels, units))
    assert info.unit == unit
    assert match_channels(spec_of(), info, interpolate=0.0, bads=())[2] == ()


def test_a_channel_that_is_used_must_be_in_the_streams_unit():
    info = read_info(described(NAMES, ["uV", "uV", "mV", "uV"]))
    with pytest.raises(StreamError, match="states for Pz another unit than uV, or none.*`--unit`"):
        match_channels(spec_of(), info, interpolate=0.0, bads=())


def test_a_unit_that_is_given_stands_above_the_streams_and_is_told():
    info = read_info(described(NAMES, ["unknown", "uV", "mV", None]), unit="uV")
    assert (info.unit, info.other_units) == ("uV", ())
    assert info.notes == ("taken as uV, by `--unit`, and not as mV, unknown, as the stream states",)
    assert read_info(described(NAMES, ["uV"] * 4), unit="uV").notes == ()
    with pytest.raises(StreamError, match="states units that are not one of nV, uV, mV and V: ADC.*--unit uV"):
        read_info(described(NAMES, ["ADC"] * 4))
    with pytest.raises(StreamError, match="does not state the unit of its channels.*--unit uV"):
        read_info(described(NAMES, [None] * 4))


def test_channels_of_a_stream_are_renamed_by_the_user():
    assert read_info(described(["A", "B"], ["uV"] * 2), rename=["a=Fz"]).ch_names == ("Fz", "B")
    with pytest.raises(StreamError, match="no channels C to rename; there are A, B"):
        read_info(described(["A", "B"], ["uV"] * 2), rename=["C=Fz"])


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("sfreq", [500.02, 600.614990234375, 999.4121105232217, 1024 / 7, 511.9987, 99.995, 100.0003])
def test_rates_without_a_ratio_of_integers_work_live(sfreq):
    """A sine comes out as the sine at k / 100, late by what the low-pass and half the interpolation take, without drift."""
    spec = spec_of(("Fz",), steps=UNTOUCHED.steps)
    chain = Chain(spec, spec.ch_names, sfreq, np.eye(1))
    t = np.arange(round(60 * sfreq)) / sfreq
    x = np.sin(2 * np.pi * 5 * t)[:, None]
    chain.start(x[0])
    out, _ = chain(x)
    assert len(out) == np.count_nonzero(np.arange(len(out) + 5) / 100 * sfreq < len(t) - 1e-6)
    sos = Resample().sections(Flow(ch_names=spec.ch_names, sfreq=sfreq, goal=spec.goal))
    gain, turn = 1.0 + 0j, np.exp(-2j * np.pi * 5 / sfreq)
    for b0, b1, b2, a0, a1, a2 in sos:
        gain *= (b0 + b1 * turn + b2 * turn**2) / (a0 + a1 * turn + a2 * turn**2)
    at = np.arange(len(out)) / 100 - HALF_TAPS / sfreq
    expected = np.abs(gain) * np.sin(2 * np.pi * 5 * at + np.angle(gain))
    np.testing.assert_allclose(out[500:, 0], expected[500:], rtol=0, atol=2e-4)


@settings(deadline=None, max_examples=25)
@given(
    sfreq=st.sampled_from([500.02, 600.614990234375, 1024 / 7, 99.995, 250.0]),
    cuts=st.lists(st.integers(1, 2999), max_size=8),
    seed=st.integers(0, 1000),
)
def test_no_bit_depends_on_the_chunks_at_any_rate(sfreq, cuts, seed):
    x = np.random.default_rng(seed).normal(size=(3000, 2))
    spec = spec_of(("Fz", "Cz"))
    whole, parts = (Chain(spec, spec.ch_names, sfreq, np.eye(2)) for _ in range(2))
    whole.start(x[0])
    parts.start(x[0])
    expected, _ = whole(x)
    found = np.concatenate([parts(piece)[0] for piece in np.split(x, sorted(set(cuts)))])
    assert found.tobytes() == expected.tobytes()


def test_a_stream_that_is_slower_than_the_model_is_refused():
    with pytest.raises(StreamError, match="The stream has 99 Hz, the model 100 Hz"):
        Chain(spec_of(("Fz",), steps=UNTOUCHED.steps), ("Fz",), 99.0, np.eye(1))
