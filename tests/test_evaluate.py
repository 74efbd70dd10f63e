"""`sjepa-evaluate`: folds that share nothing, a run that goes on, the same numbers from the table, bundles on recordings."""

import csv
import dataclasses
import json
import warnings
from importlib import resources
from pathlib import Path

import jsonschema
import mne
import numpy as np
import pytest
import yaml
from small import ENCODER
from test_evaluation_statistics import averaged

from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.errors import DataError
from sjepa_deploy.evaluation.continuous import on_stream
from sjepa_deploy.evaluation.folds import PROTOCOLS, folds_of
from sjepa_deploy.evaluation.results import EvaluationReport, read_results
from sjepa_deploy.evaluation.train import through_live_path
from sjepa_deploy.learning.data import DataConfig, Target, groups_of
from sjepa_deploy.learning.finetune import FinetuneConfig
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.loop import Engine
from sjepa_deploy.models.checkpoint import write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.runtime.decisions.data import CalibrationData
from sjepa_deploy.runtime.decisions.description import LayerDescription
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.probabilities import Probabilities
from sjepa_deploy.runtime.decisions.threshold import Threshold
from sjepa_deploy.serialize import encode, json_schema
from sjepa_deploy.spec import ModelSpec

NAMES = ["F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2"]
RATE = 100.0


def save(path: Path, seed: int, *, n: int = 24, kinds=("left", "right"), effect: float = 30e-6) -> str:
    """Write a recording of eight channels: after a "left" a wave on the left, after a "right" one on the right."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.repeat(kinds, n // len(kinds)))
    onsets = 3.0 + 1.7 * np.arange(len(names))
    volts = rng.normal(size=(8, round((onsets[-1] + 4) * RATE))) * 8e-6
    wave = effect * np.sin(2 * np.pi * 8 * np.arange(60) / RATE)
    for onset, name in zip(onsets, names, strict=True):
        first = round((onset + 0.2) * RATE)
        volts[(0 if name == kinds[0] else 1) :: 2, first : first + 60] += wave
    raw = mne.io.RawArray(volts, mne.create_info(NAMES, RATE, "eeg"), verbose="error")
    raw.set_annotations(mne.Annotations(onsets, 0.0, names), verbose="error")
    raw.save(path, verbose="error")
    return str(path)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    return tuple(save(folder / f"sub-{i}_raw.fif", i) for i in range(5))


TARGET = Target(kind="event", task="classification", classes=("left", "right"), tmin=0.0)
RECIPE = FinetuneConfig(
    variant="prelocal",
    encoder=ENCODER,
    class_weights="balanced",
    data=DataConfig(target=TARGET, n_times=160, sfreq=RATE, n_folds=5),
    engine=Engine(max_epochs=4, batch_size=8, lr=5e-3, accelerator="cpu"),
)


@pytest.fixture
def call(capsys):
    def run(*arguments):
        status = run_command(_command("evaluate"), "sjepa-evaluate", [str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def evaluated(recordings, tmp_path_factory):
    """Return the folder of an evaluation: two folds, two seeds, baselines, the live path."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(encode(RECIPE)))
    arguments = ["--config", folder / "recipe.yaml", *(f"--data={file}" for file in recordings)]
    arguments += ["--protocol", "loso", "--folds", "0,2", "--seeds", "2", "--baseline", "csp-lda,xdawn-ts"]
    arguments = [str(each) for each in (*arguments, "--out", folder / "out")]
    assert run_command(_command("evaluate"), "sjepa-evaluate", arguments) == 0
    return folder / "out", arguments


def rows_of(folder):
    with (folder / "predictions.tsv").open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_figures_are_those_of_scikit_learn_on_the_table(evaluated):
    out, _ = evaluated
    report = read_results(out)
    keys = [(each.model, each.way) for each in report.judged]
    assert keys == [("prelocal", "offline"), ("prelocal", "live"), ("csp-lda", "offline"), ("xdawn-ts", "offline")]
    for each in report.judged:
        want = averaged((out / "predictions.tsv").read_text(), report.averaged_over, report.class_names, (each.model, each.way))
        assert {name: each.figures[name].value for name in want} == pytest.approx(want, abs=1e-12)
        assert each.n_windows == 48
        assert each.n_rows == (96 if each.model == "prelocal" else 48)
        assert sum(map(sum, each.confusion)) == each.n_rows
    assert report.judged[0].figures["balanced_accuracy"].value > 0.9  # planted
    assert "prelocal is better than chance" in report.verdict[0]


def test_a_causal_model_decides_live_as_offline(evaluated):
    report = read_results(evaluated[0])
    (agreement,) = report.agreements
    assert (agreement.name, agreement.differ, agreement.n_windows) == ("live", 0.0, 96)
    rows = [row for row in rows_of(evaluated[0]) if row["model"] == "prelocal"]
    scores = [[float(row["score"]) for row in rows if row["way"] == way] for way in ("offline", "live")]
    np.testing.assert_allclose(*scores, atol=1e-4)  # PyTorch and ONNX Runtime on windows of the same bits


def test_a_fold_that_is_done_is_not_trained_again(evaluated, call):
    out, arguments = evaluated
    files = sorted((out / "models").glob("fold-*/seed-*/model.safetensors"))
    assert [str(file.parent.relative_to(out)) for file in files] == [f"models/fold-{i}/seed-{j}" for i in (0, 2) for j in (0, 1)]
    before, table = [file.stat().st_mtime_ns for file in files], (out / "predictions.tsv").read_bytes()
    status, _, err = call(*arguments)
    assert status == 2
    assert "--resume" in err
    (out / "models/fold-2/seed-1/config.json").unlink()  # a kill before the end of the last fold
    status, printed, err = call(*arguments, "--resume")
    assert status == 0, err
    assert [file.stat().st_mtime_ns for file in files[:3]] == before[:3]
    assert (out / "predictions.tsv").read_bytes() == table
    assert "prelocal" in printed
    status, _, err = call(*arguments, "--resume", "--lr", "0.01")
    assert status == 2
    assert "another configuration" in err


def test_results_are_as_the_schema_says(evaluated):
    schema = json.loads(resources.files("sjepa_deploy").joinpath("assets", "evaluation.schema.json").read_text())
    assert schema == json_schema(EvaluationReport), "write it again, see tests/test_serialize.py"
    jsonschema.Draft202012Validator(schema).validate(json.loads((evaluated[0] / "results.json").read_text()))


def test_the_page_needs_nothing_beside_it(evaluated):
    page = (evaluated[0] / "report.html").read_text()
    for word in ("Verdict", "Confusion matrix", "Reliability", "Windows over time", "Examples", "csp-lda", "95 % intervals over"):
        assert word in page
    assert '<link rel="stylesheet"' not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_models_are_compared_with_other_evaluations(evaluated, call, tmp_path, recordings):
    out, arguments = evaluated
    other = [each if each != str(out) else str(tmp_path / "other") for each in arguments]
    other[other.index("csp-lda,xdawn-ts")] = "csp-lda"
    status, _, err = call(*other, "--max-epochs", "1", "--lr", "1e-7", "--against", out, "--no-live", "--json")
    assert status == 0, err
    report = read_results(tmp_path / "other")
    assert [(each.other, each.figure) for each in report.differences] == [
        (name, figure) for name in ("csp-lda", "prelocal of out") for figure in ("balanced_accuracy", "auc")
    ]
    assert report.differences[2].worse
    fewer = [each for each in other if each != f"--data={recordings[4]}"]
    status, _, err = call(*fewer, "--max-epochs", "1", "--against", out, "--no-live", "--force")
    assert status == 2
    assert "other windows or labels" in err


def test_a_base_model_is_compared_with_the_recipe_from_scratch(call, tmp_path, recordings):
    data = dataclasses.replace(RECIPE.data, montage="standard_1005")
    windows = load_windows(dataclasses.replace(data, source=recordings[:1]))
    base = build_model(ModelSpec(variant="base", signal=windows.signal, encoder=ENCODER), seed=7)
    for fold in (0, 1):
        write_checkpoint(base, tmp_path / f"base-{fold}")
    recipe = dataclasses.replace(RECIPE, data=data, variant="postlocal", encoder=None, freeze_encoder=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(encode(recipe)))
    arguments = ["--config", tmp_path / "recipe.yaml", *(f"--data={file}" for file in recordings[:3]), "--protocol", "loso"]
    arguments += ["--pretrained", tmp_path / "base-{fold}", "--against", "scratch", "--folds", "1", "--max-epochs", "1"]
    status, _, err = call(*arguments, "--no-live", "--name", "with base", "--out", tmp_path / "out")
    assert status == 0, err
    report = read_results(tmp_path / "out")
    assert [(each.model, each.way) for each in report.judged] == [("with base", "offline"), ("scratch", "offline")]
    assert [(each.model, each.other) for each in report.differences] == [("with base", "scratch")] * 2
    runs = [
        json.loads((tmp_path / "out" / name / "fold-1/seed-0/training/run.json").read_text()) for name in ("models", "scratch")
    ]
    assert [run["pretrained"] for run in runs] == [str(tmp_path / "base-1"), None]
    assert [run["freeze_encoder"] for run in runs] == [True, False]
    assert runs[1]["encoder"] == encode(ENCODER)


def test_a_model_that_has_seen_the_test_subjects_is_refused_as_a_start(evaluated, call, tmp_path, recordings):
    start = evaluated[0] / "models/fold-0/seed-0"
    data = [f"--data={file}" for file in recordings]
    arguments = [*data, "--classes", "left,right", "--from", start, "--protocol", "loso", "--no-live", "--out", tmp_path / "out"]
    tested = next(row["subject"] for row in rows_of(evaluated[0]) if row["fold"] == "0")
    status, _, err = call(*arguments, "--folds", "1", "--max-epochs", "1", "--batch-size", "8")
    assert status == 2
    assert "has seen" in err
    status, _, err = call(*arguments, "--folds", "0", "--max-epochs", "1", "--batch-size", "8", "--force", "--accelerator", "cpu")
    assert status == 0, err
    assert {row["subject"] for row in rows_of(tmp_path / "out")} == {tested}
    status, _, err = call(*arguments, "--variant", "postlocal", "--force")
    assert status == 2
    assert "--variant is the model's that --from names" in err


def test_the_live_path_of_zero_phase_windows_gives_causal_ones_at_the_same_places(recordings):
    config = dataclasses.replace(RECIPE.data, source=recordings[:2])
    causal = load_windows(config)
    for phase in ("causal", "zero-phase"):
        live = through_live_path(dataclasses.replace(config, phase=phase))
        assert live.eeg.tobytes() == causal.eeg.tobytes()
        np.testing.assert_array_equal(live.onset, causal.onset)
    assert through_live_path(dataclasses.replace(config, source=("synthetic",))) is None


# ---------------------------------------------------------------- folds


def windows_of(tmp_path, subjects):
    """Return windows of subjects, each with recordings (session, number of windows)."""
    recordings = [(s, session, f"{s}{i}", n) for s, each in subjects.items() for i, (session, n) in enumerate(each)]
    rows = [(s, session, name, 2.0 * k) for s, session, name, n in recordings for k in range(n)]
    names = [np.array(column) for column in zip(*rows, strict=True)]
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "w.npz",
        eeg=rng.normal(0, 10, (len(rows), 2, 100)).astype(np.float32),
        ch_names=["C3", "C4"],
        sfreq=100.0,
        subject=names[0],
        session=names[1],
        onset=names[3].astype(float),
        targets=rng.permutation(np.arange(len(rows)) % 2),
    )
    config = DataConfig(
        source=(str(tmp_path / "w.npz"),), n_times=100, target=dataclasses.replace(TARGET, kind="column", classes=()),
        steps=(), phase="zero-phase",
    )  # fmt: skip
    return dataclasses.replace(load_windows(config), recording=names[2]), config


SUBJECTS = {
    "a": [("1", 20), ("1", 20), ("2", 20), ("3", 20)],
    "b": [("1", 20), ("2", 20)],
    "c": [("1", 30), ("2", 15), ("2", 15)],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("n_subjects", [2, 3])
def test_every_window_is_tested_once_by_a_model_that_has_not_seen_its_group(tmp_path, protocol, n_subjects):
    windows, config = windows_of(tmp_path, dict(list(SUBJECTS.items())[:n_subjects]))
    groups = groups_of(windows)
    folds = folds_of(windows, config, protocol)
    tested = np.concatenate([fold.split.test for fold in folds])
    assert sorted(tested.tolist()) == list(range(len(windows)))
    assert len({fold.name for fold in folds}) == len(folds)
    for fold in folds:
        parts = [fold.split.train, fold.split.val, fold.split.test]
        assert all(len(part) for part in parts)
        assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
        known = np.concatenate(parts[:2])
        if fold.subject is not None:
            assert set(windows.subject[np.concatenate(parts)]) == {fold.subject}
        if fold.split.by != "block":
            assert not set(groups[fold.split.by][known]) & set(groups[fold.split.by][fold.split.test])
        for one, other in ((0, 1), (0, 2), (1, 2)):  # no two parts overlap in time
            for recording in np.unique(windows.recording):
                here = [windows.onset[part[windows.recording[part] == recording]] for part in (parts[one], parts[other])]
                if all(map(len, here)):
                    assert abs(here[0][:, None] - here[1]).min() >= 1.0
    wanted = {"within": "recording", "cross-session": "session", "cross-subject": "subject", "loso": "subject"}
    assert {fold.split.by for fold in folds} <= {wanted[protocol], "block"}


def test_folds_across_subjects_are_those_of_finetune(tmp_path):
    from sjepa_deploy.learning.data import split_windows

    windows, config = windows_of(tmp_path, {name: [("1", 12)] for name in "abcdefg"})
    for fold in folds_of(windows, config, "cross-subject"):
        split = split_windows(windows, dataclasses.replace(config, split="subject", fold=fold.number))
        for name in ("train", "val", "test"):
            np.testing.assert_array_equal(getattr(fold.split, name), getattr(split, name))


@pytest.mark.parametrize(
    ("protocol", "message", "mend"),
    [("loso", "one subject, b", "--protocol within"), ("cross-session", "Subject b has one session", "--protocol within")],
)
def test_too_few_groups_are_refused(tmp_path, protocol, message, mend):
    windows, config = windows_of(tmp_path, {"b": [("1", 20)]})
    with pytest.raises(DataError, match=message) as error:
        folds_of(windows, config, protocol)
    assert mend in error.value.mend


# ---------------------------------------------------------------- what is wrong


def test_wrong_input_is_one_line_with_the_way_out(call, tmp_path, recordings):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(encode(RECIPE)))
    one = save(tmp_path / "one_raw.fif", 9, kinds=("left",))
    alone = ["--config", tmp_path / "recipe.yaml", "--out", tmp_path / "out"]
    five = [*alone, *(f"--data={each}" for each in recordings)]
    nobody = "no events foot, hand; its events are left (12), right (12)"
    for arguments, message, mend in (
        ([*five[:-1], "--data", one, "--protocol", "loso"], "has no window of right", "Split in another way"),
        ([*five, "--classes", "a=foot,b=hand"], nobody, "--classes"),
        ([*alone, f"--data={recordings[0]}"], "There is one subject", "--protocol within"),
        ([*five, "--folds", "7"], "There is no fold 7; there are 0 to 4", "--folds"),
        ([*five, "--folds", "x"], "neither all nor numbers", "--help"),
        ([*five, "--against", "scratch"], "There is no base model", "--against scratch"),
        ([*five, "--against", tmp_path / "no"], "is missing or damaged", "sjepa-evaluate"),
        ([*alone, "--baseline", "svm"], "'svm' is not one of", "--help"),
        (["nowhere", recordings[0], "--out", tmp_path / "out"], "nowhere", ""),
    ):
        status, printed, err = call(*arguments, "--force", "--max-epochs", "1", "--no-live")
        assert (status, err.count("\n")) == (2, 1), (err, printed)
        assert message in err
        assert mend in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    status, _, err = call("--config", tmp_path / "recipe.yaml", "--out", tmp_path / "mine", "--force")
    assert status == 2
    assert "is no evaluation" in err
    assert (tmp_path / "mine/notes.txt").read_text() == "precious"


# ---------------------------------------------------------------- a bundle


def test_a_bundle_on_recordings(evaluated, recordings, call, tmp_path, capsys):
    """The table of a bundle is that of the fold it comes from; a layer leaves some undecided; backends are compared."""
    out, _ = evaluated
    bundle = out / "models/fold-0/seed-0/bundle"
    where = ("model", "way", "fold", "seed")
    tested = [row for row in rows_of(out) if [row[name] for name in where] == ["prelocal", "live", "0", "0"]]
    (file,) = [each for each in recordings if Path(each).stem == tested[0]["recording"]]
    status, printed, err = call(bundle, file, "--out", tmp_path / "one", "--backend", "ort-cpu,torch", "--name", "mine")
    assert status == 0, err
    rows = [row for row in rows_of(tmp_path / "one") if row["way"] == "live"]
    for name in ("session", "recording", "onset", "label", "score", "decision"):
        assert [row[name] for row in rows] == [row[name] for row in tested]
    report = read_results(tmp_path / "one")
    assert (report.protocol, report.judged[0].model, len(report.judged)) == ("bundle", "mine", 2)
    assert [(each.name, each.reference, each.differ) for each in report.agreements] == [
        ("live", "offline", 0.0), ("torch fp32", "ort-cpu fp32", 0.0),
    ]  # fmt: skip
    assert "better than chance" in printed
    status, _, err = call(bundle, file, "--out", tmp_path / "two", "--hop", "0.2")
    assert status == 2
    assert "no decision layer" in err
    decide = [str(bundle), *(f"--fit={each}" for each in recordings[:3]), "--accept-rate", "0.9", "--hop", "0.2"]
    assert run_command(_command("decide"), "sjepa-decide", [*decide, "--dwell", "0.2", "--refractory", "1.0"]) == 0
    capsys.readouterr()
    names = tuple(each for each in recordings if each != file)[:2]
    status, printed, err = call(bundle, *names, "--out", tmp_path / "three", "--hop", "0.2", "--json")
    assert status == 0, err
    report = read_results(tmp_path / "three")
    (stream,) = report.continuous
    assert stream.n_events == 48
    assert 0.3 < stream.figures["latency_median"].value <= stream.figures["latency_p90"].value < 4.0
    assert set(stream.figures) == {
        "accept_rate", "accuracy", "false_per_minute", "latency_median", "latency_p90", "time_to_decision", "undecided",
        "bits_per_minute",
    }  # fmt: skip
    assert json.loads(printed)["report"]["continuous"][0]["n_events"] == 48
    page = (tmp_path / "three/report.html").read_text()
    assert "Detection latency" in page
    status, _, err = call(bundle, save(tmp_path / "x_raw.fif", 3, kinds=("hand", "foot")), "--out", tmp_path / "four")
    assert status == 2
    assert "The classes are left, right" in err or "the classes are left, right" in err
    status, _, err = call(bundle, save(tmp_path / "y_raw.fif", 4, kinds=("left",)), "--out", tmp_path / "five")
    assert status == 2
    assert "are labelled left" in err


def test_figures_of_a_stream_are_those_counted_by_hand():
    """Ten windows a second; events of 2 s at 5, 15, 25 and 35 s; one is missed, one is wrong, and two decisions are false."""
    times = np.arange(0.1, 40.05, 0.1)
    labels, events = np.full(len(times), -1), np.full(len(times), -1)
    onsets, truth = np.array([5.0, 15.0, 25.0, 35.0]), [0, 1, 0, 1]
    for i, onset in enumerate(onsets):
        inside = (times > onset + 0.05) & (times < onset + 2.05)
        labels[inside], events[inside] = truth[i], i
    probability = np.full((len(times), 2), 0.5)

    def decide(begin, end, which):
        rows = (times > begin - 0.01) & (times < end + 0.01)
        probability[rows] = (0.9, 0.1) if which == 0 else (0.1, 0.9)

    decide(5.7, 6.2, 0)  # right, 0.7 s
    decide(15.4, 15.6, 0)  # wrong, 0.4 s
    decide(25.9, 26.5, 0)  # right, 0.9 s
    decide(10.0, 10.3, 1)  # false
    decide(20.0, 20.1, 0)  # false
    description = LayerDescription(
        name="hand", bundle="", output_name="prediction", n_outputs=2, class_names=("a", "b"),
        steps=(Probabilities(temperature=1.0), Threshold(enter=0.8)),
    )  # fmt: skip
    data = CalibrationData(
        outputs=np.log(probability), labels=labels, targets=None, times=times, events=events,
        recordings=np.zeros(len(times), np.intp), flags=((),) * len(times), minutes=40 / 60, names=("r",), hop=0.1,
    )  # fmt: skip
    found = on_stream(data, DecisionLayer(description), [onsets])
    assert found.n_events == 4
    value = {name: figure.value for name, figure in found.figures.items()}
    assert value["accept_rate"] == 3 / 4
    assert value["accuracy"] == pytest.approx(2 / 3)
    assert value["false_per_minute"] == pytest.approx(3 / (40 / 60))  # two of no event, one of the wrong class
    assert value["latency_median"] == pytest.approx(0.8)
    assert found.latencies == pytest.approx((0.7, 0.9))
    assert value["time_to_decision"] == pytest.approx(0.7)
    assert value["undecided"] == pytest.approx(1 - (6 + 3 + 7 + 4 + 2) / len(times))
    accuracy = 2 / 3
    bits = 1 + accuracy * np.log2(accuracy) + (1 - accuracy) * np.log2(1 - accuracy)
    assert value["bits_per_minute"] == pytest.approx(bits * 3 / (40 / 60))


def test_regressions_have_figures_chance_and_a_table(call, tmp_path):
    rng = np.random.default_rng(0)
    targets = rng.normal(5, 2, 80)
    eeg = rng.normal(0, 10, (80, 2, 160)) + (targets[:, None, None] - 5) * np.sin(np.arange(160) / 3) * 10
    np.savez(
        tmp_path / "w.npz", eeg=eeg.astype(np.float32), ch_names=["C3", "C4"], sfreq=100.0, onset=np.arange(80.0) % 16,
        subject=np.repeat(list("abcde"), 16), targets=targets,
    )  # fmt: skip
    target = Target(kind="column", column="targets")
    data = DataConfig(source=(str(tmp_path / "w.npz"),), n_times=160, steps=(), phase="zero-phase", target=target)
    config = dataclasses.replace(RECIPE, data=data, class_weights="none")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(encode(config)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, printed, err = call("--config", tmp_path / "recipe.yaml", "--protocol", "loso", "--out", tmp_path / "out")
    assert status == 0, err
    report = read_results(tmp_path / "out")
    want = averaged((tmp_path / "out/predictions.tsv").read_text(), report.averaged_over, None, ("prelocal", "offline"))
    assert {name: report.judged[0].figures[name].value for name in want} == pytest.approx(want, rel=1e-9)
    assert report.averaged_over == ("fold", "seed")
    assert "no live path" in printed
