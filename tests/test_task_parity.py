"""The live decoder decodes what the model learned: a model that was trained elsewhere, on events of a recording, three ways."""

import json
import re
import shutil
from pathlib import Path

import mne
import numpy as np
import oracle
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from skorch import NeuralNetClassifier

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.events import Events, events_of
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.steps import BandPass, Channels, Reference, Resample
from sjepa_deploy.errors import BundleError, RecordingError
from sjepa_deploy.evaluation.task import check_task, live_windows, read_tasks, write_task
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.learning.origin import ORIGIN_KEY, Origin, samples_hash
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.runtime.predictor import load
from sjepa_deploy.spec import EventWindow, ModelSpec, SignalSpec

from bundles import RANDOM  # isort: skip


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """Return 200 s of eight channels at 128 Hz: after each "left" a wave on the left, after each "right" one on the right.

    The waves are locked to their events: 8 Hz that begins 0.2 s after them, of opposite phase on the two sides.
    """
    rng = np.random.default_rng(5)
    names, rate = ["F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2"], 128.0
    volts = np.cumsum(rng.normal(size=(8, 25600)), axis=1) * 1e-6 + rng.normal(size=(8, 25600)) * 4e-6
    raw = mne.io.RawArray(volts, mne.create_info(names, rate, "eeg"), verbose="error")
    onsets = 6.0 + 2.4 * np.arange(80)
    kinds = rng.permutation(["left", "right"] * 40)
    time = np.arange(100) / rate
    wave = 9e-6 * np.sin(2 * np.pi * 8 * time) * np.hanning(100)
    for onset, kind in zip(onsets, kinds, strict=True):
        first = round((onset + 0.2) * rate)
        volts[:, first : first + 100] += np.outer([1, -1] * 4, wave if kind == "left" else -wave)
    raw = mne.io.RawArray(volts, raw.info, verbose="error")
    raw.set_annotations(mne.Annotations(onsets, 0.0, kinds), verbose="error")
    path = tmp_path_factory.mktemp("task") / "planted_raw.fif"
    raw.save(path, verbose="error")
    return path


def sjepa(name, *arguments) -> int:
    return run_command(_command(name), f"sjepa-{name}", list(map(str, arguments)))


def signal_of(raw, phase, **changes) -> SignalSpec:
    fields = {
        "n_chans": len(raw.ch_names),
        "n_times": 160,
        "sfreq": 100.0,
        "ch_names": tuple(raw.ch_names),
        "steps": (BandPass(l_freq=0.5, h_freq=40.0), Resample(), Channels(), Reference()),
        "phase": phase,
        "event_window": EventWindow(start=0.0, events=("left", "right")),
    }
    return SignalSpec(**fields | changes)


def taught(prepared, classes, *, max_epochs=40) -> NeuralNetClassifier:
    """Return braindecode's PostLocal after skorch trained it on prepared windows."""
    n_chans, n_times = prepared.signal.input_shape
    torch.manual_seed(1)
    return NeuralNetClassifier(
        oracle.CLASSES["postlocal"](n_outputs=2, n_chans=n_chans, n_times=n_times, sfreq=100.0, n_spat_filters=4),
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=2e-3,
        max_epochs=max_epochs,
        batch_size=16,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
    ).fit(prepared.eeg, np.array([classes.index(name) for name in prepared.events.description]))


def exported(net, signal, classes, folder) -> Bundle:
    """Return the bundle of a trained PostLocal."""
    spec = ModelSpec(variant="postlocal", signal=signal, n_outputs=2, class_names=classes)
    model = build_model(spec, seed=0)
    model.load_state_dict(net.module_.state_dict())
    return to_bundle(model.eval(), folder, weights=RANDOM, precisions=("fp32",), max_batch=64)


@pytest.fixture(scope="module")
def trained(recording, tmp_path_factory):
    """Return a function from a phase to a bundle: skorch trains braindecode's PostLocal on windows of `prepare`."""
    raw = read_recording(recording)
    made = {}

    def train(phase):
        if phase in made:
            return made[phase]
        signal = signal_of(raw, phase)
        prepared = prepare(raw, signal)
        classes = ("left", "right")
        targets = np.array([classes.index(name) for name in prepared.events.description])
        net = taught(prepared, classes)
        bundle = exported(net, signal, classes, tmp_path_factory.mktemp(phase) / "bundle")
        made[phase] = bundle, net, prepared, targets
        return made[phase]

    return train


def test_a_causal_model_decides_live_as_it_did_in_training(trained, recording):
    bundle, net, prepared, targets = trained("causal")
    raw = read_recording(recording)
    with load(bundle, check_unit=False) as predict:
        outputs = predict.predict(prepared.eeg)
        result = check_task(predict, raw, events_of(raw), recording="planted", start=0.0, labels=prepared.events.description)
    with torch.no_grad():
        theirs = net.module_.eval()(torch.as_tensor(prepared.eeg)).numpy()
    np.testing.assert_allclose(outputs, theirs, atol=1e-4 * np.abs(theirs).max())
    assert result.passed
    assert result.identical == 1.0
    accuracy = balanced_accuracy_score(targets, theirs.argmax(axis=1))
    assert accuracy > 0.8
    for way in result.ways:
        assert way.differ == 0.0
        assert way.score.value == pytest.approx(accuracy)
        assert way.score.low <= way.score.value <= way.score.high
    assert (result.loss.value, result.loss.low, result.loss.high) == (0.0, 0.0, 0.0)


def test_a_model_of_a_recorded_experiment_decides_live_as_in_training(recorded, tmp_path):
    """32 channels at 128 Hz, decoded at 100 Hz: the same windows and predictions live, to the bit, and the same score."""
    path = recorded("eeglab_data.set")
    raw = read_recording(path)
    classes = ("square", "rt")
    signal = signal_of(raw, "causal", n_times=200, event_window=EventWindow(start=-0.5, events=classes))
    prepared = prepare(raw, signal)
    net = taught(prepared, classes, max_epochs=12)
    bundle = exported(net, signal, classes, tmp_path / "bundle")
    events = events_of(raw).named(classes)
    with load(bundle, check_unit=False) as predict:
        result = check_task(predict, raw, events, recording=path.name, start=-0.5, labels=events.description)
        offline = np.concatenate([predict(window[None]) for window in prepared.eeg])
    assert result.passed
    assert result.identical == 1.0
    assert [way.differ for way in result.ways] == [0.0, 0.0, 0.0]
    truth = [classes.index(name) for name in prepared.events.description]
    score = balanced_accuracy_score(truth, offline.argmax(axis=1))
    assert [way.score.value for way in result.ways] == pytest.approx([score] * 3)
    fitted = fit_recording(raw, signal)
    starts, whole = fitted.place_windows(events.onset, -0.5)
    live = np.stack(list(live_windows(raw, fitted, starts[whole], bundle.spec.signal, interpolate=0.0, seed=3)))
    assert live.tobytes() == prepared.eeg.tobytes()
    with load(bundle, check_unit=False) as predict:
        assert np.concatenate([predict(window[None]) for window in live]).tobytes() == offline.tobytes()


def test_a_zero_phase_model_is_caught(trained, recording, capsys):
    """The command ends with status 1 and says why; the result lies in the bundle, whose digest stays."""
    bundle, *_ = trained("zero-phase")
    digest = bundle.manifest.digest
    status = sjepa("stream", bundle.path, "--check", str(recording), "--events", "left,right", "--json")
    captured = capsys.readouterr()
    assert status == 1
    assert "zero-phase" in captured.err
    assert "delay" in captured.err
    found = json.loads(captured.out)
    assert not found["passed"]
    assert found["ways"][2]["differ"] > 0.01
    assert found["identical"] == 1.0  # the steps are right, their phase is not
    opened = Bundle.open(bundle.path)
    assert opened.manifest.digest == digest
    assert read_tasks(opened)[0].phase == "zero-phase"


def test_the_command_passes_a_causal_model(trained, recording, capsys):
    bundle, *_ = trained("causal")
    assert sjepa("stream", bundle.path, "--check", str(recording), "--events", "all") == 0
    shown = capsys.readouterr().out
    assert "balanced accuracy" in shown
    assert "all" in shown


def test_windows_that_slide_are_a_choice_where_the_model_learned_at_events(trained, recording, tmp_path, capsys):
    """No command slides by default; one that is told to slide says what the model learned from."""
    bundle, *_ = trained("causal")
    for arguments in (["stream", bundle.path, "--check", recording], ["run", bundle.path, recording]):
        assert sjepa(*arguments) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "learned from windows at 0 s after events" in told
        assert "--events" in told
    fit = ["--fit", tmp_path / "gone.fif", "--max-false-per-minute", "1"]
    sjepa("run", bundle.path, recording, "--hop", "60", "--out", tmp_path / "out.tsv")
    sjepa("decide", bundle.path, *fit, "--hop", "1")
    assert capsys.readouterr().out.count("learned from windows at 0 s after events") == 2
    sjepa("decide", bundle.path, *fit)
    assert "learned from" not in capsys.readouterr().out


def test_events_of_a_table_are_decoded_the_same(trained, recording, tmp_path, capsys):
    """sjepa-run gives each event of a table a row, with its own columns and its class."""
    bundle, _, prepared, _ = trained("causal")
    rows = [
        f"{onset:.6f}\tcue\t{name}\t{i}"
        for i, (onset, name) in enumerate(zip(prepared.events.onset, prepared.events.description, strict=True))
    ]
    table = tmp_path / "events.tsv"
    table.write_text("\n".join(["onset\ttrial_type\tside\ttrial", *rows]) + "\n")
    out = tmp_path / "out.tsv"
    assert sjepa("run", bundle.path, str(recording), "--events", str(table), "--out", str(out)) == 0
    header, *lines = [line.split("\t") for line in out.read_text().splitlines()]
    assert header == ["onset", "description", "side", "trial", "left", "right", "class"]
    assert [line[2] for line in lines] == list(prepared.events.description)
    with load(bundle, check_unit=False) as predict:
        want = predict.predict(prepared.eeg)
    np.testing.assert_allclose(np.array([line[4:6] for line in lines], dtype=float), want, rtol=1e-6)
    assert [line[6] for line in lines] == [("left", "right")[row.argmax()] for row in want]
    by_column = ["--check", str(recording), "--events", str(table), "--column", "side"]
    assert sjepa("stream", bundle.path, *by_column) == 0
    capsys.readouterr()


def test_an_event_locked_bundle_asks_for_events(trained, recording, capsys):
    bundle, *_ = trained("causal")
    assert sjepa("run", bundle.path, str(recording)) == 2
    assert "--events" in capsys.readouterr().err
    assert sjepa("run", bundle.path, str(recording), "--hop", "0.5", "--events", "left") == 2
    assert "contradict" in capsys.readouterr().err
    assert sjepa("run", bundle.path, str(recording), "--events", "nod") == 2
    assert "left (40), right (40)" in capsys.readouterr().err


def test_the_example_of_the_page_runs_as_it_stands(recording, tmp_path, monkeypatch, capsys):
    """Windows from `prepare`, a network that skorch trains, and the commands that take them to a live decoder."""
    page = (Path(__file__).parents[1] / "docs/signal.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    shutil.copy(recording, tmp_path / "session_raw.fif")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    for line in commands.splitlines():
        name, *arguments = line.split()
        assert sjepa(name.removeprefix("sjepa-"), *arguments) == 0, line
    assert "balanced accuracy" in capsys.readouterr().out
    assert len((tmp_path / "decoded.tsv").read_text().splitlines()) == 81


def test_what_cannot_be_judged_is_refused(trained, recording):
    bundle, *_ = trained("causal")
    raw = read_recording(recording)
    with load(bundle, check_unit=False) as predict:
        with pytest.raises(RecordingError, match="whole windows"):
            check_task(predict, raw, events_of(raw), recording="r", start=500.0)
        with pytest.raises(RecordingError, match="nod"):
            check_task(predict, raw, events_of(raw), recording="r", start=0.0, labels=["nod"] * 80)
        far = Events(onset=np.array([1e6, 2e6]), description=("left", "right"), columns={})
        with pytest.raises(RecordingError, match="0 whole windows"):
            check_task(predict, raw, far, recording="r", start=0.0)


def test_results_of_tasks_are_sealed(trained, recording, tmp_path):
    bundle, *_ = trained("causal")
    raw = read_recording(recording)
    with load(bundle, check_unit=False) as predict:
        result = check_task(predict, raw, events_of(raw), recording="sealed.fif", start=0.0)
    assert result.metric == ""
    file = write_task(bundle, result)
    assert result in read_tasks(bundle)
    file.write_text(file.read_text().replace('"n_events": 80', '"n_events": 81'))
    with pytest.raises(BundleError, match="was changed"):
        read_tasks(bundle)
    file.write_text("[" * 100_000)
    with pytest.raises(BundleError, match="no result"):
        read_tasks(bundle)
    file.unlink()


def test_the_export_judges_the_task(trained, recording, tmp_path, capsys):
    """A checkpoint of a causal model passes; that of a zero-phase one gives a bundle, a result in it, and status 1."""
    for phase, want in (("causal", 0), ("zero-phase", 1)):
        bundle, *_ = trained(phase)
        out = tmp_path / phase
        flags = ("--checkpoint", bundle.checkpoint, "--out", out, "--precision", "fp32", "--engine", "none", "--json")
        status = sjepa("export", *flags, "--task-data", recording)  # the events are the model's
        shown = capsys.readouterr()
        assert status == want, shown.err
        (result,) = read_tasks(Bundle.open(out))
        assert (result.passed, result.phase) == (not want, phase)
        assert json.loads(shown.out)["task"]["passed"] == result.passed


def test_figures_on_what_the_model_has_learned_from_are_told(trained, recording, tmp_path, capsys):
    """The bundle knows the recording by its samples, and no name of it or of its subject."""
    bundle, *_ = trained("causal")
    raw = read_recording(recording)
    origin = Origin(subjects=("Ada",), recordings={"Ada.fif": samples_hash([raw.get_data()])})
    model = load_model(read_checkpoint(bundle.checkpoint), bundle.spec)
    write_checkpoint(model, tmp_path / "model", training={ORIGIN_KEY: origin})
    flags = ("--out", tmp_path / "bundle", "--precision", "fp32", "--engine", "none")
    assert sjepa("export", "--checkpoint", tmp_path / "model", *flags) == 0
    assert not any(b"Ada" in file.read_bytes() for file in (tmp_path / "bundle").rglob("*") if file.is_file())
    raw.copy().crop(0, 100).save(tmp_path / "other_raw.fif", verbose="error")
    for path, seen in ((recording, True), (tmp_path / "other_raw.fif", False)):
        capsys.readouterr()
        sjepa("stream", tmp_path / "bundle", "--check", path, "--events", "left,right")
        assert (f"The model has learned from {path.name}" in capsys.readouterr().err) == seen


def test_events_that_are_not_in_the_recording_cost_no_export(trained, recording, tmp_path, capsys):
    bundle, *_ = trained("causal")
    flags = ("--checkpoint", bundle.checkpoint, "--out", tmp_path / "out", "--precision", "fp32")
    assert sjepa("export", *flags, "--task-data", recording, "--events", "nod") == 2
    assert "left (40), right (40)" in capsys.readouterr().err
    assert sjepa("export", *flags, "--events", "all") == 2
    assert "--task-data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
