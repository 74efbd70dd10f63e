"""Describes a decision layer: the bundle and classes that it belongs to, its steps, and where its thresholds come from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sjepa_deploy.errors import DecisionError
from sjepa_deploy.files import seal
from sjepa_deploy.runtime.decisions.signal import Signal
from sjepa_deploy.runtime.decisions.step import Step
from sjepa_deploy.runtime.decisions.steps import STEPS
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import ModelSpec

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Holds a figure and its 95 % interval; None where there are too few events or blocks.

    Attributes
    ----------
    value, low, high : float or None
        The figure, and the ends of its interval.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class FitSummary:
    """Says from what a layer was fitted, and what it did on events that it was not fitted on.

    Attributes
    ----------
    asked : str
        What was asked for: "accept-rate", "max-false-per-minute", "target-accuracy" or "coverage".
    wanted : float
        The value that was asked for.
    data : tuple of str
        Names of the recordings or files.
    hop : float or None
        Seconds from one window to the next. None: one window an event.
    n_events, n_windows : int
        Events and windows of the fit.
    minutes : float
        Minutes of signal that the windows come from.
    accept_rate, accuracy, false_per_minute, coverage : Figure
        Share of events with a decision, share of right ones among these, decisions a minute that are wrong or belong to no
        event, and share of targets inside the interval. From cross-fitting: no event was fitted on and counted at once.
    calibration_error : float or None
        Expected calibration error of the probabilities in 15 bins of equally many windows, from cross-fitting.
    """

    asked: str
    wanted: float
    data: tuple[str, ...]
    hop: float | None
    n_events: int
    n_windows: int
    minutes: float
    accept_rate: Figure = Figure()
    accuracy: Figure = Figure()
    false_per_minute: Figure = Figure()
    coverage: Figure = Figure()
    calibration_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """Says which bundle a layer belongs to, and where it comes from.

    Attributes
    ----------
    name : str
        Name of the layer, and of its file.
    bundle : str
        Digest of the bundle's manifest.
    output_name : str
        Name of the output that is decided on.
    n_outputs : int
        Numbers of the output.
    class_names : tuple of str or None
        Classes. One output with two classes is the logit of the second one. None for a regression.
    signal : Signal
        Which windows are no signal.
    fit : FitSummary or None
        Where the thresholds come from.
    created : str
        Time of the fit, ISO 8601, UTC.
    schema_version : int
        Version of this description.
    digest : str
        sha256 of the description without this field.
    """

    name: str
    bundle: str
    output_name: str
    n_outputs: int
    class_names: tuple[str, ...] | None
    signal: Signal = field(default_factory=Signal)
    fit: FitSummary | None = None
    created: str = ""
    schema_version: int = SCHEMA_VERSION
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerDescription(LayerFacts):
    """Describes a decision layer: its facts, and its steps.

    Attributes
    ----------
    steps : tuple of Step
        The chain. See `LayerFacts` for the other attributes.

    Raises
    ------
    DecisionError
        If classes and outputs do not fit, or a step does not fit the classes.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise DecisionError(f"{self.name!r} is no name of a decision layer.", "Use letters, digits, dots and dashes.")
        if self.output_name == "features":
            raise DecisionError("A base model outputs features, on which nothing can be decided.", "Fine-tune the model first.")
        n_classes = self.n_classes
        if n_classes == 0 and self.n_outputs != 1:
            raise DecisionError(f"A regression of {self.n_outputs} outputs has no decision layer.", "Name the classes.")
        if n_classes and (self.n_outputs < 1 or n_classes != max(2, self.n_outputs)):
            raise DecisionError(
                f"{n_classes} classes do not fit {self.n_outputs} outputs.", "Name a class for each output; two for one output."
            )
        if len({*(self.class_names or ()), ""}) <= n_classes:
            raise DecisionError("A class has an empty name, or that of another one.", "Name every class once.")
        if not self.steps:
            raise DecisionError("The layer has no steps.", "Give at least one.")
        for step in self.steps:
            step.machine(n_classes)

    @property
    def n_classes(self) -> int:
        """Return the number of classes, 0 for a regression."""
        return len(self.class_names or ())

    def sealed(self) -> LayerDescription:
        """Return a copy with the digest filled in."""
        return dataclasses.replace(self, digest=seal(self.encoded()))

    def encoded(self) -> dict[str, Any]:
        """Return the description as plain JSON types. Each step has its name in `STEPS` under the key "step"."""
        names = {kind: name for name, kind in STEPS.items()}
        data: dict[str, Any] = encode(self)
        return data | {"steps": [{"step": names[type(step)], **encode(step)} for step in self.steps]}

    @classmethod
    def decoded(cls, data: Any) -> LayerDescription:
        """Return the description from plain JSON types.

        Raises
        ------
        DecodeError
            If a key is unknown or missing, a value has the wrong type, or a step is unknown.
        DecisionError
            If a value is outside its range.
        """
        entries = data.get("steps") if isinstance(data, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DecodeError("the top level has no list of steps")
        steps = []
        for i, entry in enumerate(entries):
            kind = STEPS.get(str(entry.get("step")))
            if kind is None:
                raise DecodeError(f"steps[{i}] is {entry.get('step')!r}, which is none of {', '.join(STEPS)}")
            steps.append(decode(kind, {key: value for key, value in entry.items() if key != "step"}, f"steps[{i}]"))
        facts = decode(LayerFacts, {key: value for key, value in data.items() if key != "steps"})
        return cls(steps=tuple(steps), **vars(facts))

    def __str__(self) -> str:
        what = "a number" if self.class_names is None else ", ".join(self.class_names)
        return "\n".join([f"{self.name}: decides {what}.", str(self.signal), *map(str, self.steps)])


def classes_of(spec: ModelSpec, class_names: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """Return the classes of a model's outputs, None for a regression.

    With the names of two classes one output is the logit of the second one. Classes without names are numbered.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    class_names : sequence of str or None
        Names that stand above those of the model.

    Raises
    ------
    DecisionError
        If the model outputs features.
    """
    if spec.variant == "base":
        raise DecisionError("A base model outputs features, on which nothing can be decided.", "Fine-tune the model first.")
    names = spec.class_names if class_names is None else tuple(class_names)
    if names is None:
        return None if spec.task == "regression" else tuple(map(str, range(max(2, spec.n_outputs))))
    if len(names) == spec.n_outputs == 1:
        return f"not {names[0]}", names[0]
    return names
