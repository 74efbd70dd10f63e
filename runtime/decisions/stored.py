"""Stores decision layers beside the manifest of their bundle: ``decisions/NAME.json``, canonical JSON with a digest."""

from __future__ import annotations

from pathlib import Path

from sjepa_deploy.bundle import DECISION_FOLDER, Bundle
from sjepa_deploy.errors import DecisionError
from sjepa_deploy.files import canonical_json, load_json, seal, write_atomically
from sjepa_deploy.runtime.decisions.description import SCHEMA_VERSION, LayerDescription, classes_of
from sjepa_deploy.serialize import DecodeError

AGAIN = "Fit the layer again with sjepa-decide."


def layers_of(bundle: Bundle) -> list[str]:
    """Return the names of the decision layers of a bundle."""
    return sorted(file.stem for file in (bundle.path / DECISION_FOLDER).glob("*.json") if not file.name.startswith("."))


def read_layer(bundle: Bundle, name: str) -> LayerDescription:
    """Read a decision layer of a bundle and compare the layer with the bundle.

    Raises
    ------
    DecisionError
        If the file is missing, damaged, altered, of a newer release, or of another bundle or other classes.
    """
    file = bundle.path / DECISION_FOLDER / f"{name}.json"
    try:
        data = load_json(file.read_bytes())
    except OSError as e:
        raise DecisionError(
            f"The decision layer {file} cannot be read ({e.strerror or e}).", "Check the path and its rights."
        ) from e
    except (ValueError, RecursionError) as e:
        raise DecisionError(f"The decision layer {file} is damaged: it is no JSON ({e}).", AGAIN) from e
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DecisionError(
            f"The decision layer {file} has schema version {version}; this release reads up to {SCHEMA_VERSION}.",
            "Upgrade sjepa-deploy.",
        )
    if isinstance(data, dict) and data.get("digest") != seal(data):
        raise DecisionError(f"The decision layer {file} was changed after it was written (its digest differs).", AGAIN)
    try:
        layer = LayerDescription.decoded(data)
    except (DecodeError, DecisionError) as e:
        why = e.problem if isinstance(e, DecisionError) else str(e)
        raise DecisionError(f"The decision layer {file} is damaged: {why.rstrip('.')}.", AGAIN) from e
    if layer.name != name:
        raise DecisionError(f"The decision layer {file} is called {layer.name}.", "Give the file its own name.")
    check_bundle(layer, bundle)
    return layer


def check_bundle(layer: LayerDescription, bundle: Bundle) -> None:
    """Compare a decision layer with a bundle.

    Raises
    ------
    DecisionError
        If outputs, classes or the bundle are others.
    """
    spec = bundle.spec
    if (layer.output_name, layer.n_outputs) != (spec.output_name, spec.n_outputs):
        raise DecisionError(
            f"The decision layer {layer.name} is of {layer.n_outputs} outputs, the model has {spec.n_outputs}.", AGAIN
        )
    if spec.class_names is not None and layer.class_names != classes_of(spec):
        theirs = "none" if layer.class_names is None else ", ".join(layer.class_names)
        raise DecisionError(
            f"The decision layer {layer.name} has the classes {theirs}, the model {', '.join(spec.class_names)}.", AGAIN
        )
    if layer.bundle != bundle.manifest.digest:
        raise DecisionError(
            f"The decision layer {layer.name} was fitted on another bundle ({layer.bundle[:12]}, not "
            f"{bundle.manifest.digest[:12]}): other weights have other thresholds.",
            AGAIN,
        )


def write_layer(bundle: Bundle, layer: LayerDescription) -> Path:
    """Write a decision layer into its bundle and return the file. The files that the manifest lists never change.

    Raises
    ------
    DecisionError
        If the layer does not belong to the bundle, or the file cannot be written.
    """
    check_bundle(layer, bundle)
    file = bundle.path / DECISION_FOLDER / f"{layer.name}.json"
    try:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, (canonical_json(layer.sealed().encoded()) + "\n").encode())
    except OSError as e:
        raise DecisionError(f"{file} cannot be written ({e.strerror or e}).", "Check the rights of the bundle's folder.") from e
    return file
