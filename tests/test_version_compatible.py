"""Engines that an earlier TensorRT built as version compatible, on fake machines with a later TensorRT or its lean runtime."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import tensorrt_lean  # creating its Runtime without a driver ends the process: names only
from engine_bundles import small_bundle
from fake_machine import Rig, eeg, outputs

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.build import build
from sjepa_deploy.cli.doctor import engine_line
from sjepa_deploy.errors import EngineError, MissingDependencyError
from sjepa_deploy.export.to_tensorrt import build_engine, why_no_engines
from sjepa_deploy.runtime.backends import tensorrt_api
from sjepa_deploy.runtime.backends.engine_judge import EngineParityError
from sjepa_deploy.runtime.backends.engines import BuildSettings, promised
from sjepa_deploy.runtime.backends.proofs import engine_states
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT

COMPATIBLE = BuildSettings(max_batch=8, version_compatible=True)
LATER = {"version": "10.16.1.11", "driver_version": "590.2"}


@pytest.fixture
def rig(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Rig(monkeypatch, "8.6.0")


@pytest.fixture
def bundle(tmp_path):
    shutil.copytree(small_bundle("prelocal").path, tmp_path / "b")
    return Bundle.open(tmp_path / "b")


def decode(bundle, precision="fp32"):
    with sjepa_deploy.load(bundle, backend="tensorrt", precision=precision) as predict:
        return predict(eeg(bundle, 3))


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_a_later_version_judges_the_engine_at_its_first_load_and_then_decodes(rig, bundle, lean, precision):
    record = build_engine(bundle, precision, settings=COMPATIBLE)
    rig.set(**LATER, lean=lean)
    calls = []
    rig.faults.spoil = lambda out: (calls.append(len(out)), out)[1]
    graph = "fp32" if precision == "tf32" else precision
    np.testing.assert_array_equal(decode(bundle, precision), outputs(bundle, graph, eeg(bundle, 3)))
    judged = len(calls)
    assert {1, 2, 3, 8} <= set(calls), "the batch sizes of parity"
    calls.clear()
    decode(bundle, precision)
    assert 0 < len(calls) < judged / 2, "the proof was kept"
    (state,) = engine_states(Bundle.open(bundle.path))
    (proof,) = state.proofs
    assert state.record == record, "the record of the build does not change"
    assert (proof.machine.version, proof.machine.driver, proof.parity.passed) == ("10.16.1.11", "590.2", True)
    assert not rig.driver.allocations
    assert "built and judged on NVIDIA Fake 9000, driver 580.1; proven with tensorrt 10.16.1.11, driver 590.2" in engine_line(
        state
    )


def test_an_engine_of_this_version_comes_first(rig, bundle):
    build_engine(bundle, "fp32", settings=COMPATIBLE)
    rig.set(**LATER)
    build_engine(bundle, "fp32")
    decode(bundle)
    assert not any(state.proofs for state in engine_states(bundle)), "the older one was not asked"


def test_engines_of_one_earlier_version_run_together(rig, bundle, monkeypatch):
    """They are run with the calls of the version that built the newest."""
    days = itertools.count(1)
    monkeypatch.setattr("sjepa_deploy.export.to_tensorrt.now", lambda: f"2026-01-{next(days):02}T00:00:00+00:00")
    build_engine(bundle, "fp32", settings=COMPATIBLE)
    rig.set("10.9.0")
    for opt in (1, 8):
        build_engine(bundle, "fp32", settings=dataclasses.replace(COMPATIBLE, opt_batch=opt))
    rig.set(**LATER)
    with sjepa_deploy.load(bundle, backend="tensorrt") as predict:
        np.testing.assert_array_equal(predict(eeg(bundle, 8)), outputs(bundle, "fp32", eeg(bundle, 8)))
    proven = [state.record.identity.machine.version for state in engine_states(bundle) if state.proofs]
    assert proven == ["10.9.0", "10.9.0"]


def test_an_engine_that_differs_here_decodes_nothing(rig, bundle):
    build_engine(bundle, "fp32", settings=COMPATIBLE)
    rig.set(**LATER, lean=True)
    rig.faults.spoil = lambda out: out * np.float32(1.01)
    for _ in range(2):
        with pytest.raises(EngineParityError, match=r"off by .* first load on this machine. The engine stays unproven"):
            decode(bundle)
    assert not rig.driver.allocations
    assert rig.driver.n_retained == 0
    rig.faults.spoil = lambda out: out
    np.testing.assert_array_equal(decode(bundle), outputs(bundle, "fp32", eeg(bundle, 3)))


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        (BuildSettings(max_batch=8), LATER, "version is '8.6.0' in the engine and '10.16.1.11' here"),
        (COMPATIBLE, {"version": "11.4.0"}, "version is '8.6.0' in the engine and '11.4.0' here"),
        (COMPATIBLE, LATER | {"name": "NVIDIA Other"}, "gpu is 'NVIDIA Fake 9000' in the engine and 'NVIDIA Other' here"),
        (COMPATIBLE, LATER | {"capability": (8, 9)}, "compute_capability is '9.0' in the engine and '8.9' here"),
    ],
)
def test_what_nobody_promised_is_refused(rig, bundle, settings, changes, words):
    build_engine(bundle, "fp32", settings=settings)
    rig.set(**changes)
    with pytest.raises(EngineError, match=words):
        decode(bundle)


@pytest.mark.parametrize(
    ("built", "runs_on"),
    [
        ("8.6.0", ("8.6.0", "8.6.1", "9.3.0", "10.0.1", "10.9.0", "10.16.1.11")),
        ("10.9.0", ("10.9.0", "10.16.1.11", "11.0.0", "11.4.0.106")),
        ("10.16.1.11", ("10.16.1.11", "11.0.0", "11.4.0.106")),
        ("11.0.0", ("11.0.0", "11.4.0.106")),
        ("8.5.3", ()),
        ("1.7.1", ()),
    ],
)
def test_versions_that_are_promised(built, runs_on):
    """docs.nvidia.com, "Version Compatibility" of 10.16.1 and "Engine Compatibility" of 11.1."""
    every = ("1.7.1", "8.5.3", "8.6.0", "8.6.1", "9.3.0", "10.0.1", "10.9.0", "10.16.1.11", "11.0.0", "11.4.0.106", "12.0.0")
    assert tuple(here for here in every if promised(built, here)) == runs_on


def test_the_lean_runtime_builds_nothing(rig, bundle):
    rig.set(**LATER, lean=True)
    with pytest.raises(MissingDependencyError, match="needs tensorrt, which is not installed"):
        build_engine(bundle, "fp32")
    assert "tensorrt" in why_no_engines()
    assert run_command(build, "sjepa-build", [str(bundle.path)]) == 2


def test_the_installed_lean_runtime_is_taken_to_run_engines_alone(monkeypatch):
    """TensorRT itself is not installed here; the lean runtime of 11.4 is."""
    api = TensorRT("tensorrt", runs_only=True)
    assert api.module is tensorrt_lean
    assert api.version.startswith("11.4.")
    with pytest.raises(MissingDependencyError, match="needs tensorrt"):
        TensorRT("tensorrt")
    monkeypatch.setattr(tensorrt_api, "LEAN_MODULE", "lean_runtime_that_nobody_has")
    with pytest.raises(MissingDependencyError, match="needs tensorrt"):
        TensorRT("tensorrt", runs_only=True)


def test_only_version_compatible_engines_may_run_code_of_theirs(rig, bundle):
    """Such an engine holds a runtime that runs in this process: nothing but the request for such an engine allows it."""
    plans = []
    for settings in (BuildSettings(max_batch=8), COMPATIBLE):
        record = build_engine(bundle, "fp32", settings=settings)
        plans.append((bundle.path / "engines" / f"{record.identity.key}.plan").read_bytes())
    api = TensorRT("tensorrt")
    api.deserialize(plans[0])
    assert not api._runtime.engine_host_code_allowed
    with pytest.raises(EngineError, match="engine_host_code_allowed is false"):
        api.deserialize(plans[1])
    TensorRT("tensorrt", host_code=True).deserialize(plans[1])


def test_a_build_without_the_lean_runtime_says_what_to_install(rig, bundle):
    """The message of 8.6.0."""
    rig.faults.no_plan = (
        "6: [libLoader.cpp::Impl::293] Error Code 6: Internal Error (Unable to load library: libnvinfer_lean.so.8.6.0)"
    )
    with pytest.raises(EngineError, match="Install TensorRT's lean runtime 8.6.0, which a version-compatible engine holds"):
        build_engine(bundle, "fp32", settings=COMPATIBLE)
