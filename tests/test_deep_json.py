"""JSON that is nested too deeply is an error that names the file, in every reader of the package."""

from types import SimpleNamespace

import pytest
from eeg_files import ROOT

from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.verify import verify
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.learning.run_folder import check_run
from sjepa_deploy.models.checkpoint import read_checkpoint
from sjepa_deploy.runtime.backends import fastest
from sjepa_deploy.runtime.backends.engines import EngineStore
from sjepa_deploy.runtime.bench.files import load_report
from sjepa_deploy.safetensors_file import read_safetensors
from sjepa_deploy.serving.contract import Contract


@pytest.mark.parametrize("text", [b'{"a":' * 200 + b"1" + b"}" * 200, b"[" * 100_000])
def test_files_of_ours_that_are_nested_too_deeply_are_named_in_our_errors(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (tmp_path / "options.yaml").write_bytes(text)
    (tmp_path / "run.json").write_bytes(text)
    (tmp_path / "last.ckpt").touch()
    (tmp_path / "engines" / "fastest").mkdir(parents=True)
    (tmp_path / "engines" / "fastest" / "fp32-0.json").write_bytes(text)
    (tmp_path / "engines" / "0.json").write_bytes(text)
    bundle = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(digest=""))
    for read in (
        lambda: load_report(tmp_path / "config.json"),
        lambda: read_checkpoint(tmp_path),
        lambda: read_safetensors(tmp_path / "model.safetensors"),
        lambda: Contract.loads(text.decode(), "model"),
        lambda: check_run(tmp_path, None, resume=True),
        lambda: fastest.find(bundle, "fp32"),
        lambda: EngineStore(bundle=bundle).records(),
    ):
        with pytest.raises(SjepaError, match="nested more than 100|no contract|damaged"):
            read()
    assert run_command(verify, "sjepa-verify", ["--config", str(tmp_path / "options.yaml"), "bundle"]) == 2


def test_no_file_is_parsed_but_by_load_json():
    """What is left is of our own processes, or of a library in memory."""
    own = {"cold_start.py", "demo.py", "engine_precision.py", "files.py", "model.py"}
    own |= {"dashboard.py", "dashboard_server.py", "feedback.py", "server.py"}  # pipes between a decoder and its servers
    parsed = {
        file.name
        for room in ("sjepa_deploy", "export", "runtime")
        for file in (ROOT / room).rglob("*.py")
        if "json.load" in file.read_text()
    }
    assert parsed == own
