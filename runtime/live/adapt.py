"""Adapts the last layer of a live decoder to the person, from labels that come during the run. NumPy alone.

Adaptation is governed: labels have a budget, updates a cooldown. Every last layer is kept. Where decisions and labels agree less
than they did, an alarm ends the adaptation and puts the last layer back that was there before, with its bits.

References
----------
E. S. Page, Continuous inspection schemes, Biometrika 41, 1954.
"""

from __future__ import annotations

import base64
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import CommandError, DataError, StreamError
from sjepa_deploy.files import bytes_hash
from sjepa_deploy.last_layer import LastLayer, fit_classes
from sjepa_deploy.runtime.live.commands import Label, Reply
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.sources import Chunk

KEPT = 256
"""Newest decisions that may still be labelled: half a minute at ten a second."""

REFERENCE = 80
"""Newest labels before a suspicion, which say how often decisions and labels agreed."""

LEAST_REFERENCE = 20
"""Labels from which on that is known well enough for an alarm. Simulated with a bound of 1 % in 200 labels: 1.4 % false alarms
where 60 % agree, 0.5 % at 70 %, 0.3 % at 90 %; at 90 %, labels of swapped classes are found after 10 (median), random ones after
29 (`tests/test_adapt.py` has the simulation)."""


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Says how a live decoder adapts.

    Attributes
    ----------
    budget : int
        Labels that a run takes at most.
    cooldown : float
        Seconds of the stream from one update to the next, at least.
    trials : int
        Labels of each class before the first update.
    memory : int
        Newest labels that an update is fitted on.
    false_alarm : float
        Largest probability of a false alarm over the labels of the budget.

    Raises
    ------
    StreamError
        If a value is no such number.
    """

    budget: int = 200
    cooldown: float = 10.0
    trials: int = 5
    memory: int = 100
    false_alarm: float = 0.01

    def __post_init__(self) -> None:
        if self.budget < 1 or not self.cooldown >= 0 or self.trials < 2 or self.memory < 2 or not 0 < self.false_alarm < 1:
            raise StreamError(
                "The adaptation has no labels, or updates without an end.",
                "Use a budget of 1 or more, a cooldown of 0 or more, 2 trials or more of each class, a false alarm below 1.",
            )


@dataclass(frozen=True, kw_only=True)
class HeadChange:
    """Tells of another last layer.

    Attributes
    ----------
    why : {"update", "rollback"}
        Whether labels or an alarm brought it.
    after : int
        Number of the last decision of the layer before (`Decision.index`).
    time : float
        Stamp of that decision.
    n_labels : int
        Labels that it was fitted on. 0 is the layer of the bundle.
    digest : str
        Hash of the layer; empty for that of the bundle.
    weight, bias : str or None
        The layer: float64, little-endian, in base64, weights row by row. None is the layer of the bundle.
    seconds : float
        What the fit took.
    text : str
        One sentence.
    """

    why: Literal["update", "rollback"]
    after: int
    time: float
    n_labels: int
    digest: str
    weight: str | None
    bias: str | None
    seconds: float
    text: str

    @property
    def layer(self) -> LastLayer | None:
        """The last layer; None for that of the bundle."""
        if self.weight is None or self.bias is None:
            return None
        weight, bias = (np.frombuffer(base64.b64decode(text), "<f8") for text in (self.weight, self.bias))
        return LastLayer(weight=weight.reshape(len(bias), -1).copy(), bias=bias.copy())


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    features: NDArray[np.float32]
    label: int
    right: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    n_trials: int  # labels taken before it
    n_labels: int  # labels that it was fitted on
    layer: LastLayer | None


class Agreement:
    """Watches how often decisions and labels agree, by Page's cumulative sum, and tells when they agree as by chance.

    The sum is that of the likelihood ratios of "by chance" against "as before". It cannot fall below zero: its last zero is where
    the change began. "As before" is the share of the newest `REFERENCE` labels up to there, less its standard error.

    Parameters
    ----------
    chance : float
        Share that agrees by chance.
    bound : float
        Sum from which on there is an alarm. The mean number of labels to a false alarm is at least exp(`bound`).

    Attributes
    ----------
    began : int
        Number of the label at which the change began.
    """

    def __init__(self, chance: float, bound: float) -> None:
        self._chance, self._bound = chance, bound
        self._results: list[bool] = []
        self._first = 0
        self._sum = 0.0
        self.began = 0

    def restart(self) -> None:
        """Forget how often decisions and labels agreed so far."""
        self._first = self.began = len(self._results)
        self._sum = 0.0

    def add(self, right: bool) -> bool:
        """Take whether a label agreed with the decision, and return whether there is an alarm."""
        self._results.append(right)
        before = self._results[max(self._first, self.began - REFERENCE) : self.began]
        shown = (sum(before) + 1) / (len(before) + 2)
        shown -= math.sqrt(shown * (1 - shown) / max(1, len(before)))
        if len(before) < LEAST_REFERENCE or shown <= self._chance:
            self._sum = 0.0
        else:
            ratio = self._chance / shown if right else (1 - self._chance) / (1 - shown)
            self._sum = max(0.0, self._sum + math.log(ratio))
        if self._sum == 0:
            self.began = len(self._results)
        return self._sum > self._bound


class Adapter:
    """Learns from the labels of a live decoder. Made by `adapt`; the decoder's thread calls all methods.

    Parameters
    ----------
    decoder : Decoder
        The decoder.
    config : AdaptConfig
        Its limits.
    classes : mapping of str to str
        Class of the events that are not called like their class.

    Attributes
    ----------
    n_labels, n_refused : int
        Labels that were taken, and labels that were not.
    alarmed : bool
        Whether an alarm has ended the adaptation.
    changes : list of HeadChange
        What became of the last layer.
    """

    def __init__(self, decoder: Decoder, config: AdaptConfig, classes: Mapping[str, str]) -> None:
        spec = decoder.spec
        if spec.task != "classification":
            raise StreamError(f"A {spec.task} cannot be adapted: labels are classes.", "Use sjepa-calibrate.")
        self.config = config
        self._decoder, self._backend = decoder, decoder.predict.adaptable()
        self._n_outputs = spec.n_outputs
        self._names = spec.class_names or tuple(map(str, range(max(2, spec.n_outputs))))
        self._class_of = {name: name for name in self._names} | dict(classes)
        if strange := sorted(set(self._class_of.values()) - set(self._names)):
            raise StreamError(f"The model has no class {strange[0]!r}.", f"Its classes are {', '.join(self._names)}.")
        self._decided: OrderedDict[int, tuple[Decision, NDArray[np.float32]]] = OrderedDict()
        self._labelled: deque[int] = deque(maxlen=KEPT)
        self._waiting: list[tuple[int, str]] = []
        self._trials: list[_Trial] = []
        self._snapshots = [_Snapshot(0, 0, None)]
        self._agreement = Agreement(1 / len(self._names), math.log(config.budget / config.false_alarm))
        self._last = (-1, -math.inf)
        self._updated = -math.inf
        self._on_change: list[Callable[[HeadChange], object]] = []
        self.n_labels = self.n_refused = 0
        self.alarmed = False
        self.changes: list[HeadChange] = []
        decoder.on_decision(self._take_decision)
        decoder.on_chunk(self._take_events)
        decoder.commands.handle(Label, self._obey)

    def on_change(self, callback: Callable[[HeadChange], object]) -> None:
        """Call `callback` with every change of the last layer."""
        self._on_change.append(callback)

    def label(self, index: int, class_name: str) -> str:
        """Learn the true class of the decision `index`, and return what was done.

        Raises
        ------
        CommandError
            If the label is not taken: there was an alarm, the budget is used up, the class or the decision is not known, the
            decision has a label, or its window is no signal to learn from.
        """
        try:
            decision, features = self._known(index, class_name)
        except CommandError:
            self.n_refused += 1
            raise
        number = self._names.index(class_name)
        self.n_labels += 1
        self._labelled.append(index)
        right = _class_of(decision.prediction) == number
        self._trials.append(_Trial(features, number, right))
        if self._agreement.add(right):
            return self._roll_back()
        return self._update() or f"{self.n_labels} labels of {self.config.budget} were taken."

    def _known(self, index: int, class_name: str) -> tuple[Decision, NDArray[np.float32]]:
        if self.alarmed:
            raise CommandError("An alarm has ended the adaptation.", "Look at where the labels come from, and start again.")
        if self._decoder.predict.backend is not self._backend:
            raise CommandError("The bundle was replaced, and the adaptation was of the one before.", "Start again.")
        if self.n_labels >= self.config.budget:
            raise CommandError(f"The budget of {self.config.budget} labels is used up.", "Use a larger --adapt-budget.")
        if class_name not in self._names:
            raise CommandError(f"The model has no class {class_name!r}.", f"Its classes are {', '.join(self._names)}.")
        if index in self._labelled:
            raise CommandError(f"The decision {index} has a label already.", "Label each decision once.")
        if index not in self._decided:
            raise CommandError(
                f"There is no decision {index} among the newest {KEPT}.", "Label a decision soon, by its number `index`."
            )
        decision, features = self._decided[index]
        if unfit := [flag for flag in decision.flags if flag != "late"]:
            raise CommandError(
                f"The window of the decision {index} is not learned from ({', '.join(unfit)}).", "Label other windows."
            )
        return decision, features

    def _obey(self, command: Label, asked: float) -> Reply:
        return Reply(accepted=True, text=self.label(command.event, command.class_name))

    def _take_decision(self, decision: Decision) -> None:
        self._last = decision.index, decision.time
        if decision.held or self._decoder.predict.backend is not self._backend:
            return
        self._decided[decision.index] = decision, self._backend.features[0].copy()
        if len(self._decided) > KEPT:
            self._decided.popitem(last=False)
        if decision.event is not None and (name := self._class_of.get(decision.event.description)) is not None:
            self._waiting.append((decision.index, name))

    def _take_events(self, chunk: Chunk) -> None:
        """Learn from the events that were decided, after their decisions have gone out."""
        waiting, self._waiting = self._waiting, []
        for index, name in waiting:
            try:
                self.label(index, name)
            except CommandError as e:
                if not self.alarmed:
                    self._decoder.note("label", e.problem)

    def _update(self) -> str | None:
        """Fit the last layer to the newest labels, where it is time for that."""
        trials = self._trials[-self.config.memory :]
        labels = np.array([trial.label for trial in trials])
        counts = np.bincount(labels, minlength=len(self._names))
        if (counts < self.config.trials).any() or self._last[1] - self._updated < self.config.cooldown:
            return None
        started = time.perf_counter()
        try:
            features = np.stack([trial.features for trial in trials])
            layer = fit_classes(features, labels, len(self._names), n_outputs=self._n_outputs)
        except DataError as e:
            self._decoder.note("label", e.problem)
            return None
        seconds = time.perf_counter() - started
        if len(self._snapshots) == 1:
            self._agreement.restart()  # the layer of the bundle, which knew nobody, says nothing of those that know the person
        self._updated = self._last[1]
        told = ", ".join(f"{n} of {name}" for n, name in zip(counts, self._names, strict=True))
        snapshot = _Snapshot(len(self._trials), len(trials), layer)
        self._snapshots.append(snapshot)
        return self._put(snapshot, "update", seconds, f"The last layer was fitted to {len(trials)} labels: {told}.")

    def _roll_back(self) -> str:
        """Put the layer back that was there when decisions and labels began to agree less, and end the adaptation."""
        self.alarmed = True
        began = self._agreement.began
        snapshot = [each for each in self._snapshots if each.n_trials <= began][-1]
        suspected = self._trials[began:]
        n_right = sum(trial.right for trial in suspected)
        which = f"fitted to {snapshot.n_labels} labels" if snapshot.layer is not None else "of the bundle"
        return self._put(
            snapshot,
            "rollback",
            0.0,
            f"{n_right} of the last {len(suspected)} labels agree with the decisions, fewer than before: the last layer {which} "
            "is back, and the adaptation has ended.",
        )

    def _put(self, snapshot: _Snapshot, why: Literal["update", "rollback"], seconds: float, text: str) -> str:
        layer = snapshot.layer
        self._backend.last_layer = layer
        weight = bias = None
        if layer is not None:
            weight, bias = (np.asarray(each, "<f8").tobytes() for each in (layer.weight, layer.bias))
        change = HeadChange(
            why=why,
            after=self._last[0],
            time=self._last[1],
            n_labels=snapshot.n_labels,
            digest="" if weight is None or bias is None else bytes_hash(weight + bias),
            weight=None if weight is None else base64.b64encode(weight).decode(),
            bias=None if bias is None else base64.b64encode(bias).decode(),
            seconds=seconds,
            text=text,
        )
        self.changes.append(change)
        for tell in self._on_change:
            tell(change)
        self._decoder.note(why, text)
        return text


def _class_of(outputs: NDArray[np.float32]) -> int:
    """Return the number of the class that the outputs of one window name."""
    return int(outputs.ravel()[0] > 0) if outputs.size == 1 else int(outputs.argmax())


def adapt(decoder: Decoder, config: AdaptConfig | None = None, *, classes: Mapping[str, str] | None = None) -> Adapter:
    """Let a decoder adapt its last layer to labels: from the events that it decides, and from the command `Label`.

    Call it before the outputs are opened (`record`, `write_lines`), and before the run.

    Parameters
    ----------
    decoder : Decoder
        A decoder of a classifier, on a backend that can replace the last layer ("ort-cpu").
    config : AdaptConfig or None
        Its limits.
    classes : mapping of str to str or None
        Class of each event that is not called like its class.

    Raises
    ------
    StreamError
        If the model is no classifier, or lacks one of the classes.
    BackendError
        If the backend cannot replace the last layer.
    """
    return Adapter(decoder, config or AdaptConfig(), classes or {})


def follow(decoder: Decoder, changes: list[HeadChange]) -> None:
    """Let a decoder of a record have the last layers of the run that was recorded, from the same decisions on."""
    backend, waiting = decoder.predict.adaptable(), deque(changes)
    backend.last_layer = None

    def put(after: int) -> None:
        while waiting and waiting[0].after <= after:
            backend.last_layer = waiting.popleft().layer

    put(-1)
    decoder.on_decision(lambda decision: put(decision.index))
