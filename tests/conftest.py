import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import people
import pylsl
import pytest
import torch
from bundles import export_small, small_spec
from eeg_files import eeg_file
from filelock import FileLock
from kernels_on_cpu import KernelDriver, compiled_for_cpu
from oracle import randomise
from own_lsl import CONFIG
from torch.onnx._internal.exporter._registration import ONNXRegistry

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.bench import bench
from sjepa_deploy.eeg.synthetic import hard_windows
from sjepa_deploy.models.checkpoint import write_checkpoint
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.parity import Reference
from sjepa_deploy.runtime.backends.reference import run_reference
from sjepa_deploy.runtime.gpu import cuda, nvrtc
from sjepa_deploy.safetensors_file import read_safetensors

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, as below


def pytest_addoption(parser):
    explained = "fail every test that would be skipped because real recordings or Chromium are missing"
    parser.addoption("--require-recordings", action="store_true", help=explained)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("require_recordings"):
        report.outcome, report.longrepr = "failed", f"{call.excinfo.value} (--require-recordings lets no test be skipped)"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The tensors are small: on two busy cores, two threads wait for each other nine times as long. Some tests leave two."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def shared_registry():
    """Let exports share the registry of operators that each would build anew, in a third of the time of a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch):
    """Keep standard error of commands free of lines that a busy machine would add."""
    monkeypatch.setattr("sjepa_deploy.cli.progress.FIRST_LINE_AFTER", 3600.0)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Return a function that lets one process of this run make something, and gives its folder to all: once(key, make)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(key: str, make) -> Path:
        folder = shared / "made" / hashlib.sha256(key.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / "whole").exists():
                make(folder)
                (folder / "whole").touch()
        return folder

    return once


@pytest.fixture(scope="session")
def make_bundle(once):
    """Return a function that exports a small model, once for each model and set of options: make_bundle(variant, **spec).

    `model_seed` and the options of `to_bundle` may stand among the fields of the spec. Tests share what it returns, and alter
    copies of it only.
    """
    options = ("model_seed", "precisions", "max_batch", "static_batch", "parity_windows")

    @functools.cache
    def export(spec, **chosen) -> Bundle:
        key = repr((spec, sorted(chosen.items())))
        return Bundle.open(once(key, lambda folder: export_small(folder / "bundle", spec, **chosen)) / "bundle")

    def make(variant="prelocal", **fields) -> Bundle:
        chosen = {name: fields.pop(name) for name in options if name in fields}
        return export(small_spec(variant, **fields), **chosen)

    return make


@pytest.fixture(scope="session")
def people_bundle(once):
    """Return the bundle of a model that learned from planted people (`people.recording`)."""
    return Bundle.open(once("people", lambda folder: people.export(folder / "bundle")) / "bundle")


@pytest.fixture(scope="session")
def default_contextual(once):
    """Return the bundle that the README's first command writes, in a process of its own. It takes a minute."""
    command = [Path(sys.executable).parent / "sjepa-export", "--variant", "contextual"]
    folder = once("default contextual", lambda folder: subprocess.run(command, cwd=folder, check=True))
    return Bundle.open(folder / "sjepa-contextual")


@pytest.fixture(scope="session")
def manifest_json(make_bundle):
    """Return the text of a real manifest with three precisions; parse it anew to alter it."""
    text = (make_bundle("prelocal", precisions=("fp32", "fp16", "bf16")).path / "manifest.json").read_text()
    assert json.loads(text)["parity"]
    return text


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Return a function that writes a recording once and returns a `written_eeg.Written`: written("eeglab_data.set")."""
    from written_eeg import write  # most runs need none

    folder = tmp_path_factory.mktemp("recordings")
    return functools.cache(lambda name: write(name, folder))


@pytest.fixture(scope="session", params=["written", "real"])
def recorded(request, written):
    """Return a function from the name of a recording to its path; tests run with the stand-in first, then with the original."""
    return eeg_file if request.param == "real" else lambda name: written(name).path


@pytest.fixture(scope="session", autouse=True)
def own_lsl():
    """Configure liblsl before any test can: it reads its configuration once in a process."""
    pylsl.set_config_content(CONFIG)


@pytest.fixture(scope="module")
def browser():
    """Return a `browser.Browser`: Chromium without a window, shared by the tests of a module."""
    from browser import chromium  # most runs need no Selenium

    with chromium() as started:
        yield started


@pytest.fixture
def sjepa_bench(capsys):
    """Return a function that runs sjepa-bench, and returns its exit status, what it printed and its errors."""

    def run(*arguments):
        capsys.readouterr()
        status = run_command(bench, "sjepa-bench", [str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


KINDS_FOR_KERNELS = ("eeg 0", "eeg with 20 mV offsets", "flat channel", "saturated channel", "zeros", "one NaN")
"""Windows for the transformer's kernel, of which a launch takes half a second here."""


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU that runs kernels compiled by g++."""
    driver = KernelDriver()
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compiled", compiled_for_cpu)
    yield driver
    assert not driver.allocations
    assert not driver.modules


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Return a function that gives what the backend needs of a bundle, and the float64 reference: make_model(spec)."""
    made = {}

    def make(spec):
        if spec not in made:
            folder = tmp_path_factory.mktemp("model")
            model = randomise(build_model(spec, seed=0), seed=1)
            write_checkpoint(model, folder)
            windows = hard_windows(*spec.input_shape, spec.sfreq, np.random.default_rng(0))
            kinds = [kind for kind in windows if kind in KINDS_FOR_KERNELS or not spec.needs_positions]
            inputs = np.stack([windows[kind] for kind in kinds])
            outputs = np.concatenate([run_reference(model.double(), window[None]) for window in inputs])
            graph = SimpleNamespace(max_batch=4)
            known = {"graph": lambda precision: graph, "weights": lambda: read_safetensors(folder / "model.safetensors")}
            bundle = SimpleNamespace(spec=spec, path=folder, checkpoint=folder, **known)
            made[spec] = bundle, Reference(kinds=tuple(kinds), inputs=inputs, outputs=outputs), model
        return made[spec]

    return make
