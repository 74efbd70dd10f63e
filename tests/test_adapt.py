"""Live adaptation: labels bring back what a person loses, within limits; poisoned labels bring the last layer back to the bit."""

import dataclasses
import json
import math

import numpy as np
import pytest
from people import CLASSES, SHIFT, labels, recording
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from streams import ScriptedSource, chunks_of, info_of, run_stream

import sjepa_deploy
from sjepa_deploy.eeg.prepared import prepare
from sjepa_deploy.errors import BackendError, CommandError, StreamError
from sjepa_deploy.learning.calibrate import features_of
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
from sjepa_deploy.runtime.live.adapt import AdaptConfig, Agreement, adapt
from sjepa_deploy.runtime.live.commands import Label
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import Event, PlannedMarkers
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.live.schedule import Events


@pytest.fixture(scope="module")
def bundle(people_bundle):
    return people_bundle


@pytest.fixture(scope="module")
def model(bundle):
    return load_model(read_checkpoint(bundle.checkpoint), bundle.spec)


def decoder_of(bundle, raw, told=None, **options):
    """Return a decoder of all events of a recording. `told` are the classes that markers tell, true or not."""
    predict = sjepa_deploy.load(bundle, check_unit=False)
    samples = raw.get_data().T * 1e6
    info = info_of(bundle.spec, sfreq=raw.info["sfreq"])
    source = ScriptedSource(info, chunks_of(samples, np.arange(len(samples)) / info.sfreq, 50))
    source.live = False  # a recorder is waited for
    names = raw.annotations.description if told is None else told
    plan = list(zip(raw.annotations.onset.tolist(), map(str, names), strict=True))
    markers = PlannedMarkers(plan, source.clock)
    return Decoder(predict, source, StreamConfig(late="queue"), schedule=Events(("all",)), markers=[markers], **options)


def swapped(names):
    return np.where(np.asarray(names) == CLASSES[0], *CLASSES[::-1])


def right(decisions, raw):
    truth = [CLASSES.index(name) for name in raw.annotations.description]
    return np.array([d.prediction.argmax() == truth[i] for i, d in enumerate(decisions)])


def test_40_labels_of_events_bring_back_what_another_person_loses(bundle, model):
    raw = recording(7, 100, SHIFT)
    decoder = decoder_of(bundle, raw)
    adapter = adapt(decoder, AdaptConfig(budget=40, cooldown=0.0))
    incidents = []
    decoder.on_incident(incidents.append)
    decisions = list(decoder)
    assert len(decisions) == 100
    before, after = right(decisions, raw)[:10], right(decisions, raw)[45:]
    assert before.mean() < 0.3
    assert after.mean() > 0.9
    assert (adapter.n_labels, adapter.alarmed) == (40, False)
    assert adapter.n_refused == 60
    assert {change.why for change in adapter.changes} == {"update"}
    assert "update" in {incident.kind for incident in incidents}
    # the oracle: scikit-learn on PyTorch's features of the first 40 windows
    trials = prepare(raw, model.spec.signal)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
    oracle.fit(features_of(model, trials.eeg[:40]).astype(np.float64), labels(trials)[:40])
    expected = oracle.decision_function(features_of(model, trials.eeg[45:]).astype(np.float64))
    found = np.array([d.prediction[1] - d.prediction[0] for d in decisions[45:]])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_poisoned_labels_bring_the_last_layer_back_to_the_bit(bundle):
    """80 labels are right, then all are of the other class: what was before the first of them is back, and stays."""
    raw = recording(8, 130)
    told = np.concatenate([raw.annotations.description[:80], swapped(raw.annotations.description[80:])])
    decoder = decoder_of(bundle, raw, told)
    adapter = adapt(decoder, AdaptConfig(cooldown=20.0))
    seen = []
    decoder.on_decision(lambda decision: seen.append(decoder.predict.backend.last_layer))
    decisions = list(decoder)
    assert adapter.alarmed
    (alarm,) = [change for change in adapter.changes if change.why == "rollback"]
    clean = [change for change in adapter.changes if change.why == "update" and change.n_labels <= 80]
    assert alarm.digest == clean[-1].digest
    assert alarm.after < 80 + 40
    assert adapter.n_labels == alarm.after + 1
    back, then = decisions[-1], decisions[79]
    assert seen[back.index] is seen[then.index] is not None
    assert right(decisions, raw)[alarm.after + 1 :].mean() > 0.9
    window = np.random.default_rng(0).normal(0, 10, (1, *bundle.spec.input_shape)).astype(np.float32)
    with sjepa_deploy.load(bundle) as predict:
        predict.adaptable().last_layer = clean[-1].layer
        assert decoder.predict(window).tobytes() == predict(window).tobytes()


def test_an_alarm_before_any_update_leaves_the_bits_of_the_bundle(bundle):
    raw = recording(9, 60)
    told = np.concatenate([raw.annotations.description[:30], swapped(raw.annotations.description[30:])])
    decoder, plain = decoder_of(bundle, raw, told), decoder_of(bundle, raw)
    plain.predict.adaptable()
    adapter = adapt(decoder, AdaptConfig(trials=1000))
    adapted, known = list(decoder), list(plain)
    assert adapter.alarmed
    assert adapter.changes[-1].digest == ""
    assert [d.prediction.tobytes() for d in adapted] == [d.prediction.tobytes() for d in known]


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_record_of_an_adapted_run_is_replayed_to_the_bit(bundle, tmp_path, poisoned):
    raw = recording(10, 90, SHIFT)
    names = raw.annotations.description
    decoder = decoder_of(bundle, raw, np.concatenate([names[:60], swapped(names[60:])]) if poisoned else None)
    adapter = adapt(decoder, AdaptConfig(cooldown=15.0))
    recorder = record(decoder, tmp_path / "run.xdf", adapter=adapter)
    decisions = list(decoder)
    recorder.close()
    assert adapter.alarmed == poisoned
    recorded = read_record(tmp_path / "run.xdf")
    assert recorded.run.adapt == adapter.config
    assert recorded.heads == adapter.changes
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        result = replay(predict, recorded)
        assert result.passed
        assert result.n_decisions == len(decisions)
        without = replay(predict, dataclasses.replace(recorded, heads=recorded.heads[:1]))
        assert min(without.differ) == recorded.heads[1].after + 1


def test_labels_of_the_command_are_learned_from_or_refused_with_a_reason(bundle):
    """A decoder that decides every hop: a label names the number of a decision."""
    raw = recording(11, 30)
    samples = raw.get_data().T * 1e6
    samples[3000:3100, 3] = np.nan
    info = info_of(bundle.spec, sfreq=raw.info["sfreq"])
    source = ScriptedSource(info, chunks_of(samples, np.arange(len(samples)) / info.sfreq, 50))
    decoder = Decoder(sjepa_deploy.load(bundle, check_unit=False), source, StreamConfig(hop=0.2, late="queue"))
    adapter = adapt(decoder, AdaptConfig(budget=30, cooldown=1.0))
    flagged, replies = [], {}
    for decision in decoder:
        if decision.flags and not flagged:
            flagged.append(decision.index)
        if decision.index == 100:
            asked = {
                "known": Label(event=99, class_name="left"),
                "twice": Label(event=99, class_name="right"),
                "future": Label(event=5000, class_name="left"),
                "class": Label(event=98, class_name="up"),
                "flagged": Label(event=flagged[0], class_name="left"),
            }
            replies = {name: decoder.commands.submit(command) for name, command in asked.items()}
        if 110 <= decision.index < 150:
            decoder.commands.submit(Label(event=decision.index, class_name=CLASSES[decision.index % 2]))
    told = {name: future.result() for name, future in replies.items()}
    assert told["known"].accepted
    for name, why in (("twice", "already"), ("future", "5000"), ("class", "up"), ("flagged", "not learned from")):
        assert not told[name].accepted
        assert why in told[name].text
    assert adapter.n_labels == 30
    assert adapter.changes
    with pytest.raises(CommandError, match="budget"):
        adapter.label(decision.index, "left")


def test_updates_keep_their_cooldown_and_wait_for_each_class(bundle):
    raw = recording(12, 60)
    decoder = decoder_of(bundle, raw)
    adapter = adapt(decoder, AdaptConfig(cooldown=25.0, trials=4))
    list(decoder)
    times = [change.time for change in adapter.changes]
    assert len(times) > 2
    assert min(np.diff(times)) >= 25.0
    counts = [list(raw.annotations.description[: adapter.changes[0].n_labels]).count(name) for name in CLASSES]
    assert min(counts) == 4


@pytest.mark.parametrize("fault", ["regression", "torch", "classes", "config"])
def test_what_cannot_adapt_is_refused(bundle, make_bundle, fault):
    raw = recording(13, 4)
    if fault == "regression":
        numbers = sjepa_deploy.load(make_bundle("prelocal"), check_unit=False)
        decoder = Decoder(numbers, ScriptedSource(info_of(numbers.spec), []))
        with pytest.raises(StreamError, match="regression"):
            adapt(decoder)
    elif fault == "torch":
        decoder = decoder_of(bundle, raw)
        decoder.predict.close()
        decoder.predict = sjepa_deploy.load(bundle, backend="torch", check_unit=False)
        with pytest.raises(BackendError, match="ort-cpu"):
            adapt(decoder)
    elif fault == "classes":
        with pytest.raises(StreamError, match="up"):
            adapt(decoder_of(bundle, raw), classes={"T1": "up"})
    else:
        with pytest.raises(StreamError, match="budget"):
            AdaptConfig(budget=0)


@pytest.mark.parametrize("agree", [0.7, 0.9])
def test_false_alarms_are_as_rare_as_asked_for_and_swapped_labels_are_found(agree):
    rng = np.random.default_rng(0)
    false = sum(any(watch.add(bool(each)) for each in rng.random(200) < agree) for watch in (_watch() for _ in range(500)))
    assert false <= 500 * 0.02  # asked for is 0.01
    found = []
    for _ in range(100):
        watch = _watch()
        alarms = [watch.add(bool(each)) for each in rng.random(60) < agree]
        if not any(alarms):
            found.append(next(i for i, each in enumerate(rng.random(1000) < 1 - agree) if watch.add(bool(each))))
    assert np.median(found) < (80 if agree == 0.7 else 14)


def _watch():
    return Agreement(0.5, math.log(200 / 0.01))


def test_the_command_adapts_and_its_record_replays(bundle, tmp_path, capsys):
    raw = recording(14, 60, SHIFT)
    raw.annotations.description[:] = np.where(raw.annotations.description == "left", "T1", "T2")
    raw.save(tmp_path / "session_raw.fif", verbose="error")
    command = ["--events", "T1,T2", "--classes", "left=T1,right=T2", "--adapt", "--adapt-cooldown", 5, "--speed", "inf"]
    record = ["--record", tmp_path / "run.xdf", "--late", "queue", "--quiet", "--json"]
    source = f"file:{tmp_path / 'session_raw.fif'}"
    assert run_stream(bundle.path, "--source", source, *command, *record) == 0
    told = json.loads(capsys.readouterr().out)["adaptation"]
    assert told["labels"] == 60
    assert not told["alarm"]
    assert len(told["changes"]) > 3
    assert run_stream(bundle.path, "--replay", tmp_path / "run.xdf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_differ"] == 0
    assert all(isinstance(event, Event) for event in (each.event for each in read_record(tmp_path / "run.xdf").events))
