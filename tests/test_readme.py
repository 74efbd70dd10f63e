"""The README's commands and example run as written."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sjepa_deploy
from sjepa_deploy.runtime.backend import BackendOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(start):
    return [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.startswith(start)]


@pytest.fixture(scope="module")
def folder(default_contextual, written):
    """Return a folder in which the README's commands ran, with the recording that they name."""
    folder = default_contextual.path.parent
    for suffix in (".set", ".fdt"):
        shutil.copy(written("eeglab_data.set").path.with_suffix(suffix), folder)
    exported, *lines = commands("sjepa-")
    assert exported == "sjepa-export --variant contextual"
    assert len(lines) >= 3
    scripts = Path(sys.executable).parent
    for line in lines:
        name, *arguments = line.split()
        done = subprocess.run([scripts / name, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr)
    return folder


def test_commands_run_as_written(folder):
    header, *rows = (folder / "predictions.tsv").read_text().splitlines()
    assert header == "time\tprediction"
    assert len(rows) > 400  # 238 s, one window every 0.5 s


def test_python_example_runs_as_written(folder):
    (example,) = blocks("python")
    check = "\nassert prediction.shape == (1, 1) and np.isfinite(prediction).all()\n"
    subprocess.run([sys.executable, "-W", "error", "-c", example + check], cwd=folder, check=True)


def test_examples_of_the_backend_cuda_are_calls(monkeypatch):
    """There is no GPU here to run them on."""
    asked = []
    monkeypatch.setattr(sjepa_deploy, "load", lambda bundle, *, backend, options=None: asked.append((bundle, backend, options)))
    for example in re.findall(r"^    (sjepa_deploy\..*)$", (ROOT / "docs" / "fused.md").read_text(), re.MULTILINE):
        exec(f"import sjepa_deploy\n{example}", {})
    assert asked == [("bundle", "cuda", None), ("bundle", "cuda", BackendOptions(persistent=True))]


def test_make_targets_exist():
    targets = re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands("make "):
        assert line.split()[1] in targets


def test_every_fault_of_the_table_has_its_test():
    rows = [line for line in (ROOT / "docs/faults.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 25
    for row in rows:
        tests = re.findall(r"`(\w+\.py)::(\w+)`", row)
        assert tests, row
        for file, test in tests:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), row


def test_links_lead_somewhere():
    for text in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", text.read_text()):
            assert (text.parent / link).exists(), f"{text.name}: {link}"
