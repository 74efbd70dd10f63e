"""Real LSL streams over loopback, and processes that are killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import mne
import numpy as np
import pylsl
import pytest
from own_lsl import CONFIG
from streams import assert_accounted, kinds

import sjepa_deploy
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live import lsl_markers
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.lsl import LslSource, changes, find_stream
from sjepa_deploy.runtime.live.lsl_markers import LslMarkers
from sjepa_deploy.runtime.live.lsl_outlet import LslOutlet
from sjepa_deploy.runtime.live.open_markers import open_markers
from sjepa_deploy.runtime.live.schedule import Events

pytestmark = pytest.mark.usefixtures("own_lsl")

SENDER = Path(__file__).with_name("lsl_sender.py")


@pytest.fixture(scope="module")
def predict(make_bundle):
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        yield predict


@pytest.fixture
def name():
    return f"amp-{uuid.uuid4().hex[:8]}"


class Amplifier:
    def __init__(self, name, labels, *, source_id=None, sfreq=100.0, unit="microvolts", seed=0, config=CONFIG, kind="float32"):
        identity = name if source_id is None else source_id
        arguments = [name, identity, str(sfreq), unit, ",".join(labels), str(seed), config, kind]
        self._process = subprocess.Popen([sys.executable, SENDER, *arguments], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def pause(self, seconds):
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)


class Markers(Amplifier):
    def __init__(self, name, kind, delay):
        arguments = [sys.executable, SENDER.with_name("lsl_marker_sender.py"), name, kind, str(delay), CONFIG]
        self._process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n"


def run_until(decoder, done, timeout=120.0):
    """Decode until `done(decisions, incidents)`."""
    decisions, incidents = [], []
    decoder.on_incident(incidents.append)
    timer = threading.Timer(timeout, decoder.stop)
    timer.start()
    for decision in decoder:
        decisions.append(decision)
        if done(decisions, incidents):
            break
    timer.cancel()
    assert done(decisions, incidents), (len(decisions), incidents, decoder.counters)
    assert_accounted(decoder.counters, decisions)
    return decisions, incidents


def test_stream_is_decoded_with_its_age(predict, name):
    with Amplifier(name, predict.spec.ch_names), Decoder(predict, LslSource(name)) as decoder:
        decisions, _ = run_until(decoder, lambda decisions, _: len(decisions) == 10)
        assert decoder.source.info.unit == "uV"
    assert all(0 <= d.age < 5 and d.received >= d.time for d in decisions)
    assert np.diff([d.time for d in decisions]).min() > 0


def test_source_killed_and_restarted(make_bundle, name):
    """The stream is found again, and the decoder starts anew on it; nothing of the interruption is bridged."""
    with sjepa_deploy.load(make_bundle("prelocal").path, check_unit=False) as predict:
        amplifier = Amplifier(name, predict.spec.ch_names)
        again = []

        def kill_and_restart():
            amplifier.kill()
            again.append(Amplifier(name, predict.spec.ch_names, seed=1))

        decoder = Decoder(predict, LslSource(name), StreamConfig(late="queue"))
        started = []

        def done(decisions, incidents):
            if len(decisions) >= 3 and not started:
                started.append(threading.Thread(target=kill_and_restart))
                started[0].start()
            return decoder.counters.interruptions == 1 and "interruption" in kinds(incidents) and decisions[-1].index > 40

        try:
            decisions, incidents = run_until(decoder, done)
        finally:
            started[0].join()
            again[0].kill()
            decoder.source.close()
    said = kinds(incidents)
    assert said.index("lost") < said.index("reconnected") < said.index("interruption")
    assert decoder.counters.skipped_gap > 0
    gap = np.diff([d.time for d in decisions]).max()
    assert gap >= 1.99  # a whole window of new samples


@pytest.mark.parametrize(
    ("unit", "message"),
    [("volts", "came back in V in place of uV"), ("", "does not state the unit of its channels")],
)
def test_stream_that_comes_back_as_another_is_refused(predict, name, unit, message):
    amplifier = Amplifier(name, predict.spec.ch_names)
    source = LslSource(name)
    try:
        while source.read(0.1) is None:
            pass
        amplifier.kill()
        amplifier = Amplifier(name, predict.spec.ch_names, unit=unit)
        with pytest.raises(StreamError, match=message):
            _read_for_ever(source)
    finally:
        amplifier.kill()
        source.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ch_names": ("Fz", "Cz", "Oz")}, ["Fz, Cz, Oz", "Fz, Cz, Pz"]),
        ({"sfreq": 500.0}, ["500 Hz", "250 Hz"]),
        ({"unit": "V"}, ["in V", "uV"]),
        ({"other_units": ("Cz",)}, ["Cz", "another unit"]),
        ({"notes": ("a note",)}, None),
    ],
)
def test_what_differs_in_a_stream_that_came_back_is_said(change, words):
    before = StreamInfo(name="amp", ch_names=("Fz", "Cz", "Pz"), sfreq=250.0, unit="uV")
    said = changes(before, dataclasses.replace(before, **change))
    assert len(said) == (words is not None)
    for word in words or ():
        assert word in said[0]


def test_a_stream_that_comes_back_with_another_type_of_samples_is_refused(predict, name):
    """Its record would go on in the first type, cut to whole numbers."""
    amplifier = Amplifier(name, predict.spec.ch_names, kind="int16")
    source = LslSource(name)
    try:
        while source.read(0.1) is None:
            pass
        amplifier.kill()
        amplifier = Amplifier(name, predict.spec.ch_names)
        with pytest.raises(StreamError, match=r"came back with samples of another type \(float32, not int16\)"):
            _read_for_ever(source)
    finally:
        amplifier.kill()
        source.close()


def test_a_lost_stream_without_an_identity_is_followed_by_another_on_request_alone(predict, name):
    amplifier = Amplifier(name, predict.spec.ch_names, source_id="")
    sources = [LslSource(name), LslSource(name, successor=True)]
    try:
        for source in sources:
            while source.read(0.1) is None:
                pass
        amplifier.kill()
        amplifier = Amplifier(name, predict.spec.ch_names, source_id="")
        with pytest.raises(StreamError, match="is another outlet of that name"):
            _read_for_ever(sources[0])
        _read_for_ever(sources[1], until="reconnected")
    finally:
        amplifier.kill()
        for source in sources:
            source.close()


WITHOUT_MULTICAST = CONFIG.replace("AddressesOverride={127.0.0.1}", "AddressesOverride={127.0.0.9}")
FOLLOW = """
import sys, time, pylsl
pylsl.set_config_content(sys.argv[2])
from sjepa_deploy.runtime.live.lsl import LslSource
source = LslSource(sys.argv[1])
while source.read(0.1) is None: pass
print("reading", flush=True)
while True:
    source.read(0.1)
    while source.incidents: print(source.incidents.popleft().kind, flush=True)
"""


@pytest.mark.parametrize("n_others", [0, 3])
def test_a_stream_is_found_again_without_multicast(predict, name, n_others):
    """Known peers are asked one by one, as on wireless networks: an answer takes longer than 0.1 s."""
    assert WITHOUT_MULTICAST != CONFIG
    labels = predict.spec.ch_names
    others = [Amplifier(f"{name}-{i}", labels, config=WITHOUT_MULTICAST) for i in range(n_others)]
    amplifier = Amplifier(name, labels, config=WITHOUT_MULTICAST)
    command = [sys.executable, "-c", FOLLOW, name, WITHOUT_MULTICAST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        try:
            assert follower.stdout.readline() == "reading\n"
            amplifier.kill()
            amplifier = Amplifier(name, labels, config=WITHOUT_MULTICAST)
            started = time.monotonic()
            said = iter(follower.stdout.readline, "")
            assert any(line == "reconnected\n" for line in said)
            assert time.monotonic() - started < 20  # a few seconds on a machine that has nothing else to do
        finally:
            follower.kill()
            for sender in (amplifier, *others):
                sender.kill()


def test_a_stream_that_stood_still_is_found_again(predict, name):
    """Longer than a silent stream is waited for, beside others on the same host."""
    with (
        Amplifier(f"{name}-beside", predict.spec.ch_names),
        Amplifier(name, predict.spec.ch_names) as amplifier,
    ):
        source = LslSource(name)
        while source.read(0.1) is None:
            pass
        stopped = threading.Thread(target=amplifier.pause, args=(18.0,))
        stopped.start()
        try:
            _read_for_ever(source, until="lost")
            _read_for_ever(source, until="reconnected")
        finally:
            stopped.join()
            source.close()


def _read_for_ever(source, until=None):
    for _ in range(600):
        source.read(0.1)
        if until in [incident.kind for incident in source.incidents]:
            return
    assert until is None


def test_paused_source_goes_on(predict, name):
    """A process that stands still for a while and then goes on stamps what it missed late: a gap, or late windows."""
    with Amplifier(name, predict.spec.ch_names) as amplifier, Decoder(predict, LslSource(name)) as decoder:
        paused = []

        def done(decisions, _):
            if len(decisions) == 3 and not paused:
                paused.append(threading.Thread(target=amplifier.pause, args=(3.0,)))
                paused[0].start()
            return len(decisions) > 3 and decisions[-1].time - decisions[0].time > 5

        run_until(decoder, done)
        paused[0].join()
        assert decoder.counters.silences >= 1
        assert decoder.counters.gaps >= 1


def test_consumer_that_stalls_for_five_seconds(predict, name):
    """What is late by then is left out and counted, and the age is what it was before."""
    with Amplifier(name, predict.spec.ch_names), Decoder(predict, LslSource(name)) as decoder:
        stalled = []

        def stall(decision):
            if len(stalled) < 1 and decision.index >= 10:
                stalled.append(decision.index)
                time.sleep(5)

        decoder.on_decision(stall)
        decisions, incidents = run_until(decoder, lambda decisions, _: len(decisions) == 40)
    assert decoder.counters.skipped_late >= 40
    assert not [incident for incident in incidents if incident.kind in ("gap", "clock reset", "interruption")]
    after = [decision for decision in decisions if decision.index > stalled[0]]
    assert after[0].index - stalled[0] >= 40
    assert np.median([decision.age for decision in after[5:]]) < 1


def test_samples_from_before_the_start_are_dropped_and_counted(predict, name):
    with Amplifier(name, predict.spec.ch_names), Decoder(predict, LslSource(name)) as decoder:
        time.sleep(1.5)
        decisions, incidents = run_until(decoder, lambda decisions, _: len(decisions) >= 1)
        assert decoder.counters.samples_flushed >= 50
        assert kinds(incidents)[0] == "flushed"
    assert decisions[0].age < 5.0


def test_two_decoders_on_one_stream(predict, make_bundle, name):
    with (
        Amplifier(name, predict.spec.ch_names),
        sjepa_deploy.load(make_bundle("prelocal"), check_unit=False) as other,
        Decoder(predict, LslSource(name), StreamConfig(late="queue")) as one,
        Decoder(other, LslSource(name), StreamConfig(late="queue")) as two,
    ):
        thread = threading.Thread(target=run_until, args=(two, lambda decisions, _: len(decisions) == 8))
        thread.start()
        run_until(one, lambda decisions, _: len(decisions) == 8)
        thread.join()
        assert one.counters.decisions == two.counters.decisions == 8


def test_no_stream_lists_what_is_there(predict, name):
    wanted = rf"There is no LSL stream nobody; the streams there are .*{name} \(EEG, 8 channels, 100 Hz"
    with Amplifier(name, predict.spec.ch_names), pytest.raises(StreamError, match=wanted):
        find_stream("nobody", timeout=0.5)


def test_ambiguous_name_lists_the_candidates(predict, name):
    with (
        Amplifier(name, predict.spec.ch_names, source_id=f"{name}-left"),
        Amplifier(name, predict.spec.ch_names, source_id=f"{name}-right"),
    ):
        with pytest.raises(StreamError, match=rf"2 LSL streams are {name}: .*source_id {name}-"):
            find_stream(name)
        assert find_stream(f"source_id={name}-right").source_id() == f"{name}-right"


def test_unit_and_names_must_be_known(predict, name):
    labels = predict.spec.ch_names
    with Amplifier(name, labels, unit=""):
        with pytest.raises(StreamError, match="does not state the unit"):
            LslSource(name)
        source = LslSource(name, unit="mV")
        assert source.info.unit == "mV"
        source.close()
    with Amplifier(f"{name}b", labels, unit="apples"), pytest.raises(StreamError, match="not one of nV, uV, mV and V: apples"):
        LslSource(f"{name}b")
    with Amplifier(f"{name}c", labels):
        source = LslSource(f"{name}c", unit="V")
        assert source.info.unit == "V"
        assert "taken as V, by `--unit`" in source.info.notes[0]
        source.close()


def test_outlet_sends_decisions_with_their_stamps_and_refuses_a_taken_name(predict, name):
    outlet = LslOutlet(name, predict.spec, {"hop": 0.1})
    with pytest.raises(StreamError, match=f"There is an LSL stream {name} already"):
        LslOutlet(name, predict.spec, {})
    inlet = pylsl.StreamInlet(find_stream(name), recover=False)
    inlet.open_stream(5.0)
    info = inlet.info(5.0)
    assert info.type() == "Decision"
    labels = ["prediction_0", "prediction_1", "prediction_2", "state", "class", "probability", "kind", "index", "late", "held"]
    assert info.get_channel_labels() == [*labels, "bridged", "doubtful", "settling", "bad channels", "paused"]
    assert json.loads(info.desc().child_value("sjepa_deploy")) == {"hop": 0.1}
    stamp = pylsl.local_clock() - 0.25
    prediction = np.array([1.5, -2.0, 0.25], np.float32)
    outlet.send(Decision(0, prediction, stamp, stamp + 0.1, stamp, stamp, 0.0, False, False, ()))
    sample, received = inlet.pull_sample(5.0)
    np.testing.assert_array_equal(sample, [*prediction.tolist(), -1, -1, np.nan, 1, 0, *[0] * 7])
    assert received == pytest.approx(stamp, abs=1e-9)


def test_command_over_lsl_ends_well_on_a_signal(make_bundle, predict, name, tmp_path):
    """SIGTERM: lines, record and summary are whole."""
    config = tmp_path / "lsl_api.cfg"
    config.write_text(CONFIG)
    code = "import sys; sys.argv[0] = 'sjepa-stream'; from sjepa_deploy.cli.stream import main; main()"
    arguments = ["--source", f"lsl:{name}", "--out", tmp_path / "out.jsonl", "--record", tmp_path / "run.xdf", "--json"]
    arguments += ["--outlet", f"{name}-decisions"]
    with Amplifier(name, predict.spec.ch_names):
        command = [sys.executable, "-W", "error", "-c", code, make_bundle("prelocal").path, *arguments]
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, "LSLAPICFG": str(config)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 90
        out = tmp_path / "out.jsonl"
        while time.monotonic() < deadline and (not out.exists() or out.read_text().count('"index"') < 5):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    counters = json.loads(printed)["counters"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert counters["decisions"] == sum("index" in line for line in lines) >= 5
    from sjepa_deploy.runtime.live.records import read_record

    record = read_record(tmp_path / "run.xdf")
    assert len(record.decisions) == counters["decisions"]
    assert sum(len(chunk.stamps) for chunk in record.chunks) == counters["samples"]


def test_events_of_two_marker_streams_get_the_windows_at_their_samples(predict, name):
    """The oracle cuts the recorded samples, conditioned offline, at the sample whose stamp is nearest to the event."""
    config = StreamConfig(late="queue", check_unit=False, max_jitter=5.0)
    with (
        Amplifier(name, predict.spec.ch_names, unit="volts"),
        Markers(f"{name}-t", "string", 0.0),
        Markers(f"{name}-n", "int32", 1.5),
    ):
        source = LslSource(name)
        markers = open_markers([f"lsl:{name}-t", f"lsl:name={name}-n,type=Markers"], source)
        with Decoder(predict, source, config, schedule=Events(("go", "7"), 0.1), markers=markers) as decoder:
            chunks, left = [], []
            decoder.on_chunk(chunks.append)
            decoder.on_undecided(left.append)
            decisions, _ = run_until(decoder, lambda decisions, _: len(decisions) > 15, timeout=40.0)
    counters = decoder.counters
    assert counters.events == len(decisions) + len(left)
    assert {(d.event.stream, d.event.description) for d in decisions} == {(f"{name}-t", "go"), (f"{name}-n", "7")}
    delays = {name: [d.event.marker_delay for d in decisions if d.event.description == name] for name in ("go", "7")}
    assert np.median(delays["go"]) < 0.5 < 1.5 < np.median(delays["7"]) < 2.0
    stamps = np.concatenate([chunk.stamps for chunk in chunks])
    samples = np.concatenate([chunk.samples for chunk in chunks]).astype(np.float64)
    first_gap = int(np.argmax(np.diff(stamps) > 0.3)) or len(stamps)
    raw = mne.io.RawArray(samples.T, mne.create_info(list(predict.spec.ch_names), 100.0, "eeg"), verbose="error")
    offline = fit_recording(raw, predict.spec.signal, phase="causal", check_unit=False).data
    n_compared = 0
    for decision in decisions:
        start = int(np.abs(stamps - decision.event.onset).argmin()) + 10
        if start + 200 < first_gap:
            want = predict(offline[None, :, start : start + 200])[0]
            assert decision.prediction.tobytes() == want.tobytes()
            n_compared += 1
    assert n_compared > 0


def test_a_marker_stream_that_is_not_there_lists_what_is(predict, name):
    with Markers(f"{name}-t", "string", 0.0), Amplifier(name, predict.spec.ch_names):
        source = LslSource(name)
        try:
            with pytest.raises(StreamError, match=f"{name}-t"):
                open_markers(["lsl:nowhere"], source)
            with pytest.raises(StreamError, match="markers"):
                open_markers([f"lsl:{name}"], source)  # EEG
        finally:
            source.close()


def test_markers_that_are_lost_and_come_back(name):
    with Markers(f"{name}-t", "string", 0.0) as sender:
        markers = LslMarkers(f"{name}-t")
        try:
            sender.kill()
            wait_for(lambda: [incident.kind for incident in markers.incidents] == ["lost"])
            with Markers(f"{name}-t", "string", 0.0):
                wait_for(lambda: [incident.kind for incident in markers.incidents] == ["lost", "reconnected"])
                markers.read()
                wait_for(markers.read)
        finally:
            markers.close()


def test_markers_that_nobody_reads_wait_up_to_a_number_and_the_others_are_counted(name, monkeypatch):
    monkeypatch.setattr(lsl_markers, "MOST_WAITING", 2)
    with Markers(f"{name}-t", "string", 0.0):
        markers = LslMarkers(f"{name}-t")
        try:
            wait_for(lambda: markers.n_lost >= 2)
            assert len(markers.read()) == 2
        finally:
            markers.close()


def wait_for(happens, timeout=30.0):
    ends = time.monotonic() + timeout
    while not happens():
        assert time.monotonic() < ends
        time.sleep(0.05)
