"""Proves engines that were built elsewhere: parity judges such an engine at its first load on a machine.

Such an engine was built for other machines, or by an earlier version of TensorRT as version compatible.

A proof lies beside the engines as ``engines/proofs/KEY-MACHINE.json``. KEY is that of the engine, MACHINE a hash of TensorRT, GPU
and driver. A proof names the hash of the plan, so that an engine which is built again must be proven again. The files that the
manifest lists never change.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import EngineError
from sjepa_deploy.files import bytes_hash, canonical_json, json_file, load_json, now, seal, write_atomically
from sjepa_deploy.parity import ParityResult
from sjepa_deploy.runtime.backends.engine_judge import EngineJudge, EngineParityError, EngineTypes
from sjepa_deploy.runtime.backends.engines import EngineRecord, EngineStore, LayerSummary, Machine
from sjepa_deploy.serialize import decode, encode
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineProof:
    """Says that an engine which was built elsewhere gives the PyTorch model's outputs on one machine.

    Attributes
    ----------
    engine : str
        Key of the engine, `EngineIdentity.key`.
    plan_sha256 : str
        Hash of the plan that was judged.
    machine : Machine
        Machine that judged it.
    computes_in : {"fp32", "tf32", "fp16", "bf16"}
        Precision that the engine was found to have.
    evidence : str
        Reason to believe `computes_in`.
    layers : LayerSummary
        From the engine inspector, here or where the engine was built.
    parity : ParityResult
        Parity of the engine on `machine`.
    created : str
        Time of the judgement, ISO 8601, UTC.
    digest : str
        sha256 of this description without this field.
    """

    engine: str
    plan_sha256: str
    machine: Machine
    computes_in: RunPrecision
    evidence: str
    layers: LayerSummary
    parity: ParityResult
    created: str
    digest: str = ""

    def sealed(self) -> EngineProof:
        """Return a copy with the digest filled in."""
        return dataclasses.replace(self, digest=seal(encode(self)))


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """Says on which machines an engine of a bundle was judged.

    Attributes
    ----------
    record : EngineRecord
        The engine.
    proofs : tuple of EngineProof
        Valid proofs of the engine on machines that did not build it.
    """

    record: EngineRecord
    proofs: tuple[EngineProof, ...]

    @property
    def unproven(self) -> bool:
        """Whether nothing has judged the engine yet."""
        return self.record.for_others and not self.proofs


def engine_states(bundle: Bundle) -> tuple[EngineState, ...]:
    """Return the state of every engine in `bundle`, the newest first. A warning names a damaged proof, which proves nothing.

    Raises
    ------
    EngineError
        If the record of an engine cannot be read.
    """
    store = EngineStore(bundle=bundle)
    return tuple(EngineState(record=record, proofs=_proofs_of(store, record)) for record in store.records())


def _proofs_of(store: EngineStore, record: EngineRecord) -> tuple[EngineProof, ...]:
    files = sorted(_folder(store).glob(f"{record.identity.key}-*.json"))
    found = (_read(file) for file in files)
    return tuple(proof for proof in found if proof is not None and _proves(proof, record))


def prove(store: EngineStore, record: EngineRecord, plan: bytes, machine: Machine, judge: EngineJudge) -> EngineProof:
    """Return the proof of an engine on `machine`. If there is none, judge the engine and keep the proof.

    Parameters
    ----------
    store : EngineStore
        Engines of the bundle.
    record : EngineRecord
        An engine that was not built on `machine`.
    plan : bytes
        Plan of the engine, whose hash was verified.
    machine : Machine
        This machine.
    judge : EngineJudge
        Judge on this machine.

    Raises
    ------
    EngineError
        If TensorRT refuses the engine, or the engine computes in another precision. The engine stays unproven.
    EngineParityError
        If the outputs of the engine differ from the PyTorch model's. The engine stays unproven.
    """
    identity = record.identity
    file = _folder(store) / f"{identity.key}-{bytes_hash(canonical_json(machine).encode())[:16]}.json"
    proof = _read(file)
    if proof is not None and proof.machine == machine and _proves(proof, record):
        return proof
    mend = (
        f"The engine stays unproven and decodes nothing. Build one on this machine with: sjepa-build {store.bundle.path} "
        f"--precision {identity.precision} --flavour {machine.flavour}"
    )
    logger.info("The %s engine %s was built elsewhere; parity judges it on this machine.", identity.precision, identity.key)
    try:
        types = _types(record) or judge.types(plan)
        parity = judge.parity(plan)
    except EngineError as e:
        raise EngineError(f"The {identity.precision} engine could not be proven at its first load here: {e.problem}", mend) from e
    if not parity.passed:
        raise EngineParityError(parity, "at its first load on this machine", mend)
    if types.computes_in != identity.precision:
        raise EngineError(
            f"The {identity.precision} engine could not be proven at its first load here: it computes in {types.computes_in} "
            f"({types.evidence}).",
            mend,
        )
    proof = EngineProof(
        engine=identity.key,
        plan_sha256=record.plan_sha256,
        machine=machine,
        computes_in=types.computes_in,
        evidence=types.evidence,
        layers=types.layers,
        parity=parity,
        created=now(),
    ).sealed()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json_file(proof))
    except OSError as e:
        logger.warning("The proof of the engine cannot be kept (%s); each load judges the engine again: %s", e.strerror, file)
    return proof


def _types(record: EngineRecord) -> EngineTypes | None:
    """Return the types of an engine that was judged where it was built: the plan is the same, and a lean runtime shows no layers.

    The lean runtime of 10.16 ended the process when it was asked for the layers of an engine of 8.6.
    """
    if record.layers is None:
        return None
    return EngineTypes(layers=record.layers, computes_in=record.computes_in, evidence=record.evidence)


def _folder(store: EngineStore) -> Path:
    return store.folder / "proofs"


def _proves(proof: EngineProof, record: EngineRecord) -> bool:
    return proof.engine == record.identity.key and proof.plan_sha256 == record.plan_sha256 and proof.parity.passed


def _read(file: Path) -> EngineProof | None:
    try:
        data = load_json(file.read_bytes(), finite=False)
        proof = decode(EngineProof, data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        logger.warning("The proof %s is damaged and proves nothing: %s", file, e)
        return None
    if proof.digest != seal(data):
        logger.warning("The proof %s was changed after it was kept (its digest differs) and proves nothing.", file)
        return None
    return proof
