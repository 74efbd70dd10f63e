"""Checkpoints by the name of a model on the Hub: fetched from a stand-in for its endpoint, kept in the cache, found offline."""

import json
import os
import subprocess
import sys

import pytest
from bundles import small_spec
from hub import REVISIONS, served
from small import FINETUNE, make_spec

from sjepa_deploy.errors import CheckpointError
from sjepa_deploy.models.checkpoint import read_checkpoint, write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.serialize import encode


@pytest.fixture
def repositories(tmp_path):
    """Return a model with two revisions, a base model, and a repository that holds no model."""
    folders = {}
    for name, commit, spec in (
        ("lab/model", "main", small_spec()),
        ("lab/model", "v1", small_spec(n_outputs=2)),
        ("lab/base", "main", make_spec()),
    ):
        folder = tmp_path / "hub" / name / commit
        write_checkpoint(build_model(spec, seed=3), folder)
        folders.setdefault(name, {})[REVISIONS[commit]] = folder
    (tmp_path / "hub" / "text").mkdir()
    (tmp_path / "hub" / "text" / "config.json").write_text("{}")
    return folders | {"lab/text": {REVISIONS["main"]: tmp_path / "hub" / "text"}}


def in_a_process(code, *arguments, endpoint, home, offline=False):
    """Run Python in a process of its own: huggingface_hub reads its variables once."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    run = [sys.executable, *code, *map(str, arguments)]
    done = subprocess.run(run, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ = """
import json, sys
from sjepa_deploy.errors import CheckpointError
from sjepa_deploy.models.checkpoint import read_checkpoint

found = {}
for name in sys.argv[1:]:
    try:
        checkpoint = read_checkpoint(name)
        found[name] = [checkpoint.file_name, checkpoint.sha256, checkpoint.known["n_outputs"]]
    except CheckpointError as e:
        found[name] = str(e)
print(json.dumps(found))
"""


def test_a_name_is_fetched_once_and_found_offline(repositories, tmp_path):
    code = ("-c", READ)
    names = ("lab/model", "lab/model@v1", "lab/other", "lab/model@v9", "lab/text")
    with served(repositories) as (endpoint, asked):
        found = in_a_process(code, *names, endpoint=endpoint, home=tmp_path)
        n_asked = len(asked)
        offline = in_a_process(code, *names[:2], "lab/base", endpoint=endpoint, home=tmp_path, offline=True)
        assert len(asked) == n_asked
    there = [read_checkpoint(repositories["lab/model"][REVISIONS[name]]) for name in ("main", "v1")]
    assert found["lab/model"] == [f"lab/model@{'a' * 12}", there[0].sha256, 3]
    assert found["lab/model@v1"] == [f"lab/model@{'b' * 12}", there[1].sha256, 2]
    assert "neither as a path nor on the Hugging Face Hub" in found["lab/other"]
    assert "no revision v9" in found["lab/model@v9"]
    assert "holds no model.safetensors" in found["lab/text"]
    assert {name: offline[name] for name in names[:2]} == {name: found[name] for name in names[:2]}
    assert "neither in the cache nor within reach" in offline["lab/base"]


def test_a_base_model_is_fine_tuned_by_its_name(repositories, tmp_path):
    config = encode(FINETUNE) | {"variant": "postlocal", "encoder": None}
    config["engine"] |= {"max_epochs": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps(config))
    with served(repositories) as (endpoint, _):
        arguments = ("--config", "recipe.yaml", "--pretrained", "lab/base@main", "--out", "out", "--json")
        told = in_a_process(("-m", "sjepa_deploy", "finetune"), *arguments, endpoint=endpoint, home=tmp_path)
    assert told["result"]["transfer"]["source"] == f"lab/base@{'a' * 12}"


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/a/b", "../a", "a/b@", "a/b c"])
def test_what_is_no_name_of_the_hub_is_a_path(name):
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        read_checkpoint(name)


def test_a_folder_of_this_machine_comes_before_the_hub(tmp_path, monkeypatch):
    write_checkpoint(build_model(small_spec(), seed=0), tmp_path / "lab" / "model")
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint("lab/model").file_name == "model"
