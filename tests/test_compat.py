"""Files that the release at commit 4af6286 wrote (tests/compat) still open, decode and replay.

The bundle is a PreLocal model of two channels with random weights, and its own `reference.npz` holds the outputs of that commit's
PyTorch in float64. `run.xdf` was recorded by sjepa-stream from the synthetic source, the record of the fastest backend was
written by sjepa-bench, and `checkpoint` by `write_checkpoint` as a training does. Reports: test_old_reports.py.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import from_pretrained
from streams import run_command, run_stream

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli.verify import verify
from sjepa_deploy.errors import BackendError
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
from sjepa_deploy.parity import TOLERANCE
from sjepa_deploy.runtime.backends import fastest
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.records import RecordSource, read_record

COMPAT = Path(__file__).parent / "compat"


@pytest.fixture(scope="module")
def stored():
    """Return the windows and float64 outputs that lie in the bundle, of windows that are finite."""
    reference = Bundle.open(COMPAT / "bundle").reference()
    finite = np.isfinite(reference.inputs).all(axis=(1, 2))
    assert finite.sum() >= 4
    return reference.inputs[finite], reference.outputs[finite]


def test_the_bundle_opens_and_is_verified(capsys):
    bundle = Bundle.open(COMPAT / "bundle")
    assert bundle.spec.class_names == ("left", "right")
    assert run_command(verify, "sjepa-verify", [str(bundle.path)]) == 0, capsys.readouterr().err


def test_the_weights_give_what_they_gave_in_braindecode_and_here(stored):
    windows, outputs = stored
    theirs = from_pretrained("prelocal", COMPAT / "bundle" / "checkpoint").double().eval()
    ours = load_model(read_checkpoint(COMPAT / "checkpoint"), Bundle.open(COMPAT / "bundle").spec).double().eval()
    for model in (theirs, ours):
        with torch.no_grad():
            np.testing.assert_allclose(model(torch.from_numpy(windows).double()).numpy(), outputs, rtol=1e-9, atol=1e-11)


def test_the_bundle_decodes_to_the_outputs_of_pytorch_then(stored):
    windows, outputs = stored
    with sjepa_deploy.load(COMPAT / "bundle", check_unit=False) as predict:
        error = np.abs(predict.predict(windows) - outputs).max()
    assert error < TOLERANCE["fp32"] * np.sqrt(np.mean(outputs**2))


def test_what_a_training_wrote_beside_the_weights_is_read():
    config = json.loads((COMPAT / "checkpoint" / "config.json").read_text())
    assert {"data": "synthetic"} in config.values()
    assert read_checkpoint(COMPAT / "checkpoint").variant == "prelocal"


def test_the_record_of_a_stream_replays(capsys):
    record = read_record(COMPAT / "run.xdf")
    assert len(record.decisions) >= 8
    config = dataclasses.replace(record.run.config, late="queue", roll=False)
    with sjepa_deploy.load(COMPAT / "bundle", check_unit=False) as predict:
        again = {decision.index: decision.prediction for decision in Decoder(predict, RecordSource(record), config)}
    assert record.decisions.keys() <= again.keys()
    scale = max(np.abs(prediction).max() for prediction in record.decisions.values())
    error = max(np.abs(again[index] - prediction).max() for index, prediction in record.decisions.items())
    assert error <= TOLERANCE["fp32"] * scale
    status = run_stream(COMPAT / "bundle", "--replay", COMPAT / "run.xdf", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["n_missing"] == 0
    assert status == bool(result["n_differ"]) == bool(error), "another processor or ONNX Runtime may round otherwise"


def test_the_record_of_the_fastest_backend_is_obeyed_on_its_machine(stored, tmp_path, monkeypatch):
    windows, _ = stored
    bundle = Path(shutil.copytree(COMPAT / "bundle", tmp_path / "bundle"))
    (file,) = (bundle / "engines" / "fastest").glob("*.json")
    there = json.loads(file.read_text())["machine"]
    monkeypatch.setattr(fastest, "machine_of", lambda backends, device: there)
    with sjepa_deploy.load(bundle, backend="fastest", check_unit=False) as predict:
        fast = predict.predict(windows)
    with sjepa_deploy.load(bundle, backend="ort-cpu", check_unit=False) as predict:
        np.testing.assert_array_equal(fast, predict.predict(windows))
    monkeypatch.setattr(fastest, "machine_of", lambda backends, device: there | {"processor": "another"})
    with pytest.raises(BackendError, match=f"processor is {there['processor']} in the record and another here"):
        sjepa_deploy.load(bundle, backend="fastest")
    file.write_text(file.read_text().replace('"torch": 384006', '"torch": 1'))
    with pytest.raises(BackendError, match="was changed after it was kept"):
        sjepa_deploy.load(bundle, backend="fastest")
