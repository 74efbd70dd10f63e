"""Model cards, and bundles for the public: they tell what the manifest holds, and name nobody."""

import base64
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
from bundles import copy_bundle
from small import CH_NAMES, make_spec

from sjepa_deploy.bundle import Bundle, Provenance, write_manifest
from sjepa_deploy.card import LatencyFact, TaskFact, TrainingFact, model_card, read_training, without_names
from sjepa_deploy.cli import _command, run_command
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import ExportError
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.export.to_hub import public_copy, push
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.runtime.predictor import load

SECRETS = ("anna", "sub-07", "session1", "clinic", "split")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Return a bundle of a person: her EEG judged it, her recordings stand in its notes, her results beside it."""
    path = tmp_path_factory.mktemp("anna") / "bundle"
    spec = make_spec("prelocal", ch_names=CH_NAMES[:8], n_outputs=2, task="classification", class_names=("left", "right"))
    provenance = Provenance(
        source="anna_final.pth",
        format="state dict",
        notes=(
            "calibrated (closed-form) on 40 trials of anna_session1_raw.fif",
            "measured on /clinic/sub-07/sub-07_eeg.edf: 3 %",
        ),
    )
    windows = eeg_windows(6, 8, spec.n_times, 100.0, np.random.default_rng(3))
    bundle = to_bundle(build_model(spec), path, weights=provenance, precisions=("fp32",), parity_windows=windows)
    for folder in ("task", "decisions", "engines"):
        (path / folder).mkdir()
        (path / folder / "anna.json").write_text("{}")
    return bundle


def test_a_card_tells_what_the_manifest_holds_and_what_was_measured(bundle):
    card = model_card(
        bundle,
        training=TrainingFact(
            parts={"train": (71, 3, 4)},
            split="subject",
            scores=(TaskFact(metric="auc", n=24, where="test part", value=0.91, low=0.8, high=0.97),),
        ),
        tasks=[TaskFact(metric="balanced_accuracy", n=120, where="live", value=0.742, low=0.654, high=0.823)],
        latency=[LatencyFact(machine="A CPU", backend="ort-cpu", precision="fp32", p50_us=24.2, p99_us=31.0)],
        license_name="bsd-3-clause",
    )
    assert card.startswith("---\nlibrary_name: sjepa-deploy\nlicense: bsd-3-clause\ntags:\n- eeg\n")
    for text in (
        "8 channels x 152 samples at 100 Hz (1.52 s)",
        ", ".join(CH_NAMES[:8]),
        f"| fp32 | ort-cpu | {bundle.manifest.parity[0].max_error:.1e} | 1e-05 | passed |",
        "| balanced accuracy | live | 0.742 | 0.654 to 0.823 | 120 |",
        "| auc | test part | 0.910 | 0.800 to 0.970 | 24 |",
        "| A CPU | ort-cpu | fp32 | 24 | 31 |",
        "| train | 71 | 3 | 4 |",
        "No two parts share a subject.",
        "zero-phase windows",
        "no medical device",
    ):
        assert text in card, text
    assert not any(secret in card.lower() for secret in SECRETS)
    bare = model_card(bundle)
    assert all(text in bare for text in ("No score of a task was measured", "No latency was measured", "says nothing about its"))


def test_names_of_recordings_are_left_out_of_notes():
    assert without_names("on 40 trials of anna.fif, not x.npz") == "on 40 trials of a recording, not a recording"
    assert without_names("sub-07_ses-1_eeg.edf and sub-07") == "a recording and a recording"
    assert without_names("8 attention heads are assumed") == "8 attention heads are assumed"


def test_a_public_copy_decodes_the_same_and_holds_nobody(bundle, tmp_path):
    copy = public_copy(bundle, tmp_path / "copy", "card")
    assert {file.name for file in copy.path.iterdir()} == {
        *("README.md", "manifest.json", "model.fp32.onnx", "reference.npz", "checkpoint")
    }
    assert not any("parity data" in kind for kind in copy.reference().kinds)
    assert any("parity data" in kind for kind in bundle.reference().kinds)  # else the line above says nothing
    for file in copy.path.rglob("*"):
        if file.is_file():
            content = file.read_bytes().lower()
            assert not any(secret.encode() in content for secret in ("anna", "sub-07", "session1", "clinic")), file
    windows = eeg_windows(4, 8, 152, 100.0, np.random.default_rng(1))
    with load(bundle) as own, load(copy) as other:
        assert np.array_equal(own(windows), other(windows))
    assert run_command(_command("verify"), "sjepa-verify", [str(copy.path), "--backend", "ort-cpu"]) == 0


def test_what_training_wrote_is_read_as_numbers_alone(tmp_path):
    part = {"n_windows": 5, "n_subjects": 2, "n_recordings": 3, "classes": {}}
    score = {"value": 0.9, "low": 0.8, "high": 1.0}
    record = {
        "data": {"split": "subject", "parts": {"train": part, "test": part}, "skipped": ["anna.fif"]},
        "result": {"n_test": 5, "test": {"auc": score}},
        "origin": {"subjects": ["anna"]},
    }
    (tmp_path / "config.json").write_text(json.dumps({"sjepa_deploy_training": record}))
    read = read_training(tmp_path)
    assert read.parts == {"train": (5, 2, 3), "test": (5, 2, 3)}
    assert read.scores[0].value == 0.9
    assert "anna" not in repr(read)
    assert read_training(tmp_path / "nothing") is None
    (tmp_path / "config.json").write_text("{}")
    assert read_training(tmp_path) is None


# ---------------------------------------------------------------- a hub on loopback


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does to a client that makes a repository and commits small files."""

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        answer = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.address}/org/name", "name": "org/name", "id": "org/name"}
            self.server.made = json.loads(body)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {
                "commitUrl": f"{self.address}/org/name/commit/0123456789abcdef",
                "commitOid": "0123456789abcdef",
                "success": True,
            }
        self._send(answer)

    def do_GET(self):
        self._send({"id": "org/name", "siblings": []})

    def _send(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.files, server.made, server.status = [], {}, None, 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_pushed_is_the_public_copy(bundle, hub, tmp_path):
    assert push(bundle, "org/name", "the card", private=True).endswith("/org/name/commit/0123456789abcdef")
    assert "private" in json.dumps(hub.made)
    assert {token for _, token in hub.seen} == {"Bearer hf_of_the_test"}
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        assert b"anna" not in content.lower()
    assert hub.files["README.md"] == b"the card"
    assert Bundle.open(tmp_path).spec == bundle.spec


def test_a_hub_that_refuses_and_names_that_are_none(bundle, hub):
    for name in ("name", "a/b/c", "org/na me"):
        with pytest.raises(ExportError, match="is no name of a repository"):
            push(bundle, name, "card")
    hub.status = 403
    with pytest.raises(ExportError, match="The hub refuses org/name"):
        push(bundle, "org/name", "card")
    assert not hub.files


def test_the_export_writes_a_card_and_pushes(bundle, hub, tmp_path, capsys):
    command = ["--checkpoint", str(bundle.checkpoint), "--precision", "fp32", "--assume-signal", "--out", str(tmp_path / "out")]
    arguments = [*command, "--card", str(tmp_path / "card.md"), "--push", "org/name", "--json", "--quiet"]
    assert run_command(_command("export"), "sjepa-export", arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pushed"].endswith("0123456789abcdef")
    assert (tmp_path / "card.md").read_bytes() == hub.files["README.md"]
    assert "| ort-cpu | fp32 |" in (tmp_path / "card.md").read_text()
    assert run_command(_command("export"), "sjepa-export", [*arguments, "--variant", "all"]) == 2
    assert run_command(_command("export"), "sjepa-export", arguments) == 2  # the card is there
    shutil.rmtree(tmp_path / "out")


def test_a_calibrated_copy_opens(bundle, tmp_path):
    """A manifest that was written anew vouches for its files as the first one does."""
    path = copy_bundle(bundle, tmp_path / "b")
    write_manifest(path, bundle.manifest)
    assert Bundle.open(path).manifest.parity == bundle.manifest.parity
