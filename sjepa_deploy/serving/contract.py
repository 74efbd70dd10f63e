"""Defines the description that a served model gives of itself: a client checks the montage before it sends a window."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sjepa_deploy.bundle import Manifest
from sjepa_deploy.errors import ServingError, listed
from sjepa_deploy.files import bytes_hash, canonical_json, load_json, seal
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import ModelSpec, Precision, Unit

CONTRACT_KEY = "sjepa_deploy"
"""Parameter of a model's config.pbtxt that holds a `Contract` as JSON."""

CONTRACT_PARAMETER = "sjepa_contract"
"""Parameter of a request: `contract_id` of the model that the client means. The server refuses it for another model."""

BUNDLE_PARAMETER = "sjepa_bundle"
"""Parameter of a request: digest of the only bundle that may answer it."""

CHECKED_PARAMETER = "sjepa_checked"
"""Parameter of a request whose windows the client has checked, or sends as they are on purpose."""

STEPS_PARAMETER = "sjepa_steps"
"""Parameter of a request: how many steps of the signal its windows went through. Without it these are `Contract.client_steps`."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A Contract is what a model in a Triton repository says of itself.

    Attributes
    ----------
    unit : {"nV", "uV", "mV", "V"}
        Unit of the windows that it takes.
    precision : {"fp32", "fp16", "bf16"}
        Graph that it runs.
    backend : str
        What runs the graph: a backend of ours, or Triton's onnxruntime or tensorrt.
    n_threads : int
        CPU threads of one instance.
    deadline : float
        Seconds that batching was planned for.
    client_steps, model_steps : tuple of str
        Names of the signal's steps that a client does, and of those after them that the model does.
    manifests : dict of str to Manifest
        Manifest of the bundle behind each version.
    """

    unit: Unit
    precision: Precision
    backend: str
    n_threads: int
    deadline: float
    client_steps: tuple[str, ...]
    model_steps: tuple[str, ...]
    manifests: dict[str, Manifest]

    def dumps(self) -> str:
        """Return the contract as JSON."""
        return json.dumps(encode(self), separators=(",", ":"), allow_nan=False)

    @classmethod
    def loads(cls, text: str, model: str) -> Contract:
        """Read what `dumps` wrote into the configuration of `model`.

        Raises
        ------
        ServingError
            If it is missing, of another release, or a manifest was changed; if it divides other steps than those of a manifest.
        """
        mend = "Make its repository with sjepa-export --triton of this release."
        if not text:
            raise ServingError(f"The model {model} does not say what it expects.", mend)
        try:
            data = load_json(text, finite=False)
            contract = decode(cls, data)
        except ValueError as e:
            what = str(e) if isinstance(e, DecodeError) else "no contract"
            raise ServingError(f"What the model {model} says of itself cannot be read ({what}).", mend) from e
        if changed := [version for version, manifest in data["manifests"].items() if manifest["digest"] != seal(manifest)]:
            raise ServingError(f"The manifest of version {changed[0]} of {model} was changed after it was written.", mend)
        for version, manifest in contract.manifests.items():
            steps = step_names(manifest.spec)
            if steps != (*contract.client_steps, *contract.model_steps):
                raise ServingError(
                    f"The model {model} divides the steps {listed(contract.client_steps)} and "
                    f"{listed(contract.model_steps) or 'none'}, but version {version} has {listed(steps)}.",
                    mend,
                )
        return contract


def step_names(spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of the steps of a model's signal, in order."""
    return tuple(step.name for step in spec.signal.steps)


def contract_id(spec: ModelSpec, unit: Unit) -> str:
    """Return the identity of the meaning of a window and of its output: a hash of the spec and of the unit that is sent."""
    return bytes_hash(canonical_json([spec, unit]).encode())[:32]
