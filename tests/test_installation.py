"""The lines of docs/install.md install the package, and each extra gives the commands that the table there promises."""

import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sjepa_deploy.errors import REPOSITORY
from sjepa_deploy.spec import Preprocessing

ROOT = Path(__file__).parents[1]
LINES = [
    line.partition("   #")[0].strip()
    for page in ("README.md", "docs/install.md")
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("pip install")
]
BRAIN = 20e-6 * np.random.default_rng(0).standard_normal((8, 1000))
"""Ten seconds at 100 Hz in volts."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a clone of the repository as it stands here, with what is not committed."""
    folder = tmp_path_factory.mktemp("source") / "clone"
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "demo", "results", "tests")
    shutil.copytree(ROOT, folder, ignore=left_out, symlinks=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "as it stands"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", "."], cwd=source, check=True
    )
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """Return the Python of an environment in which pip alone is installed."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def bundle(make_bundle):
    """Return a bundle with causal filters, which SciPy runs."""
    return make_bundle(preprocessing=Preprocessing(l_freq=0.5, h_freq=40.0, reference="average")).path


def pip(python, line, *, cwd, **changes):
    """Run a line ``pip install ...`` with the pip of `python`, with our versions."""
    environment = os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")} | changes
    command = f'"{python}" -m {line}'
    done = subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


def planned(python, line, *, cwd):
    """Return what a line would install: for each name its metadata and the extras asked for."""
    report = json.loads(pip(python, f"{line} --dry-run --quiet --ignore-installed --report -", cwd=cwd))
    return {entry["metadata"]["name"]: entry for entry in report["install"]}


def test_the_pages_have_lines_for_a_repository_a_clone_a_wheel_and_pytorch():
    assert any(f"git+{REPOSITORY}" in line for line in LINES)
    assert any("--editable" in line for line in LINES)
    assert any(".whl" in line for line in LINES)
    assert any(line.split()[-1] == "torch" for line in LINES)


@pytest.mark.parametrize("line", [line for line in dict.fromkeys(LINES) if not line.endswith(" torch")])
def test_a_line_installs_the_package_and_its_extras(line, source, wheel, empty):
    """A clone's address stands for the repository's; of a wheel, what the extras bring is looked up too."""
    here = line.replace(f"git+{REPOSITORY}", f"git+file://localhost{source}")
    plan = planned(empty, here if ".whl" in line else f"{here} --no-deps", cwd=source)
    ours = plan["sjepa-deploy"]
    asked = re.search(r"\[([a-z,]+)\]", line)
    assert sorted(ours.get("requested_extras", [])) == sorted(asked[1].split(",") if asked else [])
    assert set(ours.get("requested_extras", [])) <= set(ours["metadata"]["provides_extra"])
    if ".whl" in line:
        assert wheel.name in ours["download_info"]["url"]
        assert {"numpy", "onnxruntime", "mne", "pylsl"} <= set(plan)
        assert "torch" not in plan


def test_the_lines_of_pytorch_name_the_index_of_cpu_builds_or_none():
    """The index itself may be out of reach: its address is checked where pip gets it, here and in the Makefile."""
    lines = [line.split() for line in LINES if line.endswith(" torch")]
    assert ["pip", "install", "torch"] in lines
    (cpu,) = (line for line in lines if "--index-url" in line)
    assert cpu[2:] == ["--index-url", "https://download.pytorch.org/whl/cpu", "torch"]


@pytest.mark.parametrize(("driver", "index"), [(False, "--index-url https://download.pytorch.org/whl/cpu torch"), (True, None)])
def test_make_asks_the_index_of_cpu_builds_where_there_is_no_driver(tmp_path, driver, index):
    if Path("/proc/driver/nvidia/version").exists() and not driver:
        pytest.skip("this machine has an NVIDIA driver")
    if driver:
        (tmp_path / "nvidia-smi").touch(mode=0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "--dry-run", f"VENV={tmp_path}/venv", "demo"]
    steps = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert (index or 'test -z ""') in steps
    assert "sjepa-stream" in steps


def test_make_refuses_a_recording_that_is_not_there_before_it_installs():
    done = subprocess.run(["make", "demo", "RECORDING=none.edf"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "There is no recording none.edf" in done.stdout + done.stderr
    assert "Installing" not in done.stdout


def test_make_refuses_an_old_python(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    command = ["make", f"{tmp_path}/venv/torch-installed", f"VENV={tmp_path}/venv", f"PYTHON={tmp_path}/python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs Python 3.10 or later" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_plain_verifies_and_loads_in_an_empty_environment(wheel, empty, bundle, tmp_path):
    """The real pip, the real wheel and its console scripts, nothing beside them."""
    pip(empty, f"pip install --quiet '{wheel}'", cwd=tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = functools.partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    verified = run([empty.parent / "sjepa-verify", bundle, "--json"])
    assert verified.returncode == 0, verified.stderr
    assert [result["backend"] for result in json.loads(verified.stdout)["results"]] == ["ort-cpu"]
    code = (
        "import sys, numpy, sjepa_deploy\n"
        "with sjepa_deploy.load(sys.argv[1]) as predict:\n"
        "    print(predict(numpy.ones((1, *predict.spec.input_shape), 'float32')).shape)\n"
    )
    loaded = run([empty, "-c", code, bundle])
    assert loaded.stdout.strip() == "(1, 3)", loaded.stderr
    np.save(tmp_path / "eeg.npy", BRAIN)
    refused = run([empty.parent / "sjepa-run", bundle, "eeg.npy", "--sfreq", "100", "--unit", "V"])
    assert refused.returncode == 2
    (line,) = re.findall(r"(pip install .*) \(the extra \[eeg\]\)\.", refused.stderr)
    assert {"mne", "mffpy"} <= set(planned(empty, f"{line} --no-deps", cwd=tmp_path))


@pytest.fixture(scope="module")
def environment_of(wheel, tmp_path_factory):
    """Return a function that lays out what pip would install for some extras, by the metadata, from what is installed here."""

    @functools.cache
    def lay_out(extras):
        folder = tmp_path_factory.mktemp("extras")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        (metadata,) = folder.glob("*.dist-info")
        wanted = importlib.metadata.PathDistribution(metadata).requires
        for distribution in _closure(wanted, extras.split(",")).values():
            tops = {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}
            for top in tops:
                (folder / top).exists() or (folder / top).symlink_to(distribution.locate_file(top))
        return folder

    return lay_out


def _closure(requirements: Iterable[str], extras: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions that requirements reach with extras."""
    found, waiting = {}, [(requirements, extra) for extra in ("", *extras)]
    seen = set()
    ours = requirements
    while waiting:
        of, extra = waiting.pop()
        for requirement in map(Requirement, of):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            if name == "sjepa-deploy":
                waiting += [(ours, inner) for inner in requirement.extras]
                continue
            found.setdefault(name, importlib.metadata.distribution(name))
            for inner in {"", *requirement.extras}:
                if (name, inner) not in seen:
                    seen.add((name, inner))
                    waiting.append((found[name].requires or (), inner))
    return found


def sjepa(folder, *arguments, cwd):
    """Run a command with the packages of `folder` alone: ``-S`` leaves out those of the Python that runs the tests."""
    code = "from sjepa_deploy.cli import sjepa; sjepa()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


TINY = """
variant: prelocal
warmup_epochs: 0
data: {montage: sjepa-62, n_times: 152, target: {kind: reaction_time}, synthetic: {n_subjects: 5, n_windows: 4}}
engine: {max_epochs: 1, batch_size: 4}
"""
COMMANDS = {
    "eeg": ["run", "BUNDLE", "eeg.npy", "--sfreq", "100", "--unit", "V", "--out", "OUT"],
    "stream": ["stream", "BUNDLE", "--source", "synthetic", "--speed", "inf", "--duration", "4", "--quiet", "--out", "OUT"],
    "export": ["export", "--variant", "prelocal", "--out", "OUT"],
    "train": ["finetune", "--config", "tiny.yaml", "--out", "OUT"],
}


@pytest.mark.parametrize("extra", list(COMMANDS))
def test_an_extra_gives_its_command_and_the_command_names_its_extra(extra, environment_of, bundle, tmp_path):
    np.save(tmp_path / "eeg.npy", BRAIN)
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [{"BUNDLE": bundle, "OUT": tmp_path / "out"}.get(word, word) for word in COMMANDS[extra]]
    without = sjepa(environment_of("export" if extra == "train" else ""), *command, cwd=tmp_path)
    assert without.returncode == 2, without.stderr
    assert re.search(rf"pip install .* \(the extra \[{extra}\]\)\.$", without.stderr.strip())
    assert len(without.stderr.strip().splitlines()) == 1
    done = sjepa(environment_of(extra), *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").exists()


def test_the_extra_eeg_reads_the_format_of_the_default_montage(environment_of):
    """MNE imports mffpy to read EGI's MFF."""
    code = "import mffpy, mne, pyxdf, mne_bids"
    environment = os.environ | {"PYTHONPATH": str(environment_of("eeg"))}
    subprocess.run([sys.executable, "-S", "-c", code], env=environment, check=True)


def test_the_table_names_every_extra():
    page = (ROOT / "docs" / "install.md").read_text()
    told = re.findall(r"^\| `\[(\w+)\]`", page, re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[project.scripts]")[0]
    assert sorted(told) == sorted(set(re.findall(r"^(\w+) = \[", section, re.MULTILINE)))


def test_no_page_asks_an_index_for_sjepa_deploy():
    """No package index has it: a name alone finds nothing, or another's package."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    commands = [command for page in pages for command in re.findall(r"pip install '?sjepa-deploy.*", page.read_text())]
    assert len(commands) >= 4
    assert [command for command in commands if f"@ git+{REPOSITORY}" not in command] == ["pip install sjepa-deploy`"]
