"""Says whether a model can take the place of another one in a live decoder, and names what differs."""

from __future__ import annotations

import dataclasses

from sjepa_deploy.errors import StreamError, listed
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.spec import ModelSpec, SignalSpec

MOST_TOLD = 4
"""Differences that a message tells."""


def check_exchange(
    ours: ModelSpec, theirs: ModelSpec, layer: DecisionLayer | None = None, new_layer: DecisionLayer | None = None
) -> None:
    """Compare the contracts of two models and their decision layers.

    Signal, classes and the kind of the output must be equal. Weights, variant and thresholds may differ.

    Parameters
    ----------
    ours, theirs : ModelSpec
        The model that decides, and the one that shall.
    layer, new_layer : DecisionLayer or None
        Their decision layers.

    Raises
    ------
    StreamError
        If something differs.
    """
    differ = _differences(ours, theirs)
    if (layer is None) != (new_layer is None):
        differ.append("one has a decision layer, the other has none")
    elif layer is not None and new_layer is not None and layer.class_names != new_layer.class_names:
        differ.append(f"classes of the decision layer: {_said(layer.class_names)} and {_said(new_layer.class_names)}")
    if differ:
        raise StreamError(
            f"The contract of the bundle is another one: {listed(differ, MOST_TOLD)}.",
            "Name a bundle of the same signal, classes and kind of output.",
        )


def _differences(ours: ModelSpec, theirs: ModelSpec) -> list[str]:
    pairs = [
        (field.name, getattr(ours.signal, field.name), getattr(theirs.signal, field.name))
        for field in dataclasses.fields(SignalSpec)
    ]
    pairs += [
        (name, getattr(ours, name), getattr(theirs, name)) for name in ("task", "class_names", "output_unit", "output_shape")
    ]
    return [f"{name}: {_said(mine)} and {_said(other)}" for name, mine, other in pairs if mine != other]


def _said(value: object) -> str:
    """Return a value in words, cut where it is long."""
    if isinstance(value, tuple):
        return listed([str(getattr(each, "name", each)) for each in value], 6) or "none"
    return str(value)
