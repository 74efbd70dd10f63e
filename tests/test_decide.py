"""sjepa-decide: what is fitted holds for other events, and what is written is read back or refused."""

import dataclasses
import json
from pathlib import Path

import mne
import numpy as np
import pytest
import scipy.special
from bundles import MONTAGE, copy_bundle, flip_byte
from test_decisions import planted

import sjepa_deploy
from sjepa_deploy.bundle import Bundle, check_writable
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.events import events_of
from sjepa_deploy.eeg.recording import fit_recording
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import DecisionError, ExportError
from sjepa_deploy.files import seal
from sjepa_deploy.runtime.decisions import chain, fit
from sjepa_deploy.runtime.decisions.calibrate import calibration_error
from sjepa_deploy.runtime.decisions.chain import FitRequest
from sjepa_deploy.runtime.decisions.data import BETWEEN, NO_EVENT, CalibrationData, event_windows, joined, labelled
from sjepa_deploy.runtime.decisions.description import LayerDescription, LayerFacts
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.signal import Signal
from sjepa_deploy.runtime.decisions.stored import read_layer, write_layer
from sjepa_deploy.runtime.decisions.threshold import Threshold

CLASSES = ("left", "right", "rest")
FACTS = LayerFacts(name="default", bundle="digest", output_name="prediction", n_outputs=3, class_names=CLASSES)
PAGE = (Path(__file__).parents[1] / "docs" / "decide.md").read_text()


def data_of(outputs, labels, *, seconds=2.0, **changes):
    n = len(labels)
    known = {"events": np.arange(n), "recordings": np.zeros(n, int), "flags": ((),) * n, "names": ("planted",), "targets": None}
    known |= {"times": seconds * np.arange(n), "minutes": n * seconds / 60}
    return CalibrationData(outputs=outputs, labels=labels, **known | changes)


@dataclasses.dataclass
class HeldOut:
    """What a layer does on events of its own."""

    accepted: np.ndarray
    right: np.ndarray
    probability: np.ndarray
    best_is_right: np.ndarray

    @classmethod
    def of(cls, layer, outputs, labels, seconds=2.0):
        states = DecisionLayer(layer).run(outputs, seconds * np.arange(len(labels)))
        names = [layer.class_names[i] for i in labels]
        return cls(
            np.array([state.class_name is not None for state in states]),
            np.array([state.class_name == name for state, name in zip(states, names, strict=True)]),
            np.array([state.probability for state in states]),
            np.array([np.argmax(state.probabilities) for state in states]) == labels,
        )


# ---------------------------------------------------------------- 5,000 events to fit on, 5,000 held out


@pytest.mark.parametrize("accept_rate", [0.8, 0.95])
def test_the_accept_rate_is_what_was_asked_for_on_other_events(accept_rate):
    found = fit.fit(data_of(*planted(5000)), FACTS, FitRequest(asked="accept-rate", wanted=accept_rate))
    held_out = HeldOut.of(found.layer, *planted(5000, seed=1))
    assert held_out.accepted.mean() == pytest.approx(accept_rate, abs=0.02)
    assert calibration_error(held_out.probability, held_out.best_is_right) < 0.03
    summary = found.layer.fit
    assert summary.calibration_error < 0.03
    assert summary.accept_rate.low <= accept_rate <= summary.accept_rate.high
    assert summary.accuracy.value == pytest.approx(held_out.right.sum() / held_out.accepted.sum(), abs=0.03)
    assert summary.false_per_minute.value == pytest.approx((held_out.accepted & ~held_out.right).sum() / (5000 * 2 / 60), rel=0.1)


def test_the_accept_rate_is_not_biased():
    """One pair of 5,000 events has a standard deviation of 0.9 points at 30 %, the mean over six of 2,000 has 0.6."""
    found = []
    for seed in range(100, 112, 2):
        layer = fit.fit(data_of(*planted(2000, seed=seed)), FACTS, FitRequest(asked="accept-rate", wanted=0.3)).layer
        found.append(HeldOut.of(layer, *planted(2000, seed=seed + 1)).accepted.mean())
    assert np.mean(found) == pytest.approx(0.3, abs=0.015)


def test_the_temperature_is_the_planted_one():
    found = fit.fit(data_of(*planted(5000, overconfident=3.0)), FACTS, FitRequest(asked="accept-rate", wanted=0.8))
    assert found.layer.steps[0].temperature == pytest.approx(3.0, rel=0.05)


def test_accuracy_and_false_decisions_hold_on_other_events():
    data = data_of(*planted(5000))
    accurate = fit.fit(data, FACTS, FitRequest(asked="target-accuracy", wanted=0.75)).layer
    held_out = HeldOut.of(accurate, *planted(5000, seed=1))
    assert held_out.right.sum() / held_out.accepted.sum() == pytest.approx(0.75, abs=0.025)
    quiet = fit.fit(data, FACTS, FitRequest(asked="max-false-per-minute", wanted=3.0)).layer
    held_out = HeldOut.of(quiet, *planted(5000, seed=1))
    assert (held_out.accepted & ~held_out.right).sum() / (5000 * 2 / 60) == pytest.approx(3.0, rel=0.12)


def test_a_stated_prevalence_is_what_the_layer_is_calibrated_to():
    """Fitted on equal shares, and judged where one class is rare: probabilities and accept rate are right there."""
    stated = (0.7, 0.2, 0.1)
    data = data_of(*planted(5000))
    plain = fit.fit(data, FACTS, FitRequest(asked="accept-rate", wanted=0.6)).layer
    corrected = fit.fit(data, FACTS, FitRequest(asked="accept-rate", wanted=0.6, prevalence=stated))
    there = planted(5000, seed=2, prevalence=stated)
    before, after = HeldOut.of(plain, *there), HeldOut.of(corrected.layer, *there)
    assert calibration_error(after.probability, after.best_is_right) < 0.03
    assert after.right.sum() > before.right.sum()
    assert after.accepted.mean() == pytest.approx(0.6, abs=0.03)
    assert corrected.layer.fit.accept_rate.value == pytest.approx(0.6, abs=0.02)
    assert corrected.layer.fit.calibration_error < 0.03


def test_the_curve_is_what_the_thresholds_do():
    found = fit.fit(data_of(*planted(2000)), FACTS, FitRequest(asked="accept-rate", wanted=0.5))
    rates = [point.accept_rate.value for point in found.curve]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (pytest.approx(1, abs=0.01), pytest.approx(0, abs=0.01))
    outputs, labels = planted(2000, seed=5)
    for point in found.curve[5:35:10]:
        steps = (found.layer.steps[0], Threshold(enter=point.threshold))
        held_out = HeldOut.of(dataclasses.replace(found.layer, steps=steps), outputs, labels)
        assert held_out.accepted.mean() == pytest.approx(point.accept_rate.value, abs=0.04)
        assert held_out.right.sum() / held_out.accepted.sum() == pytest.approx(point.accuracy.value, abs=0.05)


@pytest.mark.parametrize("steps", ["threshold", "rest"])
def test_the_parts_of_a_chain_give_what_the_whole_chain_gives(steps):
    """A fit runs what comes before the threshold once; thresholds alone it computes for all windows at once."""
    more = {} if steps == "threshold" else {"smoothing": 3.0, "hysteresis": 0.1, "dwell": 2.0, "refractory": 4.0}
    outputs, labels = planted(600)
    outputs[100] = np.nan
    flags = tuple(("held",) if i % 50 == 7 else () for i in range(600))
    data = data_of(outputs, labels, flags=flags, recordings=np.repeat([0, 1], 300), hop=2.0 if more else None)
    request = FitRequest(asked="accept-rate", wanted=0.4, signal=Signal(max_gap=5.0), **more)
    found = fit.fit(data, FACTS, request)
    values = chain.values_of(found.layer.steps[: 1 + bool(more)], data, CLASSES, request.signal)
    outcome = chain.simulated(found.layer.steps[1 + bool(more) :], values, data, CLASSES, request)
    layer = DecisionLayer(found.layer)
    whole = layer.run(outputs[:300], data.times[:300], flags[:300])
    layer.restart()
    whole += layer.run(outputs[300:], data.times[300:], flags[300:])
    assert [state.class_name for state in whole] == [
        CLASSES[c] if d else None for d, c in zip(outcome.decided, outcome.chosen, strict=True)
    ]
    assert 0.05 < outcome.decided.mean() < 0.9


def test_a_stream_is_judged_by_its_events():
    """Ten windows an event, ten between events: a decision that lasts counts once, one between events is false."""
    rng = np.random.default_rng(0)
    n = 120
    truth = rng.integers(3, size=n)
    labels = np.full((n, 20), NO_EVENT)
    labels[:, 5:15] = truth[:, None]
    labels[:, [4, 15]] = BETWEEN
    logits = np.where(np.arange(3) == labels[..., None], 2.0, 0.0) + rng.normal(size=(n, 20, 3))
    events = np.where(labels >= 0, np.arange(n)[:, None], NO_EVENT)
    data = data_of(logits.reshape(-1, 3), labels.ravel(), seconds=0.1, events=events.ravel(), hop=0.1)
    request = FitRequest(asked="max-false-per-minute", wanted=4.0, smoothing=0.3, refractory=1.0, signal=Signal(max_gap=0.3))
    found = fit.fit(data, FACTS, request)
    states = DecisionLayer(found.layer).run(data.outputs, data.times)
    named = np.array([CLASSES.index(s.class_name) if s.class_name else -1 for s in states])
    false = ((named >= 0) & (data.labels != BETWEEN) & (named != data.labels)).sum()
    assert false / data.minutes == pytest.approx(4.0, abs=0.4)  # with a refractory time every decision is an onset
    first = [next((c for c in row if c >= 0), -1) for row in named.reshape(n, 20)[:, 5:15]]
    assert found.layer.fit.accept_rate.value == pytest.approx(np.mean([c >= 0 for c in first]), abs=0.05)
    assert found.layer.fit.n_events == n


@pytest.mark.parametrize("rule", ["fixed", "margin", "probability", "bayes"])
def test_added_evidence_keeps_its_promise(rule):
    def trials(seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(3, size=300)
        outputs = rng.normal(size=(300, 6, 3)) + 0.6 * (np.arange(3) == labels[:, None, None])
        return data_of(outputs.reshape(-1, 3), np.repeat(labels, 6), events=np.repeat(np.arange(300), 6))

    data = trials(0)
    request = FitRequest(asked="target-accuracy", wanted=0.85, stop=rule)
    found = fit.fit(data, FACTS, request)
    new = trials(1)
    values = chain.values_of(found.layer.steps[:1], new, CLASSES, request.signal)
    outcome = chain.simulated(found.layer.steps[1:], values, new, CLASSES, request)
    decided = outcome.decided
    assert decided.reshape(300, 6).sum(axis=1).max() == 1
    assert (outcome.chosen == new.labels)[decided].mean() == pytest.approx(0.85, abs=0.06)
    assert found.layer.fit.accept_rate.value == pytest.approx(decided.sum() / 300, abs=0.12)
    if rule == "fixed":
        assert not decided.reshape(300, 6)[:, :5].any()


@pytest.mark.parametrize("rule", ["value", "distribution", "bds1", "bds2"])
def test_other_rules_stop_trials_once_and_as_often_as_asked(rule):
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    outputs = rng.normal(size=(60, 3, 3)) + 1.5 * (np.arange(3) == labels[:, None, None])
    data = data_of(outputs.reshape(-1, 3), np.repeat(labels, 3), events=np.repeat(np.arange(60), 3))
    request = FitRequest(asked="accept-rate", wanted=0.8, stop=rule, target_pf=0.6, target_pd=0.3)
    found = fit.fit(data, FACTS, request)
    assert found.layer.steps[-1].rule == ("bayes" if rule.startswith("bds") else rule)
    flags = [("new trial",) if i % 3 == 0 else () for i in range(180)]
    states = DecisionLayer(found.layer).run(data.outputs, data.times, flags)
    decided = np.array([state.name == "decided" for state in states]).reshape(60, 3).sum(axis=1)
    assert decided.max() == 1
    assert decided.mean() == pytest.approx(0.8, abs=0.07) or rule.startswith("bds")
    assert decided.mean() > 0.3


def test_the_interval_of_a_regression_holds_other_targets():
    def regression(seed):
        rng = np.random.default_rng(seed)
        targets = rng.normal(size=3000)
        outputs = targets[:, None] + rng.standard_t(4, (3000, 1))
        return data_of(outputs, np.zeros(3000, int), targets=targets)

    facts = dataclasses.replace(FACTS, n_outputs=1, class_names=None)
    found = fit.fit(regression(0), facts, FitRequest(asked="coverage", wanted=0.9)).layer
    new = regression(1)
    states = DecisionLayer(found).run(new.outputs, new.times)
    inside = [low <= y <= high for y, (low, high) in zip(new.targets, (s.interval for s in states), strict=True)]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.015)
    assert found.fit.coverage.value == pytest.approx(0.9, abs=0.015)


# ---------------------------------------------------------------- what cannot be fitted


@pytest.mark.parametrize(
    ("data", "request_", "message"),
    [
        (lambda: data_of(planted(300)[0], np.full(300, 1)), {}, "All events are of the class right"),
        (lambda: data_of(*planted(15)), {}, "15 events"),
        (lambda: data_of(planted(300)[0], np.repeat([0, 2], 150)), {"prevalence": (0.3, 0.3, 0.4)}, "no events of right"),
        (
            lambda: data_of(planted(300)[0], planted(300, seed=1)[1]),
            {"asked": "target-accuracy", "wanted": 0.95},
            r"No threshold reaches --target-accuracy 0\.95: the best is 0",
        ),
        (lambda: data_of(*planted(300)), {"asked": "coverage"}, "classifier is not fitted by --coverage"),
        (lambda: data_of(np.full((300, 3), np.nan), planted(300)[1]), {}, "No window of an event is a signal"),
        (lambda: data_of(*planted(300)), {"stop": "margin", "most": 4}, "0 events have 4 windows"),
        (lambda: data_of(*planted(300)), {"wanted": 1.5}, r"--accept-rate is 1\.5"),
        (lambda: data_of(*planted(300)), {"stop": "margin", "dwell": 1.0}, "Leave one of them out"),
        (lambda: data_of(*planted(300)), {"smoothing": 1.0, "mean_of": 3}, "Leave one of them out"),
    ],
)
def test_what_cannot_be_fitted_says_why(data, request_, message):
    with pytest.raises(DecisionError, match=message):
        fit.fit(data(), FACTS, FitRequest(**{"asked": "accept-rate", "wanted": 0.8} | request_))


def test_windows_at_events_and_of_streams_do_not_mix():
    with pytest.raises(DecisionError, match="do not go together"):
        joined([data_of(*planted(30)), data_of(*planted(30), hop=0.1)])


# ---------------------------------------------------------------- the command, from a recording to the file


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle("postlocal", class_names=CLASSES)


@pytest.fixture
def decide(capsys):
    def run(*arguments):
        capsys.readouterr()
        status = run_command(_command("decide"), "sjepa-decide", [str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def annotated(bundle, n_events, seed, path=None):
    """Return planted EEG whose events the bundle tells as well as it says: classes are drawn from its own probabilities."""
    spec, rng = bundle.spec, np.random.default_rng(seed)
    volts = eeg_windows(1, 8, (n_events + 4) * 100, 100.0, rng)[0].astype(np.float64) * 1e-6
    raw = mne.io.RawArray(volts, mne.create_info(list(MONTAGE.ch_names), 100.0, "eeg"), verbose="error")
    onsets = np.arange(n_events) + 1.0
    fitted = fit_recording(raw, spec.signal, phase="causal")
    starts, _ = fitted.place_windows(onsets, 0.0)
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        outputs = predict.predict(fitted.cut(starts))
    posterior = scipy.special.softmax(SHARPNESS * outputs.astype(np.float64), axis=1)
    labels = (posterior.cumsum(axis=1) < rng.uniform(size=(n_events, 1))).sum(axis=1)
    names = {"left": "left", "right": "T2", "rest": "rest"}
    raw.set_annotations(mne.Annotations(onsets, 0.0, [names[CLASSES[label]] for label in labels]))
    if path is not None:
        raw.save(path, verbose="error")
    return raw, labels


SHARPNESS = 25.0
"""The random weights of the bundle give small outputs. Multiplied by this, they are the planted logits."""


def test_planted_eeg_from_recording_to_held_out_events(bundle, decide, tmp_path):
    """5,000 events of a recording are fitted on through the command, the 5,000 after them are decided."""
    copied = copy_bundle(bundle, tmp_path / "bundle")
    raw, labels = annotated(bundle, 10_000, 0)
    raw.copy().crop(0, 5002.5).save(tmp_path / "fit_raw.fif", verbose="error")
    status, out, err = decide(
        copied,
        "--fit",
        tmp_path / "fit_raw.fif",
        "--classes",
        "right=T2",
        "--tmin",
        "0",
        "--accept-rate",
        "0.8",
        "--json",
        "--out",
        tmp_path / "a.html",
    )
    assert status == 0, err
    result = json.loads(out)
    assert "events get" not in out
    for word in ("accept rate", "threshold", "On other events", "random"):
        assert word in " ".join(err.split())
    layer = DecisionLayer.load(copied)
    assert layer.description == LayerDescription.decoded(result["layer"])
    assert result["layer"]["bundle"] == Bundle.open(copied).manifest.digest
    assert layer.description.steps[0].temperature == pytest.approx(1 / SHARPNESS, rel=0.1)
    raw.crop(5000.5)
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        found = events_of(raw)
        names = [{"T2": "right"}.get(name, name) for name in found.description]
        new = event_windows(raw, bundle.spec, labelled(found, names, CLASSES, all_of_them=True), predict.predict, start=0.0)
    assert np.array_equal(new.labels, labels[5000:])
    held_out = HeldOut.of(layer.description, new.outputs, new.labels)
    assert held_out.accepted.mean() == pytest.approx(0.8, abs=0.02)
    assert calibration_error(held_out.probability, held_out.best_is_right) < 0.03
    page = (tmp_path / "a.html").read_text()
    assert page.count("<tr>") > 40
    assert "<polyline" in page
    status, out, _ = decide(copied, "--show")
    assert status == 0
    assert "Outputs become probabilities at temperature" in out
    assert "5000 events of fit_raw.fif" in out


def test_a_stream_of_a_recording_is_fitted_through_the_live_path(bundle, decide, tmp_path):
    copied = copy_bundle(bundle, tmp_path / "bundle")
    annotated(bundle, 120, 0, tmp_path / "fit_raw.fif")
    status, out, err = decide(
        *(
            copied,
            "--fit",
            tmp_path / "fit_raw.fif",
            "--classes",
            "right=T2",
            "--tmin",
            "0",
            "--max-false-per-minute",
            "20",
            "--json",
        ),
        *("--hop", "0.5", "--smoothing", "0.5", "--refractory", "1", "--decisions", "stream"),
    )
    assert status == 0, err
    layer = DecisionLayer.load(copied, "stream").description
    assert [type(step).__name__ for step in layer.steps] == ["Probabilities", "Exponential", "Refractory", "Threshold"]
    assert layer.signal == Signal(max_gap=1.5)
    assert layer.fit.hop == 0.5
    assert layer.fit.n_windows == pytest.approx(124 / 0.5 - 3, abs=1)
    assert json.loads(out)["file"].endswith("decisions/stream.json")


def npz_of(path, n=400, **arrays):
    outputs, labels = planted(n)
    np.savez(path, **{"outputs": outputs, "labels": np.array(CLASSES)[labels]} | arrays)
    return path


def test_the_example_of_the_page_runs_as_written(bundle, decide, tmp_path, monkeypatch):
    copy_bundle(bundle, tmp_path / "my-bundle")
    npz_of(tmp_path / "calibration.npz", minutes=20.0)
    monkeypatch.chdir(tmp_path)
    commands = [line.split() for line in PAGE.splitlines() if line.startswith("    sjepa-decide my-bundle") and ".npz" in line]
    assert commands
    for command in [*commands, ["sjepa-decide", "my-bundle", "--show"]]:
        status, _, err = decide(*command[1:])
        assert status == 0, err
    (example,) = [block for block in PAGE.split("```")[1::2] if block.startswith("python")]
    said = []
    exec(example.removeprefix("python"), {"print": lambda *words: said.append(" ".join(map(str, words)))})
    assert said
    assert all(line.split()[0] in ("decided", "rejected") for line in said)


def test_a_layer_is_not_replaced_without_force(bundle, decide, tmp_path):
    copied = copy_bundle(bundle, tmp_path / "bundle")
    fit_it = (copied, "--fit", npz_of(tmp_path / "w.npz"), "--accept-rate", "0.5")
    assert decide(*fit_it)[0] == 0
    status, _, err = decide(*fit_it)
    assert (status, "--force" in err) == (2, True)
    assert decide(*fit_it, "--force")[0] == 0
    assert decide(*fit_it, "--decisions", "other")[0] == 0
    with pytest.raises(DecisionError, match="several decision layers; it has default, other"):
        DecisionLayer.load(copied)
    assert DecisionLayer.load(copied, "other").description.name == "other"
    status, out, _ = decide(copied, "--show")
    assert out.count("decides left, right, rest") == 2
    assert Bundle.open(copied).manifest == Bundle.open(bundle.path).manifest  # the layer is no file of the manifest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "w.npz"], "Give one of --accept-rate"),
        (["--fit", "w.npz", "--accept-rate", "0.5", "--coverage", "0.9"], "Give one of --accept-rate"),
        (["--accept-rate", "0.5"], "Give --fit"),
        (["--fit", "w.npz", "--accept-rate", "1.5"], "--accept-rate is 1.5"),
        (["--fit", "w.npz", "--accept-rate", "0.5", "--prevalence", "left=0.5"], "a share for each of left, right, rest"),
        (["--fit", "w.npz", "--accept-rate", "0.5", "--prevalence", "left=0.5,right=0.4,rest=0.3"], "add up to 1"),
        (["--fit", "w.npz", "--accept-rate", "0.5", "--class-names", "a,b,c"], "Leave --class-names out"),
        (["--fit", "w.npz", "--accept-rate", "0.5", "--decisions", "a/b"], "no name of a decision layer"),
        (["--fit", "none.npz", "--accept-rate", "0.5"], "cannot be read"),
        (["--fit", "strange.npz", "--accept-rate", "0.5"], "the labels up"),
        (["--fit", "nan.npz", "--accept-rate", "0.5"], "not finite"),
        (["--fit", "short.npz", "--accept-rate", "0.5"], "outputs of shape (400, 2)"),
        (["--fit", "w.npz", "--coverage", "0.9"], "classifier is not fitted by --coverage"),
        (["--fit", "w.npz", "--accept-rate", "0.5", "--prevalence", "left"], "Write CLASS=VALUE"),
        (["--show"], "no decision layer"),
        (["--show", "--decisions", "mine"], "no decision layer mine"),
    ],
)
def test_wrong_input_is_refused(bundle, decide, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    npz_of("w.npz")
    outputs, labels = planted(400)
    npz_of("strange.npz", labels=np.where(labels == 0, "up", "left"))
    npz_of("nan.npz", outputs=np.where(labels[:, None] == 0, np.nan, outputs))
    npz_of("short.npz", outputs=outputs[:, :2])
    status, _, err = decide(bundle.path, *arguments)
    assert status == 2
    assert message in " ".join(err.split())
    assert not (bundle.path / "decisions").exists()


def test_a_recording_without_the_events_says_which_it_has(bundle, decide, tmp_path):
    annotated(bundle, 30, 0, tmp_path / "fit_raw.fif")
    where = (bundle.path, "--fit", tmp_path / "fit_raw.fif", "--accept-rate", "0.5")
    status, _, err = decide(*where)
    assert (status, "--tmin" in err) == (2, True)
    status, _, err = decide(*where, "--tmin", "0", "--events", "left,T2,up")
    assert status == 2
    assert "no events up; its events are T2" in " ".join(err.split())
    status, _, err = decide(*where, "--tmin", "0", "--events", "all")
    assert "events of T2, left, rest; the classes are left, right, rest" in " ".join(err.split())


def test_events_and_numbers_come_from_a_table(make_bundle, decide, tmp_path):
    """A regression is fitted on the column of a table of events, as sjepa-run reads it."""
    bundle = copy_bundle(make_bundle("postlocal", n_outputs=1), tmp_path / "bundle")
    opened, rng = Bundle.open(bundle), np.random.default_rng(0)
    volts = eeg_windows(1, 8, 6500, 100.0, rng)[0].astype(np.float64) * 1e-6
    raw = mne.io.RawArray(volts, mne.create_info(list(MONTAGE.ch_names), 100.0, "eeg"), verbose="error")
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    rows = [f"{1 + i}\tstimulus\t{value:.4f}" for i, value in enumerate(rng.normal(size=60))]
    (tmp_path / "a.tsv").write_text("\n".join(["onset\ttrial_type\tseconds", *rows]))
    where = (bundle, "--fit", tmp_path / "a_raw.fif", "--events", tmp_path / "a.tsv", "--tmin", "0", "--coverage", "0.8")
    status, _, err = decide(*where)
    assert (status, "--column" in err) == (2, True)
    status, _, err = decide(*where, "--column", "seconds")
    assert status == 0, err
    layer = DecisionLayer.load(bundle).description
    fitted = fit_recording(raw, opened.spec.signal, phase="causal")
    starts, _ = fitted.place_windows(np.arange(60) + 1.0, 0.0)
    with sjepa_deploy.load(opened, check_unit=False) as predict:
        residuals = predict.predict(fitted.cut(starts))[:, 0] - [float(row.split("\t")[2]) for row in rows]
    assert layer.steps[-1].radius == pytest.approx(np.sort(np.abs(residuals))[48], rel=1e-5)  # the 49th of 60, as 61 x 0.8 = 48.8


def test_a_base_model_has_no_decision_layer(make_bundle, decide, tmp_path):
    status, _, err = decide(make_bundle("base").path, "--fit", npz_of(tmp_path / "w.npz"), "--accept-rate", "0.5")
    assert (status, "Fine-tune the model first" in err) == (2, True)


def test_a_regression_is_fitted_from_targets(make_bundle, decide, tmp_path):
    bundle = copy_bundle(make_bundle("postlocal", n_outputs=1), tmp_path / "bundle")
    rng = np.random.default_rng(0)
    targets = rng.normal(size=200)
    np.savez(tmp_path / "w.npz", outputs=targets[:, None] + rng.normal(size=(200, 1)), targets=targets)
    status, out, err = decide(bundle, "--fit", tmp_path / "w.npz", "--coverage", "0.9")
    assert status == 0, err
    assert "of the targets lie inside the interval" in out
    assert DecisionLayer.load(bundle).step(np.array([1.0]), 0.0).interval is not None


# ---------------------------------------------------------------- damaged files, and files of something else


@pytest.fixture
def fitted(bundle, tmp_path):
    """Return a bundle with a layer."""
    copied = Bundle.open(copy_bundle(bundle, tmp_path / "bundle"))
    layer = LayerDescription(
        name="default",
        bundle=copied.manifest.digest,
        output_name="prediction",
        n_outputs=3,
        class_names=CLASSES,
        steps=(Probabilities(), Threshold(enter=0.5)),
    )
    write_layer(copied, layer)
    return copied


def test_a_flipped_bit_is_found(fitted):
    file = fitted.path / "decisions" / "default.json"
    intact = file.read_bytes()
    for at in range(0, len(intact), 7):
        flip_byte(file, at)
        with pytest.raises(DecisionError, match="damaged|changed after"):
            read_layer(fitted, "default")
        file.write_bytes(intact)
    file.write_bytes(intact[:-20])
    with pytest.raises(DecisionError, match="is no JSON"):
        read_layer(fitted, "default")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(bundle="0" * 64), "fitted on another bundle"),
        (lambda data: data.update(class_names=["a", "b", "c"]), "has the classes a, b, c, the model left, right, rest"),
        (lambda data: data.update(n_outputs=2, class_names=["a", "b"]), "of 2 outputs, the model has 3"),
        (lambda data: data.update(schema_version=2), "reads up to 1"),
        (lambda data: data.update(name="other"), "is called other"),
        (lambda data: data["steps"].append({"step": "magic"}), "'magic', which is none of"),
        (lambda data: data["steps"][1].update(enter=1.5), r"threshold is 1\.5"),
        (lambda data: data["steps"][1].update(more=1), "unknown key 'more'"),
        (lambda data: data.update(steps=[]), "no steps"),
        (lambda data: data.pop("steps"), "no list of steps"),
        (lambda data: data["steps"][0].update(temperature="hot"), "must be of type number"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(fitted, edit, message):
    """Sealed anew: the digest keeps nobody from writing nonsense."""
    file = fitted.path / "decisions" / "default.json"
    data = json.loads(file.read_text())
    edit(data)
    data["digest"] = seal(data)
    file.write_text(json.dumps(data))
    with pytest.raises(DecisionError, match=message):
        DecisionLayer.load(fitted)


def test_a_bundle_is_replaced_with_its_layers(fitted):
    """They are of its weights: a new export needs no other permission for them, as for engines."""
    check_writable(fitted.path, force=True)
    (fitted.path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="notes.txt"):
        check_writable(fitted.path, force=True)


def test_another_bundle_of_the_same_classes_is_told(fitted, make_bundle, tmp_path):
    other = copy_bundle(make_bundle("postlocal", class_names=CLASSES, model_seed=3), tmp_path / "other")
    (other / "decisions").mkdir()
    (other / "decisions" / "default.json").write_bytes((fitted.path / "decisions" / "default.json").read_bytes())
    with pytest.raises(DecisionError, match="other weights have other thresholds"):
        DecisionLayer.load(other)
