"""Runs of a session: recorded, replayed, read as recordings, and exported to BIDS, as MNE-BIDS and its validator read them."""

import csv
import json
import shutil
from collections import namedtuple

import mne
import mne_bids
import numpy as np
import pytest
from bids_validator import BIDSValidator
from bundles import MONTAGE
from streams import ScriptedSource, chunks_of, eeg, info_of, run_stream

import sjepa_deploy
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.info import StreamInfo
from sjepa_deploy.errors import OutputError, RecordingError
from sjepa_deploy.runtime.live.commands import BadChannels
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.markers import PlannedMarkers
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.session.bids import export_run
from sjepa_deploy.runtime.session.folder import read_run, record_run, room, run_labels, run_path, runs_of

ONSETS = {1.5: "left", 4.0: "right", 7.25: "left", 11.0: "right", 14.5: "rest", 19.5: "left"}


def session(*arguments):
    """Run `sjepa-session` in this process and return its exit status."""
    return run_command(_command("session"), "sjepa-session", [str(argument) for argument in arguments])


def table(path):
    """Return the rows of a table of BIDS."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle("prelocal", phase="causal")


@pytest.fixture(scope="module")
def predict(bundle):
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        yield predict


@pytest.fixture(scope="module")
def recording(tmp_path_factory, bundle):
    """Return a recording of 20 s with events."""
    path = tmp_path_factory.mktemp("recording") / "trials_raw.fif"
    info = mne.create_info(list(bundle.spec.ch_names), 100.0, "eeg")
    raw = mne.io.RawArray(eeg(2000).T.astype(np.float32) * 1e-6, info, verbose="error")
    raw.set_annotations(mne.Annotations(list(ONSETS), 0.0, list(ONSETS.values())), verbose="error")
    raw.save(path, verbose="error")
    return path


Recorded = namedtuple("Recorded", "folder files")


@pytest.fixture(scope="module")
def recorded(bundle, recording, tmp_path_factory):
    """Return a folder with two runs of one subject and one of another, as the command records them."""
    folder = tmp_path_factory.mktemp("session")
    options = ["--source", f"file:{recording}", "--speed", "inf", "--late", "queue", "--quiet", "--session", folder]
    events = ["--events", "left,right", "--tmin", "0"]
    assert run_stream(bundle.path, *options, *events, "--subject", "P1", "--task", "hands", "--session-label", "a") == 0
    assert run_stream(bundle.path, *options, *events, "--subject", "P1", "--task", "hands", "--session-label", "a") == 0
    markers = ["--markers", "annotations"]  # recorded, and a window every hop
    assert run_stream(bundle.path, *options, *markers, "--hop", "0.5", "--subject", "P2", "--task", "hands") == 0
    return Recorded(folder, runs_of(folder))


def test_runs_lie_where_labrecorder_puts_them(recorded):
    names = [str(file.relative_to(recorded.folder)) for file in recorded.files]
    assert names == [
        "sub-P1/ses-a/eeg/sub-P1_ses-a_task-hands_run-1_eeg.xdf",
        "sub-P1/ses-a/eeg/sub-P1_ses-a_task-hands_run-2_eeg.xdf",
        "sub-P2/eeg/sub-P2_task-hands_run-1_eeg.xdf",
    ]
    for file, (subject, label, run) in zip(recorded.files, [("P1", "a", 1), ("P1", "a", 2), ("P2", None, 1)], strict=True):
        labels = read_run(file).run.labels
        assert (labels.subject, labels.session, labels.task, labels.run) == (subject, label, "hands", run)
        assert run_path(recorded.folder, labels) == file


def test_a_run_is_never_recorded_over(recorded, bundle, recording, capsys):
    before = {file: file.read_bytes() for file in recorded.files}
    options = ["--source", f"file:{recording}", "--speed", "inf", "--session", recorded.folder, "--task", "hands"]
    assert run_stream(bundle.path, *options, "--subject", "P1", "--session-label", "a", "--run", "2", "--force") == 2
    assert "--run 3" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in runs_of(recorded.folder)} == before


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--session", "s", "--subject", "Anna Maria", "--task", "t"], "letters and digits"),
        (["--session", "s", "--subject", "P1"], "--task"),
        (["--subject", "P1"], "--session"),
        (["--session", "s", "--subject", "P1", "--task", "t", "--record", "r.xdf"], "--record"),
        (["--markers", "every:1"], "record"),
    ],
)
def test_labels_that_cannot_be(bundle, arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_stream(bundle.path, "--source", "synthetic", "--duration", "1", *arguments) == 2
    assert word in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_room_on_the_disk_is_told(predict, tmp_path, monkeypatch):
    """At the start for how long it is enough, and during the run once, when it is nearly full."""
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    source = ScriptedSource(info_of(predict.spec), chunks_of(eeg(600), np.arange(600) / 100))
    decoder, incidents = Decoder(predict, source), []
    decoder.on_incident(incidents.append)
    free, seconds = room(decoder, tmp_path / "later")
    assert (free, seconds) == (10**6, pytest.approx(10**6 / (100 * (8 * 8 + 40))))
    recorder = record_run(decoder, tmp_path, run_labels(tmp_path, subject="P1", task="t"))
    recorder._began -= 1000.0  # the rate of the run is known
    for i, _ in enumerate(decoder):
        if i == 20:
            recorder._flush()
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0.3 * recorder.n_bytes))
            recorder._watch_room()
            recorder._watch_room()
    recorder.close()
    assert [incident.text for incident in incidents if incident.kind == "record"] == [
        "The disk of the record has room for 5 minutes more."
    ]
    assert recorder.n_bytes == recorder.path.stat().st_size


def test_a_session_is_decoded_again_and_read_as_recordings(recorded, bundle, tmp_path, capsys):
    """All decisions and states come again to the bit, and `sjepa-run` cuts the same windows at the same events."""
    assert session("replay", recorded.folder, bundle.path, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert [(one["n_decisions"], one["differ"], one["missing"]) for one in results] == [(4, [], []), (4, [], []), (37, [], [])]
    run = [recorded.files[0], "--events", "left,right", "--tmin", "0", "--out", tmp_path / "out.tsv"]
    assert run_command(_command("run"), "sjepa-run", [str(bundle.path), *map(str, run)]) == 0, capsys.readouterr().err
    rows = table(tmp_path / "out.tsv")
    kept = read_record(recorded.files[0])
    assert len(rows) == len(kept.rows) == 4
    outputs = list(rows[0])[-3:]
    for row, decision in zip(rows, kept.rows, strict=True):
        assert [np.float32(row[name]) for name in outputs] == decision.prediction.tolist()
    capsys.readouterr()
    assert session("show", recorded.folder, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(one["n_decisions"], one["n_without_decision"]) for one in shown] == [(4, 1), (4, 1), (37, 0)]
    assert all(one["events"] == {"left": 3, "right": 2, "rest": 1} for one in shown)


def test_a_replay_that_differs_is_told(recorded, make_bundle, capsys):
    other = make_bundle("prelocal", phase="causal", model_seed=1)
    assert session("replay", recorded.folder, other.path) == 2
    told = capsys.readouterr()
    assert "another bundle" in told.err
    assert "Name the file of a run" in told.err
    assert all(file.name in told.err for file in recorded.files)
    assert "decisions on" not in told.out


def test_mne_bids_reads_what_was_exported(recorded, recording, tmp_path, capsys):
    """Samples, events and decisions of all runs in one BIDS folder; no name of a file breaks the rules of BIDS."""
    root = tmp_path / "bids"
    assert session("export", recorded.folder, root) == 0, capsys.readouterr().err
    volts = mne.io.read_raw(recording, verbose="error").get_data()
    paths = mne_bids.find_matching_paths(root, extensions=".vhdr")
    assert sorted((path.subject, path.session, path.run) for path in paths) == [
        ("P1", "a", "1"),
        ("P1", "a", "2"),
        ("P2", None, "1"),
    ]
    for path in paths:
        raw = mne_bids.read_raw_bids(path, verbose="error")
        assert raw.info["bads"] == []
        np.testing.assert_allclose(raw.get_data(), volts, atol=1e-10, rtol=1e-6)
        assert [(round(mark["onset"], 6), mark["description"]) for mark in raw.annotations] == list(ONSETS.items())
        folder = root / "derivatives" / "sjepa-deploy" / path.directory.relative_to(root)
        beside = folder / f"{path.copy().update(suffix=None, extension=None).basename}_desc-decisions_events.tsv"
        kept = read_record(next(file for file in recorded.files if file.name.startswith(beside.name.partition("_desc")[0])))
        rows = table(beside)
        decided = [row for row in rows if row["window_end"] != "n/a"]
        assert len(decided) == len(kept.rows)
        for row, decision in zip(decided, kept.rows, strict=True):
            assert [np.float32(row[f"output_{i}"]) for i in range(3)] == decision.prediction.tolist()
        if path.subject == "P1":
            assert [float(row["onset"]) for row in decided] == [1.5, 4.0, 7.25, 11.0]
            assert [float(row["window_end"]) - float(row["onset"]) for row in decided] == pytest.approx([1.99] * 4)
            assert [(float(row["onset"]), row["trial_type"], row["reason"]) for row in rows if row not in decided] == [
                (19.5, "left", "past end")
            ]
        else:
            np.testing.assert_allclose([float(row["onset"]) for row in rows], 1.99 + 0.5 * np.arange(37), atol=1e-6)
            assert {row["trial_type"] for row in rows} == {"window"}
        told = json.loads(beside.with_suffix(".json").read_text())
        assert set(rows[0]) - {"onset", "duration", "trial_type"} <= set(told)
        assert told["sjepa-deploy"]["bundle_digest"] == kept.run.bundle_digest
    validator, files = BIDSValidator(), [file for file in root.rglob("*") if file.is_file()]
    assert [str(file) for file in files if not validator.is_bids(f"/{file.relative_to(root)}")] == []
    assert {row["participant_id"]: {*row.values()} for row in table(root / "participants.tsv")} == {
        "sub-P1": {"sub-P1", "n/a"},
        "sub-P2": {"sub-P2", "n/a"},
    }
    derived = json.loads((root / "derivatives" / "sjepa-deploy" / "dataset_description.json").read_text())
    assert (derived["DatasetType"], derived["GeneratedBy"][0]["Name"]) == ("derivative", "sjepa-deploy")
    assert session("export", recorded.files[0], root) == 2
    assert "--force" in capsys.readouterr().err
    assert session("export", recorded.files[0], root, "--force", "--no-date") == 0
    assert {row["acq_time"] for row in table(root / "sub-P1" / "ses-a" / "sub-P1_ses-a_scans.tsv")} != {"n/a"}


@pytest.mark.parametrize("n_bytes", [700, 5000])
def test_a_run_that_was_killed_is_replayed_and_exported(recorded, bundle, tmp_path, n_bytes, capsys):
    """What is in the file up to its last whole chunk."""
    file = tmp_path / "study" / recorded.files[2].relative_to(recorded.folder)
    file.parent.mkdir(parents=True)
    file.write_bytes(recorded.files[2].read_bytes()[:-n_bytes])
    assert session("replay", tmp_path / "study", bundle.path, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["n_decisions"] <= 37
    assert session("export", tmp_path / "study", tmp_path / "bids") == 0
    (path,) = mne_bids.find_matching_paths(tmp_path / "bids", extensions=".vhdr")
    n_samples = sum(len(chunk.stamps) for chunk in read_record(file).chunks)
    assert mne_bids.read_raw_bids(path, verbose="error").n_times == n_samples


def test_losses_bad_channels_and_other_units_in_a_bids_folder(predict, tmp_path):
    """A loss is a cut, channels are bad that were flat or that the user named, and a trigger channel is no EEG."""
    samples, keep = eeg(3000).astype(np.float32), np.r_[0:1500, 1520:3000]
    samples[:, 2] = 7.0
    samples = np.column_stack([samples, np.zeros(3000, np.float32)])
    info = StreamInfo(name="amp", ch_names=(*predict.spec.ch_names, "TRG"), sfreq=100.0, unit="uV", other_units=("TRG",))
    source = ScriptedSource(info, chunks_of(samples[keep], keep / 100.0))
    plan = [(3.0, "a"), (3.0, "b"), (15.1, "a"), (20.0, "b")]
    decoder = Decoder(
        predict, source, StreamConfig(late="queue"), schedule=Events(start=0.0), markers=[PlannedMarkers(plan, source.clock)]
    )
    recorder = record_run(decoder, tmp_path, run_labels(tmp_path, subject="P1", task="t"))
    decoder.on_chunk(lambda chunk: decoder.commands.submit(BadChannels(names=("C4",))) if chunk.received == 5.09 else None)
    decoder.run()
    recorder.close()
    notes = export_run(recorder.path, tmp_path / "bids", with_date=False)
    assert any("20 samples" in note for note in notes)
    path = mne_bids.BIDSPath(root=tmp_path / "bids", subject="P1", task="t", run="1", datatype="eeg")
    raw = mne_bids.read_raw_bids(path, verbose="error")
    assert raw.ch_names == list(MONTAGE.ch_names)
    assert set(raw.info["bads"]) == {MONTAGE.ch_names[2], "C4"}
    assert raw.info["meas_date"] is None
    status = {
        row["name"]: row["status_description"] for row in table(path.copy().update(suffix="channels", extension=".tsv").fpath)
    }
    assert "flat" in status[MONTAGE.ch_names[2]]
    assert status["C4"] == "named as bad"
    marks = [(round(mark["onset"], 6), mark["description"]) for mark in raw.annotations]
    assert sorted(marks) == [(3.0, "a"), (3.0, "b"), (15.0, "BAD boundary"), (15.0, "a"), (19.8, "b")]
    rows = table(tmp_path / "bids/derivatives/sjepa-deploy/sub-P1/eeg/sub-P1_task-t_run-1_desc-decisions_events.tsv")
    assert [(round(float(row["onset"]), 4), row["trial_type"], row["reason"]) for row in rows] == [
        (3.0, "a", "n/a"),
        (3.0, "b", "n/a"),
        (15.0, "a", "gap"),
        (19.8, "b", "n/a"),
    ]


def test_what_is_no_session_is_refused(predict, tmp_path):
    with pytest.raises(RecordingError, match="no runs"):
        runs_of(tmp_path)
    from sjepa_deploy.runtime.live.recorder import record

    decoder = Decoder(predict, ScriptedSource(info_of(predict.spec), chunks_of(eeg(300), np.arange(300) / 100)))
    recorder = record(decoder, tmp_path / "run.xdf")
    decoder.run()
    recorder.close()
    with pytest.raises(RecordingError, match="--session"):
        read_run(tmp_path / "run.xdf")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        record_run(decoder, tmp_path / "file", run_labels(tmp_path, subject="P1", task="t"))
