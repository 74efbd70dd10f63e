"""Engines that are built for other machines: TensorRT-RTX builds them here for real, fake machines judge and load them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from engine_bundles import small_bundle
from fake_machine import Rig, eeg, outputs

import sjepa_deploy
from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.build import build
from sjepa_deploy.cli.doctor import doctor
from sjepa_deploy.cli.verify import verify
from sjepa_deploy.errors import BackendError, EngineError, InputError
from sjepa_deploy.export.to_tensorrt import build_engine
from sjepa_deploy.files import bytes_hash
from sjepa_deploy.runtime.backends.engine_judge import EngineParityError
from sjepa_deploy.runtime.backends.engines import BuildSettings, EngineStore
from sjepa_deploy.runtime.backends.proofs import engine_states
from sjepa_deploy.runtime.gpu import cuda

HERE = {"version": "1.7.1", "rtx": True, "name": "NVIDIA Fake 4090", "capability": (8, 9)}


@pytest.fixture
def rig(monkeypatch):
    return Rig(monkeypatch)


@pytest.fixture
def bundle(tmp_path):
    shutil.copytree(small_bundle("prelocal").path, tmp_path / "b")
    return Bundle.open(tmp_path / "b")


def build_elsewhere(rig, bundle, target="8.9", precision="fp32", **options):
    """Build on a machine that has TensorRT-RTX and no driver."""

    def no_driver():
        raise BackendError("There is no NVIDIA driver here.", "Use a CPU backend.")

    rig.set("1.7.1", rtx=True)
    rig.monkeypatch.setattr(cuda, "driver", no_driver)
    return build_engine(bundle, precision, flavour="tensorrt-rtx", target=target, **options)


def decode(bundle, precision="fp32"):
    with sjepa_deploy.load(bundle, backend="tensorrt-rtx", precision=precision, check_unit=False) as predict:
        return predict(eeg(bundle, 3))


def told(capsys):
    return " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("variant", ["prelocal", "contextual"])
def test_the_command_builds_for_other_machines_without_a_driver(tmp_path, capsys, variant):
    """With the TensorRT-RTX that is installed here."""
    shutil.copytree(small_bundle(variant).path, tmp_path / "b")
    manifest = (tmp_path / "b/manifest.json").read_bytes()
    asked = ["--flavour", "tensorrt-rtx", "--for", "8.6,8.9", "--for", "12.0", "--precision", "fp32,fp16", "--json"]
    assert run_command(build, "sjepa-build", [str(tmp_path / "b"), *asked, "--optimization-level", "0"]) == 0
    engines = [e["engine"] for e in json.loads(capsys.readouterr().out)]
    identities = [engine["identity"] for engine in engines]
    built_for = [(i["precision"], i["machine"]["compute_capability"], i["machine"]["gpu"]) for i in identities]
    assert built_for == [(p, c, "any") for p in ("fp32", "fp16") for c in ("8.6", "8.9", "12.0")]
    assert not any(engine["parity"] or engine["layers"] for engine in engines)
    plans = [file.read_bytes() for file in (tmp_path / "b/engines").glob("*.plan")]
    assert len(set(plans)) == 6, "each capability has kernels of its own"
    assert (tmp_path / "b/manifest.json").read_bytes() == manifest
    assert (
        run_command(verify, "sjepa-verify", [str(tmp_path / "b"), "--backend", "ort-cpu", "--precision", "fp32", "--json"]) == 0
    )
    assert len(json.loads(capsys.readouterr().out)["unproven"]) == 6
    assert run_command(doctor, "sjepa-doctor", [str(tmp_path / "b")]) == 0
    assert told(capsys).count("unproven") == 6


def test_capabilities_that_no_engine_is_made_for_are_refused(tmp_path, bundle, capsys):
    for asked, words in (
        (["--flavour", "tensorrt-rtx", "--for", "8.6,9.0"], "nothing for compute capability 9.0. Use 7.5, 8.0, 8.6"),
        (["--flavour", "tensorrt-rtx", "--for", "rtx4090"], "nothing for compute capability rtx4090"),
        (["--flavour", "tensorrt-rtx", "--for", "CURRENT"], "nothing for compute capability CURRENT"),
        (["--for", "8.6"], "builds for the GPU of its own machine. Build there, or use --flavour tensorrt-rtx"),
        (["--flavour", "tensorrt-rtx"], "or build for other machines with --for"),
        (
            ["--flavour", "tensorrt-rtx", "--for", "7.5", "--precision", "fp32"],
            "for compute capability 7.5: .*Leave 7.5 out of --for",
        ),
    ):
        assert run_command(build, "sjepa-build", [str(bundle.path), *asked]) == 2
        assert re.search(words, told(capsys))
    assert not list((bundle.path / "engines").glob("*.[pj]*")), "8.6 was not built before 9.0 was refused"


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_the_first_load_judges_before_the_engine_decodes_and_later_loads_do_not(rig, bundle, caplog, precision):
    record = build_elsewhere(rig, bundle, precision=precision)
    assert [state.unproven for state in engine_states(bundle)] == [True]
    rig.set(**HERE)
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
    assert not state.unproven
    assert state.record == record, "the record of the build does not change"
    assert (proof.machine.gpu, proof.computes_in, proof.parity.passed) == ("NVIDIA Fake 4090", precision, True)
    assert not rig.driver.allocations
    assert rig.driver.n_retained == 0


@pytest.mark.parametrize("change", [{"name": "NVIDIA Fake 4080"}, {"driver_version": "581.2"}])
def test_another_gpu_and_another_driver_judge_again(rig, bundle, change):
    """Kernels are compiled at loading, for the GPU and by the driver: a proof is of one machine."""
    build_elsewhere(rig, bundle)
    rig.set(**HERE)
    decode(bundle)
    rig.set(**HERE | change)
    rig.faults.spoil = lambda out: out * np.float32(1.01)
    with pytest.raises(EngineParityError):
        decode(bundle)
    rig.faults.spoil = lambda out: out
    decode(bundle)
    assert len(engine_states(bundle)[0].proofs) == 2


def test_an_engine_that_fails_its_judgement_stays_marked_and_says_so(rig, bundle, capsys):
    build_elsewhere(rig, bundle)
    rig.set(**HERE)
    rig.faults.spoil = lambda out: out * np.float32(1.01)
    for _ in range(2):
        with pytest.raises(EngineParityError, match=r"off by .* first load on this machine. The engine stays unproven") as e:
            decode(bundle)
        assert f"sjepa-build {bundle.path} --precision fp32 --flavour tensorrt-rtx" in str(e.value)
        assert engine_states(bundle)[0].unproven
    assert run_command(verify, "sjepa-verify", [str(bundle.path), "--backend", "tensorrt-rtx"]) == 1
    assert "stays unproven" in told(capsys)
    assert not rig.driver.allocations
    assert rig.driver.n_retained == 0
    rig.faults.spoil = lambda out: out
    decode(bundle)
    assert not engine_states(bundle)[0].unproven


def test_types_that_are_not_those_asked_for_prove_nothing(rig, bundle):
    build_elsewhere(rig, bundle)
    build_elsewhere(rig, bundle, precision="fp16")
    rig.set(**HERE)
    rig.faults.layer_type = "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n"
    with pytest.raises(EngineError, match=r"could not be proven .*fp32 engine use TensorFloat-32.* stays unproven"):
        decode(bundle)
    rig.faults.layer_type = "Float"
    with pytest.raises(EngineError, match=r"could not be proven .* computes in fp32 .* stays unproven"):
        decode(bundle, "fp16")
    assert all(state.unproven for state in engine_states(bundle))


def test_a_machine_of_another_capability_is_told_the_difference(rig, bundle):
    build_elsewhere(rig, bundle, target="8.6")
    rig.set(**HERE)
    with pytest.raises(EngineError, match="compute_capability is '8.6' in the engine and '8.9' here") as e:
        decode(bundle)
    assert "'any'" not in str(e.value), "GPU and driver are not what keeps it from running"
    rig.set(**HERE | {"version": "1.8.0"})
    build_elsewhere(rig, bundle)
    rig.set(**HERE | {"version": "1.8.0"})
    with pytest.raises(EngineError, match="version is '1.7.1' in the engine and '1.8.0' here"):
        decode(bundle)


def test_a_plan_of_another_capability_under_a_false_name_is_refused_by_its_judge(rig, bundle):
    """As after a copy by hand that put the wrong plan beside a record: its hash was mended too."""
    other = build_elsewhere(rig, bundle, target="12.0")
    ours = build_elsewhere(rig, bundle)
    store = EngineStore(bundle=bundle)
    plan = store.plan(other)
    false = dataclasses.replace(ours, plan_sha256=bytes_hash(plan))
    store.add(false, plan, lambda reloaded: false)
    rig.set(**HERE)
    with pytest.raises(EngineError, match=r"could not be proven .* refuses the plan: .*SM120.* stays unproven"):
        decode(bundle)


def test_an_engine_that_is_built_again_is_unproven_again(rig, bundle):
    build_elsewhere(rig, bundle)
    rig.set(**HERE)
    decode(bundle)
    store = EngineStore(bundle=bundle)
    (record,) = store.records()
    plan = store.plan(record) + b" "
    again = dataclasses.replace(record, plan_sha256=bytes_hash(plan))
    store.add(again, plan, lambda reloaded: again)
    assert [state.unproven for state in engine_states(bundle)] == [True]


def test_an_engine_of_this_machine_comes_before_one_for_others(rig, bundle):
    rig.set(**HERE)
    here = build_engine(bundle, "fp32", flavour="tensorrt-rtx", settings=BuildSettings(max_batch=2))
    assert here.parity
    build_elsewhere(rig, bundle)
    rig.set(**HERE)
    with pytest.raises(InputError, match="profile is 1 to 2"):
        decode(bundle)
    assert [state.unproven for state in engine_states(bundle)].count(True) == 1, "it was not asked"


def flip(text):
    return text.replace('"computes_in": "fp32"', '"computes_in": "tf32"')


@pytest.mark.parametrize(
    "damage",
    [flip, lambda text: text[: len(text) // 2], lambda text: "", lambda text: text.replace("4090", "4091"), lambda text: "[]"],
    ids=("changed", "cut", "empty", "of another machine", "not a record"),
)
def test_a_damaged_proof_proves_nothing_and_the_engine_is_judged_again(rig, bundle, caplog, damage):
    build_elsewhere(rig, bundle)
    rig.set(**HERE)
    decode(bundle)
    (file,) = (bundle.path / "engines/proofs").glob("*.json")
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    assert [state.unproven for state in engine_states(bundle)] == [True]
    assert str(file) in caplog.text
    rig.faults.spoil = lambda out: out * np.float32(1.01)
    with pytest.raises(EngineParityError):
        decode(bundle)
    rig.faults.spoil = lambda out: out
    decode(bundle)
    assert [state.unproven for state in engine_states(bundle)] == [False]


def test_a_proof_of_another_engine_under_this_name_proves_nothing(rig, bundle):
    """Its digest holds, so that only the engine that it names tells."""
    small = build_elsewhere(rig, bundle, settings=BuildSettings(max_batch=2))
    rig.set(**HERE)
    with sjepa_deploy.load(bundle, backend="tensorrt-rtx") as predict:
        predict(eeg(bundle, 1))
    (proof,) = (bundle.path / "engines/proofs").glob("*.json")
    large = build_elsewhere(rig, bundle)
    proof.rename(proof.with_name(proof.name.replace(small.identity.key, large.identity.key)))
    assert all(state.unproven for state in engine_states(bundle))


def test_a_damaged_record_of_an_unproven_engine_is_refused(rig, bundle, capsys):
    record = build_elsewhere(rig, bundle)
    file = bundle.path / "engines" / f"{record.identity.key}.json"
    data = json.loads(file.read_text())
    identity = data["identity"]
    false = identity | {"machine": identity["machine"] | {"gpu": "NVIDIA Fake 4090"}}
    rig.set(**HERE)
    for change, words in (
        ({"plan_sha256": "0" * 64}, "was changed after it was built"),
        ({"identity": false}, "another engine"),
    ):
        file.write_text(json.dumps(data | change))
        with pytest.raises(EngineError, match=words):
            decode(bundle)
    assert run_command(doctor, "sjepa-doctor", [str(bundle.path)]) == 2
    assert "describes another engine" in told(capsys)
    file.write_text("{")
    assert run_command(verify, "sjepa-verify", [str(bundle.path), "--backend", "ort-cpu", "--precision", "fp32"]) == 2
    assert "is damaged" in told(capsys)


def test_a_folder_that_cannot_be_written_keeps_no_proof(rig, bundle, caplog):
    build_elsewhere(rig, bundle)
    rig.set(**HERE)
    (bundle.path / "engines" / "proofs").write_text("a file, where the folder would be")  # root may write into any folder
    decode(bundle)
    assert "cannot be kept" in caplog.text


def test_a_full_disk_keeps_no_proof_and_the_engine_decodes(rig, bundle, caplog, monkeypatch):
    build_elsewhere(rig, bundle)
    rig.set(**HERE)

    def full(file, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sjepa_deploy.runtime.backends.proofs.write_atomically", full)
        decode(bundle)
    assert "cannot be kept (No space left on device)" in caplog.text
    assert engine_states(bundle)[0].unproven


def test_doctor_and_verify_tell_what_is_proven_where(rig, bundle, capsys):
    build_elsewhere(rig, bundle)
    rig.set(**HERE)
    assert run_command(doctor, "sjepa-doctor", [str(bundle.path), "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"][str(bundle.path)]
    assert engine["unproven"] is True
    arguments = [str(bundle.path), "--backend", "tensorrt-rtx", "--precision", "fp32", "--json"]
    assert run_command(verify, "sjepa-verify", arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["passed"], answer["unproven"]) == (True, []), "the load of verify was the first, and proved it"
    assert run_command(doctor, "sjepa-doctor", [str(bundle.path)]) == 0
    assert "compute capability 8.9: proven on NVIDIA Fake 4090, driver 580.1" in told(capsys)
