"""What `make recordings` does, with a server on this machine in the place of the originals'."""

import hashlib
import http.server
import threading
from functools import partial

import mne
import numpy as np
import pytest
from eeg_files import REAL
from fetch_recordings import fetch


@pytest.fixture
def server(tmp_path):
    """Return a folder and the address under which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever).start()
        yield folder, f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def row(url, sha, original="-"):
    return {"url": url, "sha256": sha, "sha256_of_original": original}


def test_a_recording_comes_once_and_only_with_its_sha256(server, tmp_path):
    folder, url = server
    (folder / "test.edf").write_bytes(b"samples")
    recordings = {"a.edf": row(f"{url}/test.edf", sha256(b"samples"))}
    fetch(recordings, tmp_path / "cache")
    assert (tmp_path / "cache/a.edf").read_bytes() == b"samples"
    (folder / "test.edf").unlink()
    fetch(recordings, tmp_path / "cache")
    (folder / "test.edf").write_bytes(b"Samples")
    with pytest.raises(ValueError, match="does not match"):
        fetch({"b.edf": row(f"{url}/test.edf", sha256(b"samples"))}, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.edf"]


def test_a_run_of_a_muse_becomes_edf_and_only_with_its_sha256(server, tmp_path):
    """The oracle is the table that went in."""
    folder, url = server
    eeg = np.random.default_rng(0).normal(0, 20, (512, 5)).round(3)
    markers = np.zeros(512, int)
    markers[[30, 200, 401]] = 1, 2, 1
    lines = [",".join(map(str, (i / 256, *values, mark))) for i, (values, mark) in enumerate(zip(eeg, markers, strict=True))]
    text = "\n".join(["timestamps,TP9,AF7,AF8,TP10,Right AUX,Marker0", *lines])
    (folder / "run.csv").write_text(text)
    original = sha256(text.encode())
    with pytest.raises(ValueError, match=r"p300/run\.edf was converted to another file than expected \(sha256 (\w+)\)") as caught:
        fetch({"p300/run.edf": row(f"{url}/run.csv", "0" * 64, original)}, tmp_path / "cache")
    assert not (tmp_path / "cache/p300/run.edf").exists()
    made = str(caught.value).partition("sha256 ")[2][:64]
    fetch({"p300/run.edf": row(f"{url}/run.csv", made, original)}, tmp_path / "cache")
    raw = mne.io.read_raw(tmp_path / "cache/p300/run.edf", verbose="error")
    assert (raw.ch_names, raw.info["sfreq"]) == (["TP9", "AF7", "AF8", "TP10"], 256.0)
    np.testing.assert_allclose(raw.get_data() * 1e6, eeg[:, :4].T, rtol=0, atol=0.003)
    events = [(round(mark["onset"] * 256), mark["description"]) for mark in raw.annotations]
    assert events == [(30, "nontarget"), (200, "target"), (401, "nontarget")]


def test_originals_are_pinned_to_a_commit():
    assert len(REAL) == 34
    for name, entry in REAL.items():
        assert entry["url"].startswith("https://raw.githubusercontent.com/"), name
        assert len(entry["url"].split("/")[5]) == 40, name
        assert len(entry["sha256"]) == 64, name
        assert (entry["sha256_of_original"] == "-") == (not name.startswith("p300/")), name
