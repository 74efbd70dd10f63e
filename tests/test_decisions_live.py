"""Live decisions have states: those of the layer alone, in lines, records and LSL, and the same in a replay."""

import dataclasses
import json
import math

import mne
import numpy as np
import pytest
from bundles import copy_bundle
from streams import ScriptedSource, chunks_of, decode, eeg, info_of, run_stream

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.events import events_of
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.errors import DecisionError, StreamError
from sjepa_deploy.runtime.decisions.accumulate import Accumulate
from sjepa_deploy.runtime.decisions.data import labelled
from sjepa_deploy.runtime.decisions.description import FitSummary, LayerDescription
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.pauses import Dwell, Refractory
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.signal import Signal
from sjepa_deploy.runtime.decisions.smoothing import Exponential
from sjepa_deploy.runtime.decisions.state import STATES
from sjepa_deploy.runtime.decisions.stored import write_layer
from sjepa_deploy.runtime.decisions.threshold import Threshold
from sjepa_deploy.runtime.live.calibration import stream_windows
from sjepa_deploy.runtime.live.commands import Pause, Start
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import PlannedMarkers
from sjepa_deploy.runtime.live.messages import Messages
from sjepa_deploy.runtime.live.open_source import SourceOptions
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.live.sources import ReplaySource

CLASSES = ("left", "right", "rest")
CHAIN = (
    Probabilities(temperature=0.02),  # the outputs of random weights are small
    Exponential(seconds=0.3),
    Refractory(seconds=0.6),
    Threshold(enter=0.6, leave=0.5),
    Dwell(seconds=0.2),
)


@pytest.fixture(scope="module")
def bundle(make_bundle, tmp_path_factory):
    """Return a bundle with one layer."""
    copied = Bundle.open(copy_bundle(make_bundle("prelocal", class_names=CLASSES), tmp_path_factory.mktemp("layers") / "bundle"))
    write_layer(copied, described(copied))
    return copied


def described(bundle, name="default", **facts):
    known = {"signal": Signal(max_gap=0.5), "steps": CHAIN, "class_names": CLASSES, "n_outputs": 3}
    return LayerDescription(name=name, bundle=bundle.manifest.digest, output_name="prediction", **known | facts)


@pytest.fixture(scope="module")
def predict(bundle):
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        yield predict


def eventful():
    """Return samples and stamps with a gap and a channel that breaks."""
    samples = eeg(1500).astype(np.float32)
    samples[1000:1004, 2] = np.nan
    keep = np.r_[0:500, 720:1500]
    return samples[keep], keep / 100.0 + 12_345.678


class Late(ScriptedSource):
    """A source whose reader is late for some chunks, so that decisions are held."""

    def read(self, timeout):
        chunk = super().read(timeout)
        if chunk is not None and 12_350.0 < chunk.received < 12_350.5:
            self.now = chunk.received + 0.3
        return chunk

    def clock(self):
        return self.now


def test_states_are_those_of_the_layer_alone_with_gaps_bad_channels_and_held_windows(predict, bundle):
    samples, stamps = eventful()
    source = Late(info_of(predict.spec), chunks_of(samples, stamps, 7, restarted_at=(900,)))
    decoder = Decoder(predict, source, StreamConfig(late="hold"), decisions=DecisionLayer.load(bundle))
    decisions = list(decoder)
    assert decoder.counters.held > 2
    alone = DecisionLayer.load(bundle)
    assert [d.state for d in decisions] == [alone.step(d.prediction, d.time, d.flags) for d in decisions]
    assert {d.state.name for d in decisions} == {"undecided", "decided", "refractory", "no signal"}
    assert {d.state.reason for d in decisions if d.state.name == "no signal"} >= {"held", "bad channels"}
    plain, bare, _ = decode(predict, Late(info_of(predict.spec), chunks_of(samples, stamps, 7, restarted_at=(900,))), late="hold")
    assert plain.layer is None
    assert [(d.index, d.prediction.tobytes(), d.flags) for d in bare] == [
        (d.index, d.prediction.tobytes(), d.flags) for d in decisions
    ]
    assert {d.state for d in bare} == {None}


def recorded(predict, layer, path, **config):
    samples, stamps = eventful()
    source = Late(info_of(predict.spec), chunks_of(samples, stamps, 7, restarted_at=(900,)))
    decoder = Decoder(predict, source, StreamConfig(late="hold", **config), decisions=layer)
    recorder = record(decoder, path)
    decisions = list(decoder)
    recorder.close()
    return decisions


def test_a_replay_gives_the_same_states(predict, bundle, tmp_path, capsys):
    layer = DecisionLayer.load(bundle)
    decisions = recorded(predict, layer, tmp_path / "run.xdf")
    run = read_record(tmp_path / "run.xdf")
    assert (run.run.decisions, run.run.decisions_digest) == ("default", layer.description.digest)
    assert run.run.bundle_digest == layer.description.bundle
    assert [(s.index, s.time, s.flags) for s in run.states] == [(d.index, d.time, d.flags) for d in decisions]
    for was, decision in zip(run.states, decisions, strict=True):
        state, chosen, probability = was.numbers
        assert STATES[int(state)] == decision.state.name
        assert (CLASSES[int(chosen)] if chosen >= 0 else None) == decision.state.class_name
        assert decision.state.probability == (None if math.isnan(probability) else probability)
    assert run.decisions.keys() == {d.index for d in decisions if not d.held}
    assert all(prediction.shape == (3,) for prediction in run.decisions.values())
    assert run_stream(bundle.path, "--replay", tmp_path / "run.xdf", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["decisions"] == "default"
    assert (result["n_states"], result["n_states_differ"], result["n_differ"]) == (len(decisions), 0, 0)


def test_a_replay_tells_which_states_differ(predict, bundle, tmp_path, capsys):
    class Moody(DecisionLayer):
        def step(self, outputs, time, flags=()):
            state = super().step(outputs, time, flags)
            self.n = getattr(self, "n", -1) + 1
            return type(state)("decided", "mood", "left", 0.5) if self.n in (10, 12) else state

    decisions = recorded(predict, Moody(DecisionLayer.load(bundle).description), tmp_path / "run.xdf")
    result = replay(predict, read_record(tmp_path / "run.xdf"))
    assert result.states_differ == (decisions[10].index, decisions[12].index)
    assert (result.differ, result.missing, result.passed) == ((), (), False)
    assert run_stream(bundle.path, "--replay", tmp_path / "run.xdf") == 1
    assert "2 differ" in capsys.readouterr().out


def test_a_replay_without_the_layer_of_the_record_says_so(predict, bundle, tmp_path):
    other = DecisionLayer(described(bundle, name="gone"))
    recorded(predict, other, tmp_path / "run.xdf")
    with pytest.raises(StreamError, match=r"decision layer gone.*Put the file of this layer back"):
        replay(predict, read_record(tmp_path / "run.xdf"))
    refitted = DecisionLayer(described(bundle, steps=(*CHAIN[:3], Threshold(enter=0.7))))
    recorded(predict, refitted, tmp_path / "again.xdf")
    with pytest.raises(StreamError, match="decision layer default"):
        replay(predict, read_record(tmp_path / "again.xdf"))


def test_lines_carry_the_state(predict, bundle):
    samples, stamps = eventful()
    decoder = Decoder(
        predict,
        Late(info_of(predict.spec), chunks_of(samples, stamps, 7)),
        StreamConfig(late="hold"),
        decisions=DecisionLayer.load(bundle),
    )
    messages = Messages(decoder)
    assert messages.head()["classes"] == list(CLASSES)
    for decision in decoder:
        line = json.loads(json.dumps(messages.of(decision)))
        assert (line["type"], line["run"]) == ("decision", messages.head()["run"])
        assert line["state"] == decision.state.name
        assert line["reason"] == decision.state.reason
        assert line.get("class") == decision.state.class_name
        assert line.get("probability") == decision.state.probability
        assert tuple(line.get("probabilities", {}).values()) == decision.state.probabilities
        assert list(line.get("probabilities", CLASSES)) == list(CLASSES)
    bare, decisions, _ = decode(predict, Late(info_of(predict.spec), chunks_of(samples, stamps, 7)))
    assert "state" not in Messages(bare).of(decisions[0])


def test_a_layer_of_another_bundle_or_of_other_classes_is_refused(predict, make_bundle):
    samples, stamps = eventful()
    source = ScriptedSource(info_of(predict.spec), chunks_of(samples, stamps))
    other = described(make_bundle("prelocal", class_names=CLASSES, model_seed=5))
    with pytest.raises(DecisionError, match="fitted on another bundle"):
        Decoder(predict, source, decisions=DecisionLayer(other))
    with pytest.raises(DecisionError, match="has the classes a, b, c"):
        Decoder(predict, source, decisions=DecisionLayer(described(predict.bundle, class_names=("a", "b", "c"))))


def test_a_layer_that_waits_for_trials_is_refused_every_hop(predict, bundle):
    """It would decide once and then wait for ever."""
    samples, stamps = eventful()
    evidence = Accumulate(rule="fixed", most=3)
    layer = DecisionLayer(described(bundle, steps=(Probabilities(), dataclasses.replace(evidence, waits=True))))
    with pytest.raises(DecisionError, match="waits for trials"):
        Decoder(predict, ScriptedSource(info_of(predict.spec), chunks_of(samples, stamps)), decisions=layer)
    layer = DecisionLayer(described(bundle, steps=(Probabilities(), evidence)))
    decoder = Decoder(predict, ScriptedSource(info_of(predict.spec), chunks_of(samples, stamps)), decisions=layer)
    assert sum(decision.state.name == "decided" for decision in decoder) > 10


# ---------------------------------------------------------------- trials of events


def events_decided(predict, layer, plan, schedule, n_samples=2000):
    source = ReplaySource(info_of(predict.spec), eeg(n_samples), speed=math.inf, chunk=10)
    markers = [PlannedMarkers(plan, source.clock)]
    return Decoder(predict, source, StreamConfig(late="queue"), decisions=layer, schedule=schedule, markers=markers)


def test_an_event_counts_in_its_own_trial_or_in_none(predict, bundle):
    """Markers come late: of an event whose trial is over, of an event before the first trial, and of a trial itself."""
    evidence = Accumulate(rule="fixed", most=2, waits=True)
    layer = DecisionLayer(described(bundle, steps=(Probabilities(), evidence), signal=Signal()))
    plan = [
        (0.5, "a", 0.0),
        (1.0, "go", 0.0),
        (1.0, "a", 0.0),
        (4.0, "go", 0.0),
        (4.0, "a", 0.0),
        (2.0, "a", 4.5),  # 4.0 is decided at 6.0
        (6.0, "a", 0.5),
        (7.0, "a", 0.0),
        (9.0, "a", 0.0),
        (8.5, "go", 3.0),  # 9.0 is decided at 11.0
        (10.0, "a", 1.5),
    ]
    decoder = events_decided(predict, layer, plan, Events(("a",), 0.0, trial_starts=("go",)))
    found = {d.event.onset: (d.trial, d.state.name, d.state.reason) for d in decoder}
    over, none = "the trial is over", "the window is in no trial that goes on"
    assert found == {
        0.5: (None, "undecided", none),
        1.0: (1.0, "undecided", "evidence of 1 windows is not enough"),
        4.0: (4.0, "undecided", "evidence of 1 windows is not enough"),
        2.0: (1.0, "undecided", none),
        6.0: (4.0, "decided", "enough evidence after 2 windows"),
        7.0: (4.0, "undecided", over),
        9.0: (4.0, "undecided", over),
        10.0: (8.5, "undecided", "evidence of 1 windows is not enough"),
    }
    assert list(found) == [0.5, 1.0, 4.0, 2.0, 6.0, 7.0, 9.0, 10.0]


def test_a_layer_of_trials_needs_to_know_where_they_begin(predict, bundle):
    def layer_of(most):
        evidence = Accumulate(rule="fixed", most=most, waits=True)
        return DecisionLayer(described(bundle, steps=(Probabilities(), evidence)))

    plan = [(1.0, "a"), (3.0, "a"), (5.0, "b")]
    with pytest.raises(DecisionError, match="trial-starts"):
        events_decided(predict, layer_of(3), plan, Events(start=0.0))
    assert [d.state.name for d in events_decided(predict, layer_of(1), plan, Events(start=0.0))] == ["decided"] * 3


def test_the_events_of_a_trial_are_fitted_decided_recorded_and_replayed(bundle, tmp_path, capsys):
    """Through the commands. The oracle steps the layer alone, with a new trial at the first event of each."""
    copied = Bundle.open(copy_bundle(bundle, tmp_path / "bundle"))
    spec, rng, file = copied.spec, np.random.default_rng(4), tmp_path / "trials_raw.fif"
    volts = eeg(8000, spec.n_chans).T * 1e-6
    onsets, names = [], []
    for k in range(25):
        name = CLASSES[rng.integers(3)]
        onsets += [3.0 * k + 0.3, *(3.0 * k + 0.5 * np.arange(1, 5))]
        names += ["trial", *[name] * 4]
    raw = mne.io.RawArray(volts, mne.create_info(list(spec.ch_names), 100.0, "eeg"), verbose="error")
    raw.set_annotations(mne.Annotations(onsets, [0.0] * len(onsets), names), verbose="error")
    raw.save(file, verbose="error")
    arguments = ["--trial-starts", "trial", "--stop", "margin", "--tmin", "0", "--decisions", "trials", "--accept-rate", "0.8"]
    assert run_command(_command("decide"), "sjepa-decide", [str(copied.path), "--fit", str(file), *arguments]) == 0
    layer = DecisionLayer.load(copied, "trials")
    assert layer.description.fit.n_events == 25
    assert layer.description.steps[-1].trial_windows == 4
    out = tmp_path / "lines.jsonl"
    options = ["--source", f"file:{file}", "--speed", "inf", "--late", "queue", "--quiet", "--out", out, "--record"]
    options += [tmp_path / "run.xdf", "--events", ",".join(CLASSES), "--tmin", "0", "--decisions", "trials"]
    assert run_stream(copied.path, *options) == 2
    assert "--trial-starts" in capsys.readouterr().err
    assert run_stream(copied.path, *options, "--trial-starts", "trial") == 0, capsys.readouterr().err
    lines = lines_of(out)
    assert len(lines) == 100
    for i, line in enumerate(lines):
        assert line["trial"] == pytest.approx(3.0 * (i // 4) + 0.3)
        state = layer.step(np.array(line["prediction"]), line["time"], ("new trial",) if i % 4 == 0 else ())
        assert (line["state"], line.get("class"), line["reason"]) == (state.name, state.class_name, state.reason)
    assert {line["state"] for line in lines} >= {"undecided", "decided"}
    assert run_stream(copied.path, "--replay", tmp_path / "run.xdf", "--json") == 0
    result = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert (result["n_states"], result["n_states_differ"]) == (100, 0)


def test_a_trial_of_several_classes_cannot_be_fitted(bundle):
    raw = mne.io.RawArray(np.zeros((1, 1000)), mne.create_info(["a"], 100.0, "eeg"), verbose="error")
    raw.set_annotations(mne.Annotations([0.0, 1.0, 2.0], [0.0] * 3, ["go", "left", "right"]), verbose="error")
    found = events_of(raw)
    with pytest.raises(DecisionError, match="several classes"):
        labelled(found, found.description, CLASSES, all_of_them=False, trials=np.array([0, 0, 0]))
    kept = labelled(found, found.description, CLASSES, all_of_them=False, trials=np.array([-1, -1, 0]))
    assert (kept.onset.tolist(), kept.trials.tolist()) == ([2.0], [0])


# ---------------------------------------------------------------- the command


def lines_of(path):
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["type"] == "decision"]


def stream(bundle, *arguments):
    return run_stream(
        bundle, "--source", "synthetic", "--speed", "inf", "--duration", "6", "--quiet", "--late", "queue", *arguments
    )


def test_the_command_takes_the_only_layer(bundle, tmp_path, capsys):
    assert stream(bundle.path, "--out", tmp_path / "a.jsonl", "--record", tmp_path / "a.xdf") == 0
    assert "decisions: default" in capsys.readouterr().out
    assert {line["state"] for line in lines_of(tmp_path / "a.jsonl")} <= set(STATES)
    assert run_stream(bundle.path, "--replay", tmp_path / "a.xdf") == 0
    assert stream(bundle.path, "--out", tmp_path / "b.jsonl", "--decisions", "none") == 0
    assert "decisions: default" not in capsys.readouterr().out
    assert not any("state" in line for line in lines_of(tmp_path / "b.jsonl"))


def test_the_command_asks_which_of_several_layers(bundle, tmp_path, capsys):
    copied = Bundle.open(copy_bundle(bundle, tmp_path / "bundle"))
    fitted = FitSummary(asked="accept-rate", wanted=0.8, data=("a",), hop=0.5, n_events=30, n_windows=30, minutes=1.0)
    write_layer(copied, described(copied, name="slow", fit=fitted))
    assert stream(copied.path) == 2
    assert "several decision layers; it has default, slow" in " ".join(capsys.readouterr().err.split())
    assert stream(copied.path, "--decisions", "fast") == 2
    assert "no decision layer fast; it has default, slow" in " ".join(capsys.readouterr().err.split())
    assert stream(copied.path, "--decisions", "slow") == 0
    assert "was fitted on windows every 0.5 s, not every 0.1 s" in capsys.readouterr().out
    assert stream(copied.path, "--decisions", "slow", "--hop", "0.5") == 0
    assert "was fitted on" not in capsys.readouterr().out


@pytest.mark.alone
def test_an_outlet_sends_state_class_and_probability(predict, bundle, own_lsl):
    import pylsl

    from sjepa_deploy.runtime.live.lsl_outlet import FLAG_CHANNELS, KINDS, STATE_CHANNELS, send_decisions

    class Silent(ScriptedSource):
        """Where there is no chunk, half a second passes."""

        def read(self, timeout):
            chunk = super().read(timeout)
            self.now += 0.5 * (chunk is None)
            return chunk

    samples, stamps = eventful()
    chunks = chunks_of(samples, stamps, 10)
    source = Silent(info_of(predict.spec), [*chunks, *[None] * 9, chunks[0]])
    decoder = Decoder(
        predict, source, StreamConfig(late="queue"), decisions=DecisionLayer.load(bundle), monotonic=lambda: source.now
    )
    send_decisions(decoder, "sjepa-test-states")
    pauses = [(8.0, Pause()), (10.5, Start())]

    def pause(chunk):
        while pauses and chunk.received >= pauses[0][0]:
            decoder.commands.submit(pauses.pop(0)[1])

    decoder.on_chunk(pause)
    (found,) = pylsl.resolve_byprop("name", "sjepa-test-states", 1, 10.0)
    inlet = pylsl.StreamInlet(found)
    info = inlet.info()
    labels = info.get_channel_labels()
    assert labels == [*CLASSES, *STATE_CHANNELS, "kind", "index", *FLAG_CHANNELS]
    codes = {"states": list(STATES), "classes": list(CLASSES), "kinds": list(KINDS)}
    assert json.loads(info.desc().child_value("codes")) == codes
    assert json.loads(info.desc().child_value("sjepa_deploy"))["run"]["run_id"] == decoder.run_id
    inlet.open_stream(10.0)
    decisions = list(decoder)
    sent = []
    while (pulled := inlet.pull_sample(2.0 if len(sent) < len(decisions) else 0.5))[0] is not None:
        sent.append((dict(zip(labels, pulled[0], strict=True)), pulled[1]))
    made = [(values, stamp) for values, stamp in sent if KINDS[int(values["kind"])] == "decision"]
    for decision, (values, stamp) in zip(decisions, made, strict=True):
        assert stamp == pytest.approx(decision.time, abs=1e-9)
        assert values["index"] == decision.index
        assert [values[name] for name in CLASSES] == decision.prediction.tolist()
        assert STATES[int(values["state"])] == decision.state.name
        assert (CLASSES[int(values["class"])] if values["class"] >= 0 else None) == decision.state.class_name
        number = math.nan if decision.state.probability is None else decision.state.probability
        assert values["probability"] == pytest.approx(number, nan_ok=True)
        flags = {name for name in FLAG_CHANNELS if values[name]}
        assert flags == set(decision.flags)
        assert values["bad channels"] == len(decision.bad_channels)
    beats = [(values, stamp) for values, stamp in sent if KINDS[int(values["kind"])] == "heartbeat"]
    assert all(math.isnan(values[name]) for values, _ in beats for name in (*CLASSES, "probability"))
    said = {(STATES[int(values["state"])], bool(values["paused"])) for values, _ in beats}
    assert said == {("undecided", False), ("undecided", True), ("no signal", False)}
    apart = sorted(np.diff(sorted(stamp for _, stamp in sent)))
    assert apart[-2] <= 1.6  # a heartbeat every second; the clock itself jumps once, over the lost samples


# ---------------------------------------------------------------- windows of a recording, for a fit


def test_windows_of_a_stream_belong_to_the_events_that_hold_half_of_them(predict, tmp_path):
    """An oracle that looks at every sample: with a pause, after which the file's events count from the samples before it."""
    sfreq, n_times = 100.0, predict.spec.n_times
    volts = eeg(3000).T * 1e-6
    raw = mne.io.RawArray(volts, mne.create_info(list(predict.spec.ch_names), sfreq, "eeg"), verbose="error")
    events = [(2.0, 0.0, "left"), (7.0, 4.0, "right"), (14.0, 0.0, "noise"), (21.0, 0.0, "rest"), (24.0, 0.0, "left")]
    marks = [*events, (15.0, 3.0, "BAD_ACQ_SKIP")]
    raw.set_annotations(mne.Annotations(*map(list, zip(*marks, strict=True))))
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    raw = read_recording(tmp_path / "a_raw.fif")
    found = events_of(raw)
    data = stream_windows(
        predict,
        tmp_path / "a_raw.fif",
        raw,
        labelled(found, found.description, CLASSES, all_of_them=False),
        SourceOptions(speed=math.inf, chunk=25),
        StreamConfig(hop=0.25, late="queue"),
        start=0.5,
    )
    kept = np.r_[0:1500, 1800:3000]  # samples that are streamed
    event = np.full(3000, -1)
    for i, (onset, duration, _) in enumerate(each for each in events if each[2] in CLASSES):
        start = round((onset + 0.5) * sfreq)
        event[start : start + max(round(duration * sfreq), n_times)] = i
    event = event[kept]
    truth = [0, 1, 2, 0]
    assert len(data) > 80
    assert data.hop == 0.25
    assert set(data.labels) == {-2, -1, 0, 1, 2}
    for time, label, found in zip(data.times, data.labels, data.events, strict=True):
        newest = round(time * sfreq)
        inside = event[newest - n_times + 1 : newest + 1]
        most = max(range(4), key=lambda i: (inside == i).sum())
        share = (inside == most).sum() / n_times
        assert abs(share - 0.5) < 0.011 or (label >= 0) == (share > 0.5)
        assert label != -1 or share <= 0.011
        if label >= 0:
            assert (label, found) == (truth[most], most)
    decisions = list(
        Decoder.open(predict.bundle, f"file:{tmp_path / 'a_raw.fif'}", StreamConfig(hop=0.25, late="queue"), speed=math.inf)
    )
    assert np.array_equal(data.outputs.astype(np.float32), np.stack([d.prediction for d in decisions]))
    assert data.flags == tuple(d.flags for d in decisions)
