"""Keeps TensorRT engines in a bundle's folder, each with a record of what it was built from.

An engine is a cache entry: it fits one graph, one version of TensorRT and one kind of GPU. It lies in the bundle as
``engines/KEY.plan`` and ``engines/KEY.json``, where KEY is the hash of its `EngineIdentity`. The files that the manifest lists
never change. The record is written last, so that an engine without a record does not exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sjepa_deploy.bundle import ENGINE_FOLDER, Bundle
from sjepa_deploy.errors import EngineError
from sjepa_deploy.files import (
    bytes_hash,
    cache_folder,
    canonical_json,
    file_lock,
    json_file,
    load_json,
    on_disk,
    write_atomically,
    written_beside,
)
from sjepa_deploy.parity import ParityResult
from sjepa_deploy.serialize import DecodeError, decode
from sjepa_deploy.spec import RunPrecision

ANY = "any"
"""GPU and driver of an engine that was built for every machine of one compute capability."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Describes the machine that an engine is built for and runs on.

    Attributes
    ----------
    flavour : str
        "tensorrt" or "tensorrt-rtx".
    version : str
        Version of this TensorRT.
    gpu, compute_capability, driver : str
        Name of the GPU, its compute capability, e.g. "9.0", and the version of its driver. An engine for other machines has
        `ANY` GPU and driver.
    """

    flavour: str
    version: str
    gpu: str
    compute_capability: str
    driver: str


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Holds the options of a build.

    Attributes
    ----------
    min_batch, opt_batch, max_batch : int
        The profile: smallest and largest batch, and the batch that kernels are chosen for.
    optimization_level : int
        Search effort of the builder, 0 to 5.
    workspace_mib : int or None
        Scratch memory that kernels may use, in MiB. None for all memory of the GPU.
    refittable, version_compatible : bool
        Whether weights can be replaced, and whether later versions of TensorRT may load the engine (`promised`). Such an engine
        holds the lean runtime of its own version, with which later versions run the engine.
    held_types : {"all", "float32", "none"}
        Layers of an fp16 graph that are asked to compute in the graph's type: all, the float32 layers, or none. Only TensorRT 8.6
        needs this option, as its builder chooses types.
    """

    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 64
    optimization_level: int = 3
    workspace_mib: int | None = None
    refittable: bool = False
    version_compatible: bool = False
    held_types: Literal["all", "float32", "none"] = "all"

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise EngineError(
                f"The profile {self.min_batch}, {self.opt_batch}, {self.max_batch} is none.",
                "Use 1 <= smallest <= optimal <= largest batch.",
            )
        if not 0 <= self.optimization_level <= 5:
            raise EngineError(f"The optimization level is {self.optimization_level}.", "Use 0 to 5.")


@dataclass(frozen=True, kw_only=True)
class EngineIdentity:
    """Names everything that an engine depends on.

    Attributes
    ----------
    onnx_sha256 : str
        Hash of the graph's bytes, weights included.
    precision : {"fp32", "tf32", "fp16", "bf16"}
        Requested precision.
    settings : BuildSettings
        Profile and options of the build.
    flags : tuple of str
        Flags of the builder and of the network, as TensorRT names them.
    machine : Machine
        Machine of the build.
    """

    onnx_sha256: str
    precision: RunPrecision
    settings: BuildSettings
    flags: tuple[str, ...]
    machine: Machine

    @property
    def key(self) -> str:
        """Name of the engine's files."""
        return bytes_hash(canonical_json(self).encode())[:32]


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """Counts the layers and types that the engine inspector shows.

    Attributes
    ----------
    n_layers : int
        Layers of the engine, each one or more kernels.
    types : dict of str to int
        How many layers read, write or compute in each type: "fp32", "tf32", "fp16", "bf16", "other".
    n_opaque : int
        Layers that hold whole regions of the graph, whose inner types the inspector may not tell.
    """

    n_layers: int
    types: dict[str, int]
    n_opaque: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Describes one engine of a bundle.

    Attributes
    ----------
    identity : EngineIdentity
        Everything that the engine depends on.
    computes_in : {"fp32", "tf32", "fp16", "bf16"}
        Precision that the engine was found to have. An engine asked for in fp16 without a half-typed layer is an fp32 engine.
    evidence : str
        Reason to believe `computes_in`.
    layers : LayerSummary or None
        From the engine inspector. None for an engine that was built for other machines.
    parity : tuple of ParityResult
        Parity before and after the plan was read back from the disk. Empty for an engine that was built for other machines.
    plan_sha256, plan_bytes
        Hash and size of the plan.
    build_seconds : float
        How long the build took.
    created : str
        Time of the build, ISO 8601, UTC.
    """

    identity: EngineIdentity
    computes_in: RunPrecision
    evidence: str
    layers: LayerSummary | None
    parity: tuple[ParityResult, ...]
    plan_sha256: str
    plan_bytes: int
    build_seconds: float
    created: str

    @property
    def for_others(self) -> bool:
        """Whether the engine was built for other machines, and must be proven there (`sjepa_deploy.runtime.backends.proofs`)."""
        return self.identity.machine.gpu == ANY


LAST_MAJOR = {8: 10, 10: 11}
"""Last major version of TensorRT that runs version-compatible engines of a major version (NVIDIA, "Version
Compatibility" of 10.16 and 11.1). Where none is named, it is the same major version."""


def numbers_of(version: str) -> tuple[int, ...]:
    """Return the numbers of a version of TensorRT, which compare as versions do."""
    return tuple(map(int, re.findall(r"\d+", version)))


def promised(built: str, here: str) -> bool:
    """Return whether TensorRT `here` runs version-compatible engines that TensorRT `built` built, by NVIDIA's promise.

    Engines of 8.6 and later run on the same and on later versions, up to `LAST_MAJOR`.
    """
    theirs, ours = numbers_of(built), numbers_of(here)
    return (8, 6) <= theirs <= ours and ours[0] <= LAST_MAJOR.get(theirs[0], theirs[0])


def differences(theirs: EngineIdentity, ours: EngineIdentity) -> tuple[str, ...]:
    """Return one clause for every field in which two identities differ. `ANY` differs from nothing."""
    found = []
    for there, here in ((theirs, ours), (theirs.machine, ours.machine), (theirs.settings, ours.settings)):
        for field in dataclasses.fields(there):
            a, b = getattr(there, field.name), getattr(here, field.name)
            if a not in (b, ANY) and not dataclasses.is_dataclass(a):
                a, b = (x[:12] if field.name == "onnx_sha256" else x for x in (a, b))
                found.append(f"{field.name} is {a!r} in the engine and {b!r} here")
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class EngineStore:
    """Keeps the engines of one bundle.

    Attributes
    ----------
    bundle : Bundle
        The bundle. Its files were verified at opening, which matters because deserialising an engine runs native code.
    """

    bundle: Bundle

    @property
    def folder(self) -> Path:
        """Folder of the engines."""
        return self.bundle.path / ENGINE_FOLDER

    def identity(
        self, precision: RunPrecision, machine: Machine, settings: BuildSettings, flags: tuple[str, ...]
    ) -> EngineIdentity:
        """Return the identity that an engine of this bundle's graph would have."""
        sha256 = self.bundle.manifest.files[self.bundle.graph(precision).file]
        return EngineIdentity(onnx_sha256=sha256, precision=precision, settings=settings, flags=flags, machine=machine)

    def records(self) -> tuple[EngineRecord, ...]:
        """Return the record of every engine, the newest first.

        Raises
        ------
        EngineError
            If a record cannot be read.
        """
        files = sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []
        return tuple(sorted((self._read(file) for file in files), key=lambda r: r.created, reverse=True))

    def find(self, identity: EngineIdentity) -> EngineRecord | None:
        """Return the record of the engine that is exactly `identity`."""
        file = self._file(identity, "json")
        return self._read(file) if file.is_file() else None

    def fitting(self, precision: RunPrecision, machine: Machine) -> tuple[EngineRecord, ...]:
        """Return the engines for `precision` that were built from this bundle's graph on a machine equal to `machine`.

        The newest comes first. If there are none, return those that may run here, which parity must judge on `machine` first:
        engines that were built for other machines, or version-compatible engines of one version of TensorRT that `machine` is
        promised to run, whatever the driver.

        Raises
        ------
        EngineError
            If there is no such engine. The message names the differences, and the command that builds an engine.
        """
        mend = f"Build one here with: sjepa-build {self.bundle.path} --precision {precision}{_flavour_flag(machine)}"
        records = [r for r in self.records() if r.identity.precision == precision]
        records = [r for r in records if r.identity.machine.flavour == machine.flavour]
        if not records:
            raise EngineError(f"The bundle {self.bundle.path} has no {precision} engine for {machine.flavour}.", mend)
        nearest: tuple[str, ...] | None = None
        found: list[EngineRecord] = []
        for record in sorted(records, key=lambda r: r.identity.machine != machine):
            there = record.identity
            here = machine
            if there.settings.version_compatible and promised(there.machine.version, machine.version):
                here = dataclasses.replace(machine, version=there.machine.version, driver=there.machine.driver)
            wanted = self.identity(precision, here, there.settings, there.flags)
            differs = differences(there, wanted)
            if differs:
                nearest = differs if nearest is None or len(differs) < len(nearest) else nearest
                continue
            found.append(record)
        if found:
            builder = found[0].identity.machine
            right = [r for r in found if r.computes_in == precision and r.identity.machine == builder]
            if found[0] not in right:
                raise EngineError(
                    f"The engine that was asked for in {precision} computes in {found[0].computes_in} ({found[0].evidence}).",
                    f"Use --precision {found[0].computes_in}, or another version of TensorRT.",
                )
            return tuple(right)
        assert nearest is not None
        raise EngineError(f"The {precision} engine of {self.bundle.path} is stale: {'; '.join(nearest)}.", mend)

    def plan(self, record: EngineRecord) -> bytes:
        """Read an engine's plan and verify its hash.

        Raises
        ------
        EngineError
            If the plan is missing or was changed.
        """
        return self._verified(self._file(record.identity, "plan"), record)

    def _verified(self, file: Path, record: EngineRecord) -> bytes:
        mend = f"Build it again with: sjepa-build {self.bundle.path} --precision {record.identity.precision} --rebuild"
        try:
            plan = file.read_bytes()
        except OSError as e:
            raise EngineError(f"The plan {file} cannot be read ({e.strerror}).", mend) from e
        if bytes_hash(plan) != record.plan_sha256:
            raise EngineError(f"The plan {file} was changed after it was built (its hash differs).", mend)
        return plan

    def add(self, record: EngineRecord, plan: bytes, judge: Callable[[bytes], EngineRecord]) -> EngineRecord:
        """Write the plan, let `judge` read the plan back and complete the record, then write the record.

        If `judge` raises or a file cannot be written, no new file stays, and an earlier engine stays as it was.

        Raises
        ------
        EngineError
            If the folder cannot be written.
        """
        file, candidate = self._file(record.identity, "plan"), self._file(record.identity, "candidate")
        try:
            write_atomically(candidate, plan)
            try:
                final = judge(self._verified(candidate, record))
                assert final.identity == record.identity
                described = self._file(record.identity, "json")
                with written_beside(described) as waiting:  # once both are on the disk, they take their places
                    waiting.write_bytes(json_file(final))
                    on_disk(waiting)
                    candidate.replace(file)
                    waiting.replace(described)
            finally:
                candidate.unlink(missing_ok=True)
        except OSError as e:
            raise EngineError(f"{file} cannot be written ({e.strerror}).", "Give the bundle's folder room and rights.") from e
        return final

    @contextlib.contextmanager
    def lock(self, identity: EngineIdentity, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the only right to build `identity`. Call `waiting` once if another process holds this right.

        Raises
        ------
        EngineError
            If the folder cannot be written.
        """
        file = self._file(identity, "lock")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(file_lock(file, waiting=waiting))
            except OSError as e:
                raise EngineError(f"{file} cannot be written ({e.strerror}).", "Give the folder room and rights.") from e
            yield

    def _file(self, identity: EngineIdentity, suffix: str) -> Path:
        return self.folder / f"{identity.key}.{suffix}"

    def _read(self, file: Path) -> EngineRecord:
        try:
            record = decode(EngineRecord, load_json(file.read_bytes(), finite=False))
        except (OSError, ValueError) as e:
            reason = str(e) if isinstance(e, DecodeError) else f"it is not readable as JSON ({e})"
            raise EngineError(
                f"The engine record {file} is damaged: {reason}.", "Delete it, and build again with sjepa-build."
            ) from e
        if record.identity.key != file.stem:
            raise EngineError(
                f"The engine record {file} describes another engine, {record.identity.key}.",
                "Delete it, and build again with sjepa-build.",
            )
        return record


def timing_cache_file(machine: Machine) -> Path:
    """Return the file that keeps timings of kernels on `machine` between builds."""
    name = "-".join((machine.flavour, machine.version, machine.gpu, machine.compute_capability))
    return cache_folder("timing") / ("".join(c if c.isalnum() or c in ".-" else "_" for c in name) + ".cache")


def read_timing_cache(machine: Machine) -> bytes:
    """Return the timings kept for `machine`, empty if there are none."""
    file = timing_cache_file(machine)
    return file.read_bytes() if file.is_file() else b""


def write_timing_cache(machine: Machine, content: bytes) -> None:
    """Keep timings for `machine`. The last of two builds wins; both caches are whole."""
    file = timing_cache_file(machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)


def _flavour_flag(machine: Machine) -> str:
    return "" if machine.flavour == "tensorrt" else f" --flavour {machine.flavour}"
