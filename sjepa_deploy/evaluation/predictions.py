"""Holds what models predicted about windows with known labels, and writes it as a table: one row a window."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DataError

Way = Literal["offline", "live"]

UNDECIDED = -1
"""Decision about a window for which a decision layer decides nothing."""

PREDICTIONS_FILE = "predictions.tsv"
NOTHING = "n/a"

COLUMNS = (
    "model",
    "way",
    "subject",
    "session",
    "recording",
    "onset",
    "fold",
    "seed",
    "label",
    "score",
    "probability",
    "decision",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Holds the predictions of one model.

    Attributes
    ----------
    model : str
        Name of the model.
    way : {"offline", "live"}
        Whether windows were cut out of whole recordings, or came out of the live decoder.
    window : ndarray of int, shape (n,)
        Number of the window in the data; rows of several seeds share it.
    class_names : tuple of str or None
        Classes; None of a regression.
    subject, session, recording : ndarray of str, shape (n,)
        Origin of each window.
    onset : ndarray of float64, shape (n,)
        Start of each window in its recording in seconds.
    fold, seed : ndarray of int, shape (n,)
        Fold that a window is the test part of, and seed of the training.
    truth : ndarray, shape (n,)
        Numbers of the true classes, or true numbers.
    score : ndarray of float64, shape (n,)
        Of two classes, the output of the second one less that of the first; of more, the output of the most probable class; of a
        regression, the prediction.
    probabilities : ndarray of float64, shape (n, n_classes), or None
        Probability of each class.
    decision : ndarray of int, shape (n,)
        Number of the class that is decided, or `UNDECIDED`; of a regression zeros.
    """

    model: str
    way: Way
    class_names: tuple[str, ...] | None
    window: NDArray[np.intp]
    subject: NDArray[np.str_]
    session: NDArray[np.str_]
    recording: NDArray[np.str_]
    onset: NDArray[np.float64]
    fold: NDArray[np.intp]
    seed: NDArray[np.intp]
    truth: NDArray[Any]
    score: NDArray[np.float64]
    probabilities: NDArray[np.float64] | None
    decision: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def arrays(self) -> dict[str, Any]:
        """Return the arrays with a value for each row, by their names."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), np.ndarray)}

    @property
    def key(self) -> tuple[str, Way]:
        """Return model and way."""
        return self.model, self.way

    def picked(self, rows: NDArray[Any]) -> Predictions:
        """Return some of the rows."""
        arrays: dict[str, Any] = {
            field.name: value[rows] for field in fields(self) if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        return replace(self, **arrays)


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Return the rows of several parts of one model."""
    first = parts[0]
    assert all(part.key == first.key and part.class_names == first.class_names for part in parts)
    arrays: dict[str, Any] = {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays}
    return replace(first, **arrays)


def of_outputs(outputs: NDArray[Any], class_names: tuple[str, ...] | None) -> dict[str, Any]:
    """Return score, probabilities and decision of the outputs of a model, shape (n, n_outputs).

    Of a classifier the outputs are logits; of a single one, the logit of the second of two classes.
    """
    outputs = outputs.reshape(len(outputs), -1).astype(np.float64)
    if class_names is None:
        return {"score": outputs[:, 0], "probabilities": None, "decision": np.zeros(len(outputs), np.intp)}
    if outputs.shape[1] == 1:
        outputs = np.column_stack([np.zeros(len(outputs)), outputs[:, 0]])
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    score = outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs.max(axis=1)
    return {"score": score, "probabilities": probabilities, "decision": outputs.argmax(axis=1)}


def numbered_as(other: Predictions, mine: Predictions) -> Predictions | None:
    """Return `other` with the numbers that its windows have in `mine`, or None if the windows or their labels are not the same.

    Windows are the same if recording and onset are.
    """
    places = list(zip(mine.recording.tolist(), mine.onset.tolist(), strict=True))
    numbers, truth = dict(zip(places, mine.window.tolist(), strict=True)), dict(zip(places, mine.truth.tolist(), strict=True))
    theirs = list(zip(other.recording.tolist(), other.onset.tolist(), strict=True))
    if numbers.keys() != set(theirs) or [truth[place] for place in theirs] != other.truth.tolist():
        return None
    return replace(other, window=np.array([numbers[place] for place in theirs], np.intp))


def table_of(every: Sequence[Predictions]) -> bytes:
    """Return predictions as a tab-separated table. Numbers have all their digits: scores from the table are those reported."""
    names = every[0].class_names
    more = names if names is not None and len(names) > 2 else ()
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow([*COLUMNS, *(f"probability_{name}" for name in more)])
    for part in every:
        for i in range(len(part)):
            table.writerow([*_row(part, i), *([] if not more else map(_number, _probabilities(part, i)))])
    return text.getvalue().encode(errors="backslashreplace")


def _row(part: Predictions, i: int) -> list[str]:
    place = [part.model, part.way, *(str(each[i]) for each in (part.subject, part.session, part.recording))]
    place += [_number(part.onset[i]), str(part.fold[i]), str(part.seed[i])]
    if part.class_names is None:
        return [*place, _number(part.truth[i]), _number(part.score[i]), NOTHING, NOTHING]
    values, decision = _probabilities(part, i), int(part.decision[i])
    probability = values[1] if len(values) == 2 else values.max()
    decided = NOTHING if decision == UNDECIDED else part.class_names[decision]
    return [*place, part.class_names[part.truth[i]], _number(part.score[i]), _number(probability), decided]


def _probabilities(part: Predictions, i: int) -> NDArray[np.float64]:
    assert part.probabilities is not None
    row: NDArray[np.float64] = part.probabilities[i]
    return row


def _number(value: float) -> str:
    return NOTHING if np.isnan(value) else repr(float(value))


def read_table(path: Path, class_names: tuple[str, ...] | None) -> tuple[Predictions, ...]:
    """Return the predictions of a table that `table_of` wrote.

    Raises
    ------
    DataError
        If the table is missing or damaged.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        keys = list(dict.fromkeys((row["model"], row["way"]) for row in rows))
        return tuple(_read([row for row in rows if (row["model"], row["way"]) == key], class_names) for key in keys)
    except (OSError, KeyError, ValueError, TypeError, IndexError) as e:
        raise DataError(f"{path} is missing or damaged ({e}).", "Run the evaluation again.") from e


def _read(rows: list[dict[str, str]], class_names: tuple[str, ...] | None) -> Predictions:
    def numbers(name: str) -> NDArray[np.float64]:
        return np.array([np.nan if row[name] == NOTHING else float(row[name]) for row in rows])

    n = len(rows)
    if rows[0]["way"] not in get_args(Way):
        raise ValueError(f"the way {rows[0]['way']!r} is unknown")
    known: dict[str, Any] = {name: np.array([row[name] for row in rows]) for name in ("subject", "session", "recording")}
    known |= {name: numbers(name).astype(np.intp) for name in ("fold", "seed")} | {"window": np.full(n, -1)}
    if class_names is None:
        known |= {"truth": numbers("label"), "probabilities": None, "decision": np.zeros(n, np.intp)}
    else:
        known["truth"] = np.array([class_names.index(row["label"]) for row in rows])
        known["decision"] = np.array(
            [UNDECIDED if row["decision"] == NOTHING else class_names.index(row["decision"]) for row in rows]
        )
        if len(class_names) == 2:
            second = numbers("probability")
            known["probabilities"] = np.column_stack([1 - second, second])
        else:
            known["probabilities"] = np.column_stack([numbers(f"probability_{name}") for name in class_names])
    return Predictions(
        model=rows[0]["model"],
        way=cast(Way, rows[0]["way"]),
        class_names=class_names,
        onset=numbers("onset"),
        score=numbers("score"),
        **known,
    )
