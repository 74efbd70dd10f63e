"""Adds bundles to a Triton repository. ``config.pbtxt`` is written with the server's own protobuf schema."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sjepa_deploy.bundle import Bundle, Manifest
from sjepa_deploy.errors import EngineError, ExportError, MissingDependencyError, listed
from sjepa_deploy.files import folder_beside, write_atomically
from sjepa_deploy.runtime.backend import DEFAULT_BACKEND, BackendOptions
from sjepa_deploy.runtime.backends.engines import EngineRecord, EngineStore
from sjepa_deploy.serving.batching import LARGEST_WAIT, REQUEST_OVERHEAD, Batching, measure_compute, plan_batching
from sjepa_deploy.serving.contract import CONTRACT_KEY, Contract, step_names
from sjepa_deploy.serving.model import BUNDLE_FOLDER, WINDOWS, TritonPythonModel
from sjepa_deploy.spec import ModelSpec, Precision, Unit

Platform = Literal["python", "onnxruntime", "tensorrt"]

PLATFORMS: tuple[Platform, ...] = ("python", "onnxruntime", "tensorrt")
"""Runtimes of the graph inside the server: ours in Triton's Python backend, or one of Triton's own backends."""

DEFAULT_DEADLINE = 0.05

CONFIG_FILE = "config.pbtxt"
LABEL_FILE = "labels.txt"

_NATIVE = {"onnxruntime": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Says what was added to a repository.

    Attributes
    ----------
    repository : Path
        The repository.
    name, version : str
        Name and version that clients ask for.
    steps : tuple of str
        Further models that an ensemble consists of.
    batching : Batching
        Queueing and batching of the model.
    instances : int
        Number of instances that run at once on one server.
    """

    repository: Path
    name: str
    version: str
    steps: tuple[str, ...]
    batching: Batching
    instances: int


def to_triton(
    bundle: Bundle,
    repository: Path,
    *,
    name: str | None = None,
    platform: Platform = "python",
    backend: str = DEFAULT_BACKEND,
    precision: Precision | None = None,
    deadline: float = DEFAULT_DEADLINE,
    batched: bool = True,
    instances: int | None = None,
    gpu: bool = False,
    from_unit: Unit | None = None,
) -> ServedModel:
    """Add a bundle to a Triton repository, as a new model or as the next version of one.

    Parameters
    ----------
    bundle : Bundle
        What to serve.
    repository : Path
        Folder of the repository, made if it is not there.
    name : str or None
        Name of the model; None for sjepa-VARIANT.
    platform : {"python", "onnxruntime", "tensorrt"}
        What runs the graph. "python" is our runtime, for any server whose Python has sjepa-deploy; the others are Triton's own.
    backend : str
        Backend of ours that the Python model uses.
    precision : {"fp32", "fp16", "bf16"} or None
        Precision of the graph. None takes the bundle's first graph.
    deadline : float
        Seconds from the arrival of a request to its answer, from which batches, delays and limits of the queue follow.
    batched : bool
        Whether requests may share a run.
    instances : int or None
        Number of models that run at once. None for one on each core, or one on each GPU.
    gpu : bool
        Whether the instances belong to GPUs ("tensorrt" always does).
    from_unit : {"nV", "uV", "mV", "V"} or None
        Makes an ensemble. Its first step takes windows in this unit and any reference, brings the windows to the model's unit and
        reference, and checks the windows: Triton's own backends check neither NaN nor units.

    Raises
    ------
    ExportError
        If the repository cannot be written, or the model that is there has another contract; if `from_unit` is given, and a step
        before windows are cut leaves them in no unit.
    ServingError
        If the deadline cannot be kept.
    EngineError
        If platform is "tensorrt" and the bundle has no engine for it.
    MissingDependencyError
        If tritonclient is not installed.
    """
    schema = _schema()
    spec = bundle.spec
    precision = precision or bundle.precisions[0]
    name = name or f"sjepa-{spec.variant}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ExportError(f"{name!r} is no name for a model.", "Use letters, digits, dots, dashes and underscores.")
    if from_unit is not None and any(step.changes_unit for step in spec.signal.stream_steps):
        raise ExportError(
            f"After the steps {listed(step.name for step in spec.signal.stream_steps)} windows are in no unit.",
            "Leave out --from-unit.",
        )
    gpu = gpu or platform == "tensorrt"
    instances = instances or (1 if gpu else len(os.sched_getaffinity(0)))
    engine = _engine(bundle, precision) if platform == "tensorrt" else None
    static_batch = bundle.graph(precision).static_batch
    batched = batched and static_batch is None
    config = _Config(
        schema=schema,
        spec=spec,
        static_batch=static_batch,
        batched=batched,
        batching=_plan(bundle, platform, backend, precision, engine, deadline, instances, batched),
        instances=instances,
        gpu=gpu,
    )
    names, n_continuous = step_names(spec), len(spec.signal.stream_steps)
    n_client = n_continuous if platform == "python" and from_unit is None else len(names)
    contract = Contract(
        unit=spec.unit,
        precision=precision,
        backend=backend if platform == "python" else platform,
        n_threads=1,
        deadline=deadline,
        client_steps=names[:n_client],
        model_steps=names[n_client:],
        manifests={},
    )
    graph, windows = (name, "") if from_unit is None else (f"{name}-graph", f"{name}-windows")
    steps = (windows, graph) if windows else ()
    try:
        version = str(1 + max((int(v) for each in {name, *steps} for v in _versions(repository / each)), default=0))
        contract = dataclasses.replace(contract, manifests={version: bundle.manifest} | _manifests(repository / name, spec))
        with _new_version(repository / graph, version, config.graph(graph, platform, keep=2 if steps else 1), contract) as folder:
            if platform == "python":
                _write_python(folder, bundle, "PreparedModel" if steps else "TritonPythonModel")
            elif engine is not None:
                (folder / _NATIVE[platform][1]).write_bytes(EngineStore(bundle=bundle).plan(engine))
            else:
                shutil.copy(bundle.graph_path(precision), folder / _NATIVE[platform][1])
        if from_unit is not None:
            n_client = n_continuous - spec.signal.ends_with_average  # the reference of the windows does not matter
            contract = dataclasses.replace(contract, unit=from_unit, client_steps=names[:n_client], model_steps=names[n_client:])
            with _new_version(repository / windows, version, config.windows(windows, keep=2), contract) as folder:
                _write_python(folder, bundle, "WindowPreparation")
            with _new_version(repository / name, version, config.ensemble(name, steps, version), contract):
                pass  # an ensemble is its configuration
    except OSError as e:
        raise ExportError(f"{repository} cannot be written ({e.strerror or e}).", "Choose another folder.") from e
    return ServedModel(
        repository=repository, name=name, version=version, steps=steps, batching=config.batching, instances=instances
    )


def read_config(file: Path) -> Any:
    """Read a ``config.pbtxt`` with the server's schema, as a ``ModelConfig``.

    Raises
    ------
    ExportError
        If the file does not follow the schema.
    """
    text_format = importlib.import_module("google.protobuf.text_format")
    config = _schema().ModelConfig()
    try:
        text_format.Parse(file.read_text(), config)
    except (text_format.ParseError, UnicodeDecodeError) as e:
        raise ExportError(f"{file} does not follow Triton's schema ({e}).", "Delete the model, and export it again.") from e
    return config


def _schema() -> Any:
    try:
        return importlib.import_module("tritonclient.grpc.model_config_pb2")
    except ModuleNotFoundError as e:
        raise MissingDependencyError("tritonclient", "serve") from e


def _engine(bundle: Bundle, precision: Precision) -> EngineRecord:
    """Return the newest engine of the graph, whatever GPU it was built on: that is where the repository must be served."""
    onnx = bundle.manifest.files[bundle.graph(precision).file]
    for record in EngineStore(bundle=bundle).records():
        made_of = record.identity.onnx_sha256, record.identity.machine.flavour, record.computes_in
        if made_of == (onnx, "tensorrt", precision):
            return record
    raise EngineError(
        f"The bundle {bundle.path} has no {precision} engine.",
        f"Build one where it will be served, with the server's version of TensorRT: sjepa-build {bundle.path}",
    )


def _plan(
    bundle: Bundle,
    platform: Platform,
    backend: str,
    precision: Precision,
    engine: EngineRecord | None,
    deadline: float,
    instances: int,
    batched: bool,
) -> Batching:
    """Plan the batching from measurements on this machine. The time of an engine is not known here, and is not assumed."""
    if engine is not None:
        most = engine.identity.settings.max_batch
        wait = LARGEST_WAIT * deadline
        return Batching(
            max_batch=most if batched else 1,
            queue_delay=wait if batched else 0.0,
            queue_timeout=deadline - wait,
            max_queue_size=4 * most * instances,
        )
    runs, overhead = (backend, REQUEST_OVERHEAD) if platform == "python" else (DEFAULT_BACKEND, 0.0)
    compute = measure_compute(bundle, runs, precision, BackendOptions(n_threads=1), overhead=overhead)
    most = bundle.graph(precision).max_batch
    return plan_batching(compute, most, deadline=deadline, instances=instances, batched=batched)


# ---- the configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Config:
    """Makes the ``ModelConfig`` of each model from the settings that all models share."""

    schema: Any
    spec: ModelSpec
    static_batch: int | None
    batched: bool
    batching: Batching
    instances: int
    gpu: bool

    def graph(self, name: str, platform: Platform, *, keep: int) -> Any:
        spec = self.spec
        config = self._model(name, keep=keep, labelled=True, output=spec.output_name, shape=spec.output_shape)
        if platform == "python":
            config.backend = "python"
        else:
            config.backend = platform
            config.platform, config.default_model_filename = _NATIVE[platform]
        if platform == "onnxruntime":
            config.parameters["intra_op_thread_count"].string_value = "1"
        return config

    def windows(self, name: str, *, keep: int) -> Any:
        config = self._model(name, keep=keep, labelled=False, output=WINDOWS, shape=self.spec.input_shape)
        config.backend = "python"
        return config

    def ensemble(self, name: str, steps: tuple[str, ...], version: str) -> Any:
        spec = self.spec
        config = self._tensors(name, keep=1, labelled=True, output=spec.output_name, shape=spec.output_shape)
        config.platform = "ensemble"
        tensors = (spec.input_name, WINDOWS, spec.output_name)
        for each, taken, given in zip(steps, tensors[:-1], tensors[1:], strict=True):
            # The version is named: answers of an ensemble must not come from the steps of another one.
            step = config.ensemble_scheduling.step.add(model_name=each, model_version=int(version))
            step.input_map[spec.input_name] = taken
            step.output_map[given] = given
        return config

    def _tensors(self, name: str, *, keep: int, labelled: bool, output: str, shape: tuple[int, ...]) -> Any:
        spec, schema = self.spec, self.schema
        batch = () if self.static_batch is None else (self.static_batch,)  # a static batch is part of the shape
        config = schema.ModelConfig(name=name, max_batch_size=0 if batch else self.batching.max_batch)
        config.version_policy.latest.num_versions = keep
        config.input.add(name=spec.input_name, data_type=schema.TYPE_FP32, dims=(*batch, *spec.input_shape))
        out = config.output.add(name=output, data_type=schema.TYPE_FP32, dims=(*batch, *shape))
        if labelled and spec.class_names is not None:
            out.label_filename = LABEL_FILE
        return config

    def _model(self, name: str, *, keep: int, labelled: bool, output: str, shape: tuple[int, ...]) -> Any:
        schema, batching = self.schema, self.batching
        config = self._tensors(name, keep=keep, labelled=labelled, output=output, shape=shape)
        kind = schema.ModelInstanceGroup.KIND_GPU if self.gpu else schema.ModelInstanceGroup.KIND_CPU
        config.instance_group.add(kind=kind, count=self.instances)
        # A queue with limits is the dynamic batcher's, so that a model without batches has one too.
        queue = config.dynamic_batching
        queue.max_queue_delay_microseconds = _microseconds(batching.queue_delay)
        policy = queue.default_queue_policy
        policy.timeout_action = schema.ModelQueuePolicy.REJECT
        policy.default_timeout_microseconds = _microseconds(batching.queue_timeout)
        policy.allow_timeout_override = True
        policy.max_queue_size = batching.max_queue_size
        for size in sorted({1, config.max_batch_size or 1}):
            warmup = config.model_warmup.add(name=f"batch of {size}", batch_size=size, count=3)
            tensor = warmup.inputs[config.input[0].name]
            tensor.data_type, tensor.zero_data = schema.TYPE_FP32, True
            tensor.dims.extend(config.input[0].dims)
        return config


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


# ---- the files ------------------------------------------------------------------------------------------------------------


def _versions(model: Path) -> list[str]:
    """Return the versions of a model in a repository."""
    return [entry.name for entry in model.iterdir() if entry.name.isdecimal()] if model.is_dir() else []


def check_served(spec: ModelSpec, repository: Path, name: str | None = None) -> None:
    """Check, before a bundle is made, that a model of `spec` may be added to a repository as `to_triton` does.

    Raises
    ------
    ExportError
        If the model that is there has another contract, or the repository cannot be read.
    MissingDependencyError
        If tritonclient is not installed.
    """
    _schema()
    try:
        _manifests(repository / (name or f"sjepa-{spec.variant}"), spec)
    except OSError as e:
        raise ExportError(f"{repository} cannot be read ({e.strerror or e}).", "Choose another folder.") from e


def _manifests(model: Path, spec: ModelSpec) -> dict[str, Manifest]:
    """Return the manifest behind each version that is there.

    Raises
    ------
    ExportError
        If the model that is there has another contract: a client could not tell whom it asks.
    """
    manifests: dict[str, Manifest] = {}
    if not (model / CONFIG_FILE).is_file():
        return manifests
    there = Contract.loads(read_config(model / CONFIG_FILE).parameters[CONTRACT_KEY].string_value, model.name)
    for known in _versions(model):
        manifest = there.manifests.get(known)
        if manifest is None:
            continue
        if manifest.spec != spec:
            raise ExportError(
                f"{model} serves a model with another montage or other outputs than the new one.",
                "Choose another name: clients of the one must not get answers of the other.",
            )
        manifests[known] = manifest
    return manifests


@contextlib.contextmanager
def _new_version(model: Path, version: str, config: Any, contract: Contract) -> Iterator[Path]:
    """Give a folder to fill, and move it to its place before the configuration names it."""
    config.parameters[CONTRACT_KEY].string_value = contract.dumps()
    text_format = importlib.import_module("google.protobuf.text_format")
    model.mkdir(parents=True, exist_ok=True)
    with folder_beside(model / version) as folder:
        yield folder
        folder.chmod(0o755)
        folder.rename(model / version)
        class_names = contract.manifests[version].spec.class_names
        if class_names is not None:
            (model / LABEL_FILE).write_text("".join(f"{name}\n" for name in class_names))
        write_atomically(model / CONFIG_FILE, text_format.MessageToString(config).encode())


def _write_python(folder: Path, bundle: Bundle, model: str) -> None:
    """Write a version of Triton's Python backend: the bundle, and the line that finds what runs it."""
    name = "TritonPythonModel"
    alias = name if model == name else f"{model} as {name}"
    (folder / "model.py").write_text(
        f'"""Decodes with the bundle beside this file. Written by sjepa-export."""\n\n'
        f"from {TritonPythonModel.__module__} import {alias}  # noqa: F401\n"
    )
    shutil.copytree(bundle.path, folder / BUNDLE_FOLDER)
