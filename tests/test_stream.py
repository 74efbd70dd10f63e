"""The live path beside independent offline ones: SciPy, MNE, NumPy and PyTorch."""

import dataclasses
import gc
import itertools
import json
import math
import os
import pkgutil
import sys
import threading
from fractions import Fraction

import mne
import numpy as np
import pytest
import scipy.signal
from bundles import export_small, small_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import ScriptedSource, Wrapped, chunks_of, decode, decode_samples, eeg, info_of, predictions, replay, run_stream

import sjepa_deploy
from sjepa_deploy.eeg.chain import Chain, algorithmic_delay
from sjepa_deploy.eeg.conditioning import Conditioner
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.interpolation import mixing_matrix, on_sphere, spline_weights
from sjepa_deploy.eeg.montage import fit_sphere, read_montage
from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.eeg.steps import BandPass, Channels, Flow, Reference, Resample
from sjepa_deploy.eeg.steps.rate import HALF_TAPS, RateReducer, ratio_of_rates
from sjepa_deploy.errors import BackendError, MissingDependencyError, RecordingError, StreamError
from sjepa_deploy.runtime.live.check import check_streaming
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lines import LineWriter
from sjepa_deploy.runtime.live.open_source import SOURCES, SourceEntry, SourceOptions, open_source
from sjepa_deploy.runtime.live.sources import ReplaySource, synthetic_source
from sjepa_deploy.runtime.predictor import Predictor
from sjepa_deploy.runtime.watch.watching import watch
from sjepa_deploy.spec import Preprocessing


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize(("sfreq_in", "sfreq_out"), [(100, 100), (500, 100), (128, 100), (250, 100), (1000, 128)])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_preprocessing_in_chunks_has_the_bits_of_the_whole(sfreq_in, sfreq_out, chunk):
    signal = small_spec(sfreq=float(sfreq_out)).signal
    samples = eeg(3000, sfreq=sfreq_in) + 5000.0
    names = signal.ch_names[1:]
    matrix, _ = mixing_matrix(names, signal)

    def run(size):
        chain = Chain(signal, names, float(sfreq_in), matrix)
        chain.start(samples[0, 1:])
        parts = [chain(samples[start : start + size, 1:]) for start in range(0, len(samples), size)]
        return np.concatenate([out for out, _ in parts])

    whole, cut = run(len(samples)), run(chunk)
    assert whole.tobytes() == cut.tobytes()
    assert len(whole) == math.ceil(len(samples) * sfreq_out / sfreq_in)


@pytest.mark.parametrize("sfreq_in", [128.0, 250.0, 240.0])
def test_rate_reducer_gives_the_signal_between_samples(sfreq_in):
    """A rhythm below the new Nyquist frequency comes out as itself, eight samples later."""
    ratio = Fraction(100) / Fraction(int(sfreq_in))
    time_in = np.arange(1000) / sfreq_in
    reducer = RateReducer(ratio, 1)
    reducer.start(np.zeros(1))
    out = reducer(np.sin(2 * np.pi * 13 * time_in)[:, None])
    time_out = np.arange(len(out)) / 100 - HALF_TAPS / sfreq_in
    later = time_out > 2 * HALF_TAPS / sfreq_in
    np.testing.assert_allclose(out[later, 0], np.sin(2 * np.pi * 13 * time_out[later]), atol=2e-3)
    assert reducer.rows == [math.floor(k / ratio) for k in range(len(out))]


def sections_of(preprocessing, sfreq_in, sfreq_out):
    """Return the sections of all filters before the rate is reduced."""
    flow = Flow(ch_names=("Cz",), sfreq=sfreq_in, goal=small_spec(sfreq=sfreq_out).signal.goal)
    filters = [step for step in preprocessing.steps if isinstance(step, (BandPass, Resample))]
    return np.concatenate([each.sections(flow) for each in filters])


def test_filter_has_the_band_and_stops_what_would_alias():
    sos = sections_of(Preprocessing(l_freq=0.5, h_freq=40.0), 500.0, 100.0)
    _, response = scipy.signal.sosfreqz(sos, worN=[0.5, 10, 60, 90, 200], fs=500)
    decibels = 20 * np.log10(np.abs(response))
    assert decibels[0] == pytest.approx(-3.0, abs=0.1)
    assert abs(decibels[1]) < 0.1
    assert max(decibels[2:]) < -39  # from 60 Hz on, what would fold to below 40 Hz
    assert len(sections_of(Preprocessing(l_freq=None, h_freq=None), 100.0, 100.0)) == 0


def test_group_delay_is_that_of_scipy():
    sos = sections_of(Preprocessing(), 500.0, 100.0)
    delay = algorithmic_delay(small_spec(preprocessing=Preprocessing()).signal, 500.0)
    assert [hertz for hertz, _ in delay.at_hz] == [2.0, 4.0, 10.0, 20.0]
    for hertz, seconds in delay.at_hz:
        step = 1e-3
        _, response = scipy.signal.sosfreqz(sos, worN=[hertz - step, hertz + step], fs=500)
        wanted = -np.diff(np.unwrap(np.angle(response)))[0] / (2 * np.pi * 2 * step)
        assert seconds == pytest.approx(wanted, rel=1e-3)


def test_rates_that_cannot_be_met_are_refused():
    with pytest.raises(StreamError, match="The stream has 50 Hz, the model 100 Hz"):
        ratio_of_rates(50.0, 100.0)
    assert float(ratio_of_rates(math.pi * 100, 100.0)) == pytest.approx(1 / math.pi, rel=1e-15)


def test_missing_scipy_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(MissingDependencyError, match=r"SciPy.*pip install .*'scipy>=.*\[stream\]"):
        sections_of(Preprocessing(), 100.0, 100.0)


# ---------------------------------------------------------------- interpolation


def test_spline_weights_are_those_of_mne():
    montage = read_montage("sjepa-62")
    points = np.array(montage.positions) - fit_sphere(montage.positions)[0]
    bads = [3, 17, 40]
    good = [i for i in range(62) if i not in bads]

    def placed(picks):
        named = {montage.ch_names[i]: points[i] for i in picks}
        return mne.channels.make_dig_montage(named, coord_frame="head")

    info = mne.create_info([montage.ch_names[i] for i in good], 100.0, "eeg")
    raw = mne.io.RawArray(np.eye(len(good)), info, verbose="error").set_montage(placed(good))
    wanted = raw.interpolate_to(placed(bads), origin=(0.0, 0.0, 0.0), method="spline").get_data()
    unit = on_sphere(montage.positions)
    np.testing.assert_allclose(spline_weights(unit[good], unit[bads]), wanted, atol=1e-7)


def test_channels_of_another_net_are_interpolated_by_their_names(written):
    """As `sjepa-run --interpolate` does it for the same recording."""
    from sjepa_deploy.eeg.recording import fit_recording

    montage = read_montage("GSN-HydroCel-129")
    signal = small_spec(
        n_chans=129,
        ch_names=montage.ch_names,
        positions=montage.positions,
        sfreq=128.0,
        preprocessing=Preprocessing(reference="none", l_freq=None, h_freq=None),
    ).signal
    raw = read_recording(written("eeglab_data.set").path).crop(0, 10)
    raw.set_montage(None)
    matrix, made = mixing_matrix(raw.ch_names, signal)
    wanted = fit_recording(raw, signal, interpolate=True).data
    got = matrix @ raw.get_data() * 1e6
    assert len(made) > 100
    assert np.abs(got - wanted).max() < 1e-3 * wanted.std()


def test_one_channel_is_not_referenced_to_itself():
    spec = small_spec("prelocal", n_chans=1, ch_names=("Cz",), positions=None, preprocessing=Preprocessing(reference="average"))
    info = StreamInfo(name="EEG", ch_names=("Cz",), sfreq=500.0, unit="uV")
    with pytest.raises(StreamError, match="Nothing is left of one channel"):
        Conditioner(spec.signal, info, report=print)


def test_a_stream_without_the_electrodes_of_the_reference_is_refused(predict):
    """They stand before the channels are picked, and the model has none of them."""
    signal = predict.spec.signal.replace(steps=(Reference(channels=("M1", "M2")), Resample(), Channels()))
    info = StreamInfo(name="EEG", ch_names=(*signal.ch_names, "M1"), sfreq=500.0, unit="uV")
    with pytest.raises(StreamError, match="The reference channels M2 are not there"):
        Conditioner(signal, info, report=print)


def test_interpolation_needs_positions_and_four_channels(predict):
    signal = predict.spec.signal.replace(positions=None)
    with pytest.raises(StreamError, match="no positions"):
        mixing_matrix(signal.ch_names[1:], signal)
    with pytest.raises(StreamError, match="Only 3 good channels"):
        mixing_matrix(signal.ch_names[:3], predict.spec.signal)


# ---------------------------------------------------------------- parity


RECORDINGS = {
    "eeglab_data.set": {"sfreq": 128.0},
    "biosig16.edf": {"sfreq": 128.0},
    "testbva.vhdr": {"sfreq": 100.0},
    "openbci8.xdf": {"sfreq": 125.0},
}


@pytest.mark.parametrize(
    ("recorded", "name", "variant"),
    [
        ("written", "eeglab_data.set", "postlocal"),
        ("written", "biosig16.edf", "prelocal"),
        ("written", "testbva.vhdr", "contextual"),
        ("written", "openbci8.xdf", "contextual"),
        ("real", "eeglab_data.set", "postlocal"),
        ("real", "biosig16.edf", "prelocal"),
        ("real", "testbva.vhdr", "contextual"),
        ("real", "openbci8.xdf", "contextual"),
    ],
    indirect=["recorded"],
)
def test_live_path_equals_the_offline_model_on_recordings(recorded, name, variant, make_bundle):
    facts = {"unit": "uV", "ch_names": tuple(f"EEG{i}" for i in range(8))} if name.endswith(".xdf") else {}
    path = recorded(name)
    raw = read_recording(path, **facts)
    n_chans, positions = len(raw.ch_names), None
    if name == "testbva.vhdr":
        positions = read_montage("standard_1005").pick(raw.ch_names).positions
    elif variant == "contextual":
        places = np.random.default_rng(0).normal(size=(n_chans, 3))
        places *= 0.09 / np.linalg.norm(places, axis=1, keepdims=True)
        positions = tuple(map(tuple, places.tolist()))
    bundle = make_bundle(variant, n_chans=n_chans, ch_names=tuple(raw.ch_names), positions=positions, **RECORDINGS[name])
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        result = check_streaming(predict, path, StreamConfig(hop=1.5 if name == "eeglab_data.set" else 0.5), **facts)
    assert result.identical
    assert result.passed
    assert result.max_error <= 1e-5
    assert result.n_windows > 8
    assert result.correlation is not None
    assert -1 <= result.correlation < 0.9999


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_chunking_gives_the_same_bits(predict, data):
    samples = eeg(900)
    sizes = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=8))
    turn = itertools.cycle(sizes)
    _, whole, _ = replay(predict, samples, 900)
    _, cut, _ = replay(predict, samples, lambda: next(turn))
    assert predictions(cut) == predictions(whole)


def test_windows_are_those_of_numpy(predict):
    """Without any filter, decision i is the model on samples i * hop ... i * hop + n_times."""
    spec = predict.spec
    _, decisions, _ = decode_samples(predict, eeg(600), hop=0.07, late="queue")
    assert [d.index for d in decisions] == list(range(58))
    assert [d.time for d in decisions] == pytest.approx([(199 + 7 * i) / 100 for i in range(58)])
    assert all(d.due == pytest.approx(d.time + 0.07) for d in decisions)
    assert decisions[0].prediction.shape == spec.output_shape
    assert len({d.prediction.tobytes() for d in decisions}) == 58  # no decision is another's buffer


def test_zero_hop_decides_at_every_sample(predict):
    decoder, decisions, _ = decode_samples(predict, eeg(300), hop=0, late="queue")
    assert len(decisions) == 101
    assert decoder.deadline == pytest.approx(0.01)


def test_check_command(make_bundle, tmp_path, capsys):
    samples = eeg(1500).T.astype(np.float32)
    np.save(tmp_path / "eeg.npy", samples)
    bundle = make_bundle("prelocal").path
    arguments = [str(bundle), "--check", str(tmp_path / "eeg.npy"), "--sfreq", "100", "--unit", "uV", "--json"]
    assert run_stream(*arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["identical"]
    assert result["n_windows"] == 131
    assert result["chunks"] == ["1", "7", "32", "1000", "random"]


def test_check_knows_a_recording_that_is_too_short_for_the_zero_phase_filter(make_bundle, tmp_path):
    """The FIR filter for 0.5 Hz lasts 6.6 s: correlations are left out. Any other error comes through."""
    bundle = make_bundle("prelocal", preprocessing=Preprocessing(reference="none", l_freq=0.5, h_freq=None))
    np.save(tmp_path / "eeg.npy", eeg(400).T)
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        result = check_streaming(predict, tmp_path / "eeg.npy", StreamConfig(), unit="uV", sfreq=100.0)
    assert result.passed
    assert (result.correlation, result.difference, result.flips) == (None, None, None)


@pytest.mark.parametrize("error", [ValueError("something else"), RecordingError("Something else.", "Mend it.")])
def test_check_hides_no_other_error(predict, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    np.save(tmp_path / "eeg.npy", eeg(400).T)
    monkeypatch.setattr("sjepa_deploy.runtime.live.check.fit_recording", fail)
    with pytest.raises(type(error), match="omething else"):
        check_streaming(predict, tmp_path / "eeg.npy", StreamConfig(), unit="uV", sfreq=100.0)


@pytest.mark.parametrize("wrong", [{"late": "later"}, {"bad_channels": "mend"}])
def test_policies_that_do_not_exist_are_refused(wrong):
    with pytest.raises(StreamError, match=next(iter(wrong))):
        StreamConfig(**wrong)


def test_no_garbage_is_collected_while_decisions_are_made(make_bundle, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(LineWriter, "put", lambda *_: seen.append((gc.isenabled(), sys.getswitchinterval())))
    turn = sys.getswitchinterval()
    arguments = ["--source", "synthetic", "--speed", "inf", "--duration", "5", "--quiet", "--out", str(tmp_path / "lines")]
    assert run_stream(make_bundle("prelocal").path, *arguments) == 0
    assert len(seen) > 20
    assert not any(enabled for enabled, _ in seen)
    assert max(switching for _, switching in seen) < turn
    assert gc.isenabled()
    assert sys.getswitchinterval() == pytest.approx(turn)


def test_a_priority_that_a_user_may_not_have(make_bundle, monkeypatch, capsys):
    def refuse(pid, policy, parameters):
        assert (policy, parameters.sched_priority) == (os.SCHED_FIFO, 50)
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    arguments = [str(make_bundle("prelocal").path), "--source", "synthetic", "--priority", "50"]
    assert run_stream(*arguments) == 2
    assert "may not set a real-time priority. Run as root, or allow it" in capsys.readouterr().err


def test_a_kernel_that_stays_is_asked_of_the_backend_that_has_one(make_bundle, monkeypatch, capsys):
    from sjepa_deploy.runtime import backend

    opened = []

    def fused(bundle, precision, options):
        opened.append(options)
        return backend.open_backend(bundle, "ort-cpu", precision)

    def stream(*arguments):
        source = ["--source", "synthetic", "--speed", "inf", "--duration", "5", "--quiet"]
        return run_stream(make_bundle("prelocal").path, *source, *arguments)

    monkeypatch.setitem(
        backend.BACKENDS, "cuda", backend.BackendEntry(target="fused:open", package="numpy", extra="", persistent=True)
    )
    find = backend._find
    monkeypatch.setattr(backend, "_find", lambda target: fused if target == "fused:open" else find(target))
    assert stream("--backend", "cuda") == stream("--backend", "cuda", "--persistent") == 0
    assert [options.persistent for options in opened] == [False, True]
    for name in ("ort-cpu", "triton:127.0.0.1:1/model"):
        capsys.readouterr()
        assert stream("--persistent", "--backend", name) == 2
        assert f'{name} keeps no kernel on the GPU. Use the backend "cuda", or leave persistent out.' in capsys.readouterr().err


# ---------------------------------------------------------------- sources


def test_replay_hands_out_samples_when_they_are_due(predict):
    source = ReplaySource(info_of(predict.spec), eeg(300), speed=10.0, chunk=5)
    decoder = Decoder(predict, source)
    decisions = list(decoder)
    assert len(decisions) + decoder.counters.skipped_late == 11
    assert all(d.received >= d.time for d in decisions)  # never before it is due
    assert source.clock() >= 2.99


def test_synthetic_source_repeats_a_minute(predict):
    source = synthetic_source(predict.spec.signal, speed=float("inf"), chunk=6000)
    first, second = source.read(0.0), source.read(0.0)
    np.testing.assert_array_equal(first.samples, second.samples)
    assert second.stamps[0] == 60.0
    with pytest.raises(StreamError, match="speed is 0"):
        synthetic_source(predict.spec.signal, speed=0.0)


OF_ARRAY = SourceOptions(sfreq=100.0, unit="uV", speed=float("inf"))


def test_sources_by_name(predict, tmp_path):
    np.save(tmp_path / "eeg.npy", eeg(300).T)
    source = open_source(f"file:{tmp_path / 'eeg.npy'}", predict.spec.signal, OF_ARRAY)
    assert source.info.ch_names == predict.spec.ch_names
    assert source.info.unit == "V"
    for wrong in ("lsl", "lsl:", "serial:0", "file:"):
        with pytest.raises(StreamError, match="is not a source"):
            open_source(wrong, predict.spec.signal)
    with pytest.raises(RecordingError, match="There is no recording"):
        open_source("file:nothing.edf", predict.spec.signal)


@pytest.mark.parametrize(
    ("address", "options", "name"),
    [
        ("lsl:amp", {"speed": 2.0}, "speed"),
        ("lsl:amp", {"sfreq": 100.0}, "sfreq"),
        ("synthetic", {"unit": "uV"}, "unit"),
        ("synthetic", {"ch_names": ("Cz",)}, "ch_names"),
    ],
)
def test_an_option_that_a_source_would_ignore_is_refused(predict, address, options, name):
    with pytest.raises(StreamError, match=f"takes no {name}"):
        open_source(address, predict.spec.signal, SourceOptions(**options))


def test_a_source_whose_package_is_missing_names_the_extra(predict, monkeypatch):
    monkeypatch.setitem(SOURCES, "lsl", dataclasses.replace(SOURCES["lsl"], package="not_there"))
    with pytest.raises(MissingDependencyError, match=r"not_there.*pip install .*\[stream\]"):
        open_source("lsl:amp", predict.spec.signal)


def test_every_source_of_the_table_is_found():
    for entry in SOURCES.values():
        assert callable(pkgutil.resolve_name(entry.target))


def toy_source(what, spec, options):
    """Open a source of two hops of samples, as somebody who adds a row to the table may write one."""
    samples = eeg(220, seed=int(what))
    return ScriptedSource(info_of(spec, unit=options.unit), chunks_of(samples, np.arange(220) / spec.sfreq))


def test_a_row_of_the_table_makes_a_source(make_bundle, monkeypatch):
    entry = SourceEntry(target="test_stream:toy_source", address="toy:SEED", package="numpy", extra="", takes=("unit",))
    monkeypatch.setitem(SOURCES, "toy", entry)
    with Decoder.open(make_bundle("prelocal").path, "toy:7", unit="uV") as decoder:
        decisions = list(decoder)
        source = decoder.source
    assert len(decisions) == 3
    assert source.closed
    with pytest.raises(StreamError, match="toy:SEED"):
        Decoder.open(make_bundle("prelocal").path, "toy", unit="uV")


def test_open_takes_what_a_file_does_not_say(make_bundle, tmp_path):
    """At infinite speed a hop comes at once, so that no window is late."""
    np.save(tmp_path / "eeg.npy", eeg(500).T)
    names = make_bundle("prelocal").spec.ch_names
    facts = {"unit": "uV", "sfreq": 100.0, "ch_names": names[::-1], "speed": float("inf")}
    with Decoder.open(make_bundle("prelocal").path, f"file:{tmp_path / 'eeg.npy'}", **facts) as decoder:
        sizes = []
        decoder.on_chunk(lambda chunk: sizes.append(len(chunk.stamps)))
        decisions = list(decoder)
        assert decoder.source.info.ch_names == names[::-1]
        assert not decoder.source.live
    assert sizes == [10] * 50
    assert len(decisions) == decoder.counters.windows == 31


def test_stream_without_a_rate_or_with_an_unknown_unit_is_refused(predict):
    with pytest.raises(StreamError, match="no nominal rate"):
        info_of(predict.spec, sfreq=float("inf"))
    with pytest.raises(StreamError, match="'mmHg' is not a unit"):
        info_of(predict.spec, unit="mmHg")


# ---------------------------------------------------------------- the decoder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hop": 2.5}, "longer than the window of 2 s"),
        ({"hop": 0.001}, "less than a sample"),
        ({"hop": -1.0}, "less than a sample"),
        ({"hop": float("nan")}, "less than a sample"),
    ],
)
def test_impossible_hops_are_refused(predict, config, message):
    with pytest.raises(StreamError, match=message):
        decode_samples(predict, eeg(300), **config)


def test_stream_slower_than_the_model_is_refused(predict):
    with pytest.raises(StreamError, match="The stream has 50 Hz, the model 100 Hz"):
        decode_samples(predict, eeg(300), info=info_of(predict.spec, sfreq=50.0))


def test_stream_of_other_channels_is_refused(predict):
    info = info_of(predict.spec, ch_names=tuple("ABCDEFGH"))
    with pytest.raises(StreamError, match=r"lacks 8 of the model's 8 channels.*it has A, B, C"):
        decode_samples(predict, eeg(300), info=info)


def test_bundle_without_names_or_positions(tmp_path, predict):
    bare = export_small(tmp_path / "bare", small_spec(ch_names=None, positions=None))
    with sjepa_deploy.load(bare) as nameless, pytest.raises(StreamError, match="no channel names"):
        decode_samples(nameless, eeg(300), info=info_of(predict.spec))
    unplaced = export_small(tmp_path / "unplaced", small_spec(positions=None))
    with sjepa_deploy.load(unplaced) as placeless, pytest.raises(StreamError, match="no positions to repair"):
        decode_samples(placeless, eeg(300), bad_channels="repair")


def test_backend_that_does_not_load_is_an_error_before_any_stream_is_looked_for(make_bundle, monkeypatch, capsys):
    from sjepa_deploy.runtime import backend

    entry = dataclasses.replace(backend.BACKENDS["tensorrt"], package="not_there", or_package="")
    monkeypatch.setitem(backend.BACKENDS, "tensorrt", entry)
    arguments = [str(make_bundle("prelocal").path), "--source", "lsl:nobody", "--backend", "tensorrt"]
    assert run_stream(*arguments) == 2
    assert "needs not_there, which is not installed" in capsys.readouterr().err
    with pytest.raises(BackendError, match="'abacus' is not a backend"):
        Decoder.open(make_bundle("prelocal").path, "lsl:nobody", backend="abacus")
    with pytest.raises(BackendError, match="The backend ort-cpu keeps no kernel on the GPU"):
        Decoder.open(make_bundle("prelocal").path, "lsl:nobody", options=sjepa_deploy.BackendOptions(persistent=True))


def test_open_closes_what_it_opened(make_bundle, tmp_path):
    np.save(tmp_path / "eeg.npy", eeg(300).T)
    with pytest.raises(RecordingError, match="states neither rate nor unit"):
        Decoder.open(make_bundle("prelocal").path, f"file:{tmp_path / 'eeg.npy'}")
    with Decoder.open(make_bundle("prelocal").path, "synthetic", StreamConfig(hop=0.5)) as decoder:
        assert decoder.hop == 50


def test_stop_ends_after_the_chunk_at_hand(predict):
    source = synthetic_source(predict.spec.signal, speed=float("inf"))
    decoder = Decoder(predict, source)
    seen = []
    decoder.on_decision(lambda d: seen.append(d) or (decoder.stop() if len(seen) == 5 else None))
    counters = decoder.run()
    assert counters.decisions == len(seen) == 5


def test_callbacks_see_what_the_iterator_gives(predict):
    source = ScriptedSource(info_of(predict.spec), chunks_of(eeg(400), np.arange(400) / 100))
    decoder = Decoder(predict, source)
    told, chunks = [], []
    decoder.on_decision(told.append)
    decoder.on_chunk(chunks.append)
    assert list(decoder) == told
    assert sum(len(chunk.stamps) for chunk in chunks) == 400
    decoder.source.close()
    assert source.closed


def test_subjects_in_one_process_do_not_see_each_other(make_bundle):
    """Four decoders at once in threads, one of which fails, give what each gives alone."""
    bundle = make_bundle("prelocal")
    samples = [eeg(1200, seed=seed) for seed in range(4)]
    samples[2][700:, 1] = 0.0  # this one stops

    def run(i):
        with sjepa_deploy.load(bundle, check_unit=False) as own:
            source = ScriptedSource(info_of(own.spec, name=f"subject {i}"), chunks_of(samples[i], np.arange(1200) / 100, 3 + i))
            decoder = Decoder(own, source, StreamConfig(bad_channels="stop"))
            decisions = []
            try:
                decisions.extend(decoder)
            except StreamError as error:
                return predictions(decisions), str(error)
        return predictions(decisions), ""

    alone = [run(i) for i in range(4)]
    together = [None] * 4
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, run(i))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert together == alone
    assert "Fz turned bad" in alone[2][1]
    assert [message for i, (_, message) in enumerate(alone) if i != 2] == [""] * 3
    assert len({tuple(decisions.items()) for decisions, _ in alone}) == 4


def test_two_decoders_on_one_stream_agree(predict, make_bundle):
    samples = eeg(800)
    with sjepa_deploy.load(copy := make_bundle("prelocal"), check_unit=False) as other:
        assert copy.manifest.digest == predict.bundle.manifest.digest
        _, one, _ = decode_samples(predict, samples, size=3, late="queue")
        _, two, _ = decode_samples(other, samples, size=11, late="queue")
    assert predictions(one) == predictions(two)


def test_monitor_follows_the_decoder(predict):
    keep = np.r_[0:600, 900:1500]
    samples = eeg(1500)
    samples[1200:, 2] = 0.0
    source = ScriptedSource(info_of(predict.spec), chunks_of(samples[keep], keep / 100.0))
    decoder = Decoder(predict, source, StreamConfig(bad_channels="repair"))
    monitor = watch(decoder)
    counters = decoder.run()
    shot = monitor.snapshot()
    assert shot.counters == counters
    assert shot.counters.samples_lost == 300
    assert shot.skips == {"late": 0, "gap": counters.skipped_gap, "paused": 0, "held": 0, "backend failed": 0}
    assert ChannelState(shot.quality.state[2]) is ChannelState.FLAT
    assert shot.quality.repaired.tolist() == [False, False, True] + [False] * 5
    assert any("300 samples" in incident.text for incident in shot.incidents)


def test_monitor_says_that_the_first_window_fills(predict):
    source = ScriptedSource(info_of(predict.spec), chunks_of(eeg(300), np.arange(300) / 100.0, 50))
    decoder = Decoder(predict, source, StreamConfig())
    monitor = watch(decoder)
    states = [monitor.snapshot().state]
    decoder.on_chunk(lambda _: states.append(monitor.snapshot().state))
    decoder.run()
    assert states == ["waiting", *["filling"] * 3, *["decoding"] * 3]


def test_memory_does_not_grow(predict):
    """Two minutes of stream leave no more objects than half a minute."""
    import gc
    import tracemalloc

    source = synthetic_source(predict.spec.signal, speed=float("inf"), chunk=10)
    decoder = Decoder(predict, source)
    monitor = watch(decoder)
    iterator = iter(decoder)

    def go(n):
        for _ in range(n):
            next(iterator)
            monitor.traces.thinned()  # as the page does
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        go(300)
        before = go(300)
        after = go(1200)
    finally:
        tracemalloc.stop()
    assert after - before < 60_000  # a byte for each sample of a channel would be 96,000


def test_file_replay_equals_the_recording(make_bundle, tmp_path):
    samples = eeg(700)
    np.save(tmp_path / "eeg.npy", samples.T)
    with Decoder.open(make_bundle("prelocal").path, "synthetic") as decoder:
        source = open_source(f"file:{tmp_path / 'eeg.npy'}", decoder.spec.signal, OF_ARRAY)
        _, from_file, _ = decode(decoder.predict, source)
        info = StreamInfo(name="x", ch_names=decoder.spec.ch_names, sfreq=100.0, unit="V")
        _, direct, _ = replay(decoder.predict, samples * 1e-6, 1, info=info)
    assert predictions(from_file) == predictions(direct)


def test_idle_backend_is_kept_warm_and_decisions_stay_the_same(predict):
    """Between windows the backend is called on what is thrown away, never on the stream's samples."""

    samples, seen = eeg(260), []
    backend = Wrapped(predict.backend)
    backend.before = lambda window: seen.append(window.any())
    source = ReplaySource(info_of(predict.spec), samples, speed=1.0)
    kept_warm = Predictor(predict.bundle, backend, check_unit=False)
    decisions = list(Decoder(kept_warm, source, StreamConfig(keep_warm=0.02, late="queue")))
    real = sum(seen)
    assert real == len(decisions) == 7
    assert len(seen) - real > 30  # 23 before the stream, and many of the hundred that fit into 2.6 s
    _, wanted, _ = replay(predict, samples, 1)
    assert predictions(decisions) == predictions(wanted)


def test_keep_warm_needs_a_positive_period(predict):
    with pytest.raises(StreamError, match="keep_warm"):
        decode_samples(predict, eeg(300), keep_warm=0.0)
