"""Writes the model card of a bundle: Markdown made from the manifest, for people and for a model hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjepa_deploy.bundle import TRAINING_KEY, Bundle, Manifest
from sjepa_deploy.errors import listed
from sjepa_deploy.files import load_json
from sjepa_deploy.spec import ModelSpec

CARD_FILE = "README.md"

_NAMES = re.compile(
    r"\S+\.(?:fif|edf|bdf|gdf|set|fdt|vhdr|eeg|xdf|mff|cnt|npz|npy|tsv|gz)\b|\b(?:sub|ses)-[A-Za-z0-9]+\S*", re.IGNORECASE
)
"""What looks like the name of a recording or of a BIDS entity."""


@dataclass(frozen=True, kw_only=True)
class LatencyFact:
    """Holds how long a call with one window takes on one machine, in microseconds."""

    machine: str
    backend: str
    precision: str
    p50_us: float
    p99_us: float


@dataclass(frozen=True, kw_only=True)
class TaskFact:
    """Holds the score of a task, without the name of its recording.

    Attributes
    ----------
    metric : str
        Name of the score.
    n : int
        Number of events or windows.
    where : str
        What was scored: "live", "PyTorch", or "test part".
    value, low, high : float
        The score and its interval of 95 %.
    """

    metric: str
    n: int
    where: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class TrainingFact:
    """Holds how much data a model learned from, and its scores on data that it did not learn from.

    Attributes
    ----------
    parts : dict of str to (int, int, int)
        Windows, people and recordings of each part.
    split : str
        What no two parts share.
    scores : tuple of TaskFact
        Scores of the test part.
    """

    parts: dict[str, tuple[int, int, int]]
    split: str
    scores: tuple[TaskFact, ...]


def without_names(text: str) -> str:
    """Return a note without names of recordings, people and sessions."""
    return _NAMES.sub("a recording", text)


def read_training(checkpoint: Path) -> TrainingFact | None:
    """Return what our training wrote beside a checkpoint: numbers alone. None of a checkpoint that says nothing."""
    try:
        record: dict[str, Any] = load_json((checkpoint / "config.json").read_bytes())[TRAINING_KEY]
        data, result = record["data"], record["result"]
        parts = {
            name: (int(part["n_windows"]), int(part["n_subjects"]), int(part["n_recordings"]))
            for name, part in data["parts"].items()
            if name in ("train", "val", "test")
        }
        scores = tuple(
            TaskFact(
                metric=str(metric),
                n=int(result["n_test"]),
                where="test part",
                value=float(score["value"]),
                low=float(score["low"]),
                high=float(score["high"]),
            )
            for metric, score in result["test"].items()
        )
        return TrainingFact(parts=parts, split=str(data["split"]), scores=scores)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def model_card(
    bundle: Bundle,
    *,
    training: TrainingFact | None = None,
    tasks: Sequence[TaskFact] = (),
    latency: Sequence[LatencyFact] = (),
    license_name: str | None = None,
) -> str:
    """Return the card of a bundle as Markdown, with the head that model hubs read.

    The card names no people, no recordings and no splits.

    Parameters
    ----------
    bundle : Bundle
        The bundle.
    training : TrainingFact or None
        What is known of the training.
    tasks : sequence of TaskFact
        Scores that were measured with the bundle.
    latency : sequence of LatencyFact
        Times of a call.
    license_name : str or None
        License of the weights, as a model hub calls it.
    """
    manifest, spec = bundle.manifest, bundle.spec
    parts = [
        _head(spec, license_name),
        f"# {spec.variant} decoder of EEG\n\nA [sjepa-deploy](https://github.com/sjepa-deploy/sjepa-deploy) bundle: ONNX graphs, "
        "their contract, and the outputs that they must give.",
    ]
    if manifest.weights.random:
        parts.append("**The weights are random. The predictions mean nothing.**")
    parts += [
        _contract(spec),
        _parity(manifest),
        _scores(training, tasks),
        _latency(latency),
        _training(manifest, training),
        _limits(spec, tasks),
        _use(spec),
    ]
    return "\n\n".join(parts) + "\n"


def _head(spec: ModelSpec, license_name: str | None) -> str:
    tags = ["eeg", "bci", "onnx", "signaljepa", spec.variant]
    lines = ["---", "library_name: sjepa-deploy", *([f"license: {license_name}"] if license_name else []), "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _contract(spec: ModelSpec) -> str:
    signal = spec.signal
    rows = [
        ["window", f"{spec.n_chans} channels x {spec.n_times} samples at {spec.sfreq:g} Hz ({signal.seconds:g} s)"],
        ["channels", listed(spec.ch_names, 200) if spec.ch_names else "in the order of training, without names"],
        ["unit of the EEG that enters", signal.unit],
        ["steps", ", ".join(step.name for step in signal.steps) or "none"],
        ["phase of the steps", signal.phase],
        ["outputs", spec.outputs_told],
    ]
    if (window := signal.event_window) is not None:
        rows.append(["windows begin", f"{window.start:g} s after events {listed(window.events, 20)}".rstrip()])
    return "## Contract\n\n" + _table(["", ""], rows)


def _parity(manifest: Manifest) -> str:
    rows = [
        [each.precision, each.backend, f"{each.max_error:.1e}", f"{each.tolerance:.0e}", "passed" if each.passed else "FAILED"]
        for each in manifest.parity
    ]
    heading = (
        "## Parity\n\nEach graph is compared with the PyTorch model in float64. Errors are shares of the outputs' scale.\n\n"
    )
    return heading + _table(["graph", "backend", "largest error", "allowed", ""], rows)


def _scores(training: TrainingFact | None, tasks: Sequence[TaskFact]) -> str:
    facts = [*(training.scores if training else ()), *tasks]
    if not facts:
        return "## Score\n\nNo score of a task was measured."
    rows = [
        [each.metric.replace("_", " "), each.where, f"{each.value:.3f}", f"{each.low:.3f} to {each.high:.3f}", str(each.n)]
        for each in facts
    ]
    return "## Score\n\n" + _table(["score", "of", "value", "95 % interval", "n"], rows)


def _latency(facts: Sequence[LatencyFact]) -> str:
    if not facts:
        return "## Latency\n\nNo latency was measured. `sjepa-bench BUNDLE --recommend` measures it."
    rows = [[each.machine, each.backend, each.precision, f"{each.p50_us:.0f}", f"{each.p99_us:.0f}"] for each in facts]
    return "## Latency\n\nOne window a call.\n\n" + _table(["machine", "backend", "precision", "p50 in us", "p99 in us"], rows)


def _training(manifest: Manifest, training: TrainingFact | None) -> str:
    told = ["## Training data"]
    if training is None:
        told.append("The checkpoint says nothing about its training data.")
    else:
        rows = [[name, *map(str, counts)] for name, counts in training.parts.items()]
        told.append(_table(["part", "windows", "people", "recordings"], rows))
        told.append(f"No two parts share a {training.split}.")
    notes = [f"- {without_names(note)}" for note in manifest.weights.notes]
    return "\n\n".join([*told, *(["\n".join(notes)] if notes else [])])


def _limits(spec: ModelSpec, tasks: Sequence[TaskFact]) -> str:
    limits = ["The model decodes EEG of its contract alone: its channels, its unit, its rate, its steps."]
    if spec.signal.phase == "zero-phase":
        limits.append("The model learned from zero-phase windows. Live filters are causal: live scores may be lower.")
    if not any(each.where == "live" for each in tasks):
        limits.append("The live decoder was not judged on a recording with events (`sjepa-stream --check`).")
    limits += [
        "Scores of other people, amplifiers and tasks are not known.",
        "This is no medical device. Do not diagnose or treat with it.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _use(spec: ModelSpec) -> str:
    shape = ", ".join(map(str, (1, *spec.input_shape)))
    return f"""## Use

```python
import sjepa_deploy

with sjepa_deploy.load("FOLDER") as predict:
    outputs = predict(eeg)  # float32, shape ({shape}), in {spec.unit}
```

`sjepa-verify FOLDER` proves on your machine that the outputs are those of the PyTorch model."""
