"""Folders whose names are no UTF-8: every command works there or says in one line what does not."""

import io
import json
import os
import sys

import numpy as np
import pytest
from bundles import copy_bundle

from sjepa_deploy.cli import COMMANDS, _command, run_command


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / os.fsdecode(b"b\xfcndel")
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    return path


@pytest.fixture
def command(monkeypatch):
    """Return a function that runs a command on a terminal of UTF-8, which takes no surrogates: status, stdout, stderr."""

    def run(name, *arguments):
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            status = run_command(_command(name), f"sjepa-{name}", [str(argument) for argument in arguments])
            for stream in streams:
                stream.flush()
        return status, *(stream.buffer.getvalue().decode() for stream in streams)

    return run


def test_a_bundle_is_exported_verified_and_decodes(command, make_bundle, folder):
    made = make_bundle("prelocal").checkpoint
    options = ("--precision", "fp32", "--engine", "none", "--max-batch", "2")
    status, out, error = command("export", "--checkpoint", made, *options, "--out", folder / "b", "--json")
    assert status == 0, error
    assert json.loads(out)["bundle"] == str(folder / "b")
    status, _, error = command("export", "--checkpoint", folder / "b/checkpoint", *options, "--out", folder / "b")
    assert (status, error.count("\n")) == (2, 1)
    assert "b\\udcfcndel/b already" in error
    assert command("export", "--checkpoint", folder / "b/checkpoint", *options, "--out", folder / "again")[0] == 0
    status, out, error = command("verify", folder / "b", "--json")
    assert status == 0, error
    json.loads(out)
    np.save(folder / "r.npy", np.float32(np.random.default_rng(0).normal(0, 20, (8, 1000))))
    recording = (folder / "r.npy", "--sfreq", "100", "--unit", "uV")
    for more in ((), ("--json", "--force")):
        status, out, error = command("run", folder / "b", *recording, "--out", folder / "p.tsv", *more)
        assert status == 0, error
    json.loads(out)
    assert len((folder / "p.tsv").read_text().splitlines()) == 1 + 5


def test_a_stream_is_recorded_and_replayed(command, make_bundle, folder):
    bundle = copy_bundle(make_bundle("prelocal"), folder / "b")
    files = ("--out", folder / "d.jsonl", "--record", folder / "r.xdf")
    status, out, error = command("stream", bundle, "--source", "synthetic", "--duration", "2.5", *files, "--json")
    assert status == 0, error
    json.loads(out)
    status, out, error = command("stream", bundle, "--replay", folder / "r.xdf", "--json")
    assert status == 0, error
    assert json.loads(out)["record"] == str(folder / "r.xdf")


def test_a_report_is_written(command, make_bundle, folder):
    bundle = copy_bundle(make_bundle("prelocal"), folder / "b")
    status, _, error = command("bench", bundle, "--backend", "ort-cpu", "--quick", "--out", folder / "report")
    assert status == 0, error
    page = next((folder / "report").parent.rglob("*.md")).read_text(encoding="utf-8")
    assert "b\\udcfcndel" in page


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_training_is_refused_in_a_line(command, folder, name):
    """TensorBoard writes to no such folder."""
    status, _, error = command(name, "--out", folder / "model")
    assert (status, error.count("\n")) == (2, 1)
    assert "is no UTF-8" in error
    assert not any(folder.iterdir())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("doctor", "pretrain", "finetune", "sweep")])
def test_what_is_missing_is_named_in_a_line(command, folder, name):
    before = {"export": ("--checkpoint",), "session": ("show",)}.get(name, ())
    after = {
        "run": ("r.npy",),
        "evaluate": ("r.edf", "--out", "out"),
        "stream": ("--source", "synthetic"),
        "calibrate": ("--data", "r.npz", "--out", "out"),
    }.get(name, ())
    status, _, error = command(name, *before, folder / "no", *after)
    assert (status, error.count("\n")) == (2, 1), error
    assert "b\\udcfcndel/no" in error
