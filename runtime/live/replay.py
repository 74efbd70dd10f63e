"""Decodes a record again and compares the decisions and their states."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.stored import layers_of
from sjepa_deploy.runtime.live.adapt import follow
from sjepa_deploy.runtime.live.commands import BadChannels, Load, Pause, Start
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.recorded_events import RecordedMarkers
from sjepa_deploy.runtime.live.records import Record, RecordSource
from sjepa_deploy.runtime.live.sources import Chunk
from sjepa_deploy.runtime.live.states import numbers_of
from sjepa_deploy.runtime.live.trials import EventSteps
from sjepa_deploy.runtime.predictor import Predictor, load


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Says how a record compares with its own samples decoded again.

    Attributes
    ----------
    record : str
        Path of the record.
    backend, precision : str
        What decoded it again.
    n_samples, n_decisions : int
        Samples and decisions in the record, without decisions that repeat another.
    differ : tuple of int
        Windows whose predictions are not the same bits.
    missing : tuple of int
        Windows that were decided in the record and not again.
    n_cut_off : int
        Decisions at the end of a record that was killed whose samples are not in it, so that they are not compared.
    decisions : str or None
        Name of the decision layer of the record.
    n_states : int
        States of the decision layer in the record, also those of held windows.
    states_differ : tuple of int
        Windows with another state, class or probability.
    """

    record: str
    backend: str
    precision: str
    n_samples: int
    n_decisions: int
    differ: tuple[int, ...]
    missing: tuple[int, ...]
    n_cut_off: int
    decisions: str | None = None
    n_states: int = 0
    states_differ: tuple[int, ...] = ()

    @property
    def passed(self) -> bool:
        """Return whether all decisions came again with the same bits and states."""
        return not (self.differ or self.missing or self.states_differ)


def replay(predict: Predictor, record: Record) -> Replay:
    """Decode the samples of a record again, in the chunks in which they were received, and compare every decision to the bit.

    Commands that alter decisions are executed where they were.

    Parameters
    ----------
    predict : Predictor
        The bundle of the record, loaded with `check_unit=False` on the backend and in the precision of the record.
    record : Record
        See `read_record`.

    Raises
    ------
    StreamError
        If the record was made with another bundle, or its decision layer is not in the bundle.
    """
    run = record.run
    if run.bundle_digest != predict.bundle.manifest.digest:
        raise StreamError(f"{record.path} was decoded with another bundle ({run.bundle}).", "Name that bundle.")
    layer = None if run.decisions is None else _layer_of(record, predict.bundle)
    # What was late then is decoded now, and not compared; whole windows give the bits that new samples alone gave.
    config = dataclasses.replace(run.config, late="queue", roll=False)
    markers = () if run.schedule is None else (RecordedMarkers(record.events),)
    decoder = Decoder(predict, RecordSource(record), config, schedule=run.schedule, markers=markers)
    layers = [] if layer is None else [(0, layer)]
    _obey(decoder, record, layers)
    if run.adapt is not None:
        follow(decoder, record.heads)
    with decoder:
        again = {decision.index: decision for decision in decoder}
    return Replay(
        record=str(record.path),
        backend=predict.backend.name,
        precision=predict.backend.precision,
        n_samples=decoder.counters.samples,
        n_decisions=len(record.decisions),
        differ=tuple(i for i, was in record.decisions.items() if i in again and again[i].prediction.tobytes() != was.tobytes()),
        missing=tuple(i for i in record.decisions if i not in again),
        n_cut_off=record.n_cut_off,
        decisions=run.decisions,
        n_states=len(record.states),
        states_differ=_states_that_differ(layers, record, again),
    )


def _obey(decoder: Decoder, record: Record, layers: list[tuple[int, DecisionLayer]]) -> None:
    """Let `decoder` execute the commands of a record that alter decisions, after the samples after which they were executed.

    The decision layers of bundles that were swapped in are added to `layers`, with the number of their first window.
    """
    alter = (BadChannels, Load, Pause, Start)
    waiting = deque(one for one in record.commands if one.reply.accepted and isinstance(one.command, alter))

    def execute(chunk: Chunk) -> None:
        while waiting and waiting[0].sample <= decoder.counters.samples:
            one = waiting.popleft()
            if isinstance(one.command, Load):
                decoder.swap(_opened_again(decoder, record, one.reply.data, layers))
                continue
            decoder.commands.submit(one.command)
            decoder.commands.execute_next(decoder.counters.samples)

    decoder.on_chunk(execute)


def _opened_again(decoder: Decoder, record: Record, data: dict[str, Any], layers: list[tuple[int, DecisionLayer]]) -> Predictor:
    """Open a bundle that was swapped in."""
    bundle = Bundle.open(data["bundle"])
    if bundle.manifest.digest != data["digest"]:
        raise StreamError(
            f"In {record.path} another bundle decided from window {data['window']} on, which is at {bundle.path} no more.",
            "Put this bundle back.",
        )
    if data["decisions"] is not None:
        layers.append((int(data["window"]), DecisionLayer.load(bundle, data["decisions"])))
    backend = decoder.predict.backend
    return load(bundle, backend=backend.name, precision=data["precision"], check_unit=False)


def _layer_of(record: Record, bundle: Bundle) -> DecisionLayer:
    """Return the decision layer of a record."""
    name, digest = record.run.decisions, record.run.decisions_digest
    if name in layers_of(bundle):
        layer = DecisionLayer.load(bundle, name)
        if layer.description.digest == digest:
            return layer
    raise StreamError(
        f"{record.path} was decided with the decision layer {name} ({(digest or '')[:12]}), which is not in the bundle.",
        "Put the file of this layer back.",
    )


def _states_that_differ(layers: list[tuple[int, DecisionLayer]], record: Record, again: dict[int, Decision]) -> tuple[int, ...]:
    """Return the windows whose states are not those of the record. A held window repeats the last prediction, as it did then."""
    differ: list[int] = []
    last: Decision | None = None
    schedule, waiting = record.run.schedule, deque(layers)
    for was in record.states:
        while waiting and waiting[0][0] <= was.index:
            layer = waiting.popleft()[1]
            steps = None if schedule is None else EventSteps(layer, schedule)
        last = last if "held" in was.flags else again.get(was.index)
        outputs, trial = (None, None) if last is None else (last.prediction, last.trial)
        state = layer.step(outputs, was.time, was.flags) if steps is None else steps.step(outputs, was.time, was.flags, trial)
        now = numbers_of(state, layer.class_names)
        if np.array(now).tobytes() != np.array(was.numbers).tobytes():
            differ.append(was.index)
    return tuple(differ)
