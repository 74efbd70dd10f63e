"""A whole experiment in small: calibration run, fine-tuning, export, decision layer, 100 live trials with feedback, BIDS."""

import csv
import json
import socket
import threading

import mne_bids
import numpy as np
import people
import pytest
import yaml
from sklearn.metrics import balanced_accuracy_score
from streams import assert_accounted

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg.recording import read_recording
from sjepa_deploy.evaluation.seen import warn_if_seen
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.feedback.feedback import Feedback
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.schedule import Events
from sjepa_deploy.runtime.session.folder import record_run, run_labels, runs_of
from sjepa_deploy.serialize import encode

SIZES = {"calibration": 120, "thresholds": 80, "live": 100}
"""Trials of each run."""


@pytest.fixture
def sjepa(capsys):
    """Return a function that runs a command and returns what it printed for machines."""

    def run(*arguments):
        status = run_command(group, "sjepa", [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


def read_all(port, heard, ready):
    """Hear a run over the socket as a feedback program does: mark its begin, take decisions until the run ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, connection.makefile("rwb") as lines:
        for line in lines:
            message = json.loads(line)
            heard.append(message)
            if message["type"] == "run":
                lines.write(json.dumps({"command": "mark", "text": "block 1"}).encode() + b"\n")
                lines.flush()
                ready.set()


def test_from_a_calibration_run_to_decided_trials_in_bids(make_bundle, tmp_path, sjepa):
    recordings = {}
    for seed, (name, n) in enumerate(SIZES.items()):
        recordings[name] = tmp_path / f"{name}_raw.fif"
        people.recording(seed, n, amplitude=2.2e-6).save(recordings[name], verbose="error")
    study = tmp_path / "study"

    # Calibration: whatever decodes, the run is recorded with its events.
    other = make_bundle("prelocal", phase="causal")
    stream = ["--speed", "inf", "--late", "queue", "--events", "left,right", "--tmin", "0", "--session", study, "--subject", "P1"]
    for name in ("calibration", "thresholds"):
        sjepa("stream", other.path, "--source", f"file:{recordings[name]}", *stream, "--task", name, "--json")

    # What is learned from the runs: a model, and where it is sure enough.
    calibration, thresholds = runs_of(study)
    recipe = {
        "variant": "prelocal",
        "encoder": encode(people.ENCODER),
        "engine": {"max_epochs": 12, "batch_size": 16, "accelerator": "cpu", "lr": 2e-3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    learn = ["--classes", "left,right", "--tmin", "0", "--tmax", "1.6", "--montage", "sjepa-62"]
    sjepa("finetune", "--config", tmp_path / "recipe.yaml", "--data", calibration, *learn, "--out", tmp_path / "model")
    bundle = tmp_path / "bundle"
    sjepa("export", "--checkpoint", tmp_path / "model", "--out", bundle, "--precision", "fp32", "--max-batch", 8)
    sjepa("decide", bundle, "--fit", thresholds, "--events", "left,right", "--accept-rate", "0.8")

    assert [warn_if_seen(Bundle.open(bundle), read_recording(run), run.name) for run in (calibration, thresholds)] == [
        True,
        False,
    ]

    # 100 live trials; a feedback program hears them over the socket.
    labels = run_labels(study, subject="P1", task="live")
    events, config, heard, ready = Events(("left", "right")), StreamConfig(late="queue"), [], threading.Event()
    layer = DecisionLayer.load(bundle)
    with (
        Decoder.open(
            bundle, f"file:{recordings['live']}", config, decisions=layer, schedule=events, markers=["annotations"], speed=np.inf
        ) as decoder,
        Feedback(decoder, port=0) as feedback,
    ):
        recorder, decisions = record_run(decoder, study, labels), []
        decoder.on_decision(decisions.append)
        client = threading.Thread(target=read_all, args=(feedback.ports["lines"], heard, ready))
        client.start()
        assert ready.wait(20)
        decoder.run()
        recorder.close()
    client.join(20)
    assert_accounted(decoder.counters, decisions)
    assert len(decisions) == 100
    told = [message for message in heard if message["type"] == "decision"]
    assert [(one["event"], one["state"], one.get("class")) for one in told] == [
        (one.event.description, one.state.name, one.state.class_name) for one in decisions
    ]
    assert "block 1" in [message["text"] for message in heard if message["type"] == "incident" and message["kind"] == "mark"]

    # All runs replay, and BIDS has what was heard.
    assert "0 differ" in sjepa("session", "replay", recorder.path, bundle)
    root = tmp_path / "bids"
    sjepa("session", "export", study, root)
    runs = {path.task: path for path in mne_bids.find_matching_paths(root, extensions=".vhdr")}
    assert set(runs) == set(SIZES)
    for name, path in runs.items():
        raw = mne_bids.read_raw_bids(path, verbose="error")
        assert sum(mark in people.CLASSES for mark in raw.annotations.description) == SIZES[name]
    decided = root / "derivatives" / "sjepa-deploy" / "sub-P1" / "eeg" / "sub-P1_task-live_run-1_desc-decisions_events.tsv"
    with decided.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["trial_type"], row["state"], row["class"].replace("n/a", "")) for row in rows] == [
        (one["event"], one["state"], one.get("class") or "") for one in told
    ]

    # Evaluated: the trials with a decision are mostly right, and about as many as were asked for.
    accepted = [row for row in rows if row["state"] == "decided"]
    assert 0.6 < len(accepted) / len(rows) < 0.95
    assert balanced_accuracy_score([row["trial_type"] for row in accepted], [row["class"] for row in accepted]) > 0.75
