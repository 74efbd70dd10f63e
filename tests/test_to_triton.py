"""Repositories and plans of batching, without a server: the schema is the judge."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
from bundles import copy_bundle, listing
from google.protobuf import json_format, text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.export import export
from sjepa_deploy.cli.serve import serve
from sjepa_deploy.eeg.steps import BandPass, Channels, ExponentialStandardise, Reference, Resample, ZScore
from sjepa_deploy.errors import EngineError, ExportError, ServingError
from sjepa_deploy.export.to_triton import PLATFORMS, to_triton
from sjepa_deploy.files import bytes_hash, now
from sjepa_deploy.runtime.backends.engines import BuildSettings, EngineRecord, EngineStore, LayerSummary, Machine
from sjepa_deploy.runtime.backends.ort import OrtCpuBackend
from sjepa_deploy.serving.batching import LARGEST_WAIT, plan_batching
from sjepa_deploy.serving.contract import CONTRACT_KEY, Contract, step_names
from sjepa_deploy.serving.model import TritonPythonModel

PATIENT = {"deadline": 10.0, "instances": 2}


def parsed(model) -> model_config_pb2.ModelConfig:
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.fixture
def with_engine(make_bundle, tmp_path):
    """Return a bundle with the record of an engine, whose plan nobody can run."""
    bundle = Bundle.open(copy_bundle(make_bundle("contextual"), tmp_path / "with-engine"))
    store, plan = EngineStore(bundle=bundle), b"a plan"
    machine = Machine(flavour="tensorrt", version="10.5.0", gpu="NVIDIA L4", compute_capability="8.9", driver="565.57")
    record = EngineRecord(
        identity=store.identity("fp32", machine, BuildSettings(max_batch=3), ()),
        computes_in="fp32",
        evidence="none",
        layers=LayerSummary(n_layers=1, types={}),
        parity=(),
        plan_sha256=bytes_hash(plan),
        plan_bytes=len(plan),
        build_seconds=1.0,
        created=now(),
    )
    with store.lock(record.identity):
        store.add(record, plan, lambda _: record)
    return bundle


@pytest.mark.parametrize("from_unit", [None, "V"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_configuration_follows_the_schema(platform, from_unit, with_engine, tmp_path):
    model = to_triton(with_engine, tmp_path / "r", name="m", platform=platform, from_unit=from_unit, **PATIENT)
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"m", *model.steps}
    graph = "m" if from_unit is None else "m-graph"
    config = parsed(tmp_path / "r" / graph)
    assert config.name == graph
    assert (config.input[0].name, config.input[0].data_type, list(config.input[0].dims)) == ("eeg", config_type("FP32"), [8, 200])
    assert (config.output[0].name, list(config.output[0].dims)) == ("prediction", [3])
    kind = {"python": "KIND_CPU", "onnxruntime": "KIND_CPU", "tensorrt": "KIND_GPU"}[platform]
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, kind)
    assert config.max_batch_size == model.batching.max_batch == (3 if platform == "tensorrt" else 4)
    policy = config.dynamic_batching.default_queue_policy
    assert policy.TimeoutAction.Name(policy.timeout_action) == "REJECT"
    assert 0 < policy.default_timeout_microseconds <= 10e6
    assert policy.max_queue_size == model.batching.max_queue_size > 0
    assert [w.batch_size for w in config.model_warmup] == [1, config.max_batch_size]
    files = {
        "python": ("python", "", "model.py"),
        "onnxruntime": ("onnxruntime", "onnxruntime_onnx", "model.onnx"),
        "tensorrt": ("tensorrt", "tensorrt_plan", "model.plan"),
    }
    backend, platform_name, file = files[platform]
    assert (config.backend, config.platform) == (backend, platform_name)
    assert config.default_model_filename in ("", file)
    content = (tmp_path / "r" / graph / "1" / file).read_bytes()
    if platform == "onnxruntime":
        assert content == with_engine.graph_path("fp32").read_bytes()
    elif platform == "tensorrt":
        assert content == b"a plan"
    else:
        assert Bundle.open(tmp_path / "r" / graph / "1" / "bundle").manifest == with_engine.manifest
    contract = Contract.loads(parsed(tmp_path / "r" / "m").parameters[CONTRACT_KEY].string_value, "m")
    assert contract.manifests == {"1": with_engine.manifest}
    assert contract.unit == (from_unit or "uV")


def config_type(name):
    return getattr(model_config_pb2, f"TYPE_{name}")


def test_an_ensemble_joins_its_steps_of_one_version(with_engine, tmp_path):
    for version in (1, 2):
        to_triton(with_engine, tmp_path, name="m", platform="onnxruntime", from_unit="mV", **PATIENT)
        ensemble, windows, graph = (parsed(tmp_path / name) for name in ("m", "m-windows", "m-graph"))
        tensors = {"eeg"}
        for step, config in zip(ensemble.ensemble_scheduling.step, (windows, graph), strict=True):
            assert (step.model_name, step.model_version) == (config.name, version)
            assert set(step.input_map) == {each.name for each in config.input}
            assert set(step.output_map) == {each.name for each in config.output}
            assert set(step.input_map.values()) <= tensors
            tensors |= set(step.output_map.values())
            assert config.version_policy.latest.num_versions == 2, "the ensemble before ends its work with the steps before"
        assert {each.name for each in ensemble.output} <= tensors
        assert ensemble.version_policy.latest.num_versions == 1
    assert Contract.loads(graph.parameters[CONTRACT_KEY].string_value, "m-graph").unit == "uV"


@pytest.mark.parametrize(
    ("platform", "from_unit", "n_client"), [("python", None, 4), ("python", "V", 3), ("onnxruntime", None, 5)]
)
def test_the_configuration_says_which_steps_run_where(make_bundle, tmp_path, platform, from_unit, n_client):
    steps = (BandPass(), Resample(), Channels(), Reference(), ZScore())
    bundle = make_bundle("prelocal", steps=steps)
    to_triton(bundle, tmp_path, name="m", platform=platform, from_unit=from_unit, **PATIENT)
    contract = Contract.loads(parsed(tmp_path / "m").parameters[CONTRACT_KEY].string_value, "m")
    names = ("band-pass", "resample", "channels", "reference", "z-score")
    assert (contract.client_steps, contract.model_steps) == (names[:n_client], names[n_client:])


def test_windows_that_are_in_no_unit_are_converted_from_none(make_bundle, tmp_path):
    bundle = make_bundle("prelocal", steps=(Resample(), Channels(), ExponentialStandardise()))
    with pytest.raises(ExportError, match=r"in no unit\. Leave out --from-unit"):
        to_triton(bundle, tmp_path, from_unit="V", **PATIENT)


def test_labels_go_along(make_bundle, tmp_path):
    to_triton(make_bundle("prelocal", class_names=("left", "right", "rest")), tmp_path, name="m", **PATIENT)
    assert parsed(tmp_path / "m").output[0].label_filename == "labels.txt"
    assert (tmp_path / "m" / "labels.txt").read_text().split() == ["left", "right", "rest"]


def test_a_static_batch_is_part_of_the_shape(make_bundle, tmp_path):
    to_triton(make_bundle("prelocal", max_batch=3, static_batch=3), tmp_path, name="m", **PATIENT)
    config = parsed(tmp_path / "m")
    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (0, [3, 8, 200], [3, 3])


def test_a_failed_export_leaves_the_repository_as_it_was(make_bundle, tmp_path, monkeypatch):
    to_triton(make_bundle("prelocal"), tmp_path / "r", name="m", **PATIENT)
    before = listing(tmp_path / "r")
    with pytest.raises(ExportError, match="another montage"):
        to_triton(make_bundle("postlocal"), tmp_path / "r", name="m", **PATIENT)
    assert listing(tmp_path / "r") == before
    monkeypatch.setattr("shutil.copytree", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ExportError, match="No space left on device"):
        to_triton(make_bundle("prelocal"), tmp_path / "r", name="m", **PATIENT)
    assert listing(tmp_path / "r") == before


def test_what_cannot_be_served_is_refused(make_bundle, tmp_path):
    bundle = make_bundle("prelocal")
    for name in ("", "../m", "a/b", ".m", "m n"):
        if name:
            with pytest.raises(ExportError, match="is no name for a model"):
                to_triton(bundle, tmp_path, name=name, **PATIENT)
    with pytest.raises(EngineError, match="has no fp32 engine"):
        to_triton(bundle, tmp_path, platform="tensorrt", **PATIENT)
    with pytest.raises(ServingError, match="too long for a deadline of 0.001 ms"):
        to_triton(bundle, tmp_path, deadline=1e-6)
    (tmp_path / "sjepa-prelocal").mkdir()
    (tmp_path / "sjepa-prelocal" / "config.pbtxt").write_text("name: 3")
    with pytest.raises(ExportError, match="does not follow Triton's schema"):
        to_triton(bundle, tmp_path, **PATIENT)


def test_export_writes_a_repository(capsys, tmp_path):
    command = (
        f"--variant prelocal --channels 4 --precision fp32 --triton-platform onnxruntime --out {tmp_path}/b --triton {tmp_path}/r"
    )
    assert run_command(export, "sjepa-export", command.split()) == 0
    assert parsed(tmp_path / "r" / "sjepa-prelocal").backend == "onnxruntime"
    assert f"sjepa-prelocal: version 1 for onnxruntime in {tmp_path}/r" in capsys.readouterr().out


def test_serve_writes_a_repository_without_a_server(capsys, make_bundle, tmp_path):
    bundle = str(make_bundle("prelocal").path)
    options = f"--repository {tmp_path}/r --no-start --json --deadline 10 --instances 3"
    assert run_command(serve, "sjepa-serve", [bundle, *options.split()]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["name"], model["version"], model["instances"]) == ("sjepa-prelocal", "1", 3)
    assert run_command(serve, "sjepa-serve", [bundle, "--no-start"]) == 2
    assert "--no-start needs --repository" in capsys.readouterr().err
    assert run_command(serve, "sjepa-serve", [bundle, bundle, "--name", "m"]) == 2
    assert "--name names one model" in capsys.readouterr().err


# ---------------------------------------------------------------- batching


@given(
    fixed=st.floats(0, 0.02),
    each=st.floats(1e-6, 0.02),
    graph_batch=st.integers(1, 256),
    deadline=st.floats(1e-3, 2.0),
    instances=st.integers(1, 16),
    batched=st.booleans(),
)
def test_what_the_queue_accepts_is_in_time(fixed, each, graph_batch, deadline, instances, batched):
    def compute(batch):
        return fixed + each * batch

    try:
        plan = plan_batching(compute, graph_batch, deadline=deadline, instances=instances, batched=batched)
    except ServingError:
        assert 2 * compute(1) > deadline * (1 - LARGEST_WAIT)
        return
    run = compute(plan.max_batch)
    assert 1 <= plan.max_batch <= (graph_batch if batched else 1)
    assert plan.queue_delay + 2 * run <= deadline * (1 + 1e-9), "a run is going on, and the next one takes it along"
    assert plan.queue_timeout + run <= deadline * (1 + 1e-9), "what leaves the queue at the last moment"
    runs_ahead = np.ceil(plan.max_queue_size / (instances * plan.max_batch))
    assert runs_ahead * run <= plan.queue_timeout * (1 + 1e-9), "what is last in a full queue leaves it before its time is up"
    if plan.max_batch < graph_batch and batched:
        assert 2 * compute(plan.max_batch + 1) > deadline * (1 - LARGEST_WAIT), "no larger batch would do"
    if not fixed:
        assert plan.queue_delay <= 1e-12, "where a batch saves nothing, nobody waits"


def test_contracts_that_were_changed_or_are_missing_are_refused(make_bundle):
    manifest = make_bundle("prelocal").manifest
    steps = {"client_steps": step_names(manifest.spec), "model_steps": ()}
    settings = {"unit": "uV", "precision": "fp32", "backend": "ort-cpu", "n_threads": 1, "deadline": 0.05}
    contract = Contract(**settings, **steps, manifests={"1": manifest})
    assert Contract.loads(contract.dumps(), "m") == contract
    forged = dataclasses.replace(contract, manifests={"1": dataclasses.replace(manifest, created="1999-01-01T00:00:00+00:00")})
    for text, says in (
        ("", "does not say what it expects"),
        ("{", "cannot be read"),
        ("{}", "lacks the key"),
        (forged.dumps(), "was changed"),
        (dataclasses.replace(contract, client_steps=("notch",)).dumps(), "divides the steps notch"),
        (dataclasses.replace(contract, client_steps=(), model_steps=steps["client_steps"][:-1]).dumps(), "divides the steps"),
    ):
        with pytest.raises(ServingError, match=says):
            Contract.loads(text, "m")


def test_a_model_prepares_every_batch_size_before_it_takes_requests(make_bundle, tmp_path, monkeypatch):
    """On a GPU a size is prepared at its first call, for which no request shall wait."""
    served = to_triton(make_bundle("prelocal"), tmp_path / "r", name="m", **PATIENT)
    prepared = []
    monkeypatch.setattr(OrtCpuBackend, "warmup", lambda backend, batches, n_runs: prepared.append((batches, n_runs)))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    config = json_format.MessageToJson(parsed(tmp_path / "r" / "m"), preserving_proto_field_name=True)
    model = TritonPythonModel()
    folder = str(tmp_path / "r" / "m")
    model.initialize(
        {
            "model_config": config,
            "model_name": "m",
            "model_repository": folder,
            "model_version": served.version,
            "model_instance_device_id": "0",
        }
    )
    model.finalize()
    assert served.batching.max_batch > 1
    assert prepared == [(tuple(range(1, served.batching.max_batch + 1)), 1)]
